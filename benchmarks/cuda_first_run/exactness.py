"""Step 1: is every fast path on this device as exact as the specification in float64, values and gradients?

Three parts, the widest first: attention backends on one long forest, the head without logits, whole models of each
family. A path may be as far from float64 as three times the plain way of computing the same in the same precision.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from report import StepReport, leave
from torch import Tensor

from preftree.forest import Bundle, Forest
from preftree.model.attention import BACKENDS, FOR_DEVICE, Rules

#: A path's error over the plain way's in the same precision.
ALLOWED = 3.0


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", required=True)
    parser.add_argument("--seconds", type=float, default=150)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args(argv)
    report = StepReport(Path(args.output) / "exactness.json", args.seconds)
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    report.put(torch=torch.__version__, card=_card(args.device))
    wrong = 0
    # Half of the time for attention: its compiled kernels take most of it, and the other parts must be reached.
    parts = (("attention", attention_cases, 0.6), ("head", head_cases, 0.7), ("families", family_cases, 1.0))
    for part, cases, until in parts:
        for name, compute in cases(args.device, args.tiny):
            if report.left() < (1 - until) * args.seconds + 5:
                report.add(part, {"case": name, "status": "not reached"})
                continue
            found = _outcome(compute)
            wrong += found["status"] in ("wrong", "failed")
            report.add(part, {"case": name, **found})
            print(f"{part:11}{name:58}{found['status']:9}{found.get('error', found.get('why', ''))}", flush=True)
    report.finish()
    return 1 if wrong else 0


def _card(device: str) -> str:
    return torch.cuda.get_device_name(0) if device.startswith("cuda") else device


def _outcome(compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a case found; a kernel that says that it cannot is refused, anything else that it raises is a fault."""
    try:
        return compute()
    except NotImplementedError as problem:
        return {"status": "refused", "why": str(problem).splitlines()[0][:300]}
    except Exception as problem:  # every case is to be tried, whatever one of them does
        words = str(problem).strip().splitlines() or [""]
        return {"status": "failed", "why": f"{type(problem).__name__}: {words[0]}"[:300]}
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def compared(found: list[Tensor], plain: list[Tensor], exact: list[Tensor]) -> dict[str, Any]:
    """Largest errors against float64 of a path and of the plain way, over values and each gradient."""
    status, worst = "exact", 0.0
    for have, spec, want in zip(found, plain, exact, strict=True):
        scale = float(want.abs().max()) or 1.0
        error, allowed = (float((x.double() - want).abs().max()) / scale for x in (have, spec))
        ratio = error / max(allowed, 1e-12)
        worst = max(worst, ratio if ratio == ratio else float("inf"))
        if not error <= ALLOWED * allowed + 1e-9:
            status = "wrong"
    return {"status": status, "error": f"{worst:.2f} × the plain way's"}


# --- attention ------------------------------------------------------------------------------------


def long_forest(tokens: int, device: str) -> Forest:
    """About `tokens` tokens: trees whose prompts share a prefix, forks of forks, short and long answers."""
    random = torch.Generator().manual_seed(1)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(1000, (count,), generator=random).tolist())

    unit, bundles, total, leaf = max(1, tokens // 64), list[Bundle](), 0, 0
    while total < tokens - 8 * unit:
        system = ids(2 * unit)
        for length in (1, 3):
            bundle = Bundle(
                system + ids(length * unit), (ids(unit), ids(2 * unit + 1), ids(1)), (leaf, leaf + 1, leaf + 2)
            )
            bundles.append(bundle)
            leaf += 3
            total += bundle.size - (2 * unit if length == 3 else 0)
    return Forest.of(bundles, device)


def attention_cases(device: str, tiny: bool) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Every backend that is for this device: every rule at one head size, the plain one and the window at all sizes.

    FlexAttention, compiled anew for nearly every case, comes last, and with the plain rule only at the other sizes.
    """
    forest = long_forest(300 if tiny else 8192, device)
    heads = (4, 2) if tiny else (8, 2)
    first, *others = (16, 32) if tiny else (128, 64, 256, 96, 192)
    dtype = torch.float32 if tiny else torch.bfloat16
    names = dict.fromkeys((*FOR_DEVICE.get(device, ()), "masked", "flex"))
    for name in sorted(names, key=lambda name: name == "flex"):
        for label, rules in _rules(heads[0], first, device, len(forest)):
            yield f"{name}, {label}, head size {first}", _attention(name, forest, rules, (*heads, first, first), dtype)
        if name in ("masked", "flex", "varlen"):  # the CPU's own backends have tests of their own
            half = (*heads, first, first // 2)
            yield f"{name}, values of half the size, {first}", _attention(name, forest, Rules(first**-0.5), half, dtype)
        for size in others:
            for label, rules in _rules(heads[0], size, device, len(forest)):
                if label == "plain" or (label == "window" and name != "flex"):
                    shape = (*heads, size, size)
                    yield f"{name}, {label}, head size {size}", _attention(name, forest, rules, shape, dtype)


def _rules(heads: int, size: int, device: str, tokens: int) -> Iterator[tuple[str, Rules]]:
    plain = Rules(size**-0.5)
    slopes_H = torch.tensor([2.0 ** (-8 * (h + 1) / heads) for h in range(heads)], device=device)
    yield "plain", plain
    yield "window", replace(plain, window=max(2, tokens // 16))
    yield "softcap", replace(plain, softcap=20.0)
    yield "ALiBi", replace(plain, slopes_H=slopes_H)
    for field in fields(Rules):
        if field.name.startswith("sink"):
            yield "sinks", replace(plain, **{field.name: torch.linspace(-1, 3, heads, device=device)})


def _attention(
    name: str, forest: Forest, rules: Rules, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> Callable[[], dict[str, Any]]:
    def compute() -> dict[str, Any]:
        heads, key_heads, size, value_size = shape
        sizes = ((heads, size), (key_heads, size), (key_heads, value_size))
        random = torch.Generator().manual_seed(2)
        rounded = [torch.randn(h, len(forest), d, generator=random).to(forest.device, dtype) for h, d in sizes]
        weight = torch.randn(len(forest), heads, value_size, generator=random).to(forest.device)
        # FlexAttention has no backward pass on a CPU: its values alone are compared there.
        rows = _values if name == "flex" and forest.device.type == "cpu" else _rows
        exact = rows(BACKENDS["dense"].attend, [x.double() for x in rounded], forest, rules, weight)
        plain = rows(BACKENDS["dense"].attend, rounded, forest, rules, weight)
        return compared(rows(BACKENDS[name].attend, rounded, forest, rules, weight), plain, exact)

    return compute


def _rows(attend: Any, inputs: list[Tensor], forest: Forest, rules: Rules, weight: Tensor) -> list[Tensor]:
    """Outputs and the gradients of all inputs for a random weighting of the outputs."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = attend(*leaves, forest, _in(rules, inputs[0].dtype))
    gradients = torch.autograd.grad((out * weight.to(out.dtype)).sum(), leaves)
    return [out.detach(), *gradients]


@torch.no_grad()
def _values(attend: Any, inputs: list[Tensor], forest: Forest, rules: Rules, weight: Tensor) -> list[Tensor]:
    """Outputs alone."""
    return [attend(*inputs, forest, _in(rules, inputs[0].dtype))]


def _in(rules: Rules, dtype: torch.dtype) -> Rules:
    """The rules' tensors in float64 for the float64 pass, in float32 for any other."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    tensors = {f.name: getattr(rules, f.name) for f in fields(rules) if isinstance(getattr(rules, f.name), Tensor)}
    return replace(rules, **{name: tensor.to(wide) for name, tensor in tensors.items()})


# --- the head -------------------------------------------------------------------------------------


def head_cases(device: str, tiny: bool) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """The fused head in the sizes of real models, plain, scaled and with a softcap."""
    sizes = [(50, 16, 97)] if tiny else [(4096, 576, 49152), (2048, 4096, 32000), (1024, 2304, 256000)]
    for rows, width, words in sizes:
        for label, more in (("plain", {}), ("scaled", {"scale": 0.0625}), ("softcap", {"softcap": 30.0})):
            yield f"{rows} rows of {width}, vocabulary {words}, {label}", _head(rows, width, words, device, tiny, more)


def _head(
    rows: int, width: int, words: int, device: str, tiny: bool, more: dict[str, float]
) -> Callable[[], dict[str, Any]]:
    def compute() -> dict[str, Any]:
        from preftree.model.logprob import Head, token_logprobs

        dtype = torch.float32 if tiny else torch.bfloat16
        module = torch.nn.Linear(width, words, bias=False, device=device, dtype=dtype).requires_grad_(False)
        hidden_SD = torch.randn(rows, width, device=device).to(dtype)
        target_S = torch.randint(words, (rows,), device=device)
        weight_S = torch.randn(rows, device=device)
        fused, plain = Head(module, **more), Head(module, **more)
        wide = Head(torch.nn.Linear(width, words, bias=False, device=device, dtype=torch.float64), **more)
        wide.module.weight.data.copy_(module.weight)  # type: ignore[union-attr, operator]

        def rows_of(head: Head, hidden: Tensor, logprobs: Callable[[Head, Tensor], Tensor]) -> list[Tensor]:
            leaf = hidden.detach().clone().requires_grad_()
            out_S = logprobs(head, leaf)
            return [out_S.detach(), torch.autograd.grad((out_S * weight_S.to(out_S.dtype)).sum(), leaf)[0]]

        def logits(head: Head, leaf: Tensor) -> Tensor:
            return torch.log_softmax(head.logits(leaf), -1).gather(1, target_S[:, None])[:, 0]

        exact = rows_of(wide, hidden_SD.double(), logits)
        spec = rows_of(plain, hidden_SD, logits)
        return compared(rows_of(fused, hidden_SD, lambda head, leaf: token_logprobs(leaf, target_S, head)), spec, exact)

    return compute


# --- whole models ---------------------------------------------------------------------------------

_SIZES = {
    "vocab_size": 512, "hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2048, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_GEMMA = {"head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 48}
#: Small models of each family, with heads of 64 that every kernel takes, and windows that forests reach.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("llama", {}),
    "Mistral, window": ("mistral", {"head_dim": 64, "sliding_window": 48}),
    "Qwen2": ("qwen2", {}),
    "Qwen3": ("qwen3", {"head_dim": 64}),
    "Gemma 2, window, softcaps": ("gemma2", {**_GEMMA, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0}),
    "Gemma 3, windows": ("gemma3_text", _GEMMA),
    "Phi-3, window": ("phi3", {"sliding_window": 48}),
    "GPT-NeoX": ("gpt_neox", {}),
    "MPT, ALiBi": ("mpt", {}),
    "gpt-oss, sinks": (
        "gpt_oss",
        {"head_dim": 64, "sliding_window": 48, "num_local_experts": 4, "max_position_embeddings": 131072},
    ),
}


def family_cases(device: str, tiny: bool) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Every family through every backend that is for this device: log-probs and LoRA gradients."""
    families = dict([*FAMILIES.items()][:1] + [*FAMILIES.items()][8:9]) if tiny else FAMILIES
    names = dict.fromkeys((*FOR_DEVICE.get(device, ()), "masked"))
    for name in sorted(names, key=lambda name: name == "flex"):  # which is compiled for each of them
        for family, (kind, more) in families.items():
            yield f"{family} through {name}", _family(kind, more, name, device, tiny)


def _family(kind: str, more: dict[str, Any], name: str, device: str, tiny: bool) -> Callable[[], dict[str, Any]]:
    def compute() -> dict[str, Any]:
        from preftree.model.score import attach

        dtype = torch.float32 if tiny else torch.bfloat16
        model = small_model(kind, more, dtype)
        forest = long_forest(200 if tiny else 600, "cpu")

        def rows(precision: torch.dtype, place: str, path: str) -> tuple[list[Tensor], str, str]:
            _move(model, place, precision)
            with attach(model, path) as scorer:
                sum_L = scorer(Forest.of(_bundles(forest), place)).sum_L
                weight_L = torch.linspace(-1, 1, len(sum_L), device=place, dtype=sum_L.dtype)
                leaves = [p for n, p in model.named_parameters() if ".lora_" in n]
                gradients = torch.autograd.grad((sum_L * weight_L).sum(), leaves)
                flat = torch.cat([g.double().cpu().flatten() for g in gradients])
                return [sum_L.detach().double().cpu(), flat], scorer.name, scorer.reason

        exact, _, _ = rows(torch.float64, "cpu", "dense")
        plain, _, _ = rows(dtype, device, "plain")
        found, used, reason = rows(dtype, device, name)
        if used != name:
            return {"status": "refused", "why": f"{used} was taken: {reason}"[:300]}
        return compared(found, plain, exact)

    return compute


def _move(model: Any, place: str, precision: torch.dtype) -> None:
    """Weights in `precision`; buffers keep theirs, as those of rotary embeddings do in a model that is loaded."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(place, precision)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(place)


def _bundles(forest: Forest) -> list[Bundle]:
    """The forest's answers as bundles of one, so that it can be laid out anew on another device."""
    bundles = []
    for leaf, (sequence, length) in enumerate(zip(forest.unrolled(), forest.leaf_lengths, strict=True)):
        ids = [token % 500 for token in sequence.tolist()]
        bundles.append(Bundle(tuple(ids[:-length]), (tuple(ids[-length:]),), (leaf,)))
    return bundles


def small_model(kind: str, more: dict[str, Any], dtype: torch.dtype) -> Any:
    """Random weights far from zero, with LoRA whose second matrices are not zero, rounded to `dtype`."""
    import transformers

    from preftree.model.lora import add_lora

    sizes: dict[str, Any] = dict(_SIZES)
    if kind == "mpt":
        sizes = {"vocab_size": 512, "d_model": 256, "n_heads": 4, "n_layers": 4, "max_seq_len": 2048}
    elif kind == "gpt_neox":
        sizes.pop("num_key_value_heads")
    torch.manual_seed(3)
    config = transformers.AutoConfig.for_model(kind, **{**sizes, **more})
    model = transformers.AutoModelForCausalLM.from_config(config)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the grouped product has no float64
    adapted = add_lora(model, rank=4, alpha=8)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.05 if ".lora_" in name else 0.08)
    _move(adapted, "cpu", dtype)
    return adapted.eval()


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
