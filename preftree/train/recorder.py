"""What a training run leaves for its report, beside its metrics: lengths, margins of single pairs, the extreme ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from preftree.data.encode import EncodedPair
from preftree.io.atomic import atomic_file, write_json
from preftree.io.jsonl import append_jsonl, read_jsonl
from preftree.io.optional import OptionalWrites
from preftree.io.run_folder import RunFolder
from preftree.train.health import answer_lengths, end_tokens, objective_facts
from preftree.train.inputs import EncodedSplits
from preftree.train.pair_log import PairLog
from preftree.train.trainer import DPOTrainer

#: Pairs shown as texts, of each set and of each end.
EXAMPLES = 6
#: Tokens of a text that are shown.
EXCERPT_TOKENS = 400


class RunRecorder(TrainerCallback):
    """Writes data.json, facts.json, pairs.jsonl and examples.json into the run folder; only the first rank writes.

    Args:
        splits: what is trained and validated on.
    """

    def __init__(self, folder: RunFolder, splits: EncodedSplits) -> None:
        self.folder, self.said, self.data = folder, list(splits.said), splits.facts
        self.sets: dict[str, Sequence[EncodedPair]] = {"train": splits.train, "eval": splits.validation}
        self.log: PairLog | None = None
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.objective: dict[str, Any] = {}
        self.write = OptionalWrites(lambda text: None, "")

    def follow(self, trainer: DPOTrainer) -> None:
        """Record the runs of a trainer."""
        self.log = trainer.pair_log = PairLog(self.sets, trainer.ranks)
        self.tokenizer = trainer.processing_class
        self.write = OptionalWrites(trainer.say, "training goes on, and the report will lack what it holds")
        self.objective = objective_facts(trainer.step.objective, trainer.args, trainer.ranks.count)
        trainer.add_callback(self)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        """Begin with the records of the checkpoint that the run goes on from."""
        if not state.is_world_process_zero:
            return
        self.write(self.folder.folder, lambda: self.folder.write_data(self.data))
        self.write(self.folder.facts_path, self._write_facts)
        self.write(self.folder.pairs_path, lambda: self._forget_later(state.global_step))

    def _write_facts(self) -> None:
        lengths = {name: asdict(answer_lengths(pairs, self._ends())) for name, pairs in self.sets.items() if pairs}
        with atomic_file(self.folder.facts_path, "w") as file:  # compact: it holds a number per answer
            json.dump({"objective": self.objective, "lengths": lengths, "said": self.said}, file, ensure_ascii=False)

    def _forget_later(self, step: int) -> None:
        """Leave out records of steps after `step`, which are done again."""
        records = read_jsonl(self.folder.pairs_path, skip_damaged=True)
        self.folder.reset_pairs([record for record in records if record["step"] <= step])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any) -> None:
        if control.should_save:  # a run that goes on from this checkpoint does not know the records of before
            self._drain(state)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any) -> None:
        self._drain(state)

    def _drain(self, state: TrainerState) -> None:
        if self.log is None:
            return
        records = self.log.drain()  # all ranks together
        if state.is_world_process_zero:
            self.write(self.folder.pairs_path, lambda: self._append(state.global_step, records))

    def _append(self, step: int, records: Sequence[dict[str, Any]]) -> None:
        for record in records:
            append_jsonl(self.folder.pairs_path, {"step": step, **record})

    def write_examples(self) -> None:
        """The pairs with the smallest and the largest margins of each set, as texts."""
        if self.log is None or self.tokenizer is None:
            return
        shown = []
        for name, pairs in self.sets.items():
            for place in self.log.extremes(name, EXAMPLES):
                chosen, rejected = self.log.last[name][place]
                shown.append({"set": name, "pair": place, "source": pairs[place].source, "chosen_reward": chosen,
                              "rejected_reward": rejected, **_texts(pairs[place], self.tokenizer)})  # fmt: skip
        write_json(self.folder.examples_path, shown)

    def _ends(self) -> set[int | None]:
        assert self.tokenizer is not None
        return end_tokens(self.tokenizer)


def _texts(pair: EncodedPair, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Prompt and answers as they are trained on; of a long prompt its end is shown, of an answer its beginning."""

    def text(ids: Sequence[int], keep_end: bool = False) -> str:
        cut = len(ids) > EXCERPT_TOKENS
        some = ids[-EXCERPT_TOKENS:] if keep_end else ids[:EXCERPT_TOKENS]
        shown = str(tokenizer.decode(list(some)))
        return shown if not cut else f"… {shown}" if keep_end else f"{shown} …"

    return {
        "prompt": text(pair.prompt_ids, keep_end=True),
        "chosen": text(pair.chosen_ids),
        "rejected": text(pair.rejected_ids),
    }
