"""What a trainer trains on: encoded pairs in memory, or encoded as they are read from a stream."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch.utils.data import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from preftree.config.choices import LIST_RULE, PAIR_RULES
from preftree.data.encode import EncodedPair, PairEncoder
from preftree.data.record import PreferencePair
from preftree.data.rows import IDS, encode_stream, pairs_from_rows
from preftree.errors import DataError, SettingsError
from preftree.forest import Pair
from preftree.train.rows import VISION, RowEncoder, is_trl_row


class PairDataset(Dataset[dict[str, Any]]):
    """Encoded pairs in memory; rows and columns look as in a `datasets.Dataset` with TRL's columns.

    Args:
        pairs: as the step takes them.
        by_prompt: keep the pairs of a prompt together while training (see `order`).
    """

    column_names = IDS

    def __init__(self, pairs: Sequence[Pair], by_prompt: bool = False) -> None:
        self.pairs, self.by_prompt = pairs, by_prompt

    @property
    def encoded(self) -> Sequence[Pair]:
        """What a data loader reads."""
        return self.pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: int | str) -> Any:
        """A row as a dict, or a column as a list."""
        if isinstance(key, str):
            return [list(getattr(pair, key)) for pair in self.pairs]
        return {name: list(getattr(self.pairs[key], name)) for name in self.column_names}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))


@dataclass(frozen=True, eq=False)
class Encoding:
    """How rows become token ids.

    Args:
        max_length: of prompt and answer together; None for no limit.
        truncation_mode: keep_start cuts answers at their end, keep_end prompts at their start.
        lists: rows with ranked answers are lists of all of them, else pairs of the best and the worst.
        vocabulary: tokens that the model has an embedding for, which rows of token ids must keep to.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int | None
    truncation_mode: str
    lists: bool = False
    vocabulary: int | None = None

    def encode(self, rows: Iterable[Any], name: str, report: list[str]) -> Iterator[EncodedPair]:
        """The pairs of rows of any format, in order; reads no further ahead than a batch.

        Args:
            report: what became of the rows is added at the end, in sentences.

        Raises:
            DataError: a row that is no preference pair.
        """
        first = next(iter(rows), None)
        if isinstance(first, Mapping) and (is_trl_row(first) or not VISION.isdisjoint(first)):
            encoder = RowEncoder(self.tokenizer, self.max_length, self.truncation_mode, self.vocabulary, name)
            yield from encoder.encode(rows)
            report += encoder.report.summary()
            return
        rule = LIST_RULE if self.lists else PAIR_RULES[0]
        pairs = rows if isinstance(first, PreferencePair) else pairs_from_rows(rows, name=name, pair_rule=rule)
        other = PairEncoder(self.tokenizer, max_length=self.max_length, truncation_mode=self.truncation_mode)
        yield from encode_stream(pairs, other)
        report += other.report.summary()


class StreamedPairs(IterableDataset[dict[str, Any]]):
    """Pairs of a stream; rows look as in a `datasets.IterableDataset` with TRL's columns.

    Args:
        rows: a `datasets.IterableDataset` or anything else that can be iterated anew for each epoch.
        name: for messages.
    """

    column_names = IDS

    def __init__(self, rows: Iterable[Mapping[str, Any]], encoding: Encoding, name: str) -> None:
        self.encoded = PairStream(rows, encoding, name)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return ({name: list(getattr(pair, name)) for name in self.column_names} for pair in self.encoded)


class PairStream(IterableDataset[EncodedPair]):
    """The pairs themselves, as the step takes them, encoded as they are read: no further ahead than a batch of rows."""

    def __init__(self, rows: Iterable[Mapping[str, Any]], encoding: Encoding, name: str) -> None:
        self.rows, self.encoding, self.name = rows, encoding, name

    def __iter__(self) -> Iterator[EncodedPair]:
        return self.encoding.encode(self.rows, self.name, [])

    def set_epoch(self, epoch: int) -> None:
        """Passed on to a stream that shuffles."""
        if hasattr(self.rows, "set_epoch"):
            self.rows.set_epoch(epoch)


def is_stream(data: Any) -> bool:
    """Can it only be read from its beginning on?"""
    return not hasattr(data, "__len__")


def encode_dataset(
    data: Any, encoding: Encoding, name: str, say: Callable[[str], None] | None = None
) -> PairDataset | StreamedPairs:
    """A data set as the trainer takes it.

    Args:
        data: a `datasets.Dataset` or `IterableDataset`, a list of rows, encoded pairs, or the pairs that
            `load_pairs` returns.
        name: for messages, such as "train_dataset".
        say: told what became of the rows.

    Raises:
        DataError: a row that is no preference pair, or no pair is left.
        TypeError: no data set.
    """
    if isinstance(data, PairDataset | StreamedPairs):
        return data
    if isinstance(data, str | bytes | Mapping) or not isinstance(data, Iterable):
        raise TypeError(
            f"`{name}` must be a `Dataset` or `IterableDataset` of the datasets library, a list of rows, or what "
            f"preftree.load_pairs returns. Got `{type(data).__name__}` instead."
        )
    if is_stream(data):
        list(encoding.encode(list(islice(data, 1)), name, []))  # a stream of something else is refused at once
        return StreamedPairs(data, encoding, name)
    if isinstance(next(iter(data), None), EncodedPair):
        return PairDataset(data)  # type: ignore[arg-type]
    report: list[str] = []
    pairs = list(encoding.encode(data, name, report))
    if say is not None:
        for line in report:
            say(f"data       {name}: {line}")
    if not pairs:
        raise DataError(f"{name}: no pair is left ({'; '.join(report) or 'it has no rows'}).")
    return PairDataset(pairs)


def collate(pairs: list[Pair]) -> dict[str, list[Pair]]:
    """A batch stays a list of pairs; forests are planted in the step, where the budget is known."""
    return {"pairs": pairs}


def named_set(sets: Any, name: str) -> Any:
    """One of several evaluation sets. Raises SettingsError where there is none of this name."""
    known = sets if isinstance(sets, Mapping) else {}
    if name not in known:
        those = f"those that were given are {', '.join(known)}" if known else "`eval_dataset` is not several by name"
        raise SettingsError(f"There is no evaluation set named {name!r}: {those}.")
    return known[name]
