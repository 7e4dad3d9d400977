#!/usr/bin/env bash
# The original's CPU recipe. Override from outside: MODEL=… DATA=… OUTPUT=… runs/cpu.sh [more flags]
set -euo pipefail
cd "$(dirname "$0")/.."

MODEL=${MODEL:-smollm2}
DATA=${DATA:-Intel/orca_dpo_pairs}
OUTPUT=${OUTPUT:-outputs/cpu}
PYTHON=${PYTHON:-.venv/bin/python}

exec "$PYTHON" dpo_clm.py --model_name_or_path "$MODEL" --output_dir "$OUTPUT" \
    --per_device_train_batch_size 2 --gradient_accumulation_steps 2 --learning_rate 5e-4 \
    --max_steps 1000 --save_steps 10 --logging_steps 10 \
    --lora_alpha 16 --lora_rank 16 --lora_dropout 0.05 --dataset_name "$DATA" --bf16 \
    --max_length 1024 --max_prompt_length 512 --lr_scheduler_type cosine --warmup_steps 100 \
    --use_cpu true --gradient_checkpointing true \
    --lora_all_linear false --lora_target_modules k_proj q_proj v_proj "$@"
