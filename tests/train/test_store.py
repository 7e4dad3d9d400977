"""The reference cache: found by content, missed when anything of the model changed, whole after a kill."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from preftree.forest import Bundle, Forest
from preftree.io.cache import cache_root
from preftree.model.lora import add_lora
from preftree.model.score import attach, causal_model
from preftree.train.reference import Reference
from preftree.train.store import LogprobStore, weights_key
from tests.support import tiny


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFTREE_CACHE", str(tmp_path / "cache"))


def forest() -> Forest:
    return Forest.of([Bundle((5, 6, 7), ((8, 9), (10,)), (0, 1)), Bundle((5, 6), ((11, 12),), (2,))])


def reference(model: torch.nn.Module) -> Reference:
    return Reference(attach(model), LogprobStore(cache_root() / "reference" / weights_key(causal_model(model))))


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


def test_the_key_changes_with_a_weight_the_dtype_and_the_config() -> None:
    key = weights_key(tiny.llama())
    assert weights_key(tiny.llama()) == key
    changed = tiny.llama()
    with torch.no_grad():
        next(changed.parameters()).view(-1)[0] += 1e-3
    other_config = tiny.llama()
    other_config.config.rope_parameters["rope_theta"] = 12345.0
    keys = {key, weights_key(changed), weights_key(tiny.llama().half()), weights_key(other_config)}
    assert len(keys) == 4
    renamed = tiny.llama()
    renamed.config._name_or_path = "another/name"
    assert weights_key(renamed) == key
    assert weights_key(causal_model(add_lora(tiny.llama(), rank=2))) == key


def test_shards_of_several_stores_are_read_together_and_damage_is_passed_over() -> None:
    folder = cache_root() / "reference" / "x"
    one, two = LogprobStore(folder), LogprobStore(folder)
    one.add(b"1" * 16, torch.tensor([-1.0, -2.0]))
    two.add(b"2" * 16, torch.tensor([-3.0]))
    one.flush()
    two.flush()
    one.flush()  # nothing new: no empty shard
    (folder / "torn.safetensors").write_bytes(b"\x10\x00\x00")
    (folder / "unfinished.writing").write_bytes(b"half")
    both = LogprobStore(folder)
    assert {key: value.tolist() for key, value in both.items()} == {b"1" * 16: [-1.0, -2.0], b"2" * 16: [-3.0]}
    assert len(list(folder.glob("*.safetensors"))) == 3


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
