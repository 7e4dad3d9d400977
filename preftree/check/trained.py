"""Pairs as they are trained on: the very token ids, decoded, prompt and answers apart."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass

from preftree.data.encode import EncodedPair, EncodeReport, PairEncoder, PairFate
from preftree.data.record import PreferencePair


@dataclass(frozen=True, slots=True)
class TokenText:
    """A piece of what is trained on: its token ids, their text with all special tokens, and how many were cut off."""

    ids: list[int]
    text: str
    cut: int


@dataclass(frozen=True, slots=True)
class TrainedPair:
    """One pair as training sees it.

    The sequences are prompt + chosen and prompt + rejected; only the answers' tokens are scored. `reason` says why a
    pair is left out, "" where it is not; then there are no tokens. `notes` say what encoding did to it.
    """

    place: str
    reason: str
    prompt: TokenText | None = None
    chosen: TokenText | None = None
    rejected: TokenText | None = None
    notes: tuple[str, ...] = ()

    @property
    def parts(self) -> list[tuple[str, TokenText]]:
        """The pieces by name; none of a pair that is left out."""
        pieces = {"prompt": self.prompt, "chosen": self.chosen, "rejected": self.rejected}
        return [(name, piece) for name, piece in pieces.items() if piece is not None]


def as_trained(pairs: Sequence[PreferencePair], encoder: PairEncoder) -> list[TrainedPair]:
    """What `encoder` makes of each pair; its report is left as it is."""
    uncounted = copy(encoder)
    uncounted.report = EncodeReport()
    fates = uncounted.encode(pairs)
    return [_trained(pair, fate, encoder) for pair, fate in zip(pairs, fates, strict=True)]


def _trained(pair: PreferencePair, fate: PairFate, encoder: PairEncoder) -> TrainedPair:
    encoded = fate.encoded
    if encoded is None:
        return TrainedPair(pair.source, fate.reason)
    prompt, chosen, rejected = (
        _piece(encoder, ids, whole) for ids, whole in zip(_sides(encoded), fate.sizes, strict=True)
    )
    notes = [f"{fate.repairs} of its answers are encoded on their own"] if fate.repairs else []
    notes += [f"{fate.early_ends} of its answers are ended at an end token in their text"] if fate.early_ends else []
    notes += ["its system text is in the first user turn"] if fate.folded else []
    notes += fate.events
    return TrainedPair(pair.source, "", prompt, chosen, rejected, tuple(notes))


def _sides(pair: EncodedPair) -> tuple[tuple[int, ...], ...]:
    return pair.prompt_ids, pair.chosen_ids, pair.rejected_ids


def _piece(encoder: PairEncoder, ids: Sequence[int], whole: int) -> TokenText:
    text = encoder.chat.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return TokenText(list(ids), str(text), whole - len(ids))
