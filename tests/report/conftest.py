"""A run folder with everything that a report shows, written without training; texts try to break out of the page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from preftree.io.atomic import write_json
from preftree.io.jsonl import append_jsonl
from preftree.io.run_folder import RunFolder

HOSTILE = "</pre><script>alert(1)</script><img src=x onerror=alert(2)> {{ 7 * 7 }} \x1b[31m\"' &amp; ‮"


def write_run(output: Path, name: str = "mine", steps: int = 60, finished: bool = True, **facts: Any) -> Path:
    """A run of `steps` steps in `output`/`name`."""
    run = RunFolder(output / name)
    settings = {
        "model": {"model_name_or_path": HOSTILE, "torch_dtype": "float32"},
        "data": {"dataset_name": "pairs.jsonl", "max_length": 768},
        "train": {"output_dir": name, "beta": 0.2, "use_cpu": True, "hub_token": "secret"},
    }
    write_json(run.config_path, {"fingerprint": "abc123", "settings": settings})
    write_json(run.identity_path, {"data": "40 pairs (d1d2)", "--beta": 0.2, "pairs per step": 2})
    write_json(run.env_path, {"python": "3.12", "versions": {"torch": "2.13"}, "cpu": "a CPU", "devices": []})
    lengths = {"pairs": 40, "chosen": [10, 12] * 20, "rejected": [12, 10] * 20, "prompt": [30] * 40, "chosen_cut": 0}
    objective = {"beta": 0.2, "reference": True, "pairs_per_step": 2}
    said = [f"data       pairs.jsonl: 40 pairs {HOSTILE}"]
    write_json(run.facts_path, {"objective": objective, "lengths": {"train": lengths, "eval": lengths}, "said": said,
                                **facts})  # fmt: skip
    for step in range(1, steps + 1):
        done = step / steps
        run.log({"step": step, "epoch": 3 * done, "loss": 0.69 - 0.3 * done, "grad_norm": 1.0, "learning_rate": 1e-4,
                 "rewards/chosen": 0.1 * done, "rewards/rejected": -0.5 * done, "rewards/margins": 0.6 * done,
                 "rewards/accuracies": 0.5 + 0.3 * done, "logps/chosen": -20.0, "logps/rejected": -30.0, "mfu": 0.4,
                 "pairs_per_second": 2.0, "tokens_saved": 0.5, "peak_memory_gib": 1.5})  # fmt: skip
    run.log({"step": steps, "eval_loss": 0.5, "eval_rewards/margins": 0.4, "eval_rewards/accuracies": 0.75,
             "eval_rewards/chosen": 0.1})  # fmt: skip
    chosen = [0.1 * place for place in range(40)]
    for name_ in ("train", "eval"):
        append_jsonl(run.pairs_path, {"step": steps, "set": name_, "pair": list(range(40)),
                                      "chosen": chosen, "rejected": [0.5] * 40})  # fmt: skip
    write_json(run.examples_path, [
        {"set": "eval", "pair": place, "source": f"pairs.jsonl:{place + 1}", "chosen_reward": 0.1 * place,
         "rejected_reward": 0.5, "prompt": HOSTILE, "chosen": f"{HOSTILE} chosen", "rejected": "no"}
        for place in (0, 1, 38, 39)
    ])  # fmt: skip
    for model, answer in (("reference", f"An old answer {HOSTILE}"), ("policy", f"A new answer {HOSTILE}")):
        run.sample({"step": steps, "model": model, "mode": "greedy", "prompt": f"Question {HOSTILE}", "answer": answer,
                    "tokens": len(answer.split())})  # fmt: skip
    if finished:
        (run.output_dir / "adapter_model.safetensors").write_bytes(b"")
        run.finish(steps)
    return run.output_dir


@pytest.fixture
def a_run(tmp_path: Path) -> Path:
    return write_run(tmp_path)


@pytest.fixture
def scores(tmp_path: Path) -> Path:
    """A folder of `preftree compare`."""
    difference = {"mean": 0.02, "low": -0.01, "high": 0.05, "p": 0.2, "test": "t", "gained": 3, "lost": 1}
    task = {"metric": "acc_norm", "score": 0.31, "stderr": 0.01, "questions": 100}
    models = [{"name": name, "folder": name, "average": 0.31, "average_stderr": "nan", "tasks": {HOSTILE: task},
               "heldout": {"pairs": 40, "accuracy": 0.6, "margin": 1.0}} for name in ("base", HOSTILE)]  # fmt: skip
    differences = [{"base": "base", "other": HOSTILE, "average": difference, "tasks": {HOSTILE: difference},
                    "flipped": {}, "heldout": {"accuracy": difference, "margin": difference}}]  # fmt: skip
    folder = tmp_path / "table"
    folder.mkdir()
    (folder / "compare.json").write_text(json.dumps({"models": models, "differences": differences}))
    return folder
