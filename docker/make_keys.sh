#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Keys of a cluster, made once, in the volume that its nodes share: of the hosts and of the user.
set -euo pipefail
cd /cluster
[[ -e known_hosts ]] && exit
for key in host user; do
	ssh-keygen -q -t ed25519 -N '' -C "$key of the cluster" -f "$key" <<<y
done
echo "* $(cat host.pub)" >known_hosts
