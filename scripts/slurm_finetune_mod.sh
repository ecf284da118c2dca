#!/usr/bin/env bash
# Router-tuning under SLURM: one task per node, which starts a process per GPU; continues by itself after a time limit.
#
#   sbatch --nodes 2 scripts/slurm_finetune_mod.sh
#   FOLDER_NAME=mistral-7b-mod MOD_N=16 sbatch --export ALL --nodes 2 scripts/slurm_finetune_mod.sh --logging_steps 10
#
# Every variable and argument is that of scripts/finetune_mod.sh. The repository and its trained_models folder must lie
# on a file system that all nodes see. Two minutes before the time limit every process is told to save and to end.
#SBATCH --job-name=router-tuning
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

ROOT="${ROOT:-${SLURM_SUBMIT_DIR:?submit this script with sbatch from the repository}}"
MAIN_PROCESS_IP="$(scontrol show hostnames "${SLURM_JOB_NODELIST:?}" | head -n 1)"
gpus="${SLURM_GPUS_ON_NODE:?ask for GPUs: --gpus-per-node}"
export ROOT MAIN_PROCESS_IP
export NUM_MACHINES="${SLURM_JOB_NUM_NODES:?}"
export NUM_PROCESSES="$(( gpus * NUM_MACHINES ))"
# Jobs that share a node must not share a port.
export PORT="${PORT:-$(( 20000 + SLURM_JOB_ID % 20000 ))}"
export RESUME="${RESUME:-auto}"

code=0
# shellcheck disable=SC2016  # the variables are those of each task
srun --kill-on-bad-exit=1 bash -c 'MACHINE_RANK="${SLURM_NODEID}" bash "${ROOT}/scripts/finetune_mod.sh" "$@"' _ "$@" || code=$?

# 143 (SIGTERM) says that all is saved and work is left: back into the queue, where RESUME=auto goes on.
if (( code == 143 )); then
  scontrol requeue "${SLURM_JOB_ID}"
fi
exit "${code}"
