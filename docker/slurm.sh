#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Two nodes of four GPUs: sbatch docker/slurm.sh, from the repository's root on a shared file system.
#SBATCH --job-name=adapprox
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=16
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@120
set -euo pipefail

# One torchrun a node, which starts a process a GPU; they meet at the first node.
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
exec srun --kill-on-bad-exit=1 torchrun \
	--nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$SLURM_GPUS_PER_NODE" \
	--rdzv-backend c10d --rdzv-endpoint "${hosts[0]}:29500" --rdzv-id "$SLURM_JOB_ID" \
	examples/pretrain/train.py --deepspeed_config ds_configs/ds_adapprox.json \
	--save-dir runs/checkpoints --save-on-sigterm
