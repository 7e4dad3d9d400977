"""What a trainer leaves behind: files of the model, its card, and the logits for `compute_metrics` and `predict`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from preftree.data.rows import IDS
from preftree.forest import Pair
from preftree.io.run_folder import RunFolder
from preftree.publish.card import CardFacts, model_card, run_card
from preftree.train.collator import DataCollatorForPreference
from preftree.train.reference_models import REF_ADAPTER

if TYPE_CHECKING:
    from preftree.train.trainer import DPOTrainer


def save(model: PreTrainedModel | PeftModel, folder: Path, state_dict: dict[str, Tensor] | None) -> None:
    """The adapter that is trained, without its frozen copy, or the whole model."""
    if not isinstance(model, PeftModel):
        model.save_pretrained(str(folder), state_dict=state_dict)
        return
    names = [name for name in model.peft_config if name != REF_ADAPTER]
    # Left to itself, PEFT would ask the hub whether embeddings were resized.
    model.save_pretrained(
        str(folder), state_dict=state_dict, save_embedding_layers=_trains_embeddings(model), selected_adapters=names
    )


def _trains_embeddings(model: PeftModel) -> bool:
    embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
    return any(p.requires_grad for each in embeddings if each is not None for p in each.parameters(recurse=False))


def write_card(trainer: DPOTrainer, name: str | None, dataset: str | None, tags: Sequence[str]) -> None:
    """README.md in the output folder; with all that the run folder says where a command has written one."""
    folder = Path(trainer.args.output_dir or ".")
    folder.mkdir(parents=True, exist_ok=True)
    if RunFolder(folder).config_path.is_file():
        run_card(folder, name, tags).save(folder / "README.md")
        return
    base = str(trainer.scorer.causal.config._name_or_path or "")
    known = base if base and not Path(base).exists() else None
    loss = " + ".join(trainer.loss_types)
    facts = CardFacts(
        name=name or folder.name,
        base=known,
        base_name="A language model",
        library="peft" if isinstance(trainer.model, PeftModel) else "transformers",
        datasets=[dataset] if dataset else [],
        settings={"loss_type": loss, "beta": trainer.beta, "steps": trainer.state.global_step},
        tags=tags,
    )
    model_card(facts).save(folder / "README.md")


class Predictions:
    """Logits of padded sequences and their ids; of each batch chosen answers before rejected ones.

    Args:
        trainer: whose model computes them, with an extra forward pass per batch.
    """

    def __init__(self, trainer: DPOTrainer) -> None:
        self.trainer = trainer
        tokenizer: Any = trainer.processing_class
        self.collator = DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id)
        self._logits: list[Any] = []
        self._labels: list[Any] = []

    def add(self, pairs: Sequence[Pair]) -> None:
        """One batch."""
        trainer = self.trainer
        rows = [{name: list(getattr(pair, name)) for name in IDS} for pair in pairs]
        batch = self.collator(rows)
        ids = batch["input_ids"].to(trainer.args.device)
        with trainer.precision.autocast():
            logits = trainer.scorer.causal(
                input_ids=ids, attention_mask=batch["attention_mask"].to(ids.device), use_cache=False
            ).logits
        if trainer.preprocess_logits_for_metrics is not None:
            logits = trainer.preprocess_logits_for_metrics(logits, ids)
        self._logits.append(logits.float().cpu().numpy())
        self._labels.append(ids.cpu().numpy())

    def arrays(self) -> tuple[Any, Any]:
        """Logits and ids of all batches, (2 · pairs, length, vocabulary) and (2 · pairs, length)."""
        return _stacked(self._logits), _stacked(self._labels)


def _stacked(arrays: Sequence[Any]) -> Any:
    """Batches of different lengths as one array, padded with -100 at the end."""
    longest = max(array.shape[1] for array in arrays)
    return np.concatenate(
        [
            np.pad(each, [(0, 0), (0, longest - each.shape[1]), *[(0, 0)] * (each.ndim - 2)], constant_values=-100)
            for each in arrays
        ]
    )
