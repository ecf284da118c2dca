#!/usr/bin/env bash
# The whole recipe on the embedded tiny model: raw data -> reformat -> mix -> router-tuning -> export -> lm-eval ->
# table, report.md and figures. No GPU, no network after the installation, at most 10 minutes on 2 cores.
#   bash scripts/quickstart.sh            # everything
#   bash scripts/quickstart.sh --smoke    # the same steps on a few rows, as CI runs them (or SMOKE=1)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
for argument in "$@"; do
  case "$argument" in
    --smoke) SMOKE=1 ;;
    *) fail "unknown argument $argument; usage: bash scripts/quickstart.sh [--smoke]" ;;
  esac
done
ensure_environment
cd "$ROOT"

export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
NAME=quickstart
# The published recipe moves routers by 1e-5 per step; a tiny model and a few dozen steps need more, and a threshold
# below the start of every score, or the first step would switch all layers off.
TUNE=(MAX_TRAIN_SAMPLES=3840 LEARNING_RATE=3e-4 GRADIENT_SCALE=0.1 TARGET_CAPACITY=0.6)
TUNE_FLAGS=(--threshold 0.45)
COMPARE=(--repeats 5)
STOCK=(--tasks "mod_heldout_mc" --limit 32)
if [[ "${SMOKE:-0}" == 1 ]]; then
  NAME=quickstart-smoke
  TUNE=(MAX_TRAIN_SAMPLES=512 GLOBAL_BATCH_SIZE=32 LEARNING_RATE=5e-4 GRADIENT_SCALE=0.1 TARGET_CAPACITY=0.6)
  COMPARE=(--repeats 2 --limit 8 --prompts_per_file 4 --search_count 48 --new_tokens 8)
  STOCK=(--tasks "mod_copy_gen,mod_copy_mc" --limit 4)
fi
REFORMATTED="runs/$NAME/reformatted" MIXED="runs/$NAME/mixed"
RUN="trained_models/tiny-llama-mod/$NAME"
EXPORT="exports/$NAME"

step() {
  echo
  echo "== $1"
}
START=$SECONDS

step "1/6 raw data -> conversations ($REFORMATTED)"
python entrypoints/data/reformat_datasets.py --raw_data_root data/sample/raw --save_path "$REFORMATTED"

step "2/6 mix ($MIXED)"
python entrypoints/data/mix_datasets.py --reformatted_dir "$REFORMATTED" --save_path "$MIXED" --portion alpaca=1

step "3/6 router-tuning of the tiny model ($RUN)"
env FOLDER_NAME=tiny-llama-mod OUTPUT_DIR="$RUN" MICRO_BATCH_SIZE=32 "${TUNE[@]}" \
  bash scripts/finetune_mod.sh --train_file "$MIXED/data.jsonl" "${TUNE_FLAGS[@]}"

step "4/6 dense, tuned and static drop on held-out tasks, lm-eval in process"
python entrypoints/evaluate/compare_run.py --run "$RUN" "${COMPARE[@]}"

step "5/6 export ($EXPORT)"
python entrypoints/checkpoint/export.py --run "$RUN" --output "$EXPORT" --overwrite

step "6/6 stock lm_eval on the export, outside this repository"
(
  cd "${TMPDIR:-/tmp}"
  LMEVAL_LOG_LEVEL=ERROR lm_eval --model hf --model_args "pretrained=$ROOT/$EXPORT,trust_remote_code=True,dtype=float32" \
    --include_path "$ROOT/configs/lm_eval" "${STOCK[@]}" --device cpu --batch_size 16
)

echo
echo "done in $((SECONDS - START)) s: $RUN/report.md, $RUN/capacity_by_layer.png, $RUN/quality_against_compute.png"
