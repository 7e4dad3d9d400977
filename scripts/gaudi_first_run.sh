#!/usr/bin/env bash
# For whoever has a Gaudi card: four checks of what could only be tested without one. Run in the vendor's image:
#     scripts/gaudi_first_run.sh [MODEL [DATA]]          a small model and a file of pairs; see the defaults
# 1 the tree agrees with the model itself on the card, 2 losses equal the CPU's, 3 the number of compiled graphs does
# not grow after the first steps, 4 no operation falls back to the CPU. Logs stay in $OUTPUT.
set -euo pipefail
cd "$(dirname "$0")/.."

MODEL=${1:-smollm2}
DATA=${2:-Intel/orca_dpo_pairs}
OUTPUT=${OUTPUT:-outputs/gaudi-first-run}
PYTHON=${PYTHON:-python3}
TOLERANCE=${TOLERANCE:-0.02}
mkdir -p "$OUTPUT"

train() { # name, then more flags
    local name=$1
    shift
    echo "== $name"
    "$PYTHON" dpo_clm.py --model_name_or_path "$MODEL" --dataset_name "$DATA" --output_dir "$OUTPUT/$name" \
        --overwrite_output_dir true --max_train_samples 64 --max_length 512 --max_prompt_length 256 \
        --per_device_train_batch_size 1 --gradient_accumulation_steps 8 --max_steps "$STEPS" --logging_steps 1 \
        --save_strategy no --reference_cache false --seed 1 "$@" 2>&1 | tee "$OUTPUT/$name.log"
}

STEPS=6
train cpu --use_cpu --torch_dtype float32
# What the vendor's software writes: each compiled graph, and each operation that the card does not have.
export PT_HPU_METRICS_FILE="$OUTPUT/metrics.json" PT_HPU_METRICS_DUMP_TRIGGERS=process_exit
export ENABLE_CONSOLE=true LOG_LEVEL_PT_FALLBACK=1
train short --use_habana --use_lazy_mode --pad_max true --torch_dtype bfloat16
mv -f "$OUTPUT/metrics.json" "$OUTPUT/metrics-short.json"
STEPS=18
train long --use_habana --use_lazy_mode --pad_max true --torch_dtype bfloat16
mv -f "$OUTPUT/metrics.json" "$OUTPUT/metrics-long.json"
STEPS=6
train eager --use_habana --pad_max true --torch_dtype bfloat16

"$PYTHON" - "$OUTPUT" "$TOLERANCE" <<'EOF'
import json, re, sys
from pathlib import Path

folder, tolerance, failed = Path(sys.argv[1]), float(sys.argv[2]), 0


def say(fine, text):
    global failed
    failed += not fine
    print(f"{'ok  ' if fine else 'FAIL'} {text}")


def losses(name):
    history = json.loads((folder / name / "trainer_state.json").read_text())["log_history"]
    return [record["loss"] for record in history if "loss" in record]


def compiled(name):
    """Numbers that the metrics file gives for graph compilation, whatever their place in it."""
    text = (folder / f"metrics-{name}.json").read_text()
    return max((int(n) for n in re.findall(r'"TotalNumber"\s*:\s*(\d+)', text)), default=-1)


for name in ("short", "eager"):
    log = (folder / f"{name}.log").read_text()
    line = next((line for line in log.splitlines() if line.startswith("attention  ")), "no line about attention")
    say(line.startswith("attention  masked"), f"{name}: {line}")
    pairs = list(zip(losses("cpu"), losses(name)))
    apart = max(abs(a - b) for a, b in pairs)
    say(len(pairs) == 6 and apart <= tolerance, f"{name}: losses differ from the CPU's by at most {apart:.4f}")
    fallbacks = sorted(set(re.findall(r"CPU fallback (\S+)", log)))
    say(not fallbacks, f"{name}: operations computed on the CPU: {', '.join(fallbacks) or 'none'}")
few, many = compiled("short"), compiled("long")
say(0 <= few == many, f"graphs compiled in 6 steps: {few}, in 18 steps: {many}")
sys.exit(bool(failed))
EOF
