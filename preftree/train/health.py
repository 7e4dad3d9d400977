"""Health findings while training: the same functions as in reports, asked at every log line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from preftree.data.chat import Chat
from preftree.forest import Pair
from preftree.health.evidence import AnswerLengths, Evidence, SampledAnswers
from preftree.health.findings import Level, diagnose
from preftree.io.console import Say
from preftree.train.config import DPOConfig
from preftree.train.dataset import PairDataset
from preftree.train.given import Data
from preftree.train.objective import Objective
from preftree.train.pair_log import MOST_PAIRS


class HealthWatch(TrainerCallback):
    """Says a warning once, when it begins, and keeps its name for the live line.

    Args:
        objective: as `objective_facts` has it.
        data: what is trained on and evaluated; pairs that are read from a stream are not looked at.
        warnings: names of the warnings so far, which the live line shows.
    """

    def __init__(
        self,
        say: Say,
        objective: dict[str, Any],
        data: Data,
        warnings: list[str],
    ) -> None:
        self.say, self.objective, self.warnings = say, objective, warnings
        self.train, evaluated = (
            each if isinstance(each, PairDataset) else None for each in (data.train, data.evaluation)
        )
        self.evaluated_pairs = len(evaluated) if evaluated is not None else 0
        self.lengths: AnswerLengths | None = None
        self.answers = SampledAnswers()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        tokenizer = others.get("processing_class")
        if state.is_world_process_zero and self.train is not None and tokenizer is not None:
            self.lengths = answer_lengths(self.train.pairs, end_tokens(tokenizer))

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any) -> None:
        if not state.is_world_process_zero:
            return
        history = state.log_history
        evidence = Evidence(
            records=[record for record in history if "rewards/margins" in record],
            evaluations=[record for record in history if "eval_rewards/margins" in record],
            progress=state.global_step / max(state.max_steps, 1),
            lengths=self.lengths,
            evaluated_pairs=self.evaluated_pairs,
            answers=self.answers,
            **self.objective,
        )
        for found in diagnose(evidence):
            if found.level is Level.WARNING and found.key not in self.warnings:
                self.warnings.append(found.key)
                number = found.number[:1].upper() + found.number[1:]
                self.say(f"WARNING    step {state.global_step}: {found.title} {number}.")
                self.say(f"           {found.remedy}")


def objective_facts(objective: Objective, args: DPOConfig, ranks: int) -> dict[str, Any]:
    """What `Evidence` says of the objective."""
    return {
        "beta": objective.settings.beta,
        "reference": objective.needs_reference,
        "pairs_per_step": args.pairs_per_step * ranks,
    }


def end_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int | None]:
    """Tokens of which an answer that was not cut ends with one."""
    return {Chat(tokenizer).terminator_id, tokenizer.eos_token_id}


def answer_lengths(pairs: Sequence[Pair], ends: set[int | None]) -> AnswerLengths:
    """Tokens of prompts and answers, and how many answers were cut: they have no end token."""
    some = pairs[:MOST_PAIRS]
    return AnswerLengths(
        pairs=len(pairs),
        chosen=[len(pair.chosen_ids) for pair in some],
        rejected=[len(pair.rejected_ids) for pair in some],
        prompt=[len(pair.prompt_ids) for pair in some],
        chosen_cut=sum(pair.chosen_ids[-1] not in ends for pair in pairs),
        rejected_cut=sum(pair.rejected_ids[-1] not in ends for pair in pairs),
    )
