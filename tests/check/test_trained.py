"""`--show`: the very ids that training gets, decoded; and what is claimed of a tokenizer that was or was not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from preftree.check.run import main
from preftree.data.encode import encode_pairs
from preftree.data.sources import load_pairs
from preftree.errors import SettingsError
from preftree.model.load import load_tokenizer, resolve_tokenizer
from tests.support import tiny

TEMPLATE = (
    "{% for m in messages %}{{ '<turn>' + m['role'] + ' ' + m['content'] + ' <eos> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<turn>assistant ' }}{% endif %}"
)
ROWS = [
    {
        "system": "w39",
        "prompt": " ".join(f"w4{n}" for n in range(20)),
        "chosen": "w31 w32 w33",
        "rejected": "w34 w35 w36 w37 w38 w39",
    },
    {"prompt": "w31 w32", "chosen": "w33", "rejected": "w34"},
    {"prompt": "w31 w33", "chosen": f"{'w33 ' * 15}w51", "rejected": f"{'w33 ' * 15}w52"},
]
LENGTHS = {"max_length": 18, "max_prompt_length": 12}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with a tokenizer of single words, and no weights."""
    tiny.word_tokenizer(TEMPLATE).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def flags(path: Path, model: Path, *more: str) -> list[str]:
    lengths = [word for name, length in LENGTHS.items() for word in (f"--{name}", str(length))]
    return [str(path), "--model_name_or_path", str(model), *lengths, *more]


def test_the_ids_are_those_of_training(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "pairs.jsonl", ROWS)
    tokenizer = load_tokenizer(resolve_tokenizer(str(model)))
    encoded, encoding = encode_pairs(load_pairs(str(path)), tokenizer, **LENGTHS)
    assert encoding.prompts_cut == encoding.responses_cut == 1  # so that cuts are seen here
    main(flags(path, model, "--show", "5", "--json"))
    report = json.loads(capsys.readouterr().out)
    *shown, left_out = report["trained"]
    for pair, said in zip(encoded, shown, strict=True):
        for side in ("prompt", "chosen", "rejected"):
            ids = list(getattr(pair, f"{side}_ids"))
            assert said[side]["ids"] == ids
            assert said[side]["text"] == tokenizer.decode(ids, skip_special_tokens=False)
        assert (said["place"], said["reason"]) == (pair.source, "")
    assert shown[0]["prompt"]["cut"] > 0
    assert shown[0]["rejected"]["cut"] == 1
    assert left_out["place"] == "pairs.jsonl:3"
    assert "identical by cutting" in left_out["reason"]
    # What is shown is not counted twice.
    assert report["tokenized"] == 3
    assert report["facts"]["answer tokens"] == encoding.response_tokens


def test_it_is_shown_to_people(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, page = write(tmp_path / "pairs.jsonl", ROWS), tmp_path / "page.html"
    main(flags(path, model, "--show", "2", "--html", str(page)))
    said = " ".join(capsys.readouterr().out.split())
    for text in (said, page.read_text("utf-8")):
        assert "pairs.jsonl:2" in text
        assert "only the answers' tokens are scored" in text.replace("&#39;", "'")
    assert "chosen 2 tokens: " in said
    assert "w31 w32 <eos> <turn>" in said
    assert "w33 <eos>" in said
    assert "rejected 6 of 7 tokens (cut)" in said
    assert "trained on pairs.jsonl:3" not in said
    assert '<pre class="text chosen">w33' in page.read_text("utf-8")


def test_it_needs_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="--show needs --model_name_or_path"):
        main([str(write(tmp_path / "pairs.jsonl", ROWS)), "--show", "2"])


GOOD = [{"prompt": f"w4{n} w32", "chosen": "w33", "rejected": "w34"} for n in range(8)]
SAMPLED = "Tokens and the chat template were looked at in a random sample of 5 of 8 pairs."
UNSEEN = "Nothing was found in the texts. Tokens and the chat template were not looked at"


@pytest.mark.parametrize(
    ("more", "verdict"),
    [
        ([], "Nothing was found."),
        (["--token_sample", "0"], "Nothing was found."),
        (["--token_sample", "5"], f"Nothing was found. {SAMPLED}"),
    ],
)
def test_nothing_was_found_is_said_of_what_was_looked_at(
    tmp_path: Path, model: Path, more: list[str], verdict: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "pairs.jsonl", GOOD)
    assert main(flags(path, model, "--json", *more)) == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == verdict
    assert main([str(path), "--json", *more]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["verdict"].startswith(UNSEEN)
    skipped = {finding["key"]: finding["what"] for finding in report["findings"] if finding["level"] == "skipped"}
    assert "chat template" in skipped["tokens"]


def test_pairs_that_the_template_refuses_are_counted_by_its_reason(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refusing = "{% if messages | length > 2 %}{{ raise_exception('one question only') }}{% endif %}" + TEMPLATE
    tiny.word_tokenizer(refusing).save_pretrained(model)

    def said(role: str, *texts: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text} for text in texts]

    rows = [
        {"prompt": said("user", f"w4{n}"), "chosen": said("assistant", "w33"), "rejected": said("assistant", "w34")}
        for n in range(8)
    ]
    rows[6]["prompt"] = [*said("user", "w31"), *said("assistant", "w31"), *said("user", "w31")]
    assert main(flags(write(tmp_path / "pairs.jsonl", rows), model, "--json")) == 1
    report = json.loads(capsys.readouterr().out)
    (found,) = (f for f in report["findings"] if f["level"] == "spoils" and "one question only" in f["what"])
    assert (found["count"], found["rows"]) == (1, ["pairs.jsonl:7"])
