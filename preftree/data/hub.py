"""The rows of a data set on the Hugging Face hub; code from the hub is never run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from preftree.data.files import READERS, Numbered, without_nulls
from preftree.data.local import nothing_there
from preftree.errors import DataError
from preftree.io.hub import offline_if_unreachable

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def may_be_hub_id(name: str) -> bool:
    """Is it spelled like the name of a data set on the hub?"""
    return bool(_HUB_ID.fullmatch(name)) and name[0] not in ".-" and Path(name).suffix.lower() not in READERS


def hub_rows(name: str, options: dict[str, Any]) -> Iterator[Numbered]:
    """The rows, numbered from 1; `options` are those of `datasets.load_dataset`.

    Raises DataError where the data set cannot be loaded.
    """
    import datasets  # here, because it takes seconds and local files do not need it

    try:
        with datasets_offline_if_unreachable():
            rows = datasets.load_dataset(name, **options)
        for number, row in enumerate(rows, start=1):
            yield number, without_nulls(row)
    except Exception as error:
        # The library raises a dozen kinds of error (its own, HTTP, OS, value errors), each of which means
        # that this name, configuration, split or revision could not be had from here.
        said = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{name!r} could not be loaded. Looked for a file or folder: {nothing_there(Path(name))} "
            f"Looked on the hub, split {options['split']!r}: {type(error).__name__}: {said[:400]} "
            f"Without a network, give --dataset_name a local file ({', '.join(READERS)}) or a folder of them."
        ) from error


@contextmanager
def datasets_offline_if_unreachable() -> Iterator[None]:
    """`offline_if_unreachable`, for the switch of datasets too."""
    import datasets

    with offline_if_unreachable() as switched:
        if not switched:
            yield
            return
        datasets.config.HF_HUB_OFFLINE = True
        try:
            yield
        finally:
            datasets.config.HF_HUB_OFFLINE = False
