"""What a short test forest cannot show: windows in masks, switch-overs, state between tokens, selected keys."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from preftree.forest import Bundle, Forest, ScoreRequest
from preftree.model import structure
from preftree.model.families.mask import kind_of_mask
from preftree.model.score import Scorer, attach
from preftree.model.stream import can_stream, score_requests
from tests.support import families, tiny

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def deep_forest(seed: int = 0, depth: int = 180) -> Forest:
    """Paths deeper than every window, chunk and switch-over of the tiny models, and short ones beside them."""
    rng = random.Random(seed)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(5, families.VOCABULARY) for _ in range(count))

    shared = ids(depth // 2)
    return Forest.of(
        [
            Bundle(shared + ids(depth // 3), (ids(depth // 6), ids(7)), (0, 1)),
            Bundle(shared + ids(5), (ids(15),), (2,)),
            Bundle(ids(12), (ids(5), ids(9)), (3, 4)),
        ]
    )


def truth(model: PreTrainedModel, forest: Forest) -> Tensor:
    """Single sequences in float64 through the model's own eager attention."""
    exact = copy.deepcopy(model).double()
    exact.set_experts_implementation("eager")  # the fast ones have no float64
    with tiny.attention_of(exact, "eager"), torch.no_grad():
        return tiny.plain_logprobs(exact, forest)


def assert_exact(scorer: Scorer, expected_S: Tensor, forest: Forest) -> None:
    with torch.no_grad():
        found_S = scorer(forest).token_S
    torch.testing.assert_close(found_S.double(), expected_S, rtol=0, atol=1e-4)


# --- Masks ---


@pytest.mark.parametrize(
    "family",
    [
        "qwen2_moe",  # windows in the mask alone
        "phimoe",
        "llama4_text",  # chunks in the mask, and a temperature by index
        "gpt_oss",  # sinks
        "deepseek_v3",  # values shorter than keys
        "stablelm",  # its layers drop keyword arguments
        "nemotron",
        "bloom",  # attention of their own
        "codegen",
        "falcon",
        "gpt_neo",
        "gptj",
    ],
)
def test_trees_are_the_model_far_beyond_its_windows(family: str) -> None:
    model, forest = families.tiny_model(family).requires_grad_(False).eval(), deep_forest()
    expected_S = truth(model, forest)
    with attach(model) as scorer:
        assert scorer.shares_prompts, scorer.reason
        assert_exact(scorer, expected_S, forest)
        assert can_stream(scorer)[0]


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3", "stablelm", "bloom", "gpt_neo", "falcon"])
def test_gradients_and_activation_checkpointing(family: str) -> None:
    forest = deep_forest(depth=60)
    model = tiny.with_lora(families.tiny_model(family, noise=0.0))
    exact = copy.deepcopy(model).double()
    exact.get_base_model().set_experts_implementation("eager")
    with tiny.attention_of(exact.get_base_model(), "eager"):
        expected = tiny.gradients(exact, tiny.plain_logprobs(exact, forest))
    scorer = attach(model.eval())
    assert scorer.shares_prompts, scorer.reason
    plain = tiny.gradients(model, scorer(forest).token_S)
    model.train()
    for module in model.modules():
        module.training = hasattr(module, "gradient_checkpointing")
    tiny.checkpoint(model)
    recomputed = tiny.gradients(model, scorer(forest).token_S)
    largest = max(float(want.abs().max()) for want in expected.values())
    for name, want in expected.items():
        scale = max(float(want.abs().max()), 1e-3 * largest)
        for found in (plain, recomputed):
            assert float((found[name].double() - want).abs().max()) < 1e-3 * scale, name


def _mask(window: int | None = None, chunk: int | None = None) -> Callable[..., Tensor]:
    def mask(batch: Any, head: Any, query: Tensor, key: Tensor) -> Tensor:
        seen = key <= query
        if window is not None:
            seen = seen & (key > query - window)
        return seen if chunk is None else seen & (key // chunk == query // chunk)

    return mask


@pytest.mark.parametrize("kind", [(None, None), (7, None), (4096, None), (None, 8192), (None, 31)])
def test_the_kind_of_a_mask_is_found(kind: tuple[int | None, int | None]) -> None:
    sizes = [size for size in (*kind, 33) if size is not None]
    assert kind_of_mask(_mask(*kind), sizes, torch.device("cpu")) == kind


@pytest.mark.parametrize(
    "strange",
    [_mask(7), _mask(4097), lambda batch, head, query, key: query == query + 0 * key, _mask(64, 96)],
    ids=["unknown window", "off by one", "bidirectional", "both"],
)
def test_other_masks_are_refused(strange: Callable[..., Tensor]) -> None:
    with pytest.raises(Exception, match="neither causal nor causal with"):
        kind_of_mask(strange, [4096, 64, 96], torch.device("cpu"))


# --- Switch-overs of rotary factors ---


def longrope() -> PreTrainedModel:
    return families.tiny_model("phi3, longrope")


def dynamic() -> PreTrainedModel:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    return tiny.llama(max_position_embeddings=families.SWITCH, rope_parameters=rope)


@pytest.mark.parametrize("path", ["auto", "dense", "padded", "plain"])
@pytest.mark.parametrize("make", [longrope, dynamic])
def test_an_answer_does_not_depend_on_its_neighbours_length(make: Callable[[], PreTrainedModel], path: str) -> None:
    model, long, short = make().requires_grad_(False).eval(), deep_forest(), deep_forest(seed=1, depth=24)
    assert structure.Limits.of(model).path == families.SWITCH
    expected = {depth: truth_of_each(make, forest) for depth, forest in (("long", long), ("short", short))}
    with attach(model, path) as scorer:
        assert scorer.shares_prompts == (path in ("auto", "dense"))
        for depth, forest in (("short", short), ("long", long), ("short", short), ("long", long)):
            assert_exact(scorer, expected[depth], forest)


def truth_of_each(make: Callable[[], PreTrainedModel], forest: Forest) -> Tensor:
    """As `truth`, each sequence by a model that has seen no other: dynamic factors remember the longest one."""
    parts = []
    for ids, length in zip(forest.unrolled_ids(), forest.leaf_lengths, strict=True):
        alone = Forest.of([Bundle(tuple(ids[:-length]), (tuple(ids[-length:]),), (0,))])
        parts.append(truth(make().requires_grad_(False).eval(), alone))
    return torch.cat(parts)


@pytest.mark.parametrize("make", [longrope, dynamic])
def test_streams_keep_long_requests_apart(make: Callable[[], PreTrainedModel]) -> None:
    model, forest = make().requires_grad_(False).eval(), deep_forest()
    asked = [
        ScoreRequest(tuple(ids[:-length]), tuple(ids[-length:]))
        for ids, length in zip(forest.unrolled_ids(), forest.leaf_lengths, strict=True)
    ]
    assert {request.computed > families.SWITCH for request in asked} == {False, True}
    expected = []
    for request in asked:
        fresh, ids = make().double().eval(), torch.tensor([request.context + request.continuation[:-1]])
        with tiny.attention_of(fresh, "eager"), torch.no_grad():
            logprobs = torch.log_softmax(fresh(input_ids=ids, use_cache=False).logits[0], -1)
        rows = range(len(request.context) - 1, request.computed)
        expected.append(sum(float(logprobs[row, id_]) for row, id_ in zip(rows, request.continuation, strict=True)))
    with attach(model) as scorer:
        assert can_stream(scorer)[0]
        for budget in (30, 1000):
            seen: list[int] = []
            found = score_requests(scorer, asked, budget, lambda index, _, seen=seen: seen.append(index))  # type: ignore[misc]
            assert sorted(seen) == list(range(len(asked)))
            assert [score.logprob for score in found] == pytest.approx(expected, abs=1e-3)


# --- State, and keys that are selected ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "family", ["bamba", "falcon_h1", "jamba", "nemotron_h", "lfm2", "qwen3_next", "recurrent_gemma", "minimax", "rwkv"]
)
def test_layers_with_a_state_are_refused_by_what_they_are(family: str, dtype: torch.dtype) -> None:
    config = families.tiny_config(family, 0.0)
    if family == "lfm2":
        config.layer_types = ["conv", "full_attention"] * 2
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    assert "trees" in structure.refusals(model)


def test_a_model_with_attention_alone_has_no_state() -> None:
    for make in tiny.FAMILIES.values():
        assert structure.refusals(make()) == {}


@pytest.mark.parametrize("path", ["auto", "dense"])
def test_a_stateful_model_is_scored_in_single_sequences(path: str) -> None:
    model, forest = families.tiny_model("bamba").requires_grad_(False).eval(), deep_forest(depth=60)
    expected_S = truth(model, forest)
    with attach(model, path) as scorer:
        assert scorer.name == "padded"
        assert scorer.reason.startswith("trees: ")
        assert_exact(scorer, expected_S, forest)


@pytest.mark.parametrize("family", ["doge", "glm_moe_dsa", "deepseek_v32", "reformer"])
@pytest.mark.parametrize("path", ["auto", "padded"])
def test_selected_keys_are_scored_plainly(family: str, path: str) -> None:
    model, forest = families.tiny_model(family).requires_grad_(False).eval(), deep_forest()
    with attach(model, path) as scorer, torch.no_grad():
        assert scorer.name == "plain", scorer.reason
        found_S, expected_S = scorer(forest).token_S, tiny.plain_logprobs(model, forest)
    torch.testing.assert_close(found_S.double(), expected_S, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("recurrent_gemma", {"logits_soft_cap": 3.0}),
        ("falcon_h1", {"lm_head_multiplier": 0.5}),
        ("hyperclovax", {"logits_scaling": 0.5}),  # multiplies
        ("granite", {"logits_scaling": 4.0}),  # divides
        ("cohere", {"logit_scale": 0.5}),
        ("xlstm", {"output_logit_soft_cap": 3.0}),
    ],
)
def test_what_is_done_to_logits_behind_the_head(
    family: str, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(families.VARIANTS, "other head", (family, fields))
    with attach(families.tiny_model("other head").requires_grad_(False)) as scorer:
        assert scorer.name != "plain", scorer.reason
