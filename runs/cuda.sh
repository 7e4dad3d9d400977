#!/usr/bin/env bash
# The original's GPU recipe. Override from outside: MODEL=… DATA=… OUTPUT=… runs/cuda.sh [more flags]
set -euo pipefail
cd "$(dirname "$0")/.."

MODEL=${MODEL:-mosaicml/mpt-7b}
DATA=${DATA:-Intel/orca_dpo_pairs}
OUTPUT=${OUTPUT:-outputs/cuda}
PYTHON=${PYTHON:-.venv/bin/python}

exec "$PYTHON" dpo_clm.py --model_name_or_path "$MODEL" --output_dir "$OUTPUT" \
    --per_device_train_batch_size 1 --gradient_accumulation_steps 8 --learning_rate 5e-4 \
    --max_steps 1000 --save_steps 10 --lora_alpha 16 --lora_rank 16 --lora_dropout 0.05 \
    --dataset_name "$DATA" --bf16 --use_auth_token True "$@"
