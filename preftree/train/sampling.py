"""Answers to fixed prompts while training: the reference's once, the policy's every so many steps, into the run folder.

Each prompt is answered greedily and once by drawing at temperature 1 with a seed of its own, the same in every round,
so that what changes is the model. For a drawn answer y, log π(y)/r(y) is an estimate of KL(π‖r) without bias.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from preftree.config.train import Settings
from preftree.data.chat import Chat
from preftree.data.encode import EncodedPair
from preftree.data.prompts import read_prompts
from preftree.errors import DataError
from preftree.health.evidence import SampledAnswers
from preftree.io.run_folder import RunFolder
from preftree.model.generate import Answer, Decoding, Sampling, answers
from preftree.model.score import evaluating, leaf_logprobs
from preftree.train.inputs import EncodedSplits
from preftree.train.trainer import DPOTrainer

#: Rounds of answers where --sample_steps does not say.
_ROUNDS = 4
_MODES = {"greedy": Sampling(), "sampled": Sampling(temperature=1.0)}


@dataclass(frozen=True)
class SamplePrompt:
    """A prompt as people read it, and its token ids with the assistant's header."""

    text: str
    ids: tuple[int, ...]


def sample_prompts(settings: Settings, splits: EncodedSplits, tokenizer: PreTrainedTokenizerBase) -> list[SamplePrompt]:
    """What --sample_prompts names: that many different prompts of the data, held-out ones first, or those of a file.

    Raises:
        DataError: the file cannot be read, or holds no prompt.
    """
    asked = settings.train.sample_prompts or ""
    if asked.isdecimal():
        ids = dict.fromkeys(pair.prompt_ids for pair in (*splits.validation, *splits.train))
        chosen = list(ids)[: int(asked)]
        return [SamplePrompt(str(tokenizer.decode(list(each))), each) for each in chosen]
    try:
        found = read_prompts(asked, None)
    except DataError as problem:
        raise DataError(f"--sample_prompts {problem}") from problem
    chat = Chat(tokenizer)
    texts = [chat.prompt(chat.messages(prompt.system, prompt.turns)) for prompt in found]
    ids_of = chat.tokenize(texts)
    longest = settings.data.max_prompt_length
    cut = [chat.cut_prompt(tuple(chat.with_bos(ids_of[text])), longest) for text in texts]
    return [SamplePrompt(prompt.shown, ids) for prompt, ids in zip(found, cut, strict=True)]


class PromptSampler(TrainerCallback):
    """Answers the prompts with the adapter off before the first step, and with it on every so many steps.

    Args:
        every: steps between two rounds; None for a few rounds in all. The last step has one in any case.
    """

    def __init__(
        self, folder: RunFolder, prompts: Sequence[SamplePrompt], every: int | None, max_new_tokens: int
    ) -> None:
        self.folder, self.prompts, self.every, self.max_new_tokens = folder, prompts, every, max_new_tokens
        self.trainer: DPOTrainer | None = None
        self.greedy_tokens: dict[str, list[int]] = {}

    def follow(self, trainer: DPOTrainer) -> None:
        """Answer in the runs of a trainer."""
        self.trainer = trainer
        trainer.add_callback(self)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        """Begin with the rounds up to the checkpoint that the run goes on from."""
        kept = [sample for sample in self.folder.samples() if sample.get("step", 0) <= state.global_step]
        if state.is_world_process_zero:
            self.folder.reset_samples(kept)
        old = [sample for sample in kept if (sample.get("model"), sample.get("mode")) == ("reference", "greedy")]
        self.greedy_tokens = {"reference": [sample["tokens"] for sample in old]}
        if not old:
            self._round(state, "reference")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any) -> None:
        every = self.every or max(1, -(-state.max_steps // _ROUNDS))
        if state.global_step % every == 0 or state.global_step == state.max_steps:
            self._round(state, "policy")

    def _round(self, state: TrainerState, model: str) -> None:
        trainer = self.trainer
        if trainer is None or not (state.is_world_process_zero or trainer.ranks.lockstep):
            return
        started = time.perf_counter()
        for mode, sampling in _MODES.items():
            found = self._answers(trainer, model, sampling)
            ratios = self._log_ratios(trainer, found) if (mode, model) == ("sampled", "policy") else None
            if not state.is_world_process_zero:
                continue
            if mode == "greedy":
                self.greedy_tokens[model] = [len(answer.ids) for answer in found]
            if ratios is not None:
                trainer.health.answers = SampledAnswers(
                    self.greedy_tokens["reference"], self.greedy_tokens["policy"], ratios
                )
            for number, (prompt, answer) in enumerate(zip(self.prompts, found, strict=True)):
                ratio = {} if ratios is None else {"log_ratio": round(ratios[number], 4)}
                self.folder.sample({"step": state.global_step, "model": model, "mode": mode, "prompt": prompt.text,
                                    "answer": answer.text, "tokens": len(answer.ids), "finished": answer.finished,
                                    **ratio})  # fmt: skip
        seconds = time.perf_counter() - started
        trainer.say(f"samples    step {state.global_step}: {len(self.prompts)} prompts, {model}, {seconds:.1f} s")

    def _answers(self, trainer: DPOTrainer, model: str, sampling: Sampling) -> list[Answer]:
        tokenizer = trainer.processing_class
        decoding = Decoding(self.max_new_tokens, sampling, (Chat(tokenizer).terminator_id,))
        ids = [prompt.ids for prompt in self.prompts]
        with _adapter_off(trainer) if model == "reference" else nullcontext(), trainer.step.autocast():
            return answers(trainer.model, tokenizer, ids, decoding)

    @torch.no_grad()
    def _log_ratios(self, trainer: DPOTrainer, found: Sequence[Answer]) -> list[float]:
        """log π(y)/r(y) of each answer."""
        pairs = [
            EncodedPair(prompt.ids, answer.ids, answer.ids, number, "")
            for number, (prompt, answer) in enumerate(zip(self.prompts, found, strict=True))
        ]
        ratios: dict[int, float] = {}
        with evaluating(trainer.model), trainer.step.autocast():
            for forest in trainer.step.forests(pairs):
                policy = leaf_logprobs(trainer.scorer, forest).by_leaf()
                with _adapter_off(trainer):
                    reference = leaf_logprobs(trainer.scorer, forest).by_leaf()
                for leaf, token_S in policy.items():
                    ratios[leaf // 2] = float((token_S.double() - reference[leaf].double()).sum())
        return [ratios[number] for number in range(len(found))]


def _adapter_off(trainer: DPOTrainer) -> AbstractContextManager[object]:
    model = trainer.model
    return model.disable_adapter() if isinstance(model, PeftModel) else nullcontext()
