#!/usr/bin/env bash
#SBATCH --job-name=preftree
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --requeue
# The recipe of runs/cuda.sh on several machines: one torchrun per node, which starts a rank for each GPU.
#   sbatch --nodes=4 runs/slurm.sh [more flags]        MODEL=… DATA=… OUTPUT=… as in runs/cuda.sh
#   sbatch runs/slurm.sh --fsdp                        a base model too large for one GPU
# OUTPUT and the checkout must be on a file system that all nodes share. A requeued job goes on from the last
# checkpoint. Where names of nodes lead to the wrong network: export GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"

MODEL=${MODEL:-mosaicml/mpt-7b}
DATA=${DATA:-Intel/orca_dpo_pairs}
OUTPUT=${OUTPUT:-outputs/slurm-${SLURM_JOB_ID:-0}}
PYTHON=${PYTHON:-.venv/bin/python}
GPUS=${GPUS:-${SLURM_GPUS_ON_NODE:-8}}
FIRST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)

RESUME=()
if compgen -G "$OUTPUT/checkpoint-*" >/dev/null; then
    RESUME=(--resume_from_checkpoint true)
fi

exec srun --kill-on-bad-exit=1 "$PYTHON" -m torch.distributed.run --nnodes "$SLURM_NNODES" --nproc_per_node "$GPUS" \
    --rdzv_backend c10d --rdzv_id "$SLURM_JOB_ID" --rdzv_endpoint "$FIRST:${PORT:-29500}" \
    dpo_clm.py --model_name_or_path "$MODEL" --output_dir "$OUTPUT" --dataset_name "$DATA" \
    --per_device_train_batch_size 1 --gradient_accumulation_steps 8 --learning_rate 5e-4 \
    --max_steps 1000 --save_steps 10 --lora_alpha 16 --lora_rank 16 --lora_dropout 0.05 \
    --bf16 --ddp_timeout 600 ${RESUME[@]+"${RESUME[@]}"} "$@"
