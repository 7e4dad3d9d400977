"""The documentation against the project: commands parse, flags and links exist, the picture is the code's own."""

from __future__ import annotations

import importlib.util
import re
from functools import cache
from pathlib import Path

import pytest

from tests.support.documented import PAGES, ROOT, Command, commands, parse

#: Flags of other programs that the pages mention in passing.
FOREIGN = {
    *("--include_path", "--gpus-per-node", "--gpus-per-task", "--nproc_per_node", "--mpirun_hostfile", "--cpu"),
    *("--num_processes", "--ntasks", "--gpus"),
    *("--fp8", "--flash_attention_fp8", "--context_parallel_size", "--adafactor"),  # optimum-habana's, refused
}


@pytest.mark.parametrize("command", commands(), ids=str)
def test_every_command_is_read_by_its_own_parser(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    parse(command.text)


@pytest.mark.parametrize(
    "text",
    [
        "preftree train --beat 1",
        "preftree check D --fixx OUT",
        "preftree evaluate --modle M",
        "preftree chek D",
        "python benchmarks/train_vs_trl.py --nothing 1",
        "python scripts/nothing.py",
        "make nothing",
        "make test WORKER=2",
        'pip install "preftree[evil]"',
        "docker build --build-arg NOTHING=1 .",
        "torchrun --nproc_per_node 8 dpo_clm.py --beat 1",
        "runs/nothing.sh",
        "unknown --flag",
    ],
)
def test_a_wrong_command_would_be_found(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BaseException):  # noqa: B017,PT011 -- each parser has its own error, some exit
        parse(text)


@cache
def known_flags() -> set[str]:
    """Every flag that a source file of ours spells out or declares as a field, and those of TrainingArguments."""
    from transformers import TrainingArguments

    files = [path for folder in ("preftree", "benchmarks", "scripts") for path in (ROOT / folder).rglob("*.py")]
    text = "\n".join(path.read_text("utf-8") for path in [*files, ROOT / "gaudi_spawn.py", ROOT / "Makefile"])
    fields = {*re.findall(r"^    (\w+): ", text, re.MULTILINE), *TrainingArguments.__dataclass_fields__}
    found = {*re.findall(r"--[a-z][\w-]*", text), *(f"--{name}" for name in fields), *FOREIGN}
    return {flag.replace("-", "_") for flag in found}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_flags_in_prose_exist(page: Path) -> None:
    prose = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    spans = re.findall(r"`([^`\n]+)`", prose)
    named = {flag for span in spans for flag in re.findall(r"(?<!\S)--[a-z][\w-]*", span)}
    known = known_flags()
    unknown = {flag for flag in named if flag.replace("-", "_") not in known}  # --no-cache turns --cache off
    assert {flag for flag in unknown if f"__{flag[5:]}".replace("-", "_") not in known} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if re.match(r"https?:", target):
            continue
        name, _, anchor = target.partition("#")
        linked = (page.parent / name).resolve() if name else page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text("utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, target


def test_the_index_names_every_page() -> None:
    index = (ROOT / "docs/README.md").read_text("utf-8")
    missing = [path.name for path in (ROOT / "docs").glob("*.md") if f"]({path.name})" not in index]
    assert missing == ["README.md"]


def test_the_readme_is_short_and_names_what_is_there() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.splitlines()) <= 150
    map_ = text.split("## Map of the code")[1].split("## To change X")[0]
    folders = {path.name for path in (ROOT / "preftree").iterdir() if path.is_dir() and path.name != "__pycache__"}
    named = set(re.findall(r"`(?:preftree/)?([\w/]+)/`", map_))
    assert folders <= {name.split("/")[0] for name in named} | {name.split("/")[-1] for name in named}
    # Files that the tables name exist, wherever the row says they are.
    for name in re.findall(r"`((?:preftree/)?[\w/]+\.py)`", text):
        places = (ROOT / name, ROOT / "preftree" / name, *(ROOT / "preftree").rglob(name))
        assert any(place.exists() for place in places), name


def test_the_picture_is_drawn_by_the_code() -> None:
    spec = importlib.util.spec_from_file_location("draw_token_tree", ROOT / "scripts" / "draw_token_tree.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert (ROOT / "docs" / "token_tree.svg").read_text("utf-8") == script.drawing()


def test_the_readme_counts_the_formats() -> None:
    from preftree.data.formats import FORMATS

    assert f"in any of {len(FORMATS)}\npreference formats" in (ROOT / "README.md").read_text("utf-8")
