"""TRL's batch layout, for scripts that build padded batches themselves. Token trees do not use it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True)
class DataCollatorForPreference:
    """Rows of prompt_ids, chosen_ids and rejected_ids as padded tensors: all chosen sequences, then all rejected ones.

    Args:
        pad_token_id: fills up `input_ids`; the masks are 0 there.
        max_length: of a sequence, cut as `truncation_mode` says; None for no limit.
        truncation_mode: keep_start or keep_end.
        pad_to_multiple_of: of the padded length.
    """

    pad_token_id: int
    max_length: int | None = None
    truncation_mode: str = "keep_start"
    pad_to_multiple_of: int | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """input_ids, attention_mask and completion_mask, each (2 · rows, length); ref_*_logps (rows,) if given."""
        if self.truncation_mode not in ("keep_start", "keep_end"):
            raise ValueError(
                f"Unsupported truncation mode: {self.truncation_mode}, expected 'keep_start' or 'keep_end'"
            )
        keep_start = self.truncation_mode == "keep_start"
        cut = slice(None, self.max_length) if keep_start else slice(-(self.max_length or 0), None)
        sides = [(row["prompt_ids"], row[side]) for side in ("chosen_ids", "rejected_ids") for row in rows]
        ids = [torch.tensor([*prompt, *answer][cut]) for prompt, answer in sides]
        scored = [torch.tensor(([0] * len(prompt) + [1] * len(answer))[cut]) for prompt, answer in sides]
        batch = {
            "input_ids": self._padded(ids, self.pad_token_id),
            "attention_mask": self._padded([torch.ones_like(each) for each in ids], 0),
            "completion_mask": self._padded(scored, 0),
        }
        for name in ("ref_chosen_logps", "ref_rejected_logps"):
            if name in rows[0]:
                batch[name] = torch.tensor([row[name] for row in rows])
        return batch

    def _padded(self, sequences: list[Tensor], value: int) -> Tensor:
        padded = pad_sequence(sequences, batch_first=True, padding_value=value)
        extra = -padded.shape[1] % (self.pad_to_multiple_of or 1)
        return torch.nn.functional.pad(padded, (0, extra), value=value)
