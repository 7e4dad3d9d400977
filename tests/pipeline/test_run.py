"""`preftree run`: what runs, what is skipped and why, through the command; the tasks' commands run in this process."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from preftree.cli import app
from preftree.io.console import IN_PIPELINE, next_steps
from preftree.pipeline import run as runner
from preftree.pipeline.digest import Digests
from preftree.pipeline.file import read_pipeline
from tests.support.command import write_inputs

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:accelerate.*")
ROOT = Path(__file__).parents[2]


class Commands:
    """Stands in for `run_process`: notes the commands, and leaves what they would leave."""

    def __init__(self) -> None:
        self.seen: list[list[str]] = []
        self.environments: list[dict[str, str]] = []
        self.fail: dict[str, int] = {}

    def __call__(self, words: list[str], **more: Any) -> SimpleNamespace:
        ours = words[words.index("preftree") + 1 :]
        self.seen.append(ours)
        self.environments.append(more["env"])
        if code := self.fail.pop(ours[0], 0):
            return SimpleNamespace(returncode=code)
        values = dict(itertools.pairwise(ours))
        made = {
            "check": "{--html}", "train": "{--output_dir}/adapter_model.safetensors",
            "evaluate": "{--out}/m/results_1.json", "compare": "{--out}/compare.json", "report": "{--out}",
        }[ours[0]].format(**values)  # fmt: skip
        Path(made).parent.mkdir(parents=True, exist_ok=True)
        # Another content for other flags and another adapter, as of the real commands; places do not matter.
        adapter = Path(values.get("--adapter", "")) / "adapter_model.safetensors"
        content = json.dumps([word for word in ours if "/" not in word])
        Path(made).write_text(content + (adapter.read_text() if adapter.is_file() else ""))
        if ours[0] == "train":
            (Path(values["--output_dir"]) / "run").mkdir(exist_ok=True)
            (Path(values["--output_dir"]) / "run/config.json").write_text(content)
        return SimpleNamespace(returncode=0)

    def names(self) -> list[str]:
        names, self.seen = [words[0] for words in self.seen], []
        return names


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> Commands:
    found = Commands()
    monkeypatch.setattr(runner, "run_process", found)
    return found


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    (tmp_path / "pairs.jsonl").write_text("data\n")
    (tmp_path / "heldout.jsonl").write_text("held out\n")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/weights").write_text("weights")
    return write(tmp_path)


def write(folder: Path, **changes: Any) -> Path:
    content = {
        "output": str(folder / "out"), "model": str(folder / "model"), "data": str(folder / "pairs.jsonl"),
        "heldout": str(folder / "heldout.jsonl"), "check": None,
        "train": {"beta": 0.2, "max_length": 700, "bf16": False},
        "evaluate": {"tasks": "arc_challenge"}, "report": None, **changes,
    }  # fmt: skip
    path = folder / "pipeline.yaml"
    path.write_text(yaml.safe_dump({name: value for name, value in content.items() if value != "absent"}))
    return path


def go(path: Path, *flags: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["run", str(path), *flags])
    return result.exit_code, result.output + result.stderr


ALL = ["check", "train", "evaluate", "evaluate", "compare", "report"]


def test_all_stages_run_once_with_what_the_pipeline_says(pipeline: Path, commands: Commands) -> None:
    code, said = go(pipeline)
    assert code == 0, said
    check, train, before, after, compare, report = commands.seen
    folder = pipeline.parent
    assert [words[0] for words in commands.seen] == ALL
    assert check[1:4] == [str(folder / "pairs.jsonl"), "--model_name_or_path", str(folder / "model")]
    assert check[check.index("--max_length") + 1] == "700"
    assert train[train.index("--validation_file") + 1] == str(folder / "heldout.jsonl")
    assert train[train.index("--bf16") + 1] == "false"
    assert "--adapter" not in before
    assert after[after.index("--adapter") + 1] == train[train.index("--output_dir") + 1]
    assert compare[1:3] == [before[before.index("--out") + 1], after[after.index("--out") + 1]]
    assert report[report.index("--compare") + 1] == compare[compare.index("--out") + 1]
    commands.names()
    code, said = go(pipeline)
    assert (code, commands.names()) == (0, [])
    assert said.count("unchanged") == 6
    assert said.splitlines()[-3:] == [  # in place of what each stage would name
        f"next       preftree chat {train[train.index('--output_dir') + 1]}",
        f"           preftree samples {train[train.index('--output_dir') + 1]}",
        "           preftree merge {0} --out {0}-merged".format(train[train.index("--output_dir") + 1]),
    ]
    assert all(environment[IN_PIPELINE] for environment in commands.environments)


def test_a_stage_names_no_next_command(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    next_steps(said.append, "preftree check D")
    assert said == ["next       preftree check D"]
    monkeypatch.setenv(IN_PIPELINE, "1")
    next_steps(said.append, "preftree check D")
    assert len(said) == 1


def test_a_changed_setting_runs_what_depends_on_it_and_says_why(pipeline: Path, commands: Commands) -> None:
    go(pipeline)
    commands.names()
    train = {"beta": 0.3, "max_length": 700, "bf16": False}
    code, said = go(write(pipeline.parent, train=train), "--dry-run")
    assert commands.names() == []
    assert "train      would run: --beta was 0.2, now 0.3" in said
    assert "after      would run, since train would" in said
    assert said.count("unchanged") == 2  # check and before
    go(write(pipeline.parent, train=train))
    assert commands.names() == ["train", "evaluate", "compare", "report"]
    code, _ = go(write(pipeline.parent))  # switched back: everything is still there
    assert (code, commands.names()) == (0, [])


def test_changed_contents_count_and_names_do_not(pipeline: Path, commands: Commands) -> None:
    go(pipeline)
    commands.names()
    (pipeline.parent / "heldout.jsonl").touch()
    go(pipeline)
    assert commands.names() == []
    (pipeline.parent / "pairs.jsonl").write_text("other data\n")
    said = go(pipeline)[1]
    assert "content of data was" in said
    assert commands.names()[:2] == ["check", "train"]


def test_what_was_deleted_or_damaged_is_made_again(pipeline: Path, commands: Commands) -> None:
    go(pipeline)
    commands.names()
    (table,) = pipeline.parent.glob("out/compare-*/compare.json")
    table.write_text("damaged")
    said = go(pipeline)[1]
    assert "what it made is another now" in said
    assert commands.names() == ["compare"]
    (report,) = pipeline.parent.glob("out/report-*/report.html")
    report.unlink()
    assert "what it made is gone" in go(pipeline)[1]
    assert commands.names() == ["report"]


def test_an_interrupted_pipeline_goes_on_in_the_same_folder(pipeline: Path, commands: Commands) -> None:
    commands.fail["train"] = -15
    code, said = go(pipeline)
    assert code == 143
    assert "goes on from here" in said
    first = commands.seen[-1]
    commands.names()
    code, said = go(pipeline)
    assert "it was interrupted, and goes on" in said
    assert commands.seen[0] == first
    assert commands.names() == ALL[1:]


def test_a_check_that_finds_faults_stops_and_says_how_to_go_on(pipeline: Path, commands: Commands) -> None:
    commands.fail["check"] = 1
    code, said = go(pipeline)
    assert code == 1
    assert "--from train" in said
    commands.names()
    assert go(pipeline, "--from", "train")[0] == 0
    assert commands.names() == ALL[1:]


def test_from_and_only_choose_stages(pipeline: Path, commands: Commands) -> None:
    code, said = go(pipeline, "--only", "report")
    assert code == 2
    assert "train has left nothing" in said
    go(pipeline)
    commands.names()
    assert go(pipeline, "--from", "evaluate")[0] == 0
    assert commands.names() == ALL[2:]
    assert go(pipeline, "--only", "report")[0] == 0
    assert commands.names() == ["report"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"outptu": "x"}, "outptu is no part of a pipeline. Did you mean output?"),
        ({"model": "absent"}, "model is missing"),
        ({"train": {"beat": 1}}, "train: --beat"),
        ({"train": {"output_dir": "x"}}, "train: output_dir is set by the pipeline"),
        ({"train": "yes"}, "train: write 'flag: value' lines below it"),
        ({"train": "absent"}, "train: the section is missing"),
        ({"report": {"format": "pdf"}}, "report: --format must be one of"),
        ({"evaluate": {"limit": 0}}, "evaluate: --limit must be at least 1"),
        ({"data": {"a": 1}}, "data must be a text"),
    ],
)
def test_mistakes_are_found_before_anything_runs(
    pipeline: Path, commands: Commands, changes: dict[str, Any], message: str
) -> None:
    code, said = go(write(pipeline.parent, **changes))
    assert code == 2
    assert message in " ".join(said.split())
    assert commands.seen == []


def test_files_that_are_no_pipelines_are_one_message(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text("a: [1\n")
    (tmp_path / "list.yaml").write_text("- 1\n")
    for name, message in (("p.yaml", "is not YAML (line"), ("list.yaml", "must hold"), ("no.yaml", "cannot be read")):
        code, said = go(tmp_path / name)
        assert code == 2
        assert message in " ".join(said.split())


@pytest.mark.parametrize("name", ["small.yaml", "reproduce.yaml"])
def test_the_pipelines_of_the_project_have_no_mistake(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    pipeline = read_pipeline(Path("runs") / name)
    assert set(pipeline.flags) >= {"check", "train", "evaluate", "report"}


def test_a_hash_is_of_content_and_names(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text("1")
        (tmp_path / name / ".hidden").write_text(name)
    digests = Digests(tmp_path / "digests.json")
    same = digests.of(str(tmp_path / "a"))
    assert digests.of(str(tmp_path / "b")) == same
    (tmp_path / "b/x").write_text("2")
    assert digests.of(str(tmp_path / "b")) != same
    (tmp_path / "a/x").rename(tmp_path / "a/y")
    assert digests.of(str(tmp_path / "a")) != same
    assert digests.of("org/model") == "named org/model"


def test_from_init_to_the_report_with_the_real_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    words = ["init", "--model", str(inputs / "model"), "--dataset_name", str(inputs / "pairs.jsonl")]
    made = CliRunner().invoke(app, words)
    assert made.exit_code == 0, made.output + made.stderr
    assert "is not overwritten" in CliRunner().invoke(app, words).stderr
    content = yaml.safe_load(Path("pipeline.yaml").read_text())
    assert content["train"]["max_prompt_length"] == 64
    content["train"] |= {
        "max_steps": 2,
        "use_cpu": True,
        "sample_tokens": 4,
        "sample_prompts": 2,
        "eval_strategy": "no",
    }
    Path("pipeline.yaml").write_text(yaml.safe_dump(content))

    def here(command: list[str], **more: Any) -> SimpleNamespace:
        result = CliRunner().invoke(app, command[command.index("preftree") + 1 :])
        return SimpleNamespace(returncode=result.exit_code)

    monkeypatch.setattr(runner, "run_process", here)
    code, said = go(Path("pipeline.yaml"), "--from", "train")
    assert code == 0, said
    (report,) = Path("outputs/mine").glob("report-*/report.html")
    assert "Answers before and after" in report.read_text("utf-8")
