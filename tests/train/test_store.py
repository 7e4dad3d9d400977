"""The reference cache: found by content, missed when anything of the model changed, whole after a kill."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import preftree
from preftree.forest import Bundle, Forest
from preftree.io.cache import cache_root
from preftree.model.lora import add_lora
from preftree.model.score import Scorer, attach, causal_model
from preftree.train import store
from preftree.train.reference import Reference
from preftree.train.reference_models import AdapterOff
from preftree.train.store import LogprobStore, scoring_key, weights_key
from tests.support import families, tiny


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFTREE_CACHE", str(tmp_path / "cache"))


def forest() -> Forest:
    return Forest.of([Bundle((5, 6, 7), ((8, 9), (10,)), (0, 1)), Bundle((5, 6), ((11, 12),), (2,))])


def store_of(scorer: Scorer, say=print) -> LogprobStore:  # type: ignore[no-untyped-def]
    return LogprobStore(cache_root() / "reference" / scoring_key(weights_key(scorer.causal), scorer), say)


def reference(model: torch.nn.Module) -> Reference:
    scorer = attach(model)
    return Reference(AdapterOff(scorer), store_of(scorer))


def test_another_run_computes_nothing_and_reads_the_same_numbers() -> None:
    first = reference(add_lora(tiny.llama(), rank=2))
    expected = first.token_logprobs(forest())
    first.flush()
    assert (first.hits, first.misses) == (0, 3)
    # Another adapter, another learning rate, another beta: the reference is the same model.
    second = reference(add_lora(tiny.llama(), rank=4, alpha=32))
    assert torch.equal(second.token_logprobs(forest()), expected)
    assert (second.hits, second.misses) == (3, 0)


def test_an_answer_is_found_under_another_row_and_in_another_forest() -> None:
    ref = reference(add_lora(tiny.llama(), rank=2))
    ref.token_logprobs(forest())
    alone = Forest.of([Bundle((5, 6, 7), ((10,),), (17,))])
    ref.token_logprobs(alone)
    assert (ref.hits, ref.misses) == (1, 3)
    # The same tokens, but one more of them scored: not the same answer.
    ref.token_logprobs(Forest.of([Bundle((5, 6), ((7, 10),), (0,))]))
    assert ref.misses == 4


def test_the_key_changes_with_a_weight_a_buffer_the_dtype_and_the_config() -> None:
    key = weights_key(tiny.llama())
    assert weights_key(tiny.llama()) == key
    changed = tiny.llama()
    with torch.no_grad():
        next(changed.parameters()).view(-1)[0] += 1e-3
    buffered = tiny.llama()
    buffered.model.layers[0].register_buffer("e_score_correction_bias", torch.zeros(3))
    corrected = tiny.llama()
    corrected.model.layers[0].register_buffer("e_score_correction_bias", torch.ones(3))
    other_config = tiny.llama()
    other_config.config.rope_parameters["rope_theta"] = 12345.0
    models = (changed, buffered, corrected, tiny.llama().half(), other_config)
    assert len({key, *map(weights_key, models)}) == 6
    renamed = tiny.llama()
    renamed.config._name_or_path = "another/name"
    assert weights_key(renamed) == key
    assert weights_key(causal_model(add_lora(tiny.llama(), rank=2))) == key
    mixture = families.tiny_model("mixtral")
    key = weights_key(mixture)
    assert weights_key(causal_model(add_lora(mixture, rank=2))) == key  # experts wrapped twice


def test_an_adapter_that_is_part_of_the_reference_counts_with_its_config() -> None:
    def key(**options) -> str:  # type: ignore[no-untyped-def]
        return weights_key(tiny.with_lora(tiny.llama(), **options))

    assert key() == key()
    assert len({weights_key(tiny.llama()), key(), key(seed=2), key(alpha=32), key(target_modules=["q_proj"])}) == 5
    moved = tiny.with_lora(tiny.llama())
    moved.peft_config["default"].base_model_name_or_path = "elsewhere"
    assert weights_key(moved) == key()


def test_the_key_changes_with_the_path_the_code_and_the_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.llama()
    keys = set()
    for attention in ("tiles", "padded"):
        with attach(model, attention) as scorer:
            assert scorer.name == attention
            keys.add(scoring_key("weights", scorer))
    keys.add(scoring_key("others", scorer))
    with monkeypatch.context() as patch:
        patch.setattr(store, "scoring_version", lambda: "another")
        keys.add(scoring_key("weights", scorer))
    with monkeypatch.context() as patch:
        patch.setattr(store, "version", lambda package: "9.9")
        keys.add(scoring_key("weights", scorer))
    assert len(keys) == 5
    assert scoring_key("weights", scorer) in keys


def test_the_version_of_the_code_is_that_of_its_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(preftree.__file__).parent
    for folder in ("forest", "model"):
        shutil.copytree(root / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(preftree, "__file__", str(tmp_path / "__init__.py"))
    version = store.scoring_version.__wrapped__
    before = version()
    kernel = next((tmp_path / "model").rglob("*.cpp"))
    kernel.write_text(kernel.read_text() + "// fixed")
    assert version() != before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cache_that_disagrees_is_discarded_with_a_word(dtype: torch.dtype) -> None:
    said: list[str] = []
    scorer = attach(add_lora(tiny.llama().to(dtype), rank=2))
    first = Reference(AdapterOff(scorer), store_of(scorer))
    expected = first.token_logprobs(forest())
    first.flush()
    agreeing = Reference(AdapterOff(scorer), store_of(scorer, said.append))
    assert torch.equal(agreeing.token_logprobs(forest()), expected)
    assert not said
    assert agreeing.misses == 0
    wrong = store_of(scorer)
    wrong.discard()
    for key, token_S in first.store.items():
        wrong.add(key, token_S - 0.5)  # written by a path with a fault
    wrong.flush()
    second = Reference(AdapterOff(scorer), store_of(scorer, said.append))
    torch.testing.assert_close(second.token_logprobs(forest()), expected)
    assert second.misses == 3
    assert len(said) == 1
    assert "discarded and computed again" in said[0]
    second.flush()
    third = Reference(AdapterOff(scorer), store_of(scorer, said.append))
    torch.testing.assert_close(third.token_logprobs(forest()), expected)
    assert (third.misses, len(said)) == (0, 1)


@pytest.mark.parametrize("obstacle", ["a file in its place", "read-only", "full"])
def test_a_cache_that_cannot_be_written_costs_the_cache_only(
    obstacle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, said = tmp_path / "reference", []
    if obstacle == "a file in its place":
        folder.write_text("something else")
    else:
        error = OSError(errno.EROFS if obstacle == "read-only" else errno.ENOSPC, "no room for it")

        def refuse(*arguments: object, **options: object) -> None:
            raise error

        monkeypatch.setattr(store, "atomic_file", refuse)
    keep = LogprobStore(folder, said.append)
    for number in range(2):
        keep.add(bytes([number]) * 16, torch.tensor([-1.0]))
        keep.flush()
    assert len(keep) == 2  # this run has them
    assert len(said) == 1
    assert "reference log-probs cannot be kept in" in said[0]


@pytest.mark.parametrize("damage", ["cut", "zeros", "nan", "flipped"])
def test_a_damaged_shard_is_recognized_and_removed(damage: str, tmp_path: Path) -> None:
    keep = LogprobStore(tmp_path)
    for number in range(20):
        keep.add(bytes([number]) * 16, torch.full((4,), -float(number + 1)))
    keep.flush()
    (shard,) = tmp_path.glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    end = len(content)
    if damage == "cut":
        del content[end // 2 :]
    elif damage == "zeros":
        content[end - 64 :] = bytes(64)
    elif damage == "nan":
        content[end - 4 :] = torch.tensor([torch.nan]).numpy().tobytes()
    else:
        content[end - 30] ^= 1
    shard.write_bytes(content)
    assert len(LogprobStore(tmp_path)) == 0
    assert not list(tmp_path.iterdir())
    assert len(LogprobStore(tmp_path)) == 0


def test_what_is_not_finite_is_not_kept(tmp_path: Path) -> None:
    keep = LogprobStore(tmp_path)
    keep.add(b"1" * 16, torch.tensor([-1.0, torch.nan]))
    keep.add(b"2" * 16, torch.tensor([-2.0]))
    keep.flush()
    assert list(LogprobStore(tmp_path)) == [b"2" * 16]


def test_shards_of_several_stores_are_read_together_and_damage_is_passed_over() -> None:
    folder = cache_root() / "reference" / "x"
    one, two = LogprobStore(folder), LogprobStore(folder)
    one.add(b"1" * 16, torch.tensor([-1.0, -2.0]))
    two.add(b"2" * 16, torch.tensor([-3.0]))
    one.flush()
    two.flush()
    one.flush()  # nothing new: no empty shard
    (folder / "torn.safetensors").write_bytes(b"\x10\x00\x00")
    (folder / ".unfinished.partial").write_bytes(b"half")
    both = LogprobStore(folder)
    assert {key: value.tolist() for key, value in both.items()} == {b"1" * 16: [-1.0, -2.0], b"2" * 16: [-3.0]}
    assert len(list(folder.glob("*.safetensors"))) == 2


def test_a_kill_leaves_whole_shards_only(tmp_path: Path) -> None:
    script = textwrap.dedent("""
        import os, sys, torch
        from pathlib import Path
        from preftree.train import store
        store.SHARD_ANSWERS = 4
        keep = store.LogprobStore(Path(sys.argv[1]))
        for i in range(10):
            keep.add(i.to_bytes(16, "big"), torch.full((3,), -float(i)))
        os.kill(os.getpid(), 9)
    """)
    folder = tmp_path / "killed"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", script, str(folder)], env=environment)
    assert done.returncode == -9
    found = LogprobStore(folder)
    assert sorted(int.from_bytes(key, "big") for key in found) == list(range(8))
    assert all(value.tolist() == [-float(int.from_bytes(key, "big"))] * 3 for key, value in found.items())
    assert not list(folder.glob("*.writing"))
