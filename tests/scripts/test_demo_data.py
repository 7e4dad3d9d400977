"""The code that made the demo's data: wordings and pools, equal seeds, and the shipped rows from it."""

from __future__ import annotations

import hashlib
import json
import re
import string
from itertools import product
from pathlib import Path

import pytest
import torch

from preftree.data.chat import Chat
from preftree.data.record import Turn
from preftree.demo.checks import passes
from preftree.demo.rows import SPLITS, Split, read_split
from preftree.model.generate import Answer, Decoding, answers
from preftree.model.load import load_model, load_tokenizer, resolve
from preftree.prepare.engines.local import RenderTokens
from preftree.prepare.generate import Request, seed_of
from scripts.demo_data import build as build_module
from scripts.demo_data.build import main
from scripts.demo_data.kinds import KINDS, make_examples
from scripts.demo_data.kinds.pools import CATEGORIES, ECHO_SENTENCES, OPPOSITES, PHRASE_PARTS, SORT_WORDS, TOPICS
from scripts.demo_data.near_miss import balanced, near_miss
from tests.support import tiny

ROWS = {split: read_split(split) for split in SPLITS}


def _plain(text: str) -> str:
    return re.sub(r"\W+", " ", text.lower()).strip()


@pytest.mark.parametrize("split", SPLITS)
def test_the_shipped_prompts_are_those_the_code_makes(split: Split) -> None:
    made = {e.question: e for e in make_examples(split, build_module.Recipe().per_kind[split], seed=0)}
    order = [row["question"] for row in ROWS[split]]
    assert order == [question for question in made if question in set(order)]
    for row in ROWS[split]:
        example = made[row["question"]]
        assert (row["system"], row["chosen"], row["kind"]) == (example.system, example.chosen, example.kind)
        assert json.loads(row["check"]) == example.check


def test_no_heldout_wording_is_in_training() -> None:
    every_train = {_plain(wording) for kind in KINDS for wording in kind.train}
    every_heldout = {_plain(wording) for kind in KINDS for wording in kind.heldout}
    assert not every_train & every_heldout


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_the_wordings_of_a_kind_fill_the_same_slots(kind) -> None:
    def slots(wording: str) -> set[str]:
        return {name for _, name, _, _ in string.Formatter().parse(wording) if name}

    assert len({frozenset(slots(wording)) for wording in kind.train + kind.heldout}) == 1
    assert len(set(kind.train)) >= 4
    assert len(set(kind.heldout)) >= 3


def test_the_pools_of_the_splits_are_apart() -> None:
    def values(split: Split) -> list[set[str]]:
        return [
            {item for category in CATEGORIES[split] for item in category.items},
            {category.plural for category in CATEGORIES[split]},
            {topic.phrase for topic in TOPICS[split]},
            {sentence for topic in TOPICS[split] for sentence in topic.sentences},
            set(ECHO_SENTENCES[split]),
            {" ".join(words) for words in product(*PHRASE_PARTS[split])},
            {word for word, accept in OPPOSITES[split]} | {w for _, accept in OPPOSITES[split] for w in accept},
            set(SORT_WORDS[split]),
        ]

    for trained, held in zip(values("train"), values("heldout"), strict=True):
        assert trained
        assert held
        assert not trained & held


# --- the prompts are made the same way every time ------------------------------------------------


def test_equal_seeds_give_equal_prompts() -> None:
    def digest(seed: int) -> str:
        made = [make_examples(split, 6, seed) for split in SPLITS]
        return hashlib.sha256(repr(made).encode()).hexdigest()

    assert digest(0) == digest(0) != digest(1)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("split", SPLITS)
def test_prompts_of_any_seed_are_distinct_and_their_chosen_answers_pass(split: Split, seed: int) -> None:
    examples = make_examples(split, 6, seed)
    assert len({example.question for example in examples}) == len(examples) == 6 * len(KINDS)
    assert all(passes(example.check, example.chosen) for example in examples)
    assert not any(re.search(r"[{}]", e.question) for e in examples if e.kind != "json")


@pytest.mark.parametrize("split", SPLITS)
def test_a_near_miss_is_wrong_and_no_longer_than_the_right_answer(split: Split) -> None:
    examples = make_examples(split, 28 if split == "train" else 6, seed=0)
    misses = [(example, near_miss(example)) for example in examples]
    for example, miss in misses:
        assert len(miss) <= len(example.chosen)
        assert not passes(example.check, miss)
    assert sum(bool(miss) for _, miss in misses) > 0.85 * len(misses)


def test_near_misses_take_the_place_of_as_many_longer_answers_as_it_takes() -> None:
    examples = make_examples("train", 28, seed=0)
    sampled = [example.chosen + " and more" for example in examples]
    rejected = balanced(examples, sampled)
    shorter = sum(len(text) < len(e.chosen) for e, text in zip(examples, rejected, strict=True))
    longer = sum(len(text) > len(e.chosen) for e, text in zip(examples, rejected, strict=True))
    assert abs(shorter - longer) <= 0.05 * len(examples)
    assert {text for text in rejected if text not in sampled} <= {near_miss(example) for example in examples}
    short = [example.chosen[:1] for example in examples]
    assert balanced(examples, short) == short  # only answers that are too long are replaced


# --- the command ---------------------------------------------------------------------------------


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train.jsonl").write_text("mine")
    assert main(["--out", str(tmp_path)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["train.jsonl"]
    assert (tmp_path / "train.jsonl").read_text() == "mine"


def test_a_folder_without_a_model_is_a_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path / "out"), "--model", str(tmp_path)]) == 2
    assert "config.json" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_build_takes_answers_that_fail_their_check_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    chosen = {example.question: example.chosen for split in SPLITS for example in make_examples(split, 2, 0)}

    class Engine:
        """Says what is right, what is wrong or half a sentence, as the seed has it."""

        def __init__(self, model, chat, sampling, max_new_tokens) -> None:
            self.chat = chat

        def __call__(self, unit) -> list[Answer]:
            asked.extend(prompts := [request.prompt for request in unit])
            right = [next(text for question, text in chosen.items() if question in prompt) for prompt in prompts]
            said = [(text, "No idea at all.", "No id")[r.seed % 3] for text, r in zip(right, unit, strict=True)]
            return [Answer(text, text != "No id") for text in said]

    monkeypatch.setattr(build_module, "TransformersEngine", Engine)
    monkeypatch.setattr(
        build_module, "RenderTokens", lambda chat: lambda messages: (chat.prompt(messages), len(messages))
    )
    tokenizer = tiny.word_tokenizer("{% for m in messages %}{{ m['content'] + ' <eos> ' }}{% endfor %}")
    recipe = build_module.Recipe(per_kind={"train": 2, "heldout": 2})
    rows = build_module.build(None, tokenizer, tmp_path, recipe=recipe)
    for split in SPLITS:
        assert len(KINDS) <= len(rows[split]) <= 2 * len(KINDS)
        assert "No idea at all." in {row["rejected"] for row in rows[split]}
        assert not any(passes(row["check"], row["rejected"]) for row in rows[split])
    assert 0.3 < sum("capital of Italy" in prompt for prompt in asked) / len(asked) < 0.7
    journal = (tmp_path / "train.jsonl").read_bytes()
    (tmp_path / "train.jsonl").write_bytes(journal[: len(journal) // 2])
    assert build_module.build(None, tokenizer, tmp_path, recipe=recipe) == rows
    assert (tmp_path / "train.jsonl").read_bytes() == journal


@pytest.fixture(scope="module")
def bundled(smollm2_folder: Path) -> build_module.TransformersEngine:
    """The engine that draws the rejected answers."""
    source, recipe = resolve("smollm2"), build_module.Recipe()
    tokenizer, model = load_tokenizer(source), load_model(source, torch.float32)
    return build_module.TransformersEngine(model, Chat(tokenizer), recipe.sampling, recipe.max_new_tokens)


def test_the_bundled_model_answers_alike_alone_and_in_a_batch(bundled: build_module.TransformersEngine) -> None:
    model, chat = bundled.model, bundled.chat
    render = RenderTokens(chat)
    asked = [(None, "Echo the following sentence. Nobody saw the fox."), ("Be brief.", "Say yes.")]
    ids = [render(chat.messages(system, [Turn("user", question)]))[0] for system, question in asked]
    decoding = Decoding(4, stops=(chat.terminator_id,))
    batched = answers(model, chat.tokenizer, ids, decoding)
    alone = [answers(model, chat.tokenizer, [one], decoding)[0] for one in ids]
    assert batched == alone
    assert batched[0] == Answer("Nobody saw the fox", False)


def test_the_shipped_rejected_answers_are_those_the_code_draws(bundled: build_module.TransformersEngine) -> None:
    """The three shortest. Rounding differs between processors, but hardly ever by enough to sample another token."""
    recipe, rows = build_module.Recipe(), sorted(ROWS["heldout"], key=lambda row: len(row["rejected"]))
    misses = {e.question: near_miss(e) for e in make_examples("heldout", recipe.per_kind["heldout"], seed=0)}
    own = [row for row in rows if row["rejected"] != misses[row["question"]]]
    shipped = {row["question"]: row["rejected"] for row in own[:3]}
    render = RenderTokens(bundled.chat)
    for number, example in enumerate(make_examples("heldout", recipe.per_kind["heldout"], seed=0)):
        if example.question in shipped:
            key = f"heldout/{number}"
            prompt = build_module._prompt(key, number, example, bundled.chat, recipe.rounds)
            drawn = ""
            for attempt in range(recipe.rounds):
                ids, _ = render(prompt.messages(0, attempt))
                (answer,) = bundled([Request(ids, seed_of(0, key, 0, attempt))])
                drawn = prompt.judge(answer, [])[0]
                if drawn:
                    break
            assert drawn == shipped.pop(example.question)
    assert not shipped
