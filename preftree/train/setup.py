"""From what a trainer is given to what it needs: model, tokenizer, pairs, scorer, reference, budget, each told."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from preftree.distributed.ranks import Ranks
from preftree.errors import ModelError, SettingsError
from preftree.forest import Shape, idle_forest, pair_size
from preftree.hardware.device import kind_of
from preftree.hardware.limits import allocations_within
from preftree.hardware.memory import room_for
from preftree.io.cache import cache_folder, cache_root
from preftree.io.console import Say
from preftree.model.determinism import check_causal
from preftree.model.paths import SEQUENCES
from preftree.model.quantized import is_quantized, keep_differentiable
from preftree.model.router import RouterLoss
from preftree.model.score import Scorer, attach, causal_model, leaf_logprobs
from preftree.model.shard import shard_base
from preftree.model.weights import refuse_larger_tokenizer
from preftree.train.arguments import recomputes
from preftree.train.budget import choose_budget, choose_shape
from preftree.train.config import DPOConfig
from preftree.train.dataset import Encoding, PairDataset, StreamedPairs, encode_dataset
from preftree.train.given import Data, Given
from preftree.train.hpu import StepHook, optimizer, step_hook
from preftree.train.noise import EmbeddingNoise
from preftree.train.objective import Objective
from preftree.train.policy import (
    Model,
    Policy,
    adapt,
    ask_for_router_loss,
    counted,
    load_policy,
    load_processing_class,
    without_dropout,
)
from preftree.train.precision import MixedPrecision, mixed_precision
from preftree.train.reference import Reference
from preftree.train.reference_models import (
    AdapterOff,
    FrozenAdapter,
    InitialWeights,
    ReferenceModel,
    SecondModel,
)
from preftree.train.step import Step
from preftree.train.store import LogprobStore, scoring_key, weights_key

#: What to do when a rank was lost.
RESTART = "Start all ranks again; --resume_from_checkpoint true goes on from the last checkpoint."


@dataclass(frozen=True, eq=False)
class Built:
    """Everything a trainer is made of."""

    model: Model
    tokenizer: PreTrainedTokenizerBase
    data: Data
    encoding: Encoding
    args: DPOConfig
    precision: MixedPrecision
    step: Step
    hook: StepHook
    optimizer: tuple[Any, dict[str, Any]] | None
    weights: str


def build(given: Given, data: Data, args: DPOConfig, say: Say, started: Callable[[], bool]) -> Built:
    """Make everything in order, saying what was chosen and why.

    Args:
        started: has the model been trained since?

    Raises:
        PreftreeError: whatever the user can fix.
    """
    args = one_batch_per_step(args)
    ranks = Ranks(args.ddp_timeout, kind_of(str(args.device)), lockstep=args.sharding.base)
    with ranks.explained(RESTART):
        return _built(given, data, args, ranks, say, started)


def _built(given: Given, data: Data, args: DPOConfig, ranks: Ranks, say: Say, started: Callable[[], bool]) -> Built:
    device = str(args.device)
    model = load_policy(given.model, args, given.quantization_config, say)
    keep_differentiable(causal_model(model))
    tokenizer = load_processing_class(given.processing_class, given.model, model, args)
    vocabulary = causal_model(model).get_input_embeddings().weight.shape[0]
    encoding = Encoding(tokenizer, args.max_length, args.truncation_mode, args.ranks_lists, vocabulary)
    if given.ref_model is not None:
        refuse_larger_tokenizer(tokenizer, given.ref_model, "`ref_model`")
    data = _encoded(data, encoding, say)
    key = weights_key(causal_model(model))
    ranks.check_same("weights of the model", key)
    if not (ranks.lockstep or hasattr(model, "hf_device_map") or is_quantized(model)):
        model.to(device)
    check_causal(causal_model(model))
    policy = adapt(model, given.peft_config, say, reference=given.ref_model is None)
    say(f"model      {type(causal_model(policy.model)).__name__}, {counted(policy.model)}")
    if args.disable_dropout:
        without_dropout(policy.model, say)
    if ranks.lockstep:
        _check_shardable(policy)
        say(f"sharded    {shard_base(policy.model, device, args.sharding.layers)}")  # type: ignore[arg-type]
    twin = copy.deepcopy(policy.model) if _needs_copy(given, policy, data, args) else None
    weights = causal_model(policy.model).dtype
    precision = mixed_precision(weights, bf16=bool(args.bf16), fp16=args.fp16, device=kind_of(device))
    if precision.autocast_to is not None and kind_of(device) == "cpu" and args.attention == "auto":
        args.attention = "tiles"  # compiled kernels take a module's whole forward, which autocast cannot look into
    ask_for_router_loss(causal_model(policy.model), args.router_aux_loss_coef)
    scorer = _attached(policy.model, args, say)
    what = "token trees, every prompt once" if scorer.shares_prompts else "single sequences, prompts not shared"
    say(f"attention  {scorer.name} ({what}): {scorer.reason}")
    args.bf16 = args.fp16 = False  # passes are autocast here; Trainer would wrap a forward that is never called
    objective = Objective.of(args)
    reference = None
    if objective.needs_reference:
        reference = _reference(given, policy, scorer, args, Context(twin, ranks, precision, key, started, say))
    budget, shape = _budget(scorer, data, args, ranks, say)
    step = Step(
        scorer,
        reference,
        objective,
        ranks,
        budget,
        torch.device(device),
        shape=shape,
        autocast=precision.autocast,
        router=RouterLoss.of(scorer),
        noise=_noise(scorer, args, say),
        within=partial(allocations_within, args.max_bytes if kind_of(device) == "cpu" else None),
        say=say,
    )
    if step.router is not None:
        say(f"experts    the routers' load-balancing loss, weight {step.router.coefficient:g} (output_router_logits)")
    say(
        f"step       {ranks.count * args.pairs_per_step} pairs, loss {' + '.join(objective.names)}, "
        f"beta {args.beta:g}, {precision.reason}"
    )
    chosen = optimizer(args, device)
    if chosen.value is not None:
        say(f"optimizer  {chosen.reason}")
    return Built(
        policy.model, tokenizer, data, encoding, args, precision, step, step_hook(args, device), chosen.value, key
    )


def _attached(model: Model, args: DPOConfig, say: Say) -> Scorer:
    """The model attached to what computes it, with the dropout that it keeps.

    Raises:
        ModelError: a path was asked for by name that has no dropout.
    """
    scorer = attach(model, args.attention, fixed_shapes=args.pad_max, room=room_for(args.max_bytes))
    if args.disable_dropout or not scorer.shares_prompts:
        return scorer
    training = model.training
    try:
        with torch.no_grad():
            leaf_logprobs(scorer, idle_forest(model.train().device))
    except ModelError as problem:
        if args.attention != "auto":
            raise
        say(f"note       {problem}: prompts are not shared. --disable_dropout true, the default, shares them")
        scorer.close()
        return attach(model, SEQUENCES[0])
    finally:
        model.train(training)
    return scorer


@dataclass(frozen=True, eq=False)
class Context:
    """What the choice of the reference depends on, beside the model."""

    twin: Model | None
    ranks: Ranks
    precision: MixedPrecision
    key: str
    started: Callable[[], bool]
    say: Say


def _encoded(data: Data, encoding: Encoding, say: Say) -> Data:
    def encoded(rows: Any, name: str) -> PairDataset | StreamedPairs:
        return encode_dataset(rows, encoding, name, say)

    evaluation = data.evaluation
    if isinstance(evaluation, Mapping):
        evaluation = {key: encoded(rows, f"eval_dataset[{key!r}]") for key, rows in evaluation.items()}
    elif evaluation is not None:
        evaluation = encoded(evaluation, "eval_dataset")
    return Data(encoded(data.train, "train_dataset"), evaluation)


def _needs_copy(given: Given, policy: Policy, data: Data, args: DPOConfig) -> bool:
    """Is a second model in memory the only way to have a reference: one that moves, or pairs not known beforehand?"""
    if given.ref_model is not None or policy.adapter_only or policy.frozen_adapter:
        return False
    return Objective.of(args).needs_reference and (args.sync_ref_model or data.streamed)


def _check_shardable(policy: Policy) -> None:
    if not policy.adapter_only:
        raise SettingsError(
            "FSDP and ZeRO stage 3 shard a frozen base model here: its weights have no gradients to reduce. Train a "
            "new adapter (`peft_config`), or leave sharding out for full fine-tuning."
        )


def _reference(given: Given, policy: Policy, scorer: Scorer, args: DPOConfig, context: Context) -> Reference:
    """The reference, with its log-probs of earlier runs."""
    model, key = _reference_model(given, policy, scorer, args, context)
    store = None
    where = "kept in memory for this run"
    if args.reference_cache and key and not model.moving:
        asked = model.scorer if isinstance(model, SecondModel) else scorer
        store = LogprobStore(cache_folder("reference") / scoring_key(key, asked), context.say)
        where = f"{len(store)} answers of these weights are in {cache_root()}"
    context.say(f"reference  {model.described}; {where}")
    return Reference(model, store, context.ranks, context.precision.autocast)


def _reference_model(
    given: Given, policy: Policy, scorer: Scorer, args: DPOConfig, context: Context
) -> tuple[ReferenceModel, str]:
    """What the reference is, and the hash of its weights where its log-probs may be kept."""
    autocast = context.precision.autocast_to
    suffix = f"-{str(autocast).removeprefix('torch.')}" if autocast is not None else ""
    key = context.key + suffix if context.key else ""
    if given.ref_model is not None:
        second = given.ref_model.to(args.device).requires_grad_(False)
        if args.disable_dropout:
            without_dropout(second, context.say)
        own_key = weights_key(second) + suffix if args.reference_cache else ""
        return SecondModel(attach(second, args.attention), "ref_model", moving=args.sync_ref_model), own_key
    if policy.adapter_only:
        return AdapterOff(scorer), key
    if policy.frozen_adapter:
        return FrozenAdapter(scorer), weights_key(policy.model) + suffix if args.reference_cache else ""
    if context.twin is not None:
        second = context.twin.requires_grad_(False)
        described = "a copy that follows the policy" if args.sync_ref_model else "a copy of the model before training"
        return SecondModel(attach(second, args.attention), described, moving=args.sync_ref_model), key
    return InitialWeights(scorer, context.started), "" if isinstance(policy.model, PeftModel) else key


def _noise(scorer: Scorer, args: DPOConfig, say: Say) -> EmbeddingNoise | None:
    """NEFTune's noise, in place of Trainer's own hook."""
    alpha, args.neftune_noise_alpha = args.neftune_noise_alpha, None
    if alpha is None:
        return None
    say(f"noise      on embeddings while training (NEFTune, alpha {alpha:g})")
    return EmbeddingNoise(scorer.causal.get_input_embeddings(), alpha)


def _budget(scorer: Scorer, data: Data, args: DPOConfig, ranks: Ranks, say: Say) -> tuple[int, Shape | None]:
    """Tokens per forest, and the shape they are padded to, if any; recomputation is switched on where needed."""
    pairs = [pair for each in data.pair_sets() for pair in each.pairs]
    positions = getattr(scorer.causal.config.get_text_config(), "max_position_embeddings", None)
    longest = 2 * (args.max_length or positions or 2048)  # of a stream, which does not tell its pairs beforehand
    budget = choose_budget(
        scorer,
        largest=max((pair_size(pair) for pair in pairs), default=longest),
        checkpointing=recomputes(args),
        asked=args.tokens_per_forest,
        max_memory=args.max_bytes,
    )
    if ranks.count > 1:  # as the rank with the least memory can; all must recompute, or none
        everyones = ranks.gather([budget.tokens, budget.checkpointing])
        least, recompute = min(row[0] for row in everyones), any(row[1] for row in everyones)
        budget = replace(budget, tokens=least, checkpointing=recompute)
    args.activation_checkpointing = args.gradient_checkpointing = budget.checkpointing
    say(f"forests    of at most {budget.tokens} tokens: {budget.reason}")
    if not args.pad_max:
        return budget.tokens, None
    if not pairs:
        raise SettingsError("--pad_max chooses its shape from the sizes of all pairs, which a stream does not tell.")
    shape = choose_shape(budget.tokens, pairs, args.pairs_per_step)
    say(f"shape      {shape}")
    return shape.value.tokens, shape.value


def one_batch_per_step(args: DPOConfig) -> DPOConfig:
    """A copy in which a batch holds the pairs of a whole step."""
    args = copy.copy(args)
    args.per_device_train_batch_size *= args.gradient_accumulation_steps
    args.gradient_accumulation_steps = 1
    args._n_gpu = min(1, args._n_gpu)  # several GPUs are several ranks, never DataParallel in one process
    if args.device.type != "cpu":
        args.logging_nan_inf_filter = False  # reads the loss in every step, so the host waits for the device
    args.label_names = []
    args.use_liger_kernel = False  # Trainer would patch the model once training starts, after it was attached
    args.remove_unused_columns = False
    return args
