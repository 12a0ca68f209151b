#!/bin/bash
# A fit on several machines under SLURM, one process per GPU; see docs/scaling.md.
#
#     sbatch scripts/slurm.sh --observations /shared/obs.h5 --out /shared/runs/mine --iters 10
#
# Observations and --out have to be on a file system that all machines see. Submitting the same line again continues the run.
#SBATCH --job-name=emdiff
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@60
set -euo pipefail
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
export WANDB_MODE=${WANDB_MODE:-offline}
exec srun --kill-on-bad-exit=1 bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_JOB_NUM_NODES))
    exec emdiff fit "$@"' emdiff "$@"
