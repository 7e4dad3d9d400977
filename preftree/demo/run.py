"""`preftree demo`: the bundled model, the bundled pairs, one command, before and after side by side.

Training goes through the same stage as `preftree train`, and what is judged afterwards is the adapter read
back from disk. Held-out prompts are worded in ways that no training prompt is.
"""

from __future__ import annotations

import argparse
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from preftree.config.report import ReportSettings
from preftree.config.train import Settings, parse_settings
from preftree.data.chat import Chat
from preftree.data.encode import EncodedPair, encode_pairs
from preftree.data.record import Turn
from preftree.data.sources import load_pairs
from preftree.demo.average import show_average
from preftree.demo.checks import passes
from preftree.demo.rows import DATA_FOLDER, read_split
from preftree.evaluate.preference import PairScores, score_pairs
from preftree.hardware.device import choose_device
from preftree.hardware.precision import choose_dtype
from preftree.io.console import next_steps, sayer
from preftree.io.progress import Progress
from preftree.io.run_folder import RunFolder
from preftree.model.generate import Decoding, answers
from preftree.model.load import load_model, load_tokenizer, resolve
from preftree.model.lora import load_adapter
from preftree.model.score import attach
from preftree.report.run import report
from preftree.train.run import train

#: What the demo trains with: one pass over the pairs, as flags of `preftree train`.
RECIPE = shlex.split("""
    --model_name_or_path smollm2 --num_train_epochs 1 --per_device_train_batch_size 8
    --gradient_accumulation_steps 1 --learning_rate 1e-4 --lr_scheduler_type cosine --warmup_steps 4
    --lora_rank 16 --lora_alpha 16 --lora_dropout 0 --beta 0.5 --max_length 256 --max_prompt_length 192
    --validation_split_percentage 0 --save_strategy no --logging_steps 5
""")
#: Prompts shown with both answers: this many that pass only after training, and one that does not.
IMPROVED = 2


@dataclass(frozen=True)
class HeldoutResult:
    """One model on the held-out prompts."""

    scores: PairScores
    answers: list[str]
    passed: list[bool]

    @property
    def pass_rate(self) -> float:
        return sum(self.passed) / len(self.passed)


def main(argv: Sequence[str]) -> int:
    """Run the demo, or average those that are done; flags of `preftree train` override its recipe."""
    options, flags = _options(argv)
    started = time.perf_counter()
    console = Console(soft_wrap=True)
    if options.average:
        show_average(options.average, console)
        return 0
    place = options.output_dir or _free_folder()
    own = ["--dataset_name", str(DATA_FOLDER / "train.jsonl"), "--output_dir", place, "--seed", str(options.seed)]
    settings = parse_settings([*RECIPE, *own, *flags])
    folder = RunFolder(place)
    _check_free(folder, settings)
    source = resolve(settings.model.model_name_or_path or "")
    tokenizer = load_tokenizer(source)
    rows = read_split("heldout")
    pairs, _ = encode_pairs(
        load_pairs(str(DATA_FOLDER / "heldout.jsonl")), tokenizer, max_length=256, max_prompt_length=192
    )

    device = choose_device(settings.train.device).value
    base = load_model(source, choose_dtype(device, settings.model.torch_dtype).value).to(device)
    console.print(f"before     {len(rows)} held-out prompts: scoring the pairs, answering greedily …")
    before = _judge(console, base, tokenizer, rows, pairs)
    console.print(f"before     {100 * before.pass_rate:.0f} % of the answers pass their check\n", highlight=False)
    train(settings, console, commands=False)
    tuned = load_adapter(base, str(folder.output_dir))
    console.print("\nafter      the adapter read back from disk, the same prompts …")
    after = _judge(console, tuned, tokenizer, rows, pairs)
    _show(console, rows, before, after)
    _record(folder, rows, before, after)
    seconds = time.perf_counter() - started
    say = sayer(console)
    say(f"\nsaved      {folder.output_dir}: adapter, trainer_state.json, run/samples.jsonl  ({seconds:.0f} s)")
    report(ReportSettings([str(folder.output_dir)], title="preftree demo"), console)
    next_steps(say, *next_commands(str(folder.output_dir)))
    return 0


def next_commands(output_dir: str) -> list[str]:
    """What to do after the demo: talk to its adapter, score it, then check and train on data of one's own."""
    adapter = shlex.quote(output_dir)
    return [
        f"preftree chat {adapter}",
        f"preftree evaluate --model smollm2 --adapter {adapter} --out {shlex.quote(f'{output_dir}-scores')}",
        "preftree check PAIRS.jsonl --model_name_or_path smollm2 --show 3",
        "preftree train --model_name_or_path smollm2 --dataset_name PAIRS.jsonl --output_dir outputs/mine",
    ]


def _options(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="preftree demo",
        description="Train the bundled model on the bundled pairs and show what it learned. "
        "Other flags are those of `preftree train` and override the demo's own.",
        allow_abbrev=False,
    )
    parser.add_argument("--output_dir", help="where the adapter goes (outputs/demo, or demo-2 and so on)")
    parser.add_argument("--seed", type=int, default=42, help="of data order and LoRA weights (%(default)s)")
    parser.add_argument(
        "--average", nargs="+", metavar="RUN", help="train nothing: average demos of several seeds, with a paired test"
    )
    return parser.parse_known_args(argv)


def _free_folder() -> str:
    """outputs/demo, or the first of demo-2, demo-3, … that is not there: the demo may be run again at once."""
    names = (Path("outputs") / (f"demo-{n}" if n > 1 else "demo") for n in count(1))
    return str(next(path for path in names if not path.exists()))


def _check_free(folder: RunFolder, settings: Settings) -> None:
    """Refuse an occupied folder now and not after the first half of the demo."""
    overwrite = settings.train.overwrite_output_dir
    folder.check(resume=False, overwrite=overwrite, fingerprint=settings.fingerprint())


def _judge(
    console: Console, model: Any, tokenizer: Any, rows: list[dict[str, str]], pairs: list[EncodedPair]
) -> HeldoutResult:
    chat = Chat(tokenizer)
    texts = [chat.prompt(chat.messages(row["system"] or None, [Turn("user", row["question"])])) for row in rows]
    ids = chat.tokenize(texts)
    with attach(model) as scorer:  # for generation too: on a CPU its modules are faster while it is attached
        found = answers(
            model,
            tokenizer,
            [chat.with_bos(ids[text]) for text in texts],
            Decoding(40, stops=(chat.terminator_id,)),
            batch_size=26,
            progress=Progress(console, "           answering ", "prompts"),
        )
        scores = score_pairs(scorer, pairs, progress=Progress(console, "           scoring ", "pairs"))
    answered = [answer.text for answer in found]
    passed = [passes(row["check"], answer) for row, answer in zip(rows, answered, strict=True)]
    return HeldoutResult(scores, answered, passed)


def _show(console: Console, rows: list[dict[str, str]], before: HeldoutResult, after: HeldoutResult) -> None:
    table = Table(title="Held-out prompts, worded like none in training", title_justify="left")
    for heading, justify in (("", "left"), ("before", "right"), ("after", "right")):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    total = len(rows)
    table.add_row(
        "greedy answers that pass their check",
        *(f"{sum(v.passed)}/{total} = {100 * v.pass_rate:.0f} %" for v in (before, after)),
    )
    table.add_row(
        "chosen answer more probable than rejected",
        *(f"{100 * v.scores.accuracy:.0f} %" for v in (before, after)),
    )
    table.add_row("margin, log p(chosen) − log p(rejected)", *(f"{v.scores.margin:+.1f}" for v in (before, after)))
    console.print()
    console.print(table)
    for row in showcase([row["kind"] for row in rows], before.passed, after.passed):
        answers = Table(
            title=Text(f"{rows[row]['kind']}: {rows[row]['question']}"), title_justify="left", show_lines=True
        )
        for heading, verdict in (("before", before), ("after", after)):
            answers.add_column(f"{heading} ({'passes' if verdict.passed[row] else 'fails'})", ratio=1)
        answers.add_row(Text(before.answers[row]), Text(after.answers[row]))
        console.print()
        console.print(answers)


def showcase(kinds: Sequence[str], before: Sequence[bool], after: Sequence[bool]) -> list[int]:
    """Which prompts to show: `IMPROVED` that pass only after training, of different kinds where there are, and one
    that does not: one that passed before, or else one that never did."""
    fates = list(zip(before, after, strict=True))
    improved = {kinds[row]: row for row in range(len(fates) - 1, -1, -1) if fates[row] == (False, True)}
    better = sorted(improved.values())[:IMPROVED]
    better += [row for row, fate in enumerate(fates) if fate == (False, True) and row not in better]
    worse = [fates.index(fate) for fate in ((True, False), (False, False)) if fate in fates]
    return [*better[:IMPROVED], *worse[:1]]


def _record(folder: RunFolder, rows: list[dict[str, str]], before: HeldoutResult, after: HeldoutResult) -> None:
    """The verdicts into the run folder, where a report can find them."""
    for row, first, second, ok_first, ok_second in zip(
        rows, before.answers, after.answers, before.passed, after.passed, strict=True
    ):
        folder.sample({"kind": row["kind"], "question": row["question"], "before": first, "after": second,
                       "passed_before": ok_first, "passed_after": ok_second})  # fmt: skip
    summary: dict[str, float] = {}
    for when, verdict in (("before", before), ("after", after)):
        summary[f"heldout_pass_rate_{when}"] = verdict.pass_rate
        summary[f"heldout_accuracy_{when}"] = verdict.scores.accuracy
        summary[f"heldout_margin_{when}"] = verdict.scores.margin
    folder.log(summary)
