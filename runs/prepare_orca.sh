#!/usr/bin/env bash
# The data of the original: 12,000 OpenOrca questions with their GPT-4 or GPT-3.5 answers, and llama-2-13b-chat's answers
# as the rejected ones. Stop it and start it again as you like: it goes on. Override from outside:
#   MODEL=… DATA=… TESTS=… OUTPUT=… ENGINE=vllm runs/prepare_orca.sh [more flags]
# The teacher is told by OpenOrca's two file names alone; to stratify over it, download them and give their folder:
#   hf download --repo-type dataset Open-Orca/OpenOrca --local-dir orca, then DATA=orca
set -euo pipefail
cd "$(dirname "$0")/.."

MODEL=${MODEL:-meta-llama/Llama-2-13b-chat-hf}
DATA=${DATA:-Open-Orca/OpenOrca}
TESTS=${TESTS:-hub}
OUTPUT=${OUTPUT:-outputs/orca_pairs}
ENGINE=${ENGINE:-transformers}
PYTHON=${PYTHON:-.venv/bin/python}

exec "$PYTHON" -m preftree prepare --dataset_name "$DATA" --num_samples 12000 --decontaminate "$TESTS" \
    --model_name_or_path "$MODEL" --engine "$ENGINE" --chat_template llama-2 --use_auth_token true \
    --temperature 0.7 --top_p 0.95 --max_new_tokens 512 --output_dir "$OUTPUT" "$@"
