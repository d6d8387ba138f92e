# SPDX-License-Identifier: Apache-2.0
"""What happens to a parameter, or to a ZeRO shard, in one optimizer step."""
