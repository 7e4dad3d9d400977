"""One optimizer step: its pairs sharded over the ranks and cut into forests, their losses and gradients.

Every pair's loss is divided by the number of pairs of the *step* on all ranks, so that no way of cutting changes the
objective. A loss that couples the pairs of a step is a function of all their log-probs, so it takes two passes: the
first without gradients for the log-probs of the whole step, from which the loss gives d loss / d log-prob of every
answer; the second brings these into each forest's backward pass.

Shape suffixes: S scored tokens, L leaves, P pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from preftree.distributed.ranks import Ranks
from preftree.errors import RunError
from preftree.forest import Forest, Pair, Shape, forests_of_pairs, idle_forest, shard_pairs, upload
from preftree.model.logprob import TokenStats
from preftree.model.memory import is_out_of_memory
from preftree.model.router import Logits, RouterLoss
from preftree.model.score import LeafLogprobs, Scorer, leaf_logprobs
from preftree.train.answers import AnswerOrder, pair_logps
from preftree.train.guard import row_of
from preftree.train.losses import PairLogps, join
from preftree.train.metrics import PairMeter, SpeedMeter
from preftree.train.noise import EmbeddingNoise
from preftree.train.objective import Objective
from preftree.train.pair_log import Rewards
from preftree.train.ranked import RankedNames
from preftree.train.reference import Reference

#: Columns of `PairLogps` that a loss has gradients for, where they are there.
_DIFFERENTIATED = ("chosen_P", "rejected_P", "full_chosen_P", "full_rejected_P", "policy_PK")
#: Those that ranks exchange for a loss that couples pairs.
_EXCHANGED = (
    *_DIFFERENTIATED, "ref_chosen_P", "ref_rejected_P", "chosen_length_P", "rejected_length_P", "importance_P",
    "reference_PK", "rank_PK",
)  # fmt: skip


@dataclass(frozen=True)
class StepPlan:
    """One rank's part of a step.

    Args:
        forests: of this rank's pairs.
        places: of each forest's pairs among the pairs of the step.
        pairs: of the step, on all ranks.
        mean_chosen_length: over all pairs of the step.
        dummy_passes: passes that keep collectives in step with ranks that have more forests.
        speed: counts of all ranks.
        ranked: the answers of this rank's ranked lists; None where no loss asks for them.
    """

    forests: list[Forest]
    places: list[list[int]]
    pairs: int
    mean_chosen_length: float
    dummy_passes: int
    speed: SpeedMeter
    ranked: RankedNames | None = None


@dataclass
class StepResult:
    """What a step found out: the mean loss over its pairs and the metrics, after `Step.exchange` of all ranks; and the
    rewards of this rank's pairs."""

    loss: Tensor
    meter: PairMeter
    speed: SpeedMeter = field(default_factory=SpeedMeter)
    rewards: list[Rewards] = field(default_factory=list)


@dataclass
class Step:
    """How steps are computed.

    Args:
        policy: scores the model that is trained.
        reference: log-probs of the reference; None where the loss needs none.
        objective: losses with their constants.
        ranks: the processes that train together.
        budget: maximum tokens per forest.
        device: forests are planted on it.
        shape: all forests are padded to it; None pads none.
        noise: on the embeddings of training passes.
        autocast: context of every pass through the policy.
        router: the load-balancing loss of a mixture of experts that asks for it; added to every pair's.
        within: context of everything that allocates: where a limit is set, an allocation beyond it fails.
        say: where it is told that memory ran out.
    """

    policy: Scorer
    reference: Reference | None
    objective: Objective
    ranks: Ranks
    budget: int
    device: torch.device
    shape: Shape | None = None
    noise: EmbeddingNoise | None = None
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext
    router: RouterLoss | None = None
    within: Callable[[], AbstractContextManager[object]] = nullcontext
    say: Callable[[str], object] = lambda text: None

    def plan(self, pairs: Sequence[Pair]) -> StepPlan:
        """This rank's forests of a step, with their reference log-probs known. All ranks call it together."""
        mine = shard_pairs(pairs, self.ranks.count)[self.ranks.index]
        forests = self.forests([pairs[place] for place in mine])
        counts = SpeedMeter(pairs=len(mine))
        for forest in forests:
            counts.add(forest)
        if self.reference is not None:
            with self.within():
                computed = self.reference.fill(forests)
            for forest in computed:
                counts.add_reference(forest)
        everyones = self.ranks.gather(counts.counts())
        most = max(SpeedMeter(*row).forests for row in everyones) if self.ranks.lockstep else 0
        return StepPlan(
            forests,
            _places(forests, mine),
            len(pairs),
            sum(len(pair.chosen_ids) for pair in pairs) / len(pairs),
            max(0, most - len(forests)),
            SpeedMeter.of_ranks(everyones),
            self._ranked(pairs, mine),
        )

    def forests(self, pairs: Sequence[Pair]) -> list[Forest]:
        """The forests of some pairs; pair i has the leaves 2i and 2i + 1, and lists more where a loss compares them."""
        return forests_of_pairs(pairs, self.budget, self.device, self.shape, self.objective.lists)

    def _ranked(self, pairs: Sequence[Pair], mine: Sequence[int]) -> RankedNames | None:
        """This rank's ranked lists, in tables as wide as the largest list of the step on any rank."""
        if not self.objective.lists:
            return None
        width = self.shape.answers if self.shape is not None else max(2 + len(pair.others) for pair in pairs)
        return RankedNames.of([pairs[place] for place in mine], width)

    def gradients(
        self,
        pairs: Sequence[Pair],
        backward: Callable[[Tensor], object],
        after_backward: Callable[[], object],
        drop: Callable[[], object] = lambda: None,
    ) -> StepResult:
        """Add the gradient of the mean loss over `pairs` to this rank's; the result is this rank's part.

        Where memory runs out, the step is computed again in smaller forests: the same objective.

        Args:
            backward: of a scalar; a scaler may scale it.
            after_backward: called after each backward pass.
            drop: deletes what the step has added to gradients so far.

        Raises:
            RunError: memory runs out for a single pair.
        """
        plan = self.plan(pairs)
        while True:
            try:
                with self.within():
                    return self._add_gradients(plan, backward, after_backward)
            except Exception as problem:
                self._shrink(plan, pairs, problem)
            drop()
            plan = self._replanned(plan, pairs)

    def _add_gradients(
        self, plan: StepPlan, backward: Callable[[Tensor], object], after_backward: Callable[[], object]
    ) -> StepResult:
        result = StepResult(torch.zeros((), device=self.device), PairMeter.on(self.device), plan.speed)
        parts = self._coupled(plan) if self._is_coupled(plan) else self._separate(plan)
        for places, (logps, losses_P, surrogate) in zip(plan.places, parts, strict=True):
            backward(surrogate)
            after_backward()
            result.loss += (losses_P.detach().sum() / plan.pairs).to(result.loss.dtype)
            result.meter.add(logps, losses_P, self.objective)
            result.rewards.append((places, self._rewards(logps)))
        for _ in range(plan.dummy_passes):
            backward(0 * self._dummy_pass().token_S.sum())
        return result

    @torch.no_grad()
    def evaluate(self, pairs: Sequence[Pair]) -> StepResult:
        """Losses and metrics of `pairs`, this rank's part, without gradients; memory as in `gradients`."""
        plan = self.plan(pairs)
        while True:
            try:
                with self.within():
                    return self._evaluated(plan)
            except Exception as problem:
                self._shrink(plan, pairs, problem)
            plan = self._replanned(plan, pairs)

    def _evaluated(self, plan: StepPlan) -> StepResult:
        result = StepResult(torch.zeros((), device=self.device), PairMeter.on(self.device), plan.speed)
        parts = [self.pair_logps(forest, plan, training=False) for forest in plan.forests]
        losses = [self.objective.losses(part) for part in parts]
        if self.objective.coupled:
            losses = self._coupled_losses(plan, parts)[1]
        for places, part, own_P in zip(plan.places, parts, losses, strict=True):
            losses_P = _with_router(own_P, part)
            result.loss += losses_P.sum() / plan.pairs
            result.meter.add(part, losses_P, self.objective)
            result.rewards.append((places, self._rewards(part)))
        for _ in range(plan.dummy_passes):
            self._dummy_pass()
        return result

    def _rewards(self, logps: PairLogps) -> Tensor:
        """Implicit rewards of the real pairs, chosen and rejected, (2, P)."""
        return torch.stack([reward_P.detach()[: logps.pairs] for reward_P in self.objective.rewards(logps)])

    def _shrink(self, plan: StepPlan, pairs: Sequence[Pair], problem: Exception) -> None:
        """Halve the tokens per forest after an allocation failed; raise what is no lack of memory, or cannot be halved.

        Ranks that exchange something within the step cannot start it again one by one.
        """
        together = self.ranks.lockstep or (self.ranks.count > 1 and self.objective.coupled)
        if not is_out_of_memory(problem) or together or self.shape is not None:
            raise problem
        largest = max(plan.forests, key=len)
        if all(len(places) == 1 for places in plan.places):
            pair = pairs[plan.places[plan.forests.index(largest)][0]]
            raise RunError(
                f"Out of memory with a single pair of {len(largest)} tokens ({row_of(pair)}). Raise --max_memory or "
                "whatever else limits this process, lower --max_length and --max_prompt_length, recompute activations "
                "by --gradient_checkpointing true, or drop the row."
            ) from problem
        self.budget = max(1, min(self.budget, len(largest)) // 2)
        self.say(f"memory     ran out; forests of at most {self.budget} tokens from here on, the objective is the same")

    def _replanned(self, plan: StepPlan, pairs: Sequence[Pair]) -> StepPlan:
        """The plan with this rank's pairs cut into forests of the present budget."""
        mine = sorted(place for places in plan.places for place in places)
        forests = self.forests([pairs[place] for place in mine])
        return replace(plan, forests=forests, places=_places(forests, mine))

    def pair_logps(self, forest: Forest, plan: StepPlan, training: bool = True) -> PairLogps:
        """Log-probs of a forest's pairs under policy and reference, differentiable; noise is for training only."""
        stats = TokenStats(collision=self.objective.use_weighting)
        noise = self.noise.on(forest) if self.noise is not None and training else nullcontext()
        recording: AbstractContextManager[list[Logits]] = nullcontext([])
        if self.router is not None:
            recording = self.router.recording()
        with self.autocast(), noise, recording as passes:
            scores = self.policy(forest, stats)
        reference_S = self.reference.known(forest) if self.reference is not None else None
        answers = AnswerOrder.of(forest, self.device, plan.ranked)
        logps = pair_logps(scores, reference_S, answers, self.objective.ld_alpha)
        importance_P = answers.importance(scores.token_S, stats) if self.objective.use_weighting else None
        return replace(
            logps,
            mean_chosen_length=plan.mean_chosen_length,
            importance_P=importance_P,
            tokens=answers.token_sums(stats),
            router_P=self._router_losses(passes, answers),
        )

    def _router_losses(self, passes: Sequence[Logits], answers: AnswerOrder) -> Tensor | None:
        if self.router is None:
            return None
        losses_P = self.router.losses(passes, answers.forest, answers.lists)
        return pad(losses_P, (0, len(answers.leaves) // 2 - answers.pairs))

    def _separate(self, plan: StepPlan) -> Iterator[tuple[PairLogps, Tensor, Tensor]]:
        """Forest by forest: log-probs, losses, and what its backward pass starts from."""
        for forest in plan.forests:
            logps = self.pair_logps(forest, plan)
            losses_P = _with_router(self.objective.losses(logps), logps)
            yield logps, losses_P, losses_P.sum() / plan.pairs

    def _is_coupled(self, plan: StepPlan) -> bool:
        """Two passes are needed unless one forest holds all pairs."""
        return self.objective.coupled and not (self.ranks.count == 1 and len(plan.forests) == 1)

    def _coupled(self, plan: StepPlan) -> Iterator[tuple[PairLogps, Tensor, Tensor]]:
        """The same for a loss of the whole step; dropout draws the same masks in both passes."""
        state = _rng_state(self.device)
        with torch.no_grad():
            parts = [self.pair_logps(forest, plan) for forest in plan.forests]
            for _ in range(plan.dummy_passes):
                self._dummy_pass()
        slopes, losses = self._coupled_losses(plan, parts)
        _set_rng_state(state, self.device)
        for forest, slope, losses_P in zip(plan.forests, slopes, losses, strict=True):
            logps = self.pair_logps(forest, plan)
            surrogate = sum((getattr(logps, name)[: logps.pairs] * slope[name]).sum() for name in slope)
            if logps.router_P is not None:
                surrogate = surrogate + logps.router_P.sum() / plan.pairs
            yield logps, _with_router(losses_P, logps), surrogate

    def _coupled_losses(
        self, plan: StepPlan, parts: Sequence[PairLogps]
    ) -> tuple[list[dict[str, Tensor]], list[Tensor]]:
        """d mean loss / d log-prob of each forest's answers, by column, and each forest's share of the losses.

        Args:
            parts: this rank's log-probs, without gradients.
        """
        everything = self._gathered(plan, parts)
        columns = {name: getattr(everything, name) for name in self._columns(_DIFFERENTIATED)}
        columns = {name: column_P.detach().requires_grad_() for name, column_P in columns.items()}
        with torch.enable_grad():
            losses_P = self.objective.losses(replace(everything, **columns))
            grads = torch.autograd.grad(losses_P.sum() / plan.pairs, list(columns.values()), materialize_grads=True)
        places = [upload(places, self.device) for places in plan.places]
        slopes = [{name: grad_P[place_P] for name, grad_P in zip(columns, grads, strict=True)} for place_P in places]
        return slopes, [losses_P.detach()[place_P] for place_P in places]

    def _gathered(self, plan: StepPlan, parts: Sequence[PairLogps]) -> PairLogps:
        """The log-probs of all pairs of the step, in its order: each rank brings its own, the rest is zeros."""
        names = self._columns(_EXCHANGED)
        widths = [plan.ranked.width if plan.ranked is not None and name.endswith("_PK") else 1 for name in names]
        wide = torch.float64 if self.device.type == "cpu" else torch.float32
        table = torch.zeros(plan.pairs, sum(widths), dtype=wide, device=self.device)
        if parts:
            mine = join(list(parts))
            place_P = upload([place for places in plan.places for place in places], self.device)
            table[place_P] = torch.cat(
                [getattr(mine, name).detach().to(wide).view(len(place_P), -1) for name in names], dim=1
            )
        self.ranks.add_up([table])
        parted = dict(zip(names, table.split(widths, dim=1), strict=True))
        columns = {name: part if name.endswith("_PK") else part[:, 0] for name, part in parted.items()}
        return PairLogps(**columns, mean_chosen_length=plan.mean_chosen_length)  # type: ignore[arg-type]

    def _columns(self, names: Sequence[str]) -> list[str]:
        """Those of `names` that the objective's log-probs have."""
        absent = set() if self.objective.use_weighting else {"importance_P"}
        if self.objective.ld_alpha is None:
            absent |= {"full_chosen_P", "full_rejected_P"}
        if not self.objective.lists:
            absent |= {"policy_PK", "reference_PK", "rank_PK"}
        return [name for name in names if name not in absent]

    def _dummy_pass(self) -> LeafLogprobs:
        with self.autocast():
            return leaf_logprobs(self.policy, idle_forest(self.device))


def _places(forests: Sequence[Forest], mine: Sequence[int]) -> list[list[int]]:
    """Of each forest's pairs, among all pairs of the step."""
    return [
        [mine[name // 2] for name in sorted(forest.leaf_ids) if name < 2 * len(mine)][0::2] for forest in forests
    ]  # fmt: skip


def _with_router(losses_P: Tensor, logps: PairLogps) -> Tensor:
    """Losses with what the routers add to them; as they are where the padding of a fixed shape is left out."""
    return losses_P if logps.router_P is None else losses_P + logps.router_P[: len(losses_P)]


def _rng_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return states if device.type == "cpu" else [*states, torch.get_device_module(device).get_rng_state(device)]


def _set_rng_state(states: Sequence[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states[1], device)
