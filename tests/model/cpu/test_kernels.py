"""The compiled kernel against the specification in float64, over segments longer than its blocks."""

from __future__ import annotations

import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from preftree.errors import DeviceError
from preftree.forest import Bundle, Forest
from preftree.model.attention import Rules, dense, native, tiles
from preftree.model.cpu import kernels
from preftree.model.score import attach
from tests.support.strategies import leaf_paths
from tests.support.tiny import llama

try:
    kernels.library()
except DeviceError as problem:
    pytestmark = pytest.mark.skip(reason=str(problem))

RULES = Rules(scale=0.3)


@st.composite
def forests(draw: st.DrawFn) -> Forest:
    """A few trees, or one of them all, with segments shorter and longer than the blocks of 96 rows and 128 keys and the
    pieces of 384 rows."""
    length = st.sampled_from((1, 5, 6, 7, 31, 96, 97, 128, 130, 193, 300, 385))
    shared = tuple(range(9000, 9000 + draw(st.sampled_from((0, 0, 12, 97, 390)))))
    bundles, leaf, token = [], 0, 0
    for _ in range(draw(st.integers(1, 3))):
        parts = []
        for size in (draw(length), *draw(st.lists(length, min_size=1, max_size=3))):
            parts.append(tuple(range(token, token + size)))
            token += size
        bundles.append(Bundle(shared + parts[0], tuple(parts[1:]), tuple(range(leaf, leaf + len(parts) - 1))))
        leaf += len(parts) - 1
    return Forest.of(bundles)


#: None, windows and chunks shorter and longer than blocks and pieces.
reaches = st.sampled_from(
    (
        {},
        {},
        *({"window": n} for n in (2, 7, 100, 129, 400)),
        *({"chunk": n} for n in (5, 96, 130)),
        {"window": 20, "chunk": 64},
    )
)


def asked(extra: str | None, reach: dict[str, int], scale: float, heads: int, dtype: torch.dtype) -> Rules:
    return Rules(
        scale=scale,
        softcap=2.0 if extra == "softcap" else None,
        slopes_H=torch.linspace(0.0, 0.5, heads) if extra == "alibi" else None,
        sinks_H=torch.linspace(-1.0, 4.0, heads).to(dtype).requires_grad_() if extra == "sinks" else None,
        **reach,  # type: ignore[arg-type]
    )


def qkv(
    forest: Forest,
    heads: tuple[int, int],
    size: int,
    seed: int,
    dtype: torch.dtype = torch.float32,
    value_size: int | None = None,
) -> list[torch.Tensor]:
    """As projections make them: (T, heads, D) in memory. `heads` of queries, and of keys and values."""
    random = torch.Generator().manual_seed(seed)
    return [
        torch.randn(len(forest), count, width, generator=random).to(dtype).transpose(0, 1).requires_grad_()
        for count, width in ((heads[0], size), (heads[1], size), (heads[1], value_size or size))
    ]


def run(attend, leaves, forest: Forest, rules: Rules, seed: int) -> list[torch.Tensor]:  # type: ignore[no-untyped-def]
    out = attend(*leaves, forest, rules)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed + 1))
    trained = leaves if rules.sinks_H is None else [*leaves, rules.sinks_H]
    return [out.detach(), *torch.autograd.grad((out * weight.to(out.dtype)).sum(), trained)]


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    forest=forests(),
    heads=st.sampled_from(((1, 1), (3, 1), (4, 2), (2, 2))),
    size=st.sampled_from((16, 48, 64)),
    value_size=st.sampled_from((None, 16, 32)),
    extra=st.sampled_from((None, "alibi", "sinks", "softcap")),
    reach=reaches,
    dtype=st.sampled_from((torch.float32, torch.bfloat16)),
    seed=st.integers(0, 99),
)
def test_values_and_gradients(
    forest: Forest,
    heads: tuple[int, int],
    size: int,
    value_size: int | None,
    extra: str | None,
    reach: dict[str, int],
    dtype: torch.dtype,
    seed: int,
) -> None:
    rules = asked(extra, reach, size**-0.5, heads[0], dtype)
    leaves = qkv(forest, heads, size, seed, dtype, value_size)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    found = run(native.attend, leaves, forest, rules, seed)
    wide = (
        replace(rules, sinks_H=rules.sinks_H.detach().double().requires_grad_()) if rules.sinks_H is not None else rules
    )
    expected = run(dense.attend, exact, forest, wide, seed)
    # The same in this dtype by the specification says how much rounding costs; other orders of adding up may lose a
    # few times that in float32. A wrong block shows at tenths.
    rounded = run(dense.attend, leaves, forest, rules, seed)
    for have, want, own in zip(found, expected, rounded, strict=True):
        assert have.dtype == dtype
        noise = float((own - want).abs().max())
        scale = max(1.0, float(want.abs().max()))
        assert float((have - want).abs().max()) <= 4 * noise + 4 * scale * torch.finfo(dtype).eps


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    forest=forests(),
    extra=st.sampled_from((None, "alibi", "sinks", "softcap")),
    reach=reaches,
    dtype=st.sampled_from((torch.float32, torch.bfloat16)),
    seed=st.integers(0, 99),
)
def test_a_row_has_the_same_bits_in_any_forest(
    forest: Forest, extra: str | None, reach: dict[str, int], dtype: torch.dtype, seed: int
) -> None:
    """Whether its path is cut into segments, where, and what lies beside it: values, and gradients of queries."""
    rules = asked(extra, reach, 0.25, 4, dtype)
    query, key, value = (x.detach() * 3 for x in qkv(forest, (4, 2), 16, seed, dtype))
    weight = torch.randn(len(forest), 4, 16, generator=torch.Generator().manual_seed(seed + 1)).to(dtype)

    def rows(of: Forest, at_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = query[:, at_T].requires_grad_()
        out = native.attend(leaf, key[:, at_T], value[:, at_T], of, rules)
        return out.detach(), torch.autograd.grad(out, leaf, weight[at_T])[0]

    together_THD, slope_HTD = rows(forest, torch.arange(len(forest)))
    for path_N in leaf_paths(forest):
        ids = tuple(range(len(path_N)))
        alone_NHD, alone_slope_HND = rows(Forest.of([Bundle(ids[:-1], (ids[-1:],), (0,))]), path_N)
        assert torch.equal(alone_NHD, together_THD[path_N])
        assert torch.equal(alone_slope_HND, slope_HTD[:, path_N])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_change_nothing(dtype: torch.dtype) -> None:
    forest = Forest.of([Bundle(tuple(range(150)), (tuple(range(40)), tuple(range(100, 590))), (0, 1))])
    leaves, before = qkv(forest, (4, 2), 16, 0, dtype), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = run(native.attend, leaves, forest, RULES, 0)
        torch.set_num_threads(3)
        together = run(native.attend, leaves, forest, RULES, 0)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize(
    ("rules", "dtype", "size", "compiled"),
    [
        (RULES, torch.float32, 16, True),
        (Rules(scale=1.0, window=8, softcap=3.0), torch.float32, 16, True),
        (Rules(scale=1.0, softcap=3.0, slopes_H=torch.ones(2)), torch.float32, 16, False),
        (RULES, torch.bfloat16, 16, True),
        (RULES, torch.float16, 16, False),
        (RULES, torch.float64, 16, False),
        (RULES, torch.float32, 3, False),
    ],
)
def test_what_the_kernel_cannot_do_goes_to_tiles(rules: Rules, dtype: torch.dtype, size: int, compiled: bool) -> None:
    forest = Forest.of([Bundle((1, 2, 3, 4, 5), ((6, 7), (8, 9, 10, 11)), (0, 1))])
    leaves = [x.detach().to(dtype) for x in qkv(forest, (2, 1), size, 0)]
    with mock.patch.object(tiles, "attend", side_effect=tiles.attend) as attend:
        found = native.attend(*leaves, forest, rules)
    assert attend.called is not compiled
    tolerance = (
        {"rtol": 1e-4, "atol": 1e-5} if dtype in (torch.float32, torch.float64) else {"rtol": 0.02, "atol": 0.02}
    )
    torch.testing.assert_close(found, dense.attend(*leaves, forest, rules), **tolerance)


def test_inputs_may_lie_in_memory_as_they_like() -> None:
    forest = Forest.of([Bundle(tuple(range(20)), (tuple(range(30)),), (0,))])
    leaves = qkv(forest, (2, 2), 16, 0)
    odd = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in leaves]
    for have, want in zip(
        run(native.attend, odd, forest, RULES, 0), run(native.attend, leaves, forest, RULES, 0), strict=True
    ):
        assert torch.equal(have, want)


def test_without_a_compiler_tiles_are_used_and_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    assert attach(model).name == "native"
    monkeypatch.setenv("CXX", "no-such-compiler")
    kernels.forget()
    try:
        scorer = attach(model)
        assert scorer.name == "tiles"
        assert "no C++ compiler (no-such-compiler)" in scorer.reason
    finally:
        kernels.forget()


def test_a_failing_compiler_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "broken.cpp").write_text("this is not C++\n")
    monkeypatch.setattr(kernels, "HERE", tmp_path)
    monkeypatch.setattr(kernels, "SOURCES", ("broken.cpp",))
    kernels.forget()
    try:
        with pytest.raises(DeviceError, match=r"failed: .*error"):
            kernels.library()
    finally:
        kernels.forget()


def test_processes_that_need_them_at_once_compile_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Threads stand for processes: each takes the lock by a file of its own."""
    built: list[Path] = []
    compiled = kernels.library()._name

    def build(compiler: str, target: Path) -> None:
        built.append(target)
        time.sleep(0.2)  # long enough for the other to come
        shutil.copy(compiled, target)
        kernels._hash_file(target).write_text(kernels._sha256(target))

    monkeypatch.setenv("PREFTREE_CACHE", str(tmp_path))
    monkeypatch.setattr(kernels, "_build", build)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: kernels._load(), range(2))
    assert len(built) == 1
    assert first._name == second._name == str(built[0])


@pytest.fixture
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache folder with kernels in it, for which a stand-in of the compiler copies those of the suite."""
    compiled = kernels.library()._name

    def build(compiler: str, target: Path) -> None:
        shutil.copy(compiled, target)
        kernels._hash_file(target).write_text(kernels._sha256(target))

    monkeypatch.setenv("PREFTREE_CACHE", str(tmp_path))
    monkeypatch.setattr(kernels, "_build", build)
    return Path(kernels._load()._name)


@pytest.mark.parametrize("content", [b"", b"\x7fELF planted by another"], ids=["empty", "planted"])
def test_a_library_that_is_not_what_was_compiled_is_compiled_again(own_cache: Path, content: bytes) -> None:
    whole = own_cache.read_bytes()
    own_cache.unlink()  # the loaded one is mapped: it must not change under this process
    own_cache.write_bytes(content or whole[: len(whole) // 2])
    kernels._load()
    assert own_cache.read_bytes() == whole


@pytest.mark.parametrize("place", ["", "kernels", "file"])
def test_kernels_that_others_could_replace_are_not_loaded(own_cache: Path, tmp_path: Path, place: str) -> None:
    (own_cache if place == "file" else tmp_path / place).chmod(0o777)
    with pytest.raises(DeviceError, match=r"only from a folder of this user's own, and others may write to .*mode 777"):
        kernels._load()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda q, k, v: (q, k, v[:, :-1]), "a key and a value for each token"),
        (lambda q, k, v: (q[:, :-1], k, v), "a query for each fresh token"),
        (lambda q, k, v: (q, k, torch.cat([v, v])), "as many key heads as value heads"),
        (lambda q, k, v: (q[:3], k, v), "query heads in groups of one size"),
        (lambda q, k, v: (q, k[..., :16], v), "keys as long as queries"),
        (lambda q, k, v: (q, k.bfloat16(), v), "one dtype, on the CPU"),
    ],
    ids=["values", "queries", "value heads", "groups", "key size", "dtype"],
)
def test_what_the_kernel_would_read_wrong_is_refused(change, words: str) -> None:  # type: ignore[no-untyped-def]
    forest = Forest.of([Bundle((1, 2, 3), ((4, 5), (6,)), (0, 1))])
    wrong = change(*(x.detach() for x in qkv(forest, (4, 2), 32, 0)))
    with pytest.raises(ValueError, match=f"the compiled attention needs .*{words}"):
        native.attend(*wrong, forest, RULES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_may_be_expanded_and_rows_may_begin_anywhere(dtype: torch.dtype) -> None:
    """As latent attention makes them: one key for all heads, and slices of what one projection made."""
    forest = Forest.of([Bundle(tuple(range(20)), (tuple(range(130)), (7,)), (0, 1))])
    random = torch.Generator().manual_seed(0)
    whole = torch.randn(len(forest), 4, 16 + 33, generator=random).to(dtype)
    query, value = whole[..., :16].transpose(0, 1), whole[..., 17:].transpose(0, 1)  # odd strides, an odd beginning
    key = torch.randn(1, len(forest), 16, generator=random).to(dtype).expand(4, -1, -1)
    assert torch.equal(
        native.attend(query, key, value, forest, RULES),
        native.attend(query.contiguous(), key.contiguous(), value.contiguous(), forest, RULES),
    )
