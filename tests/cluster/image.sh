#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds the CPU image without a Docker engine and trains in it, on a Debian machine, as root.
# Needs about 8 GB in TMPDIR while it runs. pip takes packages as it does outside.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
source "$here/need.sh"
need "make an image's file system" buildah=buildah debootstrap=debootstrap ip=iproute2

work=$(mktemp -d)
cleanup() {
	local job children
	# All runs in namespaces that die with their first process, the only child of the job.
	for job in $(jobs -p); do
		read -ra children <"/proc/$job/task/$job/children" || true
		kill -KILL "${children[@]:-$job}"
	done 2>/dev/null
	wait 2>/dev/null
	rm -rf "$work"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# In the background, where a signal does not wait for the end.
setpriv --pdeathsig KILL unshare --mount --pid --fork --kill-child --mount-proc \
	bash "$here/build_image.sh" "$work" &
wait $!
