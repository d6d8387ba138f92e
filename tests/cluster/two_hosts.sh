#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The pretraining example on two hosts that are one machine: each has a network, processes, a host
# name and an sshd of its own. By pdsh, then from its checkpoint by OpenMPI, then, converted, on one
# host alone. The namespaces have no names, so they end with their last process.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd) && root=${here%/tests/cluster}
source "$here/need.sh"
need "make network namespaces" ip=iproute2 sshd=openssh-server pdsh=pdsh mpirun=openmpi-bin
deepspeed=$(command -v deepspeed) || { echo "$0: no deepspeed on PATH" >&2; exit 2; }
python=$(dirname "$deepspeed")/python
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
"$python" -c "import mpi4py" || { echo "$0: no mpi4py: pip install '.[mpi]'" >&2; exit 2; }

work=$(mktemp -d)
cleanup() {
	local job children
	# Not by SIGTERM: DeepSpeed's launcher answers it with a pkill on all hosts. A host dies with
	# its first process, the only child of the job that unshared it.
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

mkdir -p /run/sshd "$work/text"
tar -xf "$root/examples/pretrain/data/sotu_1790_1830.tar.xz" -C "$work/text"
for key in host user; do ssh-keygen -q -t ed25519 -N '' -f "$work/$key"; done
printf '127.0.0.1 localhost\n10.77.0.1 node-a\n10.77.0.2 node-b\n' >"$work/hosts"
printf 'node-a slots=1\nnode-b slots=1\n' >"$work/hostfile"
cat >"$work/ssh_config" <<END
Host *
    User root
    IdentityFile $work/user
    StrictHostKeyChecking no
    UserKnownHostsFile /dev/null
    LogLevel ERROR
END
cat >"$work/sshd_config" <<END
HostKey $work/host
AuthorizedKeysFile $work/user.pub
PasswordAuthentication no
StrictModes no
PidFile none
END
# What DeepSpeed's launchers shall set on every host. Without the interface, gloo may take loopback.
cat >"$work/.deepspeed_env" <<END
DS_ACCELERATOR=cpu
OMP_NUM_THREADS=1
GLOO_SOCKET_IFNAME=eth0
TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$HOME/.cache/torch_extensions}
END

# host NAME ADDRESS: boots one; its process is $!
host() {
	setpriv --pdeathsig KILL unshare --net --uts --mount --pid --fork --kill-child --mount-proc \
		bash "$here/node.sh" "$1" "$2" "$work" 2>"$work/$1.log" &
	until [[ $(readlink "/proc/$!/ns/net") != "$(readlink /proc/self/ns/net)" ]]; do sleep 0.1; done
}
host node-a 10.77.0.1 && node_a=$!
host node-b 10.77.0.2 && node_b=$!
ip link add eth0 netns "$node_a" type veth peer name eth0 netns "$node_b"

# on HOST COMMAND: logs in and runs it. In the background, where a signal does not wait for its end.
on() {
	setpriv --pdeathsig KILL nsenter --target "$node_a" --net --mount \
		ssh -o ConnectTimeout=5 "$1" "cd $work && PYTHONPATH=$PYTHONPATH $2" &
	wait $!
}
for name in node-a node-b; do
	for try in {1..20}; do on "$name" true 2>/dev/null && break || sleep 0.2; done
	[[ $(on "$name" hostname) == "$name" ]] || { cat "$work/$name.log"; exit 1; }
done

config=$root/ds_configs/ds_adapprox.json
job="$root/examples/pretrain/train.py --deepspeed_config $config --corpus text --log-interval 1"
launch="DS_ACCELERATOR=cpu $deepspeed --hostfile hostfile"

# trained NAME RANKS FIRST LAST: the run had these ranks and steps, and finite losses.
trained() {
	"$python" - "$work/runs/$1" "${@:2}" <<-'END'
		import csv, json, math, pathlib, sys

		folder, (ranks, first, last) = pathlib.Path(sys.argv[1]), map(int, sys.argv[2:])
		rows = list(csv.DictReader((folder / "metrics.csv").open()))
		assert [int(row["step"]) for row in rows] == list(range(first, last + 1)), rows
		assert all(0 < float(row["train_loss"]) < math.inf for row in rows), rows
		assert json.loads((folder / "summary.json").read_text())["world_size"] == ranks
	END
	echo "== $1: trained steps $3 to $4 on $2 rank(s)"
}

echo "== two hosts by pdsh"
on node-a "$launch --launcher pdsh $job --name pdsh --steps 3 --save-dir saves"
trained pdsh 2 1 3

echo "== two hosts by OpenMPI, from the checkpoint"
on node-a "$launch --launcher openmpi --launcher_args=--allow-run-as-root $job --name openmpi \
	--steps 5 --load saves --save-dir saves"
trained openmpi 2 4 5

echo "== one host, from the checkpoint converted"
on node-b "$python -m adapprox_ds convert saves/global_step5 saves/global_step5_universal"
on node-b "env $(xargs <"$work/.deepspeed_env") $deepspeed --num_accelerators 1 $job --name alone \
	--steps 6 --load-universal saves"
trained alone 1 6 6
echo "== passed"
