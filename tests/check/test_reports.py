"""The numbers of a report against an independent count, on every real file and on small ones made for it."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from preftree.check.quick import quick_check
from preftree.check.report import FINE, NOTE, SKIPPED, SPOILS, Finding, Report
from preftree.check.run import check
from preftree.check.tokens import sampling_error
from preftree.check.views import counted
from preftree.config.check import parse_check_settings
from preftree.data.encode import encode_pairs
from preftree.data.record import PreferencePair, Turn
from preftree.data.sources import load_pairs
from preftree.errors import DataError
from tests.support import tiny

FILES = ("orca_pairs", "conversational", "mixed_pairs", "ultrafeedback_scored")


def run(*words: str | Path) -> Report:
    return check(parse_check_settings([str(word) for word in words]), Console(file=io.StringIO()))[0]


def by_key(report: Report) -> dict[str, Finding]:
    assert len({finding.key for finding in report.findings}) == len(report.findings)
    return {finding.key: finding for finding in report.findings}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def plain(row: dict[str, Any]) -> tuple[str, str, str]:
    """Prompt, chosen and rejected of a row of the samples, however it is laid out."""

    def text(value: Any) -> str:
        return value if isinstance(value, str) else "\x00".join(turn["content"] for turn in value)

    prompt = text(row.get("prompt", row.get("question")))
    return f"{row.get('system') or ''}\x00{prompt}", text(row["chosen"]), text(row["rejected"])


@pytest.mark.parametrize("name", FILES)
def test_real_files_against_an_independent_count(samples: Path, name: str) -> None:
    path = samples / "pref" / f"{name}.jsonl"
    rows = [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]
    tied = [row for row in rows if "score_chosen" in row and row["score_chosen"] == row["score_rejected"]]
    against = [row for row in rows if "score_chosen" in row and row["score_chosen"] < row["score_rejected"]]
    triples = [plain(row) for row in rows if row not in tied and row not in against]
    lengths = [(len(chosen), len(rejected)) for _, chosen, rejected in triples if chosen != rejected]
    longer = sum(a > b for a, b in lengths) + sum(a == b for a, b in lengths) / 2
    prompts = Counter(prompt for prompt, _, _ in triples)
    expected = {
        "broken_rows": 0,
        "score_ties": len(tied),
        "empty_answer": sum(not (plain(row)[1].strip() and plain(row)[2].strip()) for row in rows),
        "empty_prompt": sum(not plain(row)[0].strip("\x00 \n") for row in rows),
        "identical_answers": sum(plain(row)[1] == plain(row)[2] for row in rows),
        "duplicate_pairs": sum(count - 1 for count in Counter(triples).values()),
        "contradictory_pairs": sum((p, r, c) in set(triples) for p, c, r in triples if c != r),
        "duplicate_prompts": sum(count - 1 for count in prompts.values()),
    }
    report = run(path)
    found = by_key(report)
    assert (report.rows, report.pairs) == (len(rows), len(triples))
    assert {key: found[key].count for key in expected} == expected
    assert f"{longer / len(lengths):.3f}" in found["length_bias"].detail
    mojibake = {"orca_pairs": 2, "conversational": 1, "mixed_pairs": 1}  # read by eye
    assert found["mojibake"].count == mojibake.get(name, 0)


def test_the_table_of_the_docs(samples: Path, repo_root: Path) -> None:
    text = (repo_root / "docs/data.md").read_text("utf-8")
    section = text.split("What it says of six small public files")[1].split("\n## ")[0]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.split("\n") if line.startswith("| `")]
    files = {path.stem for path in (samples / "pref").glob("*.jsonl")}
    assert {name.strip("`") for name, *_ in lines} == files
    for name, formats, *counts, spoils, notes in lines[:-1]:
        path = samples / "pref" / f"{name.strip('`')}.jsonl"
        report = run(path, "--eval_data", samples / "eval", "--near_duplicates")
        assert [formats, *counts] == [", ".join(report.formats), str(report.rows), str(report.pairs)], name
        for level, cell in ((SPOILS, spoils), (NOTE, notes)):
            assert cell == ("; ".join(f"{counted(f)}: {f.what}" for f in report.of(level)) or "nothing"), name
    with pytest.raises(DataError, match="is one answer to each question"):
        run(samples / "pref" / f"{lines[-1][0].strip('`')}.jsonl")


def test_orca_prefers_short_answers_and_ultrafeedback_has_ties(samples: Path) -> None:
    orca = by_key(run(samples / "pref/orca_pairs.jsonl"))["length_bias"]
    assert (orca.level, orca.count, orca.total) == (SPOILS, 49, 60)
    assert "shorter" in orca.what
    assert "82% of the pairs" in orca.why
    report = run(samples / "pref/ultrafeedback_scored.jsonl")
    assert (by_key(report)["score_ties"].count, report.pairs) == (10, 50)
    assert by_key(report)["length_bias"].level == FINE


def test_kto_labels_and_questions_without_answers(samples: Path) -> None:
    report = run(samples / "pref/kto_labelled.jsonl")
    found = by_key(report)
    assert (report.pairs, found["no_opposite"].count, found["no_pairs"].level) == (0, 40, SPOILS)
    # Of pairs nothing is claimed where there is none.
    unseen = {finding.key for finding in report.of(SKIPPED)}
    assert unseen > {"duplicate_pairs", "contradictory_pairs", "duplicate_prompts", "length_bias", "language"}


def test_damage_is_found_in_answers_that_have_no_opposite(tmp_path: Path) -> None:
    row = {"prompt": "Where do they drink coffee?", "completion": "In a caf\u00c3\u00a9.", "label": True}
    rows = [row, {**row, "prompt": "Who?", "completion": " "}, {**row, "prompt": "Why?", "completion": "So."}]
    found = by_key(run(write(tmp_path / "labels.jsonl", rows)))
    assert found["no_opposite"].count == 3
    assert found["mojibake"].places == ["labels.jsonl:1"]
    assert found["empty_answer"].places == ["labels.jsonl:2"]


def test_tokens_against_encoding(samples: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from preftree.model import load

    tokenizer = tiny.word_tokenizer()
    monkeypatch.setattr(load, "load_tokenizer", lambda *a, **k: tokenizer)
    path = samples / "pref/orca_pairs.jsonl"
    options = {"max_length": 300, "max_prompt_length": 120}
    flags = ["--max_length", "300", "--max_prompt_length", "120", "--model_name_or_path", "x"]
    report = run(path, *flags)
    found = by_key(report)
    pairs = load_pairs(str(path))
    # One by one, and the sizes from lengths that cut nothing.
    alone = [encode_pairs([pair], tokenizer, **options) for pair in pairs]
    whole, _ = encode_pairs(pairs, tokenizer, max_length=10**6, max_prompt_length=10**5)
    assert found["prompts_cut"].count == sum(report.prompts_cut for _, report in alone) > 0
    assert found["answers_cut"].count == sum(report.responses_cut > 0 for _, report in alone) > 0
    assert found["boundary_repairs"].count == sum(report.boundary_repairs > 0 for _, report in alone)
    assert report.facts["answer tokens"] == sum(report.response_tokens for _, report in alone)
    prompts = sorted(len(pair.prompt_ids) for pair in whole)
    longest = prompts[int(0.99 * (len(prompts) - 1) + 0.999)]
    assert report.facts["suggested max_prompt_length"] == -(-longest // 64) * 64
    assert next(report.facts[name] for name in report.facts if name.startswith("padded")) > 1.2
    # A sample says so, and stands for all.
    small = run(path, *flags, "--token_sample", "30")
    assert by_key(small)["prompts_cut"].sampled == 30
    assert small.facts["answer tokens"] == pytest.approx(report.facts["answer tokens"], rel=0.3)
    assert "from 30 of 60 pairs" in small.facts["tokens are estimated"]
    assert "tokens are estimated" not in report.facts
    every = run(path, *flags, "--token_sample", "0")
    assert by_key(every)["prompts_cut"].count == found["prompts_cut"].count


def test_the_error_of_a_sample_is_as_often_exceeded_as_it_says() -> None:
    random = np.random.default_rng(0)
    used = random.gamma(2.0, 300.0, 2000).astype(np.int32)
    within = 0
    for _ in range(400):
        sample = random.choice(used, 200, replace=False)
        (said,) = sampling_error(sample, len(used)).values()
        within += abs(sample.mean() / used.mean() - 1) * 100 <= float(said.split()[1])
    assert 0.91 < within / 400 < 0.99
    assert sampling_error(used, len(used)) == sampling_error(used[:1], len(used)) == {}


GOOD = {
    "prompt": "How do clouds keep their shape over a lake?",
    "chosen": "It scatters light.",
    "rejected": "It is paint, I hope.",
}


def test_what_is_planted_is_found(tmp_path: Path) -> None:
    rows = [
        {**GOOD, "prompt": f"Question {i}?"} for i in range(20)
    ] + [
        GOOD,  # 21
        GOOD,  # 22 a duplicate
        {**GOOD, "chosen": GOOD["rejected"], "rejected": GOOD["chosen"]},  # 23 a contradiction
        {**GOOD, "chosen": " "},  # 24
        {**GOOD, "rejected": GOOD["chosen"]},  # 25
        {**GOOD, "prompt": ""},  # 26
        {**GOOD, "chosen": "I'm sorry, but I can't help with that."},  # 27
        {**GOOD, "chosen": "caf\u00c3\u00a9"},  # 28
        {**GOOD, "chosen": "bell \x07"},  # 29
        {**GOOD, "chosen": "half \ud83d"},  # 30
        {**GOOD, "chosen": "lost \ufffd"},  # 31
        {**GOOD, "chosen": "Hi<|im_end|>"},  # 32
    ]  # fmt: skip
    report = run(write(tmp_path / "planted.jsonl", rows))
    found = {key: [p.split(":")[1] for p in f.places] for key, f in by_key(report).items() if f.count and f.places}
    prompts = [str(n) for n in (22, 23, 24, 25, 27, 28, 29, 30, 31, 32)]
    assert found == {
        "duplicate_pairs": ["22"],
        "contradictory_pairs": ["21", "22", "23"],
        "duplicate_prompts": prompts,
        "empty_answer": ["24"],
        "identical_answers": ["25"],
        "empty_prompt": ["26"],
        "chosen_refusal": ["27"],
        "mojibake": ["28"],
        "control_characters": ["29"],
        "lone_surrogates": ["30"],
        "characters_lost_in_decoding": ["31"],
        "control_tokens": ["32"],
    }
    assert report.spoiled
    assert "contradictory" in report.verdict()


def test_overlap_with_test_sets(samples: Path, tmp_path: Path) -> None:
    text = (samples / "eval/arc_challenge_test.jsonl").read_text("utf-8")
    questions = [json.loads(line)["question"] for line in text.split("\n") if line]
    rows = [{**GOOD, "prompt": f"Q{i}: {question}"} for i, question in enumerate(questions[:3])] + [GOOD] * 2
    report = run(write(tmp_path / "leak.jsonl", rows), "--eval_data", samples / "eval")
    found = by_key(report)["test_overlap"]
    assert (found.count, found.level) == (3, SPOILS)
    assert "3 of 60 ARC" in found.detail
    clean = by_key(run(samples / "pref/mixed_pairs.jsonl", "--eval_data", samples / "eval"))["test_overlap"]
    assert clean.count == 0


def test_near_duplicates_are_looked_for_on_request(tmp_path: Path) -> None:
    text = " ".join(f"word{i}" for i in range(60))
    rows = [{**GOOD, "prompt": text}, {**GOOD, "prompt": text}, {**GOOD, "prompt": f"{text} again"}, GOOD]
    path = write(tmp_path / "near.jsonl", rows)
    assert by_key(run(path))["near_duplicate_prompts"].level == "skipped"
    found = by_key(run(path, "--near_duplicates"))["near_duplicate_prompts"]
    assert found.places == ["near.jsonl:3"]


def test_k_answers_and_rules(tmp_path: Path) -> None:
    answers = [{"response": f"answer {'x' * score}", "score": score} for score in (1, 4, 4, 2)]
    path = write(tmp_path / "k.jsonl", [{"prompt": f"Q{i}", "responses": answers} for i in range(3)])
    assert [run(path, "--pair_rule", rule).pairs for rule in ("best_worst", "best_each", "all")] == [3, 6, 15]
    assert run(path, "--pair_rule", "all", "--min_margin", "1").pairs == 12
    assert by_key(run(path, "--min_margin", "3"))["no_margin"].count == 3
    assert by_key(run(path, "--pair_rule", "all"))["duplicate_prompts"].count == 0


def test_several_files_have_places_of_their_own(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [GOOD, {**GOOD, "chosen": ""}])
    write(tmp_path / "b.jsonl", [{**GOOD, "prompt": "Other?"}, {**GOOD, "rejected": ""}, GOOD])
    write(tmp_path / "test.jsonl", [GOOD])
    report = run(tmp_path)
    assert by_key(report)["empty_answer"].places == ["a.jsonl:2", "b.jsonl:2"]
    assert by_key(report)["duplicate_pairs"].places == ["b.jsonl:3"]
    assert any("test.jsonl" in note for note in report.notes)
    assert run(tmp_path, "--max_rows", "3").rows == 3


def test_the_cheap_part_for_training() -> None:
    pairs = [PreferencePair(None, (Turn("user", f"q{i}"),), "y" * 9, "no", "f", i) for i in range(40)]
    first, warning = quick_check(pairs, "data.jsonl")
    assert "the longer answer is the chosen one (100.0 %)" in first
    assert "WARNING" in warning
    assert warning.endswith("see: preftree check data.jsonl")
    even = [PreferencePair(p.system, p.turns, "a" * 4, "b" * 4, "f", p.row) for p in pairs]
    assert quick_check(even, "d") == ["check      no length bias, no contradictions, no duplicates"]
    flipped = [PreferencePair(p.system, p.turns, p.rejected, p.chosen, "f", p.row) for p in even[:2]]
    assert "contradictory" in quick_check([*even, *flipped], "d")[0]


def test_levels() -> None:
    assert {finding.level for finding in run_levels()} == {SPOILS, NOTE, FINE}


def run_levels() -> list[Finding]:
    from preftree.check.report import Measure, make_finding

    measure = Measure("x", "y", spoils=0.5, note=0.1)
    return [make_finding("k", measure, count, 100) for count in (0, 9, 10, 49, 50, 100)]


# --- what README invites to: one function and one line ---------------------------------------------


def test_any_number_of_checks_of_rows_and_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forty more of each: nothing counts on their hits fitting into a byte or a word."""
    from preftree.check.report import Measure
    from preftree.check.rows import ROW_CHECKS
    from preftree.check.tokens import TOKEN_CHECKS
    from preftree.model import load

    monkeypatch.setattr(load, "load_tokenizer", lambda *a, **k: tiny.word_tokenizer())
    for n in range(40):
        monkeypatch.setitem(
            ROW_CHECKS, f"row_{n}", (lambda record, pairs: "7" in record.turns[0].content, Measure("r", ""))
        )
        monkeypatch.setitem(TOKEN_CHECKS, f"token_{n}", (lambda fate: fate.sizes[1] > 4, Measure("t", "")))
    rows = [{**GOOD, "prompt": f"Question {n}?", "chosen": "so " * n} for n in range(1, 9)]
    report = run(write(tmp_path / "some.jsonl", rows), "--model_name_or_path", "x")
    found = by_key(report)
    for n in range(40):
        assert found[f"row_{n}"].places == ["some.jsonl:7"]
        assert found[f"token_{n}"].places == [f"some.jsonl:{row}" for row in range(4, 9)]


def test_what_a_finding_is_called_decides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and the actions of --fix do not follow from labels: other words, the same report and the same files."""
    from dataclasses import replace

    from preftree.check.rows import DAMAGE_CHECKS, ROW_CHECKS
    from preftree.check.run import main

    rows = [GOOD, {**GOOD, "chosen": "caf\u00c3\u00a9"}, {**GOOD, "prompt": "Who?", "chosen": ""}]
    path = write(tmp_path / "in.jsonl", rows)
    before = by_key(run(path))
    main([str(path), "--fix", str(tmp_path / "a.jsonl")])
    for checks in (ROW_CHECKS, DAMAGE_CHECKS):
        for name, (test, measure) in list(checks.items()):
            monkeypatch.setitem(
                checks, name, (test, replace(measure, what=f"dropped (no pair is left) {name}", why=""))
            )
    after = by_key(run(path))
    main([str(path), "--fix", str(tmp_path / "b.jsonl")])
    assert before.keys() == after.keys()
    assert all(key.isidentifier() for key in after)
    assert [after[key].rows.tolist() for key in after] == [before[key].rows.tolist() for key in before]
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    assert "café" in (tmp_path / "b.jsonl").read_text("utf-8")


def test_the_losses_that_it_suggests_are_losses(tmp_path: Path) -> None:
    from preftree.check.sets import LENGTH_LOSSES
    from preftree.train.losses import LOSSES

    assert set(LENGTH_LOSSES) <= set(LOSSES)
    rows = [{**GOOD, "prompt": f"Question {i}?", "chosen": "so it is " * 9} for i in range(20)]
    why = by_key(run(write(tmp_path / "long.jsonl", rows)))["length_bias"].why
    assert all(name in why for name in LENGTH_LOSSES)


def test_rows_are_quoted_where_it_shows(tmp_path: Path) -> None:
    """The prompt tells which row it is; of damage and of left-over tokens the place itself is quoted."""
    long = "word " * 60
    rows = [
        {**GOOD, "prompt": f"{long}?"},
        {**GOOD, "prompt": "Who?", "chosen": f"{long}caf\u00c3\u00a9 {long}"},
        {**GOOD, "prompt": "When?", "rejected": f"{long}<|im_end|> {long}"},
        {**GOOD, "prompt": "Where?", "chosen": ""},
        {**GOOD, "prompt": "How?", "chosen": "I'm sorry, but I can't help with that."},
        {**GOOD, "prompt": f"{long}?"},
    ]
    found = by_key(run(write(tmp_path / "some.jsonl", rows)))
    quoted = {key: [example.text for example in finding.examples] for key, finding in found.items() if finding.examples}
    assert quoted["empty_answer"] == ["Where?"]
    assert quoted["chosen_refusal"] == ["I'm sorry, but I can't help with that."]
    assert "caf\u00c3\u00a9" in quoted["mojibake"][0]
    assert "<|im_end|>" in quoted["control_tokens"][0]
    assert quoted["duplicate_pairs"][0].startswith("word word")
    assert max(len(text) for texts in quoted.values() for text in texts) <= 74  # one line of a terminal


def test_how_rows_were_read_is_said_with_their_places(tmp_path: Path) -> None:
    """A dialogue as one text, a message list stored as text: as the reader of the data reports them."""
    turns = "\n\nHuman: Why is it so?\n\nAssistant: Because.\n\nHuman: Are you sure?\n\nAssistant:"
    rows = [{**GOOD, "prompt": f"Question {i}?"} for i in range(5)] + [{**GOOD, "prompt": turns}]
    report = run(write(tmp_path / "hh.jsonl", rows))
    (found,) = (finding for finding in report.of(NOTE) if finding.key.startswith("read: "))
    assert "dialogue" in found.what
    assert found.places == ["hh.jsonl:6"]
