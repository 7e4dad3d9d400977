"""A tiny model with an adapter in folders, and questions about it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from torch.utils import collect_env

from preftree.config.evaluate import EvaluateSettings
from preftree.evaluate.run import run
from tests.support import tiny


@pytest.fixture(scope="session", autouse=True)
def _machine_described_once() -> Iterator[None]:
    """For its results lm-eval asks pip, lscpu and the compiler what is here, which takes longer than our questions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collect_env, "get_pretty_env_info", cache(collect_env.get_pretty_env_info))
        yield


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, a tiny model with a tokenizer that reads any text, and `adapter` on it."""
    from transformers import AutoTokenizer  # noqa: F401 -- imported here for the warning filters of its first import

    place = tmp_path_factory.mktemp("models")
    model = tiny.llama(max_position_embeddings=4096)
    model.save_pretrained(place / "base")
    tiny.word_tokenizer().save_pretrained(place / "base")
    tiny.with_lora(model).save_pretrained(place / "adapter")
    return place


@pytest.fixture
def evaluated(models: Path, samples: Path, tmp_path: Path) -> Callable[..., Path]:
    """`preftree evaluate` on a few questions; returns the folder with the results."""

    def evaluate(name: str, **more: Any) -> Path:
        options = {"tasks": "truthfulqa_mc2", "limit": 2, "device": "cpu", "dtype": "float32", "num_fewshot": 1, **more}
        options.setdefault("data", str(samples / "eval"))
        run(EvaluateSettings(model=str(models / "base"), out=str(tmp_path / name), **options))
        return tmp_path / name

    return evaluate


def words(rng: random.Random, count: int) -> str:
    """Words of `tiny.word_tokenizer`."""
    return " ".join(f"w{rng.randrange(5, tiny.VOCABULARY)}" for _ in range(count))


def asked(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    """lm-eval's requests."""
    return [Instance(kind, {}, args, i, ("task", i, 1)) for i, args in enumerate(arguments)]  # type: ignore[arg-type]
