"""`preftree winrate`: answer, judge in both orders, sum up."""

from __future__ import annotations

import gc
import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from preftree.config.winrate import JudgeServerSettings, WinrateSettings
from preftree.data.chat import Chat
from preftree.data.prompts import AskedPrompt, read_prompts
from preftree.data.record import Turn
from preftree.errors import RunError
from preftree.evaluate.statistics import RESAMPLES
from preftree.hardware.device import choose_device
from preftree.hardware.memory import peak_memory
from preftree.hardware.precision import choose_dtype
from preftree.io.atomic import atomic_file, write_json
from preftree.io.console import Say, next_steps, sayer
from preftree.io.jsonl import json_line
from preftree.io.progress import Progress, amount, clock
from preftree.io.run_folder import make_folder
from preftree.model.adapted import find_run, open_trained
from preftree.model.generate import Decoding, Sampling, answers
from preftree.model.load import load_model, load_tokenizer, resolve
from preftree.model.score import attach
from preftree.samples.opened import conversation_ids
from preftree.winrate.judges import LocalJudge, ServerJudge, Verdict, both_orders, shares
from preftree.winrate.rates import WinRate, win_rate

RESULTS, ROWS = "winrate.json", "verdicts.jsonl"
#: Seeds of the second model's answers begin here, so that a model beside itself is sampled anew.
_OTHER_SEEDS = 1_000_003


def run(settings: WinrateSettings, server: JudgeServerSettings, console: Console | None = None) -> None:
    """Judge two models and show who wins.

    Raises:
        PreftreeError: whatever the user can fix, before anything is computed.
    """
    console = console or Console()
    say, started = sayer(console), time.perf_counter()
    _check_out(settings.out)
    prompts = read_prompts(settings.prompts, settings.limit)
    for name in [*settings.models, *([] if settings.judge_is_server else [settings.judge])]:
        _ = find_run(name) if Path(name).is_dir() else resolve(name)
    say(f"prompts    {len(prompts)} of {settings.prompts}")
    found = []
    for number, name in enumerate(settings.models):
        found.append(_answers(settings, name, prompts, settings.seed + number * _OTHER_SEEDS, say))
    texts = [[answer for answer, _ in side] for side in found]
    rows = list(zip((_conversation(prompt) for prompt in prompts), *texts, strict=True))
    judged = [row for row, (_, one, other) in enumerate(rows) if one != other]
    say(f"judging    {len(judged)} prompts in both orders; {len(rows) - len(judged)} have equal answers and are ties")
    verdicts = _judge(settings, server, [rows[row] for row in judged], console) if judged else []
    by_row: dict[int, dict[str, Any]] = dict(zip(judged, shares(verdicts), strict=True))
    share_Q = np.array([by_row[row]["share"] if row in by_row else 0.5 for row in range(len(rows))])
    lengths = [np.array([length for _, length in side], dtype=float) for side in found]
    rate = win_rate(share_Q, lengths[0], lengths[1])
    unread = sum(not each["read"] for each in by_row.values())
    flipped = sum(each["flipped"] for each in by_row.values())
    _show(console, settings, rate, flipped, unread)
    if settings.out:
        _write(Path(settings.out), settings, rate, rows, by_row)
        say(f"saved      {settings.out}: {RESULTS}, {ROWS}")
    say(f"           in {clock(time.perf_counter() - started)}, peak memory {amount(peak_memory())}")
    one = shlex.quote(settings.models[0])
    next_steps(say, f"preftree samples {one} --prompts {shlex.quote(settings.prompts)}", f"preftree chat {one} --blind")


def _check_out(out: str | None) -> None:
    if out is None:
        return
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise RunError(f"--out {out} is a file. Give a folder.")
    if taken := [name for name in (RESULTS, ROWS) if (folder / name).exists()]:
        raise RunError(f"--out {out} holds {taken[0]} already; nothing is overwritten. Give another folder.")
    make_folder("--out", out)


def _answers(
    settings: WinrateSettings, name: str, prompts: Sequence[AskedPrompt], seed: int, say: Say
) -> list[tuple[str, int]]:
    """A model's answers with their lengths in tokens; the model is gone when this returns."""
    device = choose_device(settings.device).value
    dtype = choose_dtype(device, settings.dtype).value
    say(f"answers    {name}: {len(prompts)} prompts")
    if Path(name).is_dir():
        run = find_run(name)
        model: Any = open_trained(run, device, dtype)
        tokenizer = run.tokenizer() if run.adapter else load_tokenizer(resolve(name))
    else:
        model, tokenizer = load_model(resolve(name), dtype).to(device), load_tokenizer(resolve(name))
    chat = Chat(tokenizer)
    decoding = Decoding(
        settings.max_new_tokens, Sampling(settings.temperature, 0, settings.top_p), (chat.terminator_id,)
    )
    ids = [_ids(chat, settings.system, prompt) for prompt in prompts]
    with attach(model):  # on a CPU its modules are faster while it is attached
        texts = [each.text for each in answers(model, tokenizer, ids, decoding, seed, settings.batch_size)]
    lengths = chat.tokenize(texts)
    del model
    gc.collect()
    return [(text, len(lengths[text])) for text in texts]


def _ids(chat: Chat, system: str | None, prompt: AskedPrompt) -> list[int]:
    return conversation_ids(chat, chat.messages(system if system is not None else prompt.system, prompt.turns))


def _conversation(prompt: AskedPrompt) -> str:
    system = [Turn("system", prompt.system)] if prompt.system else []
    turns = [*system, *prompt.turns]
    return turns[0].content if len(turns) == 1 else "\n\n".join(f"{turn.role}: {turn.content}" for turn in turns)


def _judge(
    settings: WinrateSettings, server: JudgeServerSettings, rows: Sequence[tuple[str, str, str]], console: Console
) -> list[Verdict]:
    asked = both_orders(rows)
    progress = Progress(console, "           judging ", "comparisons")
    if settings.judge_is_server:
        return ServerJudge(settings.judge_model or "", server)(asked, progress)
    device = choose_device(settings.device).value
    model = load_model(resolve(settings.judge), choose_dtype(device, settings.dtype).value).to(device)
    with attach(model) as scorer:
        return LocalJudge(scorer, Chat(load_tokenizer(resolve(settings.judge))))(asked, progress)


def _show(console: Console, settings: WinrateSettings, rate: WinRate, flipped: int, unread: int) -> None:
    one, other = settings.models
    say = sayer(console)
    table = Table(
        title=f"{one} against {other}, judged by {settings.judge_model or settings.judge}", title_justify="left"
    )
    for heading in ("", "share", "95 % interval"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, value, low, high in (
        ("wins, ties counted half", rate.rate, rate.low, rate.high),
        ("the same, length-controlled", rate.controlled, rate.controlled_low, rate.controlled_high),
    ):
        table.add_row(name, f"{100 * value:.1f} %", f"{100 * low:.1f} to {100 * high:.1f}")
    console.print(table)
    say(f"done       {rate.wins} won, {rate.ties} ties, {rate.losses} lost of {rate.prompts} prompts")
    if flipped:
        say(f"           {flipped} ties are verdicts that changed with the order of the answers")
    if unread:
        say(f"           WARNING: {unread} verdicts could not be read and count as ties")


def _write(
    out: Path,
    settings: WinrateSettings,
    rate: WinRate,
    rows: Sequence[tuple[str, str, str]],
    by_row: dict[int, dict[str, Any]],
) -> None:
    with atomic_file(out / ROWS, "w") as file:
        for row, (conversation, one, other) in enumerate(rows):
            verdict = by_row.get(row, {"share": 0.5, "equal": True})
            file.write(json_line({"prompt": conversation, "a": one, "b": other, **verdict}))
    facts = {"a": settings.models[0], "b": settings.models[1], "judge": settings.judge_model or settings.judge}
    write_json(out / RESULTS, {**facts, **asdict(rate), "resamples": RESAMPLES})
