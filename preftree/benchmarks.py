"""The four test sets, once: how they are scored, where their rows come from, what a row looks like.

Evaluation, the search for test questions in training data, and the scripts that write local files all read this
table. It imports nothing, so that any of them may.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Benchmark:
    """One test set of the Open LLM Leaderboard's first version.

    Args:
        heading: its name in tables.
        task: the lm-eval task or group whose `metric` with `shots` few-shot examples is the leaderboard's score.
        task_files: lm-eval's tasks that ask these questions, and the YAML file of each below `lm_eval/tasks`.
        files: the local file of each split.
        fields: what lm-eval reads of a row, and so what a local file must hold.
        tested: the split that models are judged by; the others supply few-shot examples.
        hub: the dataset on the Hugging Face hub, and its configuration if it has several.
        more_configs: configurations of `hub` with further test questions, which are not scored here.
        layouts: the ways in which a row can hold its question: the columns whose text it is, and further columns
            by which such a row is recognized.
    """

    heading: str
    task: str
    metric: str
    shots: int
    task_files: Mapping[str, str]
    files: Mapping[str, str]
    fields: tuple[str, ...]
    tested: str
    hub: tuple[str, str | None]
    layouts: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]
    more_configs: tuple[str, ...] = ()

    def question(self, row: Mapping[str, Any]) -> str | None:
        """The text of a row's question, None if it is no row of this test set."""
        for text, others in self.layouts:
            if all(isinstance(row.get(name), str) for name in text) and all(name in row for name in others):
                return " ".join(row[name] for name in text)
        return None


BENCHMARKS: tuple[Benchmark, ...] = (
    Benchmark(
        heading="ARC",
        task="arc_challenge",
        metric="acc_norm",
        shots=25,
        task_files={"arc_challenge": "arc/arc_challenge.yaml"},
        files={"train": "arc_challenge_train.jsonl", "test": "arc_challenge_test.jsonl"},
        fields=("question", "choices", "answerKey"),
        tested="test",
        hub=("allenai/ai2_arc", "ARC-Challenge"),
        layouts=((("question",), ("choices", "answerKey")),),
        more_configs=("ARC-Easy",),
    ),
    Benchmark(
        heading="HellaSwag",
        task="hellaswag",
        metric="acc_norm",
        shots=10,
        task_files={"hellaswag": "hellaswag/hellaswag.yaml"},
        files={"train": "hellaswag_train.jsonl", "validation": "hellaswag_validation.jsonl"},
        fields=("activity_label", "ctx_a", "ctx_b", "endings", "label"),
        tested="validation",
        hub=("Rowan/hellaswag", None),
        layouts=((("ctx",), ("endings",)), (("ctx_a", "ctx_b"), ("endings",))),
    ),
    Benchmark(
        heading="MMLU",
        task="mmlu",
        metric="acc",
        shots=5,
        task_files={"mmlu": "mmlu/default/_mmlu.yaml"},
        files={"dev": "mmlu_dev.jsonl", "test": "mmlu_test.jsonl"},
        fields=("question", "subject", "choices", "answer"),
        tested="test",
        hub=("cais/mmlu", "all"),
        layouts=((("question",), ("subject", "choices", "answer")),),
    ),
    Benchmark(
        heading="TruthfulQA",
        task="truthfulqa_mc2",
        metric="acc",
        shots=0,
        task_files={
            "truthfulqa_mc1": "truthfulqa/truthfulqa_mc1.yaml",
            "truthfulqa_mc2": "truthfulqa/truthfulqa_mc2.yaml",
        },
        files={"validation": "truthfulqa_mc.jsonl"},
        fields=("question", "mc1_targets", "mc2_targets"),
        tested="validation",
        hub=("truthfulqa/truthful_qa", "multiple_choice"),
        layouts=((("question",), ("mc1_targets",)), (("question",), ("best_answer", "incorrect_answers"))),
    ),
)

#: The test set of each of lm-eval's tasks that has a local form.
BY_TASK: dict[str, Benchmark] = {task: benchmark for benchmark in BENCHMARKS for task in benchmark.task_files}

#: Names of `--tasks` that stand for several tasks.
SUITES: dict[str, tuple[str, ...]] = {"openllm": tuple(benchmark.task for benchmark in BENCHMARKS)}


def headings(conjunction: str = "and") -> str:
    """The names of the test sets as in a sentence: 'ARC, HellaSwag, MMLU and TruthfulQA'."""
    names = [benchmark.heading for benchmark in BENCHMARKS]
    return f"{', '.join(names[:-1])} {conjunction} {names[-1]}"


def expand_tasks(names: Sequence[str]) -> list[str]:
    """Task names with suites replaced by their tasks, each once."""
    return list(dict.fromkeys(task for name in names for task in SUITES.get(name, (name,))))
