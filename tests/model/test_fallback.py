"""How a model is attached when the tree path does not fit it, and heads that are more than a linear layer."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from preftree.errors import ModelError, SettingsError
from preftree.forest import Bundle, Forest
from preftree.model.attention import BACKENDS, Backend, Rules
from preftree.model.cpu import linear
from preftree.model.score import Scorer, attach, causal_model, leaf_logprobs
from preftree.model.selfcheck import SelfCheck
from tests.support import families, tiny
from tests.support.strategies import random_batch

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def small(kind: str, **fields: object) -> PreTrainedModel:
    """A model of another architecture, float64, with the weights of `tiny`."""
    sizes = {**tiny._SIZES, "num_hidden_layers": 2}
    return tiny._model(kind, 0, **{**sizes, **fields}).double()


def forest() -> Forest:
    return Forest.of(random_batch(1))


def assert_conforms(scorer: Scorer, tolerance: float = 1e-5, adapted: nn.Module | None = None) -> None:
    """`adapted` is the model with an adapter that was put in after attaching."""
    trees, model = forest(), adapted or scorer.model
    found = leaf_logprobs(scorer, trees).token_S
    expected = tiny.plain_logprobs(model, trees)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)
    if tiny.trained(model):
        error = tiny.relative_error(tiny.gradients(model, found), tiny.gradients(model, expected))
        assert error < 1e-4


# --- Models without a tree path ---


@pytest.mark.parametrize(("kind", "refused"), [("Mamba", ["trees"]), ("XGLM", ["native", "tiles"])])
def test_models_without_a_tree_path_say_so(kind: str, refused: list[str]) -> None:
    fields: dict[str, object] = (
        {"state_size": 4, "use_cache": False} if kind == "Mamba" else {"n_head": 4, "n_layer": 2}
    )
    model = small(kind, **fields).float().requires_grad_(False)
    scorer = attach(model)
    assert scorer.name == "padded"
    assert not scorer.shares_prompts
    *refusals, agreement = scorer.reason.split("; ")
    assert [refusal.partition(": ")[0] for refusal in refusals] == refused
    assert all(refusal.partition(": ")[2] for refusal in refusals)
    assert agreement.startswith("agrees with the model's plain forward")
    assert_conforms(scorer, 1e-4)


# --- Backends that are wrong ---


def _plain_causal(query: Tensor, key: Tensor, value: Tensor, forest: Forest, rules: Rules) -> Tensor:
    everything = torch.full_like(forest.subtree_end_T, len(forest))
    return BACKENDS["dense"].attend(query, key, value, dataclasses.replace(forest, subtree_end_T=everything), rules)


def _one_late(query: Tensor, key: Tensor, value: Tensor, forest: Forest, rules: Rules) -> Tensor:
    late = (forest.subtree_end_T + 1).clamp(max=len(forest))
    return BACKENDS["dense"].attend(query, key, value, dataclasses.replace(forest, subtree_end_T=late), rules)


def _wide_window(query: Tensor, key: Tensor, value: Tensor, forest: Forest, rules: Rules) -> Tensor:
    wide = dataclasses.replace(rules, window=rules.window + 1 if rules.window else None)
    return BACKENDS["dense"].attend(query, key, value, forest, wide)


def _not_a_number(query: Tensor, key: Tensor, value: Tensor, forest: Forest, rules: Rules) -> Tensor:
    return BACKENDS["dense"].attend(query, key, value, forest, rules) * float("nan")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("sabotage", [_plain_causal, _one_late, _wide_window, _not_a_number])
def test_a_wrong_backend_is_refused(
    sabotage: Callable[..., Tensor], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BACKENDS, "sabotaged", Backend(sabotage))
    model = tiny.mistral().to(dtype)
    scorer = attach(model.requires_grad_(False), "sabotaged")
    assert scorer.name == "padded"
    assert scorer.reason.startswith("sabotaged: log-probs off by ")
    assert_conforms(scorer, 1e-3)


def test_a_backend_that_fails_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> Tensor:
        raise RuntimeError("no such kernel\nand a long story")

    monkeypatch.setitem(BACKENDS, "broken", Backend(broken))
    scorer = attach(tiny.llama().double(), "broken")
    assert scorer.name == "padded"
    assert scorer.reason.startswith("broken: RuntimeError: no such kernel; agrees")


def test_no_way_at_all_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.llama().double()
    # A model that is not the same twice, as with dropout that eval mode does not reach.
    model.model.norm.register_forward_hook(lambda module, args, out: out + torch.randn_like(out))
    with pytest.raises(ModelError, match=r"no way of scoring agrees .* tiles: .* padded: .* plain: "):
        attach(model)


def test_the_training_mode_is_kept() -> None:
    model = tiny.llama()
    for training in (True, False):
        model.train(training)
        attach(model)
        assert model.training is training


def test_attaching_again_and_to_another_path() -> None:
    model = tiny.gemma2().double().requires_grad_(False)
    for path, name in (("auto", "tiles"), ("plain", "plain"), ("dense", "dense"), ("auto", "tiles")):
        scorer = attach(model, path)
        assert scorer.name == name
        assert_conforms(scorer)


def state(model: nn.Module) -> list[object]:
    """What attaching may replace: forwards, and the attention of each config."""
    forwards = [(name, module.__dict__.get("forward")) for name, module in model.named_modules()]
    configs = [getattr(m.config, "_attn_implementation", None) for m in model.modules() if hasattr(m, "config")]
    return [*forwards, *configs]


@pytest.mark.parametrize("path", ["auto", "dense", "padded", "plain"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "mpt"])
def test_closing_puts_the_model_back(family: str, path: str) -> None:
    model = tiny.with_lora(tiny.FAMILIES[family]())
    before = state(model)
    with attach(model, path, room=2**40) as scorer:
        expected = scorer(forest()).token_S
        assert state(model) != before
    assert state(model) == before
    assert all(linear.packed(parameter) is None for parameter in model.parameters())
    with pytest.raises(ModelError, match="was closed"):
        scorer(forest())
    scorer.close()
    with attach(model, path) as again:
        torch.testing.assert_close(again(forest()).token_S, expected, rtol=0, atol=1e-4)
    assert state(model) == before


def test_scorers_of_one_model_take_turns() -> None:
    """Evaluation in the midst of training, for one. A copy of the model has patches of its own."""
    model = tiny.llama()
    before = state(model)
    first = attach(model)
    expected = first(forest()).token_S
    copied = copy.deepcopy(model)
    with attach(model, "dense") as second:
        for scorer in (second, first, second, first):
            torch.testing.assert_close(scorer(forest()).token_S, expected, rtol=0, atol=1e-4)
    assert torch.equal(first(forest()).token_S, expected)
    first.close()
    assert state(model) == before
    with attach(copied) as third:
        assert torch.equal(third(forest()).token_S, expected)
    assert state(copied) == before


def test_a_model_that_cannot_be_attached_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.gemma2()
    before = state(model)
    monkeypatch.setattr(SelfCheck, "error", lambda *_: float("nan"))
    with pytest.raises(ModelError, match="no way of scoring agrees"):
        attach(model)
    assert state(model) == before


def test_names_of_leaves_come_back() -> None:
    model = tiny.llama().double().requires_grad_(False)
    bundle = Bundle((5, 6, 7), ((8, 9, 10), (11,)), (40, 7))
    scores = leaf_logprobs(attach(model), Forest.of([bundle]))
    assert scores.leaf_ids == (40, 7)
    assert scores.lengths == (3, 1)
    by_leaf = scores.by_leaf()
    assert [len(by_leaf[name]) for name in (40, 7)] == [3, 1]
    torch.testing.assert_close(scores.sum_L, torch.stack([by_leaf[40].sum(), by_leaf[7].sum()]))
    logits = model(input_ids=torch.tensor([[5, 6, 7, 11]])).logits[0, 2]
    torch.testing.assert_close(by_leaf[7][0], torch.log_softmax(logits, -1)[11])


def test_unknown_names() -> None:
    with pytest.raises(SettingsError, match=r"--attention paded: .*Did you mean padded"):
        attach(tiny.llama(), "paded")
    with pytest.raises(ModelError, match="got Linear"):
        causal_model(nn.Linear(2, 2))


# --- Heads ---


@pytest.mark.parametrize(
    "make",
    [
        lambda: small("Phi", num_key_value_heads=4),
        lambda: small("Cohere", logit_scale=0.25, use_qk_norm=False),
        lambda: small("Granite", logits_scaling=4.0, attention_multiplier=0.2, residual_multiplier=0.7),
        lambda: tiny.gemma2().double(),
    ],
    ids=["bias (Phi)", "logit_scale (Cohere)", "logits_scaling (Granite)", "softcap (Gemma 2)"],
)
def test_heads_that_do_more(make: Callable[[], PreTrainedModel]) -> None:
    model = tiny.with_lora(make())
    scorer = attach(model)
    assert scorer.name == "tiles", scorer.reason
    assert_conforms(scorer)


@pytest.mark.parametrize("attached_first", [False, True], ids=["then attached", "attached before"])
@pytest.mark.parametrize("path", ["auto", "padded"])
def test_lora_on_the_head(path: str, attached_first: bool) -> None:
    """The trap: a fused head that reads the base weight and knows nothing of the adapter on it."""
    base = tiny.llama(num_hidden_layers=2).double()
    scorer = attach(base, path)
    model = tiny.with_lora(base, target_modules=["q_proj", "lm_head"])
    if not attached_first:
        scorer = attach(model, path)
    assert any("lm_head" in name for name in tiny.trained(model))
    assert_conforms(scorer, adapted=model)
    with torch.no_grad(), model.disable_adapter():
        off = leaf_logprobs(scorer, forest()).token_S
        expected = tiny.plain_logprobs(tiny.llama(num_hidden_layers=2).double(), forest())
    torch.testing.assert_close(off, expected, rtol=0, atol=1e-5)


def test_a_head_that_is_trained_whole() -> None:
    """`modules_to_save` trains a copy; with the adapter off, the original is back."""
    model = tiny.with_lora(
        tiny.llama(num_hidden_layers=2).double(), target_modules=["q_proj"], modules_to_save=["lm_head"]
    )
    scorer = attach(model)
    with torch.no_grad():
        for name, parameter in tiny.trained(model).items():
            if "lm_head" in name:
                parameter.mul_(1.5)
    assert_conforms(scorer)
    with torch.no_grad(), model.disable_adapter():
        off = leaf_logprobs(scorer, forest()).token_S
        expected = tiny.plain_logprobs(tiny.llama(num_hidden_layers=2).double(), forest())
    torch.testing.assert_close(off, expected, rtol=0, atol=1e-5)


def test_attention_dropout_is_refused_over_trees() -> None:
    model = tiny.llama(attention_dropout=0.3)
    scorer = attach(model)
    model.train()
    with pytest.raises(ModelError, match="attention dropout"):
        leaf_logprobs(scorer, forest())


def test_transformers_is_what_the_models_are_made_of() -> None:
    """The families are stock classes; a vendored copy would prove nothing."""
    for make in tiny.FAMILIES.values():
        assert type(make()).__module__.startswith(f"{transformers.__name__}.models.")


def test_alibi_inside_an_attention_of_its_own_is_named() -> None:
    with attach(families.tiny_model("falcon, alibi").requires_grad_(False)) as scorer:
        assert scorer.name == "padded"
        assert "it adds ALiBi to its mask inside an attention of its own" in scorer.reason
