"""`make audit` without PyPI: one sentence, not a list of packages that nobody knows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts import advisories


@pytest.mark.parametrize(
    ("content", "code", "piece"),
    [
        ({"vulnerabilities": [{"id": "PYSEC-2018-28"}]}, 0, ""),
        ({"info": {}}, 3, "lists none"),
        (None, 3, "No such file"),
    ],
    ids=["reached", "a mirror without advisories", "not reached"],
)
def test_what_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: object, code: int, piece: str
) -> None:
    page = tmp_path / "json"
    if content is not None:
        page.write_text(json.dumps(content))
    assert advisories.main(page.as_uri()) == code
    said = capsys.readouterr().err
    assert piece in said
    assert said.count("\n") == (code != 0)
    assert ("nothing was audited" in said) == (code != 0)
