"""Every backend against the dense specification, and that against single sequences computed one by one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from preftree.errors import ModelError
from preftree.forest import Bundle, Forest, Shape, pad_forest
from preftree.model.attention import BACKENDS, Attend, Rules, flex, masked, tiles, varlen
from tests.support import kernels
from tests.support.strategies import batches, leaf_paths, random_batch

SIZE = 4
QKV = tuple[Tensor, Tensor, Tensor]
FAST = [name for name in BACKENDS if name != "dense"]
# What a float64 sum of some dozens of terms loses, with room to spare; a wrong mask shows at 1e-2 and above.
EXACT = 1e-11


@pytest.fixture(autouse=True, scope="module")
def _kernels_of_accelerators() -> Iterator[None]:
    with kernels.on_cpu():
        yield


def single_attention(query_HND: Tensor, key_KND: Tensor, value_KND: Tensor, rules: Rules) -> Tensor:
    """Attention in one ordinary causal sequence, one query row at a time: no mask, no forest; (N, H, D)."""
    group = query_HND.shape[0] // key_KND.shape[0]
    rows = []
    for n in range(query_HND.shape[1]):
        first = 0 if rules.window is None else max(0, n + 1 - rules.window)
        first = first if rules.chunk is None else max(first, n // rules.chunk * rules.chunk)
        heads = []
        for h in range(query_HND.shape[0]):
            score_M = key_KND[h // group, first : n + 1] @ query_HND[h, n] * rules.scale
            if rules.softcap is not None:
                score_M = rules.softcap * torch.tanh(score_M / rules.softcap)
            if rules.slopes_H is not None:
                score_M = score_M - rules.slopes_H[h] * (n - torch.arange(first, n + 1))
            sink = score_M[:0] if rules.sinks_H is None else rules.sinks_H[h : h + 1]
            weight_M = torch.softmax(torch.cat([score_M, sink]), dim=0)[: len(score_M)]
            heads.append(weight_M @ value_KND[h // group, first : n + 1])
        rows.append(torch.stack(heads))
    return torch.stack(rows)


def unrolled(query_HTD: Tensor, key_KTD: Tensor, value_KTD: Tensor, forest: Forest, rules: Rules) -> Tensor:
    """The outputs of all leaves' sequences, one below the other."""
    parts = [
        single_attention(query_HTD[:, path], key_KTD[:, path], value_KTD[:, path], rules) for path in leaf_paths(forest)
    ]
    return torch.cat(parts)


def spread(out_THD: Tensor, forest: Forest) -> Tensor:
    """A forest's outputs in the rows of `unrolled`: shared tokens as often as leaves share them."""
    return torch.cat([out_THD[path] for path in leaf_paths(forest)])


def inputs(forest: Forest, heads: int, key_heads: int, seed: int, dtype: torch.dtype, value_size: int = SIZE) -> QKV:
    """Query, key and value of a spread that makes attention far from uniform."""
    random = torch.Generator().manual_seed(seed)
    shapes = [(heads, len(forest), SIZE), (key_heads, len(forest), SIZE), (key_heads, len(forest), value_size)]
    query, key, value = (
        (2 * torch.randn(shape, generator=random, dtype=torch.float64)).to(dtype).requires_grad_() for shape in shapes
    )
    return query, key, value


def values_and_gradients(rows: Tensor, qkv: QKV, seed: int, rule: Rules | None = None) -> list[Tensor]:
    """`rows` and the gradients of a random weighting of them; with the same seed comparable across paths."""
    leaves = qkv if rule is None or rule.sinks_H is None else (*qkv, rule.sinks_H)
    weight = torch.randn(rows.shape, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    return [rows.detach(), *torch.autograd.grad((rows * weight.to(rows.dtype)).sum(), leaves)]


def trained(numbers: list[float]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64, requires_grad=True)


@st.composite
def rules(draw: st.DrawFn, heads: int) -> Rules:
    """Any combination of window, chunk, softcap and one of ALiBi and sinks."""
    sinks = st.lists(st.sampled_from((-1.0, 0.5, 3.0)), min_size=heads, max_size=heads)
    slopes = st.lists(st.sampled_from((0.0, 0.0625, 0.5, 1.0)), min_size=heads, max_size=heads)
    alibi = draw(st.booleans())
    return Rules(
        scale=draw(st.sampled_from((SIZE**-0.5, 0.3))),
        window=draw(st.one_of(st.none(), st.integers(1, 12))),
        chunk=draw(st.one_of(st.none(), st.none(), st.integers(1, 12))),
        softcap=draw(st.sampled_from((None, 1.5))),
        slopes_H=draw(slopes.map(lambda s: torch.tensor(s, dtype=torch.float64))) if alibi else None,
        sinks_H=None if alibi else draw(st.one_of(st.none(), sinks.map(trained))),
    )


@st.composite
def problems(draw: st.DrawFn) -> tuple[Forest, QKV, Rules, int]:
    forest = Forest.of(draw(batches(max_bundles=4, longest=14)))
    heads, key_heads = draw(st.sampled_from(((1, 1), (2, 2), (4, 2), (3, 1))))
    seed = draw(st.integers(0, 1000))
    qkv = inputs(forest, heads, key_heads, seed, torch.float64, draw(st.sampled_from((SIZE, 2, 6))))
    return forest, qkv, draw(rules(heads)), seed


def test_alibi_beside_sinks_is_refused() -> None:
    with pytest.raises(ModelError, match="both ALiBi and sinks"):
        Rules(scale=1.0, slopes_H=torch.ones(1), sinks_H=torch.ones(1))


def refused(name: str, rule: Rules) -> bool:
    """Variable-length kernels know neither sinks nor chunks."""
    return name == "varlen" and (rule.sinks_H is not None or rule.chunk is not None)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(problems())
def test_the_specification_is_attention_in_single_sequences(
    problem: tuple[Forest, QKV, Rules, int],
) -> None:
    forest, qkv, rule, seed = problem
    expected = values_and_gradients(unrolled(*qkv, forest, rule), qkv, seed, rule)
    found = values_and_gradients(spread(BACKENDS["dense"].attend(*qkv, forest, rule), forest), qkv, seed, rule)
    for have, want in zip(found, expected, strict=True):
        torch.testing.assert_close(have, want, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("name", FAST)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(problem=problems(), tile_rows=st.sampled_from((1, 2, 3, 7, 128)), keep_keys=st.sampled_from((0, 6, 1024)))
def test_backend_matches_the_specification(
    name: str, problem: tuple[Forest, QKV, Rules, int], tile_rows: int, keep_keys: int
) -> None:
    forest, qkv, rule, seed = problem
    if refused(name, rule.for_forest(forest)):
        return
    expected = values_and_gradients(BACKENDS["dense"].attend(*qkv, forest, rule), qkv, seed, rule)
    # The plan of tiles is kept under the forest, which is new in each example.
    with mock.patch.object(tiles, "TILE_ROWS", tile_rows), mock.patch.object(tiles, "KEEP_KEYS", keep_keys):
        found = values_and_gradients(BACKENDS[name].attend(*qkv, forest, rule), qkv, seed, rule)
    for have, want in zip(found, expected, strict=True):
        torch.testing.assert_close(have, want, rtol=EXACT, atol=EXACT)


NAMED_RULES = {
    "plain": Rules(0.5),
    "window": Rules(0.5, window=6),
    "softcap": Rules(0.5, softcap=2.0),
    "alibi": Rules(0.5, slopes_H=torch.tensor([0.5, 0.25, 0.125, 0.0625], dtype=torch.float64)),
    "all": Rules(0.5, 9, None, 2.0, torch.tensor([0.5, 0.25, 0.125, 0.0625], dtype=torch.float64)),
    "chunk": Rules(0.5, chunk=7),
    "sinks": Rules(0.5, window=11, sinks_H=trained([0.5, -1.0, 2.0, 0.0])),
}


def long_forest() -> Forest:
    """Segments longer than two tiles of the real size, a fork of forks, and tiles that end mid-segment."""
    trunk = tuple(range(140))
    bundles = [
        Bundle((*trunk, 1, 2, 3), (tuple(range(300)), (5,)), (0, 1)),
        Bundle((*trunk, *range(50, 60)), (tuple(range(129)), (6, 7)), (2, 3)),
        Bundle((9,), ((1, 2, 3), (4,)), (4, 5)),
    ]
    return Forest.of(bundles)


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("rule", NAMED_RULES.values(), ids=NAMED_RULES)
@pytest.mark.parametrize("keep_keys", [300, 1024], ids=["recomputed", "kept"])
def test_real_tiles(name: str, rule: Rules, keep_keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "KEEP_KEYS", keep_keys)
    forest = long_forest()
    assert max(s.end - s.start for s in forest.segments) > 2 * tiles.TILE_ROWS
    if refused(name, rule):
        with pytest.raises(NotImplementedError, match="no attention sinks and no chunks"):
            BACKENDS[name].attend(*inputs(forest, 4, 2, 0, torch.float64), forest, rule)
        return
    qkv = inputs(forest, 4, 2, 0, torch.float64, 6)
    expected = values_and_gradients(BACKENDS["dense"].attend(*qkv, forest, rule), qkv, 0, rule)
    found = values_and_gradients(BACKENDS[name].attend(*qkv, forest, rule), qkv, 0, rule)
    for have, want in zip(found, expected, strict=True):
        torch.testing.assert_close(have, want, rtol=EXACT, atol=EXACT)


def test_a_window_as_long_as_the_tile_and_longer_than_the_path() -> None:
    """Borders at which a tile starts or stops to need the window's mask."""
    forest = long_forest()
    qkv = inputs(forest, 2, 1, 3, torch.float64)
    for window in (1, 2, 127, 128, 129, 130, 440, 443, 444, 1000):
        rule = Rules(0.5, window=window)
        expected = values_and_gradients(BACKENDS["dense"].attend(*qkv, forest, rule), qkv, 3)
        for name in FAST:
            found = values_and_gradients(BACKENDS[name].attend(*qkv, forest, rule), qkv, 3)
            for have, want in zip(found, expected, strict=True):
                torch.testing.assert_close(have, want, rtol=EXACT, atol=EXACT, msg=f"window {window}")


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("rule", NAMED_RULES.values(), ids=NAMED_RULES)
def test_low_precision_is_as_good_as_the_specification_in_it(name: str, dtype: torch.dtype, rule: Rules) -> None:
    """Errors against the float64 oracle on the same rounded inputs: at most 3 times the dense path's own."""
    if refused(name, rule):
        return
    forest = Forest.of(random_batch(5, bundles=6))
    rounded = inputs(forest, 4, 2, 0, dtype)
    query, key, value = (x.detach().double().requires_grad_() for x in rounded)
    exact = (query, key, value)
    oracle = values_and_gradients(BACKENDS["dense"].attend(*exact, forest, rule), exact, 0)
    low = rule if rule.slopes_H is None else replace(rule, slopes_H=rule.slopes_H.float())
    dense = values_and_gradients(BACKENDS["dense"].attend(*rounded, forest, low), rounded, 0)
    found = values_and_gradients(BACKENDS[name].attend(*rounded, forest, low), rounded, 0)
    for have, spec, want in zip(found, dense, oracle, strict=True):
        assert have.dtype == dtype
        allowed = (spec.double() - want).abs()
        error = (have.double() - want).abs()
        assert float(error.max()) <= 3 * float(allowed.max())
        assert float(error.mean()) <= 3 * float(allowed.mean())


# --- Would these tests notice? One token too many or too few must be far above every tolerance. ---


class _Skewed(Forest):
    """A forest with the wrong mask."""

    skew: str

    def dense_mask(self, window: int | None = None, chunk: int | None = None) -> Tensor:
        true_TT = super().dense_mask(window, chunk)
        index_T = torch.arange(len(self))
        q_T1, k_1T = index_T[:, None], index_T[None, :]
        end_T = self.subtree_end_T
        if self.skew == "sees its successor":
            return true_TT | ((k_1T == q_T1 + 1) & (self.position_ids_T[None, :] > 0))
        if self.skew == "subtrees end one late":
            return true_TT | ((k_1T <= q_T1) & (q_T1 < end_T[None, :] + 1))
        if self.skew == "subtrees end one early":
            return true_TT & ((q_T1 < end_T[None, :] - 1) | (q_T1 == k_1T))
        assert self.skew == "plain causal"
        return k_1T <= q_T1


def _skewed(skew: str) -> _Skewed:
    forest = Forest.of(random_batch(1))
    fields = {name: getattr(forest, name) for name, field in Forest.__dataclass_fields__.items() if field.init}
    wrong = _Skewed(**fields)
    object.__setattr__(wrong, "skew", skew)
    return wrong


@pytest.mark.parametrize(
    "skew", ["sees its successor", "subtrees end one late", "subtrees end one early", "plain causal"]
)
def test_a_wrong_mask_is_noticed(skew: str) -> None:
    wrong, rule = _skewed(skew), Rules(0.5)
    qkv = inputs(wrong, 2, 2, 0, torch.float64)
    expected = unrolled(*qkv, wrong, rule)
    found = spread(BACKENDS["dense"].attend(*qkv, wrong, rule), wrong)
    assert float((found - expected).detach().abs().max()) > 1e6 * EXACT


@pytest.mark.parametrize("step", [-1, 1])
def test_a_window_off_by_one_is_noticed(step: int) -> None:
    forest, rule = Forest.of(random_batch(1)), Rules(0.5, window=5)
    qkv = inputs(forest, 2, 2, 0, torch.float64)
    expected = unrolled(*qkv, forest, rule)
    for attend in (backend.attend for backend in BACKENDS.values()):
        found = spread(attend(*qkv, forest, Rules(0.5, window=5 + step)), forest)
        assert float((found - expected).detach().abs().max()) > 1e6 * EXACT


# --- The plan of tiles ---


def test_tiles_cover_every_token_once_and_waste_nothing() -> None:
    """Without a window a tile's keys are its rows' ancestors and its own segment so far."""
    forest = Forest.of(random_batch(2))
    with mock.patch.object(tiles, "TILE_ROWS", 3):
        plan = tiles.segment_tiles(forest, Rules(1.0))
    assert [i for tile in plan for i in range(tile.start, tile.end)] == list(range(len(forest)))
    mask = forest.dense_mask()
    for tile in plan:
        keys = [i for span in tile.spans for i in range(*span)]
        assert sorted(keys) == mask[tile.start : tile.end].any(0).nonzero().flatten().tolist()
        assert tile.distance_m.tolist() == list(range(1 - len(keys), 1))  # the path in order


def test_windowed_tiles_leave_out_what_no_row_reaches() -> None:
    forest = Forest.of(random_batch(2))
    with mock.patch.object(tiles, "TILE_ROWS", 3):
        plan = tiles.segment_tiles(forest, Rules(1.0, window=4))
    mask = forest.dense_mask(4)
    for tile in plan:
        keys = [i for span in tile.spans for i in range(*span)]
        assert sorted(keys) == mask[tile.start : tile.end].any(0).nonzero().flatten().tolist()


@pytest.fixture
def planned() -> Iterator[list[int | None]]:
    """The windows that plans were made for."""
    calls: list[int | None] = []
    make = tiles._cut_segments

    def counted(forest: Forest, window: int | None, chunk: int | None) -> list[tiles.Tile]:
        calls.append(window)
        return make(forest, window, chunk)

    with mock.patch.object(tiles, "_cut_segments", counted):
        yield calls


def test_layers_share_a_plan_for_each_window(planned: list[int | None]) -> None:
    forest = Forest.of(random_batch(3))
    qkv = inputs(forest, 2, 1, 0, torch.float64)
    attend: Attend = BACKENDS["tiles"].attend
    for window in (None, 4, None, 4):
        attend(*qkv, forest, Rules(0.5, window)).sum().backward()
    assert planned == [None, 4]
    attend(*qkv, Forest.of(random_batch(3)), Rules(0.5))
    assert planned == [None, 4, None]  # another forest, though of the same tokens


# --- What the other backends prepare on the host ---


@settings(max_examples=30, deadline=None, derandomize=True)
@given(batch=batches(), window=st.sampled_from((None, 3)), padding=st.integers(0, 9))
def test_blocks_of_flex_attention(batch: list[Bundle], window: int | None, padding: int) -> None:
    """Blocks said to be seen entirely are, those left out hold nothing, and the mask inside is the specification's."""
    small = Forest.of(batch)
    forest = pad_forest(small, Shape(len(small) + padding, len(small.target_S), len(small.leaf_ids)))
    with mock.patch.object(flex, "BLOCK", 4):
        plan = flex.planned(forest, Rules(1.0, window=window))
        assert plan.size >= len(forest)
    truth = torch.eye(plan.size, dtype=torch.bool)
    truth[: len(forest), : len(forest)] = forest.dense_mask(window)
    index = torch.arange(plan.size)
    assert torch.equal(plan.blocks.mask_mod(0, 0, index[:, None], index[None, :]), truth)  # type: ignore[arg-type]
    blocks = truth.view(plan.size // 4, 4, -1, 4).transpose(1, 2)
    everything, something = blocks.all(-1).all(-1), blocks.any(-1).any(-1)
    for row in range(len(blocks)):
        full = set(plan.blocks.full_kv_indices[0, 0, row, : plan.blocks.full_kv_num_blocks[0, 0, row]].tolist())
        cut = set(plan.blocks.kv_indices[0, 0, row, : plan.blocks.kv_num_blocks[0, 0, row]].tolist())
        assert not full & cut
        assert full <= set(everything[row].nonzero().flatten().tolist())
        assert set(something[row].nonzero().flatten().tolist()) <= full | cut
        if window is None:
            assert full | cut == set(something[row].nonzero().flatten().tolist())
            # Those seen entirely are found as such, but where two subtrees meet in one block of keys.
            assert full >= set(everything[row].nonzero().flatten().tolist()) - {row}


@pytest.mark.filterwarnings("ignore::UserWarning")  # of being uncompiled, and dynamo's own
def test_the_real_flex_attention() -> None:
    """The stand-in stands in rightly: PyTorch's own code, uncompiled, whose check of the device is left out."""
    forest, rule = Forest.of(random_batch(3)), replace(NAMED_RULES["all"], window=4)
    qkv = inputs(forest, 4, 2, 0, torch.float64)
    expected = values_and_gradients(BACKENDS["dense"].attend(*qkv, forest, rule), qkv, 0)
    with (
        mock.patch.object(flex, "_kernel", return_value=torch.nn.attention.flex_attention.flex_attention),
        mock.patch.object(torch.nn.attention.flex_attention, "_validate_device"),
    ):
        found = values_and_gradients(flex.attend(*qkv, forest, rule), qkv, 0)
    for have, want in zip(found, expected, strict=True):
        torch.testing.assert_close(have, want, rtol=EXACT, atol=EXACT)


def test_flex_attention_is_compiled_for_few_lengths() -> None:
    sizes = {flex.rounded(tokens) for tokens in range(1, 16385)}
    assert len(sizes) < 30
    assert all(size % flex.BLOCK == 0 for size in sizes)
    assert all(tokens <= flex.rounded(tokens) <= max(1.25 * tokens + flex.BLOCK, 0) for tokens in range(1, 16385))
    assert flex.rounded(flex.rounded(5000)) == flex.rounded(5000)


def test_chains_go_on_with_the_first_child() -> None:
    """Prompt and chosen answer are one sequence; the rejected one has the prompt's keys before its own."""
    forest = Forest.of([Bundle((1, 2, 3), ((4, 5), (6,)), (0, 1)), Bundle((7,), ((8,), (9, 9)), (2, 3))])
    plan = varlen.chains(forest)
    assert plan.query_start_N1.tolist() == [0, 5, 6, 8, 10]
    assert plan.key_start_N1.tolist() == [0, 5, 9, 11, 14]
    assert plan.token_M.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7, 6, 8, 9]
    assert (plan.most_queries, plan.most_keys) == (5, 5)


def test_the_kernels_refuse_what_they_cannot() -> None:
    forest = Forest.of(random_batch(1))
    qkv = inputs(forest, 2, 2, 0, torch.float32)
    with mock.patch.object(varlen, "DEVICES", ("cuda",)), pytest.raises(NotImplementedError, match="on cpu"):
        varlen.attend(*qkv, forest, Rules(0.5))
    with mock.patch.dict("sys.modules", {"flash_attn": None}), pytest.raises(NotImplementedError, match="no ALiBi"):
        varlen.attend(*qkv, forest, Rules(0.5, softcap=2.0))


def test_one_mask_for_all_layers() -> None:
    forest = Forest.of(random_batch(3))
    slopes = torch.tensor([0.5, 0.25])
    qkv = inputs(forest, 2, 1, 0, torch.float32)
    with mock.patch.object(Forest, "dense_mask", autospec=True, side_effect=Forest.dense_mask) as made:
        for rule in (Rules(0.5), Rules(0.5, 4), Rules(0.5), Rules(0.5, 4)):
            masked.attend(*qkv, forest, rule)
        assert made.call_count == 2
        for rule in (Rules(0.5, slopes_H=slopes), Rules(0.5, slopes_H=slopes)):
            masked.attend(*qkv, forest, rule)
        assert made.call_count == 3


def test_gaudis_fused_attention_gets_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its arguments in their order, a bias in the dtype of the query, and the same numbers."""
    seen: list[tuple[object, ...]] = []

    def fused(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *rest: object) -> Tensor:
        seen.append(rest)
        assert mask.dtype == query.dtype
        assert mask.dim() == 4
        assert bool(mask.isfinite().all())
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=rest[2])  # type: ignore[arg-type]

    forest, rule = Forest.of(random_batch(3)), NAMED_RULES["alibi"]
    qkv = inputs(forest, 4, 2, 0, torch.float64)
    expected = values_and_gradients(BACKENDS["dense"].attend(*qkv, forest, rule), qkv, 0)
    monkeypatch.setattr(masked, "fused_sdpa", lambda device: fused)
    found = values_and_gradients(masked.attend(*qkv, forest, rule), qkv, 0)
    for have, want in zip(found, expected, strict=True):
        torch.testing.assert_close(have, want, rtol=EXACT, atol=EXACT)
    assert seen == [(0.0, False, 0.5, "None", True)]


def test_torch_2_11_has_no_groups_in_its_variable_length_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """There `varlen_attn` has no `enable_gqa`, and wants as many key heads as query heads."""

    def varlen_attn(query: Tensor, key: Tensor, value: Tensor, *places: Any, scale: float, window_size: Any) -> Tensor:
        return kernels.varlen_attn(query, key, value, *places, scale=scale, window_size=window_size, enable_gqa=False)

    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", varlen_attn)
    forest = long_forest()
    for rule in (NAMED_RULES["plain"], NAMED_RULES["window"]):
        qkv = inputs(forest, 4, 2, 0, torch.float64)
        expected = values_and_gradients(BACKENDS["dense"].attend(*qkv, forest, rule), qkv, 0)
        found = values_and_gradients(BACKENDS["varlen"].attend(*qkv, forest, rule), qkv, 0)
        for have, want in zip(found, expected, strict=True):
            torch.testing.assert_close(have, want, rtol=EXACT, atol=EXACT)
