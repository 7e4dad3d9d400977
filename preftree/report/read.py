"""A run folder as a report sees it. What a run has not written yet is empty, so that it may still be going on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from preftree.errors import DataError, RunError
from preftree.health.evidence import AnswerLengths, Evidence, PairMargins, SampledAnswers
from preftree.health.findings import Diagnosis, diagnose
from preftree.io.jsonl import read_jsonl
from preftree.io.run_folder import RunFolder


@dataclass(frozen=True)
class PromptAnswers:
    """One fixed prompt with its answer before and after training.

    Args:
        how: greedy, or sampled.
        passed: did the answers pass their check, before and after; None where nothing checked them.
        tokens: of both answers; None where they were not counted.
    """

    prompt: str
    before: str
    after: str
    how: str = "greedy"
    passed: tuple[bool, bool] | None = None
    tokens: tuple[int, int] | None = None


@dataclass(frozen=True)
class ExamplePair:
    """A pair of the run as texts, with its last rewards."""

    set: str
    pair: int
    source: str
    chosen_reward: float
    rejected_reward: float
    prompt: str
    chosen: str
    rejected: str

    @property
    def margin(self) -> float:
        return self.chosen_reward - self.rejected_reward


@dataclass(frozen=True)
class RunView:
    """Everything that one run has written.

    Args:
        name: the output folder, as short as tells runs apart.
        records, evaluations: log records of training and of the held-out pairs.
        rewards: set -> place of the pair -> its rewards, first and last seen, as ((chosen, rejected), …).
    """

    name: str
    folder: Path
    settings: Mapping[str, Mapping[str, Any]]
    fingerprint: str
    identity: Mapping[str, Any]
    environment: Mapping[str, Any]
    facts: Mapping[str, Any]
    records: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    rewards: dict[str, dict[int, tuple[tuple[float, float], tuple[float, float]]]]
    samples: list[dict[str, Any]]
    examples: list[ExamplePair]
    finished: int | None
    lengths: dict[str, AnswerLengths] = field(default_factory=dict)

    @cached_property
    def evidence(self) -> Evidence:
        """What the findings are functions of."""
        held_out = self.lengths.get("eval")
        known = {name: value for name, value in self.facts.get("objective", {}).items() if name != "max_steps"}
        return Evidence(
            records=self.records,
            evaluations=self.evaluations,
            progress=self.progress,
            lengths=self.lengths.get("train"),
            evaluated_pairs=held_out.pairs if held_out else 0,
            answers=self.sampled,
            **known,
        )

    @property
    def step(self) -> int:
        return max((int(record.get("step", 0)) for record in (*self.records, *self.evaluations)), default=0)

    @property
    def progress(self) -> float:
        """Share of the planned steps; 1 for a finished run."""
        planned = self.facts.get("objective", {}).get("max_steps")
        return 1.0 if self.finished is not None or not planned else self.step / planned

    @cached_property
    def diagnoses(self) -> list[Diagnosis]:
        return diagnose(self.evidence)

    def margins(self, name: str) -> PairMargins:
        """Last margins of a set's pairs, with their length differences where these are known."""
        lengths, found = self.lengths.get(name), self.rewards.get(name, {})
        known = min(len(lengths.chosen), len(lengths.rejected)) if lengths else 0
        places = [place for place in found if place < known]
        if lengths is None:
            return PairMargins((), ())
        return PairMargins(
            [found[place][1][0] - found[place][1][1] for place in places],
            [lengths.chosen[place] - lengths.rejected[place] for place in places],
        )

    @cached_property
    def sampled(self) -> SampledAnswers:
        """Lengths of greedy answers before and now, and log-ratios of drawn ones."""
        both = [answers.tokens for answers in self.answers if answers.how == "greedy" and answers.tokens]
        newest = max((s.get("step", 0) for s in self.samples if s.get("model") == "policy"), default=0)
        ratios = [s["log_ratio"] for s in self.samples if s.get("step") == newest and s.get("log_ratio") is not None]
        return SampledAnswers([b for b, _ in both], [a for _, a in both], ratios)

    @cached_property
    def answers(self) -> list[PromptAnswers]:
        """Answers to the fixed prompts before and after, newest first where there are several rounds."""
        found = [_checked(sample) for sample in self.samples if "before" in sample]
        rounds: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
        for sample in self.samples:
            if "mode" in sample:
                rounds.setdefault((sample["prompt"], sample["mode"]), {})[sample["model"]] = sample
        for (prompt, mode), by_model in rounds.items():
            if {"reference", "policy"} <= by_model.keys():
                before, after = by_model["reference"], by_model["policy"]
                tokens = (int(before["tokens"]), int(after["tokens"]))
                found.append(PromptAnswers(prompt, before["answer"], after["answer"], mode, None, tokens))
        return found

    def answer_lengths(self) -> list[tuple[int, float]]:
        """Mean tokens of greedy answers by step, the reference's as step 0."""
        by_step: dict[int, list[int]] = {}
        for sample in self.samples:
            if sample.get("mode") == "greedy":
                step = 0 if sample["model"] == "reference" else int(sample["step"])
                by_step.setdefault(step, []).append(int(sample["tokens"]))
        return [(step, sum(tokens) / len(tokens)) for step, tokens in sorted(by_step.items())]


def read_runs(folders: Iterable[str]) -> list[RunView]:
    """The runs in some output folders, with names that tell them apart.

    Raises:
        RunError: a folder holds no run, or a file of it is damaged.
    """
    paths = [Path(folder) for folder in folders]
    return [read_run(path, name) for path, name in zip(paths, short_names(paths), strict=True)]


def short_names(paths: Sequence[Path]) -> list[str]:
    """The parts of paths that tell them apart: a/x/run and b/y/run are a/x and b/y; a path by itself is its last part.

    The same path twice has one name.
    """
    parts = [path.resolve().parts for path in paths]
    if len(set(parts)) < 2:
        return [each[-1] for each in parts]
    shortest = min(map(len, parts))
    first = next((n for n in range(shortest) if len({each[n] for each in parts}) > 1), shortest - 1)
    last = next((n for n in range(1, shortest - first) if len({each[-n] for each in parts}) > 1), shortest - first)
    return ["/".join(each[first : len(each) - last + 1]) for each in parts]


def read_run(path: Path, name: str = "") -> RunView:
    """The run in an output folder. Raises RunError where there is none, or where a file is damaged."""
    folder = RunFolder(path.parent if path.name == "run" and (path / "config.json").is_file() else path)
    if not folder.config_path.is_file():
        raise RunError(f"{path}: no training run here (run/config.json); name the --output_dir of preftree train.")
    try:
        view = _read(folder, name or folder.output_dir.resolve().name)
        _ = view.diagnoses, view.answer_lengths()  # whatever is damaged is found here
        return view
    except (DataError, ValueError, TypeError, KeyError, AttributeError, OSError) as problem:
        raise RunError(
            f"{folder.folder} is damaged ({type(problem).__name__}: {problem}). Train again, or restore the folder."
        ) from problem


def _read(folder: RunFolder, name: str) -> RunView:
    config, facts = _json(folder.config_path, {}), _json(folder.facts_path, {})
    log = [_numbers(record) for record in folder.metrics()]
    return RunView(
        name=name,
        folder=folder.output_dir,
        settings=config.get("settings") or {},
        fingerprint=str(config.get("fingerprint", "")),
        identity=_json(folder.identity_path, {}),
        environment=_json(folder.env_path, {}),
        facts=facts,
        records=[record for record in log if "rewards/margins" in record],
        evaluations=[record for record in log if "eval_rewards/margins" in record],
        rewards=_rewards(read_jsonl(folder.pairs_path)),
        samples=list(folder.samples()),
        examples=[ExamplePair(**each) for each in _json(folder.examples_path, [])],
        finished=folder.finished(),
        lengths={key: AnswerLengths(**value) for key, value in facts.get("lengths", {}).items()},
    )


def _json(path: Path, default: Any) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else default


def _numbers(record: Mapping[str, Any]) -> dict[str, Any]:
    """A log record with its words for what is not finite as numbers again."""
    words = {"nan", "inf", "-inf"}
    return {key: float(value) if isinstance(value, str) and value in words else value for key, value in record.items()}


def _rewards(records: Iterable[Mapping[str, Any]]) -> dict[str, dict[int, Any]]:
    found: dict[str, dict[int, Any]] = {}
    for record in records:
        known = found.setdefault(record["set"], {})
        for place, chosen, rejected in zip(record["pair"], record["chosen"], record["rejected"], strict=True):
            now = (float(chosen), float(rejected))
            known[place] = (known[place][0] if place in known else now, now)
    return found


def _checked(sample: Mapping[str, Any]) -> PromptAnswers:
    """An answer of the demo, which a check judged."""
    passed = (bool(sample["passed_before"]), bool(sample["passed_after"])) if "passed_before" in sample else None
    return PromptAnswers(
        str(sample.get("question", sample.get("prompt", ""))), sample["before"], sample["after"], passed=passed
    )
