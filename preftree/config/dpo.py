"""The settings of DPO, by TRL's names, meanings and defaults: what `DPOConfig` adds to transformers' TrainingArguments.

The docstring below a field is its help text. `TRL_DIFFERENCES` says where a field does something else than in TRL;
docs/from-trl.md is generated from both. Nothing heavy is imported here, so that a command line is read at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from preftree.config.checks import json_object, memory_size, of_declared_types, one_of, within

LOSS_TYPES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm", "dpop", "rpo", "rdpo", "simpo", "cpo", "orpo",
    "listwise",
)  # fmt: skip
"""Every loss, by the name that --loss_type takes."""
DIVERGENCE_LOSSES = frozenset(
    {"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft", "listwise"}
)
"""Losses built on a difference of rewards, in which an f-divergence's constant cancels."""
SMOOTHED_LOSSES = frozenset({"sigmoid", "exo_pair", "robust", "aot", "aot_unpaired", "rpo", "rdpo", "cpo"})
"""Losses that label smoothing means something for."""
SORTING_LOSSES = frozenset({"aot", "aot_unpaired"})
"""Losses that sort the step's pairs, so that weights of single pairs have no meaning."""
LIST_LOSSES = frozenset({"listwise"})
"""Losses that compare all answers of a ranked list."""
F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
#: A larger one makes every loss of a wrong pair overflow.
LARGEST_BETA = 1e4
TRUNCATION_MODES = ("keep_start", "keep_end")

TRL_DIFFERENCES = {
    "bf16": "Not set: true where the device is fast in bfloat16 (GPUs that have it natively), else float32.",
    "gradient_checkpointing": "Not set: activations are recomputed where the largest pair needs it, as memory allows.",
    "label_smoothing": "Smooths sigmoid too (conservative DPO), where TRL ignores it; refused for losses without it.",
    "disable_dropout": "Attention's dropout too, which TRL leaves on. With dropout there, prompts are not shared.",
    "activation_offloading": "No meaning on a CPU, where activations are in the host's memory. TRL fails there.",
    "remove_unused_columns": "No meaning: columns that are not needed are not read.",
    "padding_free": "No meaning: trees hold no padding. Accepted with one note.",
    "pad_to_multiple_of": "No meaning: trees hold no padding. Accepted with one note.",
    "use_liger_kernel": "No meaning: log-probs are computed without logits here as well. Accepted with one note.",
    "precompute_ref_batch_size": "No meaning: forests are sized by memory. Accepted with one note.",
    "dataset_num_proc": "No meaning: the tokenizer's own threads are used. Accepted with one note.",
    "precompute_ref_log_probs": "Adapters: before the first step instead of in it. Full fine-tuning: always done.",
    "trust_remote_code": "The same; what is run is printed first.",
    "per_device_train_batch_size": "Times gradient_accumulation_steps is one step; packing never changes the loss.",
    "truncation_mode": "keep_end cuts the prompt once, at its start, so that both answers follow the same prompt.",
    "router_aux_loss_coef": "The same; `aux_loss` in the log is the weighted loss, of each pair by itself.",
    "loss_type": "More losses: dpop, rpo, rdpo, simpo, cpo, orpo, listwise.",
    "sync_ref_model": "As in TRL: full fine-tuning only.",
}
"""Fields with another meaning or default than TRL's."""


@dataclass(repr=False)
class LossFields:
    """What is minimised: the losses with their constants. The command's flags and `DPOConfig` both have them."""

    loss_type: str | list[str] = field(default_factory=lambda: ["sigmoid"], metadata={"choices": LOSS_TYPES})
    """One loss or several (see docs/losses.md): sigmoid is DPO, with --label_smoothing conservative DPO."""
    loss_weights: list[float] | None = None
    """Weights of several losses, by default 1 each."""
    beta: float = 0.1
    """Strength of the pull towards the reference model (the beta of the DPO paper)."""
    label_smoothing: float = 0.0
    """Assumed share of pairs with a wrong label, below 0.5 (cDPO, robust, exo_pair)."""
    f_divergence_type: str = field(default="reverse_kl", metadata={"choices": F_DIVERGENCES})
    """Divergence between policy and reference: reverse_kl (DPO), forward_kl, js_divergence or alpha_divergence."""
    f_alpha_divergence_coef: float = 0.5
    """The alpha of alpha_divergence."""
    ld_alpha: float | None = None
    """Weight of an answer's tokens beyond the length of the other answer (LD-DPO), from 0 to 1."""
    use_weighting: bool = False
    """Weigh each pair by the policy's own probability of its answers (WPO)."""
    discopop_tau: float = 0.05
    """Temperature of discopop."""
    simpo_gamma: float = 1.0
    """Target margin of simpo."""
    cpo_alpha: float = 1.0
    """Weight of cpo's next-token term."""
    dpop_lambda: float = 50.0
    """Weight of dpop's penalty on chosen answers that become less likely than under the reference."""
    rpo_alpha: float = 1.0
    """Weight of rpo's next-token term."""
    rdpo_alpha: float = 0.01
    """Weight of rdpo's length difference, per token."""

    def loss_problems(self) -> list[str]:
        """Everything that is wrong with them, each as a sentence; a single loss becomes a list of one."""
        problems: list[str] = []
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        if not self.loss_type:
            problems.append("--loss_type must name at least one loss.")
        for name in self.loss_type:
            one_of(problems, "loss_type", name, self.known_losses())
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss_type):
            problems.append(
                "`loss_weights` must have the same length as `loss_type` when combining multiple losses. Got "
                f"{len(self.loss_weights)} weights for {len(self.loss_type)} loss types."
            )
        for weight in self.loss_weights or ():
            within(problems, "loss_weights", weight, -LARGEST_BETA, LARGEST_BETA)
        one_of(problems, "f_divergence_type", self.f_divergence_type, F_DIVERGENCES)
        within(problems, "beta", self.beta, 0, LARGEST_BETA, above=True)
        within(problems, "label_smoothing", self.label_smoothing, 0, 0.5, below=True)
        within(problems, "f_alpha_divergence_coef", self.f_alpha_divergence_coef, -LARGEST_BETA, LARGEST_BETA)
        within(problems, "ld_alpha", self.ld_alpha, 0, 1)
        within(problems, "discopop_tau", self.discopop_tau, 0, above=True)
        for name in ("simpo_gamma", "cpo_alpha", "dpop_lambda", "rpo_alpha", "rdpo_alpha"):
            within(problems, name, getattr(self, name), 0)
        return problems + self._contradictions()

    def known_losses(self) -> tuple[str, ...]:
        """Every name that `loss_type` takes."""
        return LOSS_TYPES

    def _contradictions(self) -> list[str]:
        problems = []
        known = [name for name in self.loss_type if name in LOSS_TYPES]
        if self.label_smoothing and (without := [name for name in known if name not in SMOOTHED_LOSSES]):
            problems.append(
                f"--label_smoothing has no meaning for --loss_type {' '.join(without)}: leave one of them out."
            )
        if "exo_pair" in known and self.label_smoothing == 0.0:
            problems.append(
                "Label smoothing must be greater than 0.0 when using 'exo_pair' loss. The EXO paper recommends 1e-3."
            )
        if self.f_divergence_type != "reverse_kl" and (others := set(known) - DIVERGENCE_LOSSES):
            problems.append(
                f"`f_divergence_type='{self.f_divergence_type}'` is only supported for the following loss types: "
                f"{sorted(DIVERGENCE_LOSSES)}. You provided {sorted(others)}: use 'reverse_kl' with these."
            )
        if self.use_weighting and (sorting := SORTING_LOSSES & set(known)):
            problems.append(
                f"WPO-style weighting (`use_weighting`) is not implemented for {' and '.join(sorted(sorting))}: "
                "these losses sort the pairs, so that no weight belongs to one of them."
            )
        for name, given in (("use_weighting", self.use_weighting), ("ld_alpha", self.ld_alpha is not None)):
            if given and LIST_LOSSES & set(known):
                problems.append(
                    f"--{name} has no meaning for --loss_type listwise: it is defined for two answers. Leave it out."
                )
        return problems

    @property
    def ranks_lists(self) -> bool:
        """Does a loss compare all answers of a ranked list?"""
        return not LIST_LOSSES.isdisjoint(self.loss_type)


@dataclass(repr=False)
class DPOFields(LossFields):
    """The fields of DPO."""

    learning_rate: float = 1e-6
    """Learning rate of the optimizer; 1e-6 suits full fine-tuning, LoRA wants ten times that and more."""
    logging_steps: float = 10
    """Steps between two log lines; below 1 a share of all steps."""
    bf16: bool | None = None
    """Compute in bfloat16 over float32 weights; by default where the device is fast in it and --fp16 is not set."""
    gradient_checkpointing: bool | None = None
    """Recompute activations in any case; by default only where memory is too small for the largest pair."""

    model_init_kwargs: dict[str, Any] | str | None = None
    """Arguments for from_pretrained where the model is given by its name; without a dtype weights are float32."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model, as you; without it such a model is refused."""
    router_aux_loss_coef: float | None = None
    """Weight of a mixture-of-experts model's load-balancing loss; by default the model's own, 0 switches it off."""
    disable_dropout: bool = True
    """No dropout while training, so that policy and reference are the same function at the start."""

    dataset_num_proc: int | None = None
    """Accepted for TRL's scripts; the tokenizer's own threads are used."""
    max_length: int | None = 1024
    """Maximum length of prompt and answer together, in tokens; longer ones are cut as --truncation_mode says."""
    truncation_mode: str = "keep_start"
    """keep_start cuts answers at their end; keep_end cuts prompts at their start."""
    padding_free: bool = False
    """Accepted for TRL's scripts; trees hold no padding."""
    pad_to_multiple_of: int | str | None = "auto"
    """Accepted for TRL's scripts; trees hold no padding."""
    precompute_ref_log_probs: bool = False
    """Compute all reference log-probs before the first step; full fine-tuning does so in any case."""
    precompute_ref_batch_size: int | None = None
    """Accepted for TRL's scripts; forests are sized by memory."""

    activation_offloading: bool = False
    """Keep activations in the host's memory until the backward pass."""
    sync_ref_model: bool = False
    """Move the reference model towards the policy now and then (TR-DPO); full fine-tuning only."""
    ref_model_mixup_alpha: float = 0.6
    """Share of the policy in the new reference model."""
    ref_model_sync_steps: int = 512
    """Steps between two moves of the reference model."""
    pad_token: str | None = None
    """Padding token of the tokenizer, for generation; set it on the tokenizer instead."""

    attention: str = "auto"
    """Attention backend; auto takes the fastest one that agrees with the model's own attention."""
    tokens_per_forest: int | None = None
    """Tokens computed at once, by default what memory allows; the objective does not depend on it."""
    max_memory: str | None = None
    """Memory that the process may take, such as 2GB: forests get smaller, activations are recomputed where needed."""
    reference_cache: bool = True
    """Keep reference log-probs on disk, by content, for later runs (preftree cache info says where)."""
    pad_max: bool = False
    """Fixed shapes: every forest is padded to the same size, for devices that compile for each shape."""

    def problems(self) -> list[str]:
        """Everything that is wrong with the fields of DPO, each as a sentence."""
        problems: list[str] = []
        of_declared_types(problems, self, DPOFields)
        if problems:
            return problems  # nothing else can be said of a text where a number belongs
        problems += self.loss_problems()
        within(problems, "learning_rate", self.learning_rate, 0)
        within(problems, "logging_steps", self.logging_steps, 0)
        for name in ("dataset_num_proc", "precompute_ref_batch_size"):
            within(problems, name, getattr(self, name), 1)
        self._check_padding(problems)
        self.model_init_kwargs = json_object(problems, "model_init_kwargs", self.model_init_kwargs)
        within(problems, "router_aux_loss_coef", self.router_aux_loss_coef, 0)
        one_of(problems, "truncation_mode", self.truncation_mode, TRUNCATION_MODES)
        within(problems, "ref_model_mixup_alpha", self.ref_model_mixup_alpha, 0, 1)
        within(problems, "ref_model_sync_steps", self.ref_model_sync_steps, 1)
        within(problems, "max_length", self.max_length, 2)
        within(problems, "tokens_per_forest", self.tokens_per_forest, 1)
        memory_size(problems, "max_memory", self.max_memory)
        if self.sync_ref_model and self.precompute_ref_log_probs:
            problems.append(
                "You cannot use `sync_ref_model=True` together with `precompute_ref_log_probs=True`: a reference that "
                "moves makes log-probs computed before stale. Leave one of them out."
            )
        return problems

    def _check_padding(self, problems: list[str]) -> None:
        """`pad_to_multiple_of` means nothing here, but what TRL cannot read is refused here too."""
        given = self.pad_to_multiple_of
        if isinstance(given, str) and given != "auto":
            absent = given.lower() in ("none", "null")
            self.pad_to_multiple_of = None if absent else int(given if given.isdecimal() else 0)
        if isinstance(self.pad_to_multiple_of, int) and self.pad_to_multiple_of < 1:
            problems.append(f"--pad_to_multiple_of must be at least 1, auto or None. Got {given!r} instead.")

    def without_meaning(self) -> list[str]:
        """Notes on fields that were set and have no meaning on trees."""
        asked = {
            "padding_free": self.padding_free,
            "pad_to_multiple_of": self.pad_to_multiple_of not in ("auto", None),
            "use_liger_kernel": getattr(self, "use_liger_kernel", False),
            "precompute_ref_batch_size": self.precompute_ref_batch_size is not None,
            "dataset_num_proc": self.dataset_num_proc is not None,
            "activation_offloading": self.activation_offloading and getattr(self, "use_cpu", False),
        }
        return [f"{name}: {TRL_DIFFERENCES[name].split('. ')[0]}." for name, given in asked.items() if given]
