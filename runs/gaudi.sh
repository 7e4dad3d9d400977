#!/usr/bin/env bash
# The original's Gaudi recipes: one card, or CARDS=8 through MPI.
# Override from outside: MODEL=… DATA=… OUTPUT=… CARDS=8 runs/gaudi.sh [more flags]
# Contract-tested, not hardware-tested.
set -euo pipefail
cd "$(dirname "$0")/.."

MODEL=${MODEL:-mosaicml/mpt-7b}
DATA=${DATA:-Intel/orca_dpo_pairs}
OUTPUT=${OUTPUT:-outputs/gaudi}
CARDS=${CARDS:-1}
PYTHON=${PYTHON:-python3}

LAUNCH=()
if [ "$CARDS" -gt 1 ]; then
    LAUNCH=(gaudi_spawn.py --world_size "$CARDS" --use_mpi)
fi

exec "$PYTHON" ${LAUNCH[@]+"${LAUNCH[@]}"} dpo_clm.py --model_name_or_path "$MODEL" --output_dir "$OUTPUT" \
    --per_device_train_batch_size 1 --gradient_accumulation_steps 8 --learning_rate 5e-4 \
    --max_steps 1000 --save_steps 10 --lora_alpha 16 --lora_rank 16 --lora_dropout 0.05 \
    --dataset_name "$DATA" --bf16 --use_auth_token True \
    --use_habana --use_lazy_mode --pad_max true --report_to none --torch_dtype bfloat16 \
    --use_hpu_graphs_for_training "$@"
