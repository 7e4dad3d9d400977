"""The GPU benchmark, on a CPU and a tiny model: it runs, both sides train on the same pairs, and its sums are right."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import cuda_shapes  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def test_the_command(tmp_path: Path) -> None:
    output = tmp_path / "numbers.json"
    command = [sys.executable, "cuda_shapes.py", "--device", "cpu", "--shapes", "tiny", "--steps", "2"]
    done = subprocess.run(
        [*command, "--json", str(output)],
        cwd=ROOT / "benchmarks",
        env=None,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())["results"]["tiny"]
    assert set(found) == {"preftree", "trl"}
    assert all(side["pairs_per_second"] > 0 and 0 < side["utilisation"] < 1 for side in found.values())
    assert found["trl"]["setting"].startswith("pairs of ")
    assert "cached" in done.stdout


def test_lengths_are_those_of_orca() -> None:
    pairs = cuda_shapes.make_pairs(48, 1000)
    sizes = sorted((len(p.prompt_ids), len(p.chosen_ids), len(p.rejected_ids)) for p in pairs)
    assert sizes == sorted(cuda_shapes.LENGTHS)
    assert pairs == cuda_shapes.make_pairs(48, 1000)
    assert all(3 <= i < 1000 for p in pairs for i in (*p.prompt_ids, *p.chosen_ids, *p.rejected_ids))


def test_useful_arithmetic_by_hand() -> None:
    model = cuda_shapes.make_model("tiny", "cpu")
    pairs = [cuda_shapes.Ids((3,) * 10, (4,) * 3, (5,) * 2)]
    layer = 32 * 32 + 2 * 16 * 32 + 32 * 32 + 3 * 32 * 48  # q, k and v, o, the three of the MLP
    assert cuda_shapes.useful_flops(model, pairs) == 6 * (2 * layer * 15 + 300 * 32 * 5)


@pytest.mark.parametrize(("shape", "billions"), [("smollm2-135m", 0.135), ("llama-2-7b", 6.74), ("mpt-7b", 6.65)])
def test_shapes_have_the_size_of_their_models(shape: str, billions: float) -> None:
    import torch
    import transformers

    kind, fields = cuda_shapes.SHAPES[shape]
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(**fields))
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, rel=0.01)
