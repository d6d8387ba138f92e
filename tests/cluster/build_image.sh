#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# What image.sh does in namespaces of its own: build_image.sh FOLDER
set -euo pipefail
work=$1
cd "$(dirname "$0")/../.."
export TMPDIR=$work STORAGE_DRIVER=vfs BUILDAH_ISOLATION=chroot BUILDAH_FORMAT=docker
buildah() { command buildah --root "$work/storage" --runroot "$work/run" "$@"; }

echo "== a base: Debian"
base=$(buildah from scratch)
debootstrap --variant=minbase bookworm "$(buildah mount "$base")" >"$work/log" ||
	{ tail -n 20 "$work/log"; exit 1; }
buildah umount "$base" >/dev/null
buildah commit --quiet --rm "$base" localhost/debian >/dev/null

echo "== the image"
mounts=()
while read -r mount; do mounts+=(--volume "$mount:ro"); done < <(python3 tests/cluster/pip_mounts.py "$work")
buildah bud --quiet "${mounts[@]}" --build-arg BASE=localhost/debian --build-arg PIP_FLAGS="${PIP_FLAGS:-}" \
	-f docker/Dockerfile -t localhost/adapprox_ds:cpu .
buildah images

echo "== in it, without another network than its own"
image=$(buildah from localhost/adapprox_ds:cpu)
health=$(buildah inspect --format '{{range .Docker.Config.Healthcheck.Test}}{{.}} {{end}}' "$image")
network='ip link set lo up && ip link add eth0 type veth peer name eth1 && ip link set eth1 up &&
	ip address add 10.77.0.1/24 dev eth0 && ip link set eth0 up'
# in_image COMMAND: by a shell of the image, as its user, who must not be root.
in_image() {
	echo "== $1"
	unshare --net bash -c "$network"' && exec "$@"' - \
		buildah --root "$work/storage" --runroot "$work/run" run "$image" -- bash -euc "test \$UID = 2000; $1"
}
in_image "${health#CMD }"
in_image "python -m pytest -q -p no:cacheprovider tests/core/test_layout.py tests/adapprox/test_native.py tests/adapprox/test_rank_srsi.py"
job="examples/pretrain/train.py --deepspeed_config ds_configs/ds_adapprox.json --log-interval 1"
in_image "deepspeed --num_accelerators 2 $job --steps 2 --save-dir runs/saves"
in_image "mpirun -np 2 --oversubscribe python $job --steps 4 --load runs/saves"
# As docker-compose.yaml starts its nodes, and a user a job.
in_image "docker/make_keys.sh
	/usr/sbin/sshd -D -e -f docker/sshd_config &
	trap 'kill \$!' EXIT
	timeout 60 bash -c 'until ssh localhost true; do sleep 1; done'
	echo 'localhost slots=2' >hostfile
	export DS_ENV_FILE=/workspace/docker/deepspeed_env
	deepspeed --hostfile hostfile --force_multi $job --steps 2"
echo "== passed"
