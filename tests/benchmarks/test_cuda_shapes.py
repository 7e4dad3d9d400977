"""The GPU benchmark's parts, on a CPU and tiny models; `test_cuda_first_run` measures both sides with it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import cuda_shapes  # noqa: E402
import shapes  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


@pytest.mark.parametrize("shape", ["tiny", "tiny-mpt"])
def test_an_attempt_leaves_nothing(shape: str, tmp_path: Path) -> None:
    """Recomputation is off again for the settings that are tried without it, and the reference's adapter is gone."""
    model, pairs = shapes.make_model(shape, "cpu"), shapes.make_pairs(16, 300, shorter=8)

    def state() -> tuple[list[str], int, int]:
        hooks = sum(len(module._forward_hooks) for module in model.modules())
        return (
            list(model.peft_config),
            hooks,
            sum(bool(getattr(module, "gradient_checkpointing", False)) for module in model.modules()),
        )

    before = state()
    cuda_shapes._trl(model, pairs, str(tmp_path), "cpu", cuda_shapes.TrlSetting(8, checkpointing=True))
    assert state() != before
    cuda_shapes._release(model, "cpu")
    assert state() == before
    assert cuda_shapes.run_preftree(model, pairs, str(tmp_path), "cpu")["seconds"] > 0


def test_a_side_that_fails_stops_only_itself(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    numbers = {"pairs_per_second": 2.0, "peak_gib": 1.0, "mfu": 0.5, "gemm_peak_tflops": 1.0, "setting": "S"}

    def fresh(command: list[str], name: str) -> dict[str, object]:
        if name == "mpt-7b, trl:":
            raise SystemExit(f"{name} failed with exit code 1")
        return numbers

    monkeypatch.setattr(cuda_shapes, "fresh_process", fresh)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert cuda_shapes.main(["--shapes", "mpt-7b", "tiny", "--json", str(tmp_path / "J")]) == 1
    assert json.loads((tmp_path / "J").read_text())["results"]["mpt-7b"]["trl"] == {
        "failed": "mpt-7b, trl: failed with exit code 1"
    }
    printed = capsys.readouterr().out
    assert "failed with exit code 1" in printed
    assert "ratio" in printed


def test_lengths_are_those_of_orca() -> None:
    pairs = shapes.make_pairs(48, 1000)
    sizes = sorted((len(p.prompt_ids), len(p.chosen_ids), len(p.rejected_ids)) for p in pairs)
    assert sizes == sorted(shapes.LENGTHS)
    assert pairs == shapes.make_pairs(48, 1000)
    assert all(3 <= i < 1000 for p in pairs for i in (*p.prompt_ids, *p.chosen_ids, *p.rejected_ids))


def test_useful_arithmetic_by_hand() -> None:
    model = shapes.make_model("tiny", "cpu")
    pairs = [shapes.Ids((3,) * 10, (4,) * 3, (5,) * 2)]
    layer = 32 * 32 + 2 * 16 * 32 + 32 * 32 + 3 * 32 * 48  # q, k and v, o, the three of the MLP
    assert cuda_shapes.useful_flops(model, pairs) == 6 * (2 * layer * 15 + 300 * 32 * 5)


@pytest.mark.parametrize(("shape", "billions"), [("smollm2-135m", 0.135), ("llama-2-7b", 6.74), ("mpt-7b", 6.65)])
def test_shapes_have_the_size_of_their_models(shape: str, billions: float) -> None:
    import torch
    import transformers

    kind, fields = shapes.SHAPES[shape]
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(**fields))
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, rel=0.01)


def test_a_search_that_is_cut_short_still_gives_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    seconds = {8: None, 4: 3.0, 2: 2.0, 1: 4.0}  # 8 pairs do not fit without checkpointing

    def attempt(model: object, pairs: list[object], folder: str, device: str, setting: Any) -> float:
        tried.append(setting)
        if seconds[setting.batch] is None and not setting.checkpointing:
            raise torch.OutOfMemoryError
        return 1.5 if setting.checkpointing else seconds[setting.batch]  # type: ignore[return-value]

    monkeypatch.setattr(cuda_shapes, "_trl", attempt)
    monkeypatch.setattr(cuda_shapes, "_release", lambda *_: None)
    monkeypatch.setattr(cuda_shapes, "_takes_liger", lambda model: False)
    setting = cuda_shapes.TrlSetting
    tried: list[Any] = []
    found = cuda_shapes.run_trl(None, [0] * 16, "", "cpu", lambda: 1000.0)  # type: ignore[list-item]
    assert tried == [setting(8), setting(4), setting(2), setting(1), setting(8, True), setting(8, True)]
    assert found["setting"] == "pairs of 8, checkpointing"
    tried.clear()
    left = iter([9.0, -1.0])
    found = cuda_shapes.run_trl(None, [0] * 16, "", "cpu", lambda: next(left))  # type: ignore[list-item]
    assert tried == [setting(8), setting(4), setting(2), setting(2)]
    assert found["setting"] == "pairs of 2, no checkpointing (search cut short)"
