#!/usr/bin/env bash
# Tune routers on whatever this machine has: CPU, one GPU, several GPUs, several machines.
#
#   bash scripts/finetune_mod.sh
#   NUM_PROCESSES=4 PORT=29501 bash scripts/finetune_mod.sh
#   FOLDER_NAME=mistral-7b-mod MOD_N=16 TARGET_CAPACITY=0.5 bash scripts/finetune_mod.sh --dry_run
#   RUN=configs/runs/budget.yaml MAX_TRAIN_SAMPLES=2000 bash scripts/finetune_mod.sh    # a file of settings
#   RESUME=auto bash scripts/finetune_mod.sh                # go on where an interrupted run stopped
#
# Every knob is an environment variable; further arguments go to entrypoints/finetune/finetune_mod.py as they are.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

# ---- what to tune: FOLDER_NAME, MOD_N, GRANULARITY, RECIPE, … as `finetune_mod.py --help` and docs/tuning.md list them,
# read by the entrypoint; what is not set keeps the default of the recipe.
RUN="${RUN:-}"                                  # YAML of settings (configs/runs); variables and arguments count more
[[ -e "${RUN}" || ! -f "${ROOT}/${RUN}" ]] || RUN="${ROOT}/${RUN}"
in_run() { sed -n "s/^$1: *\([^ #]*\).*/\1/p" "${RUN:-/dev/null}"; }
# ---- where
PORT="${PORT:-29501}"
NUM_MACHINES="${NUM_MACHINES:-1}"
MACHINE_RANK="${MACHINE_RANK:-0}"
MAIN_PROCESS_IP="${MAIN_PROCESS_IP:-127.0.0.1}"
CONFIG_FILE="${CONFIG_FILE:-}"                        # accelerate config; empty: chosen below

count_gpus() {
  if [[ -n "${CUDA_VISIBLE_DEVICES+set}" ]]; then
    tr ',' '\n' <<<"${CUDA_VISIBLE_DEVICES}" | grep -c '[0-9]' || true
  elif command -v nvidia-smi >/dev/null; then
    nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true
  else
    echo 0
  fi
}

# Whether the base, with some room for activations, fits into the memory of one GPU.
base_fits() {
  local name="${FOLDER_NAME:-$(in_run folder_name)}" folder="${MODEL_NAME_OR_PATH:-$(in_run model_name_or_path)}"
  local weights memory
  [[ -n "${folder}" && -z "${FOLDER_NAME:-}" ]] || folder="${ROOT}/ckpt/${name:-tiny-llama-mod}"
  weights="$(du -Lcm "${folder}"/*.safetensors 2>/dev/null | tail -n 1 | cut -f 1)"
  memory="$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits 2>/dev/null | sort -n | head -n 1)"
  (( ${weights:-0} * 13 / 10 + 4000 < ${memory:-0} ))
}

choose_config() {
  local name
  if (( GPUS == 0 )); then
    name=$( (( NUM_PROCESSES == 1 )) && echo cpu || echo cpu_ddp)
  elif (( NUM_MACHINES > 1 )); then
    name=$(base_fits && echo two_nodes || echo deepspeed_zero3)
  elif (( NUM_PROCESSES == 1 )); then
    name=$(base_fits && echo single_gpu || echo deepspeed_zero3_offload)
  elif ! base_fits; then
    name=deepspeed_zero3
  else
    name=$([[ "${ROUTER_ONLY:-$(in_run router_only)}" =~ ^([Ff]alse|0|no)$ ]] && echo deepspeed_zero2 || echo ddp)
  fi
  echo "${ROOT}/configs/accelerate/${name}.yaml"
}

if [[ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" && -x "${ROOT}/.venv/bin/python" ]]; then
  PATH="${ROOT}/.venv/bin:${PATH}"
fi
PYTHON_BIN="${PYTHON:-$(command -v python3 || command -v python)}" ||
  fail "no python found: activate an environment or create ${ROOT}/.venv"
packages='import importlib.util, sys; sys.exit(not all(map(importlib.util.find_spec, ("accelerate", "transformers"))))'
"${PYTHON_BIN}" -c "${packages}" ||
  fail "${PYTHON_BIN} has not the packages of requirements.txt: pip install -r requirements.txt, or activate their environment"
GPUS="$(count_gpus)"
NUM_PROCESSES="${NUM_PROCESSES:-$(( GPUS > 0 ? GPUS * NUM_MACHINES : 1 ))}"
for number in NUM_PROCESSES NUM_MACHINES MACHINE_RANK PORT; do
  [[ "${!number}" =~ ^[0-9]+$ ]] || fail "${number}=${!number} must be a whole number"
done
(( NUM_PROCESSES >= 1 )) || fail "NUM_PROCESSES=${NUM_PROCESSES} must be at least 1"
if (( GPUS > 0 && NUM_PROCESSES > GPUS * NUM_MACHINES )); then
  fail "NUM_PROCESSES=${NUM_PROCESSES}, but this machine has ${GPUS} GPU(s): one process drives one GPU"
fi
if [[ -z "${CONFIG_FILE}" ]]; then
  CONFIG_FILE="$(choose_config)"
elif [[ ! -f "${CONFIG_FILE}" && -f "${ROOT}/${CONFIG_FILE}" ]]; then
  CONFIG_FILE="${ROOT}/${CONFIG_FILE}"
fi
[[ -f "${CONFIG_FILE}" ]] || fail "CONFIG_FILE=${CONFIG_FILE} does not exist; configs are in ${ROOT}/configs/accelerate"

[[ -z "${RUN}" || -f "${RUN}" ]] || fail "RUN=${RUN} does not exist; runs are in ${ROOT}/configs/runs"
arguments=(--environment)
[[ -z "${RUN}" ]] || arguments+=(--config "${RUN}")
[[ -n "${RESUME:-}" ]] || arguments+=(--overwrite_output_dir)
entrypoint="${ROOT}/entrypoints/finetune/finetune_mod.py"

# Several processes that each use all cores are many times slower than one.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$( (( NUM_PROCESSES > 1 )) && echo 1 || nproc)}"
# Threads that wait by spinning slow each other down twentyfold where other programs use the cores too.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
(( GPUS > 0 )) || export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"
# DeepSpeed compiles its CPU communication with the tools of the environment.
PATH="$(dirname "${PYTHON_BIN}"):${PATH}"
export PATH

told="config: ${CONFIG_FILE#"${ROOT}/"}, ${NUM_PROCESSES} process(es) on ${NUM_MACHINES} machine(s)"
if [[ " $* " =~ \ --dry[_-]run ]]; then
  echo "${told}"
  exec "${PYTHON_BIN}" "${entrypoint}" "${arguments[@]}" --num_processes "${NUM_PROCESSES}" "$@"
elif (( NUM_PROCESSES > 1 )); then  # a mistake is told once, before several processes start
  "${PYTHON_BIN}" "${entrypoint}" "${arguments[@]}" --num_processes "${NUM_PROCESSES}" --check_inputs "$@" \
    >/dev/null || exit $?
fi

echo "${told}"
launch=(
  "${PYTHON_BIN}" -m accelerate.commands.launch
  --config_file "${CONFIG_FILE}"
  --num_processes "${NUM_PROCESSES}"
  --num_machines "${NUM_MACHINES}"
  --machine_rank "${MACHINE_RANK}"
  --main_process_ip "${MAIN_PROCESS_IP}"
  --main_process_port "${PORT}"
  --num_cpu_threads_per_process "${OMP_NUM_THREADS}"
  --quiet
)
deepspeed_json="$(sed -n 's/^ *deepspeed_config_file: *//p' "${CONFIG_FILE}")"
if [[ -n "${deepspeed_json}" && ! -f "${deepspeed_json}" && -f "${ROOT}/${deepspeed_json}" ]]; then
  launch+=(--deepspeed_config_file "${ROOT}/${deepspeed_json}")
fi

# The launcher turns every exit code into 1 and may die of a signal before its workers have saved: run all of them as
# one process group, hand signals to all, wait for all, and read the code that its first worker left.
ROUTER_TUNING_EXIT_CODE_FILE="$(mktemp)"
export ROUTER_TUNING_EXIT_CODE_FILE
trap 'rm -f "${ROUTER_TUNING_EXIT_CODE_FILE}"' EXIT
set -m
"${launch[@]}" "${entrypoint}" "${arguments[@]}" "$@" &
group=$!
trap 'kill -TERM -- "-${group}" 2>/dev/null || true' TERM
trap 'kill -INT -- "-${group}" 2>/dev/null || true' INT
code=0
{
  wait "${group}" || code=$?
  while kill -0 -- "-${group}"; do
    sleep 0.2
  done
} 2>/dev/null  # where bash would say that the group was terminated
[[ ! -s "${ROUTER_TUNING_EXIT_CODE_FILE}" ]] || code="$(<"${ROUTER_TUNING_EXIT_CODE_FILE}")"
exit "${code}"
