#!/usr/bin/env bash
# The experiment of 2023 in small, on a CPU and without a network: does DPO with its flags move the leaderboard's four
# tasks? Two recipes of pairs, three seeds, one evaluation before and one after each, and paired tables; and the same
# question of a task that a small model can learn, the demo's checked answers. Results: docs/reproduction.md.
#   runs/reproduce_small.sh DATA OUT
# DATA/pref/orca_pairs.jsonl            pairs in the columns of Intel/orca_dpo_pairs: the recipe `orca`
# DATA/pref/openorca_questions.jsonl    instructions in OpenOrca's columns; the recipe `prepared` takes their answers
#                                       as chosen and has the model itself write the rejected ones
# DATA/eval                             the test sets' local files (docs/evaluation.md)
# OUT/tables/{orca,prepared}/compare.md and OUT/demo/average.txt are renewed after each seed. Stop it and start it again
# as you like: what is done is not done again. Sizes from outside: STEPS=… LIMIT=… runs/reproduce_small.sh DATA OUT
set -euo pipefail
DATA=$(realpath "${1:?name the folder of the data}")
OUT=$(realpath -m "${2:?name a folder for the results}")
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-.venv/bin/python}
SEEDS=${SEEDS:-1 2 3}           # of training: order of the pairs, LoRA's first weights, dropout
CHECKED_SEEDS=${CHECKED_SEEDS:-42 1 2 3 4}      # of the checked answers' training
STEPS=${STEPS:-12}              # of 2 × 2 pairs
SWEEP_STEPS=${SWEEP_STEPS:-4}   # of each of the sweep's runs
LENGTH=${LENGTH:-512}           # of prompt and answer together, in tokens; half of it for the prompt
BETAS=${BETAS:-0.1, 0.3}        # the sweep's grid; 5e-4 is the original's learning rate
RATES=${RATES:-1e-4, 5e-4}
LIMIT=${LIMIT:-20}              # questions per task and, of MMLU, per subject
QUESTIONS=${QUESTIONS:-150}     # to write rejected answers to
BF16=${BF16:-true}              # as the original; false is faster on a processor without bfloat16
SIDE_BY_SIDE=${SIDE_BY_SIDE:-no}    # yes: tables and checked answers at once; with OMP_NUM_THREADS=1 for a busy machine
export PREFTREE_CACHE=$OUT/cache
mkdir -p "$OUT/data" "$OUT/unfinished"

preftree() { "$PYTHON" -m preftree "$@"; }
step() { echo "== $(date +%H:%M:%S) $*"; }

# A command whose folder appears when it is whole: whole FOLDER FLAG COMMAND…, where FLAG names the folder to it.
whole() {
    local folder=$1 flag=$2 part
    part=$OUT/unfinished/$(basename "$(dirname "$folder")")
    shift 2
    [ ! -d "$folder" ] || return 0
    rm -rf "$part"
    preftree "$@" "$flag" "$part"
    mkdir -p "$(dirname "$folder")"
    mv "$part" "$folder"
}

evaluate() {
    local folder=$1 name=$2
    shift 2
    whole "$folder" --out evaluate --model smollm2 --data "$DATA/eval" --limit "$LIMIT" \
        --preferences "$OUT/data/$name-test.jsonl" "$@"
}

# Every fifth pair is for choosing settings, every fifth for measuring what was learned; the rest is trained on.
split() {
    awk -v to="$OUT/data/$1" '{ part = NR % 5 == 0 ? "validation" : NR % 5 == 1 ? "test" : "train"
                                print > (to "-" part ".jsonl") }' "$2"
}

# Check, parts, the model before, and the sweep's choice.
settings() {
    local name=$1 pairs=$2
    step "$name: check, the model before, the sweep"
    # check ends with 1 where something would spoil training, such as a length bias, which the original's pairs have:
    # the experiment takes them as they are. Anything else ends the script.
    [ -f "$OUT/data/$name-check.html" ] ||
        preftree check "$pairs" --model_name_or_path smollm2 --eval_data "$DATA/eval" --max_length "$LENGTH" \
            --max_prompt_length "$((LENGTH / 2))" --html "$OUT/data/$name-check.html" || [ $? = 1 ]
    split "$name" "$pairs"
    evaluate "$OUT/base/$name" "$name"
    cat >"$OUT/$name.yaml" <<END
output: $OUT/sweep/$name
grid:
  beta: [$BETAS]
  learning_rate: [$RATES]
train:
  model_name_or_path: smollm2
  dataset_name: $OUT/data/$name-train.jsonl
  validation_file: $OUT/data/$name-validation.jsonl
  max_steps: $SWEEP_STEPS
  per_device_train_batch_size: 2
  gradient_accumulation_steps: 2
  lr_scheduler_type: cosine
  warmup_steps: 0.1
  lora_rank: 16
  lora_alpha: 16
  lora_dropout: 0.05
  lora_all_linear: false
  lora_target_modules: [k_proj, q_proj, v_proj]
  max_length: $LENGTH
  max_prompt_length: $((LENGTH / 2))
  bf16: $BF16
  logging_steps: 4
  save_steps: 8
END
    preftree sweep "$OUT/$name.yaml"
    cat "$OUT/sweep/$name/best.yaml"
}

orca() { settings orca "$DATA/pref/orca_pairs.jsonl"; }

prepared() {
    step "prepared: rejected answers"
    [ -f "$OUT/prepared/train.jsonl" ] || preftree prepare --dataset_name "$DATA/pref/openorca_questions.jsonl" \
        --num_samples "$QUESTIONS" --decontaminate "$DATA/eval" --max_prompt_length "$((LENGTH / 2))" \
        --max_answer_length 128 --max_new_tokens 96 --model_name_or_path smollm2 --output_dir "$OUT/prepared"
    settings prepared "$OUT/prepared/train.jsonl"
}

# Seed by seed, so that there is a table of both recipes as soon as can be.
tables() {
    local seed name
    for seed in $SEEDS; do
        for name in orca prepared; do
            [ -f "$OUT/sweep/$name/best.yaml" ] || "$name"
            step "$name, seed $seed"
            preftree train "$OUT/sweep/$name/best.yaml" --max_steps "$STEPS" --seed "$seed" \
                --output_dir "$OUT/runs/$name/seed-$seed"
            evaluate "$OUT/scores/$name/seed-$seed" "$name" --adapter "$OUT/runs/$name/seed-$seed"
            rm -rf "$OUT/tables/$name"
            preftree compare "$OUT/base/$name" "$OUT/scores/$name" --seeds --out "$OUT/tables/$name"
        done
    done
}

checked_answers() {
    local seed
    for seed in $CHECKED_SEEDS; do
        step "checked answers, seed $seed"
        whole "$OUT/demo/seed-$seed" --output_dir demo --seed "$seed"
        preftree demo --average "$OUT"/demo/seed-* | tee "$OUT/demo/average.txt"
    done
}

if [ "$SIDE_BY_SIDE" = yes ]; then
    tables &
    first=$!
    checked_answers &
    wait "$first"
    wait "$!"
else
    tables
    checked_answers
fi
step "done: $OUT/tables/orca/compare.md, $OUT/tables/prepared/compare.md, $OUT/demo/average.txt"
