"""A tiny tokenizer, and chat templates written in the shapes that are met in the wild."""

from __future__ import annotations

import functools

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

_TURN = "'<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n'"
_HEADER = "'<|im_start|>assistant\\n'"
_CALLS = (
    "{%- for c in (m.tool_calls or []) %}{{- '<tool_call>' + c.function.name + ' ' + "
    "(c.function.arguments | tojson) + '</tool_call>' }}{%- endfor %}"
)


def _each(body: str, opening: str = _HEADER) -> str:
    generation = "{%- if add_generation_prompt %}{{- " + opening + " }}{%- endif %}"
    return "{%- for m in messages %}" + body + "{%- endfor %}" + generation


def _split_thought(opening: str, plain: str, joined: str) -> str:
    """Assistant turns whose reasoning is parsed out of the content or taken from its key, then written anew."""
    return _each(
        "{%- if m.role == 'assistant' %}{%- set r = (m.reasoning_content or '') %}{%- set c = m.content or '' %}"
        "{%- if '</think>' in c %}{%- set r = c.split('</think>')[0].split('<think>')[-1] %}"
        "{%- set c = c.split('</think>')[-1] %}{%- endif %}"
        "{{- '<|im_start|>assistant\\n' }}{%- if r %}{{- " + joined + " }}{%- else %}{{- " + plain + " }}{%- endif %}"
        "{{- '<|im_end|>\\n' }}{%- else %}{{- " + _TURN + " }}{%- endif %}",
        opening,
    )


TEMPLATES = {
    "ChatML": _each("{{- " + _TURN + " }}"),
    "three roles": _each(
        "{%- if m.role in ['system', 'user', 'assistant'] %}{{- " + _TURN + " }}{%- endif %}",
    ),
    "two roles": _each(
        "{%- if m.role not in ['user', 'assistant'] %}{{- raise_exception('unknown role ' + m.role) }}{%- endif %}"
        "{{- " + _TURN + " }}"
    ),
    "first system": _each("{%- if m.role != 'system' or loop.first %}{{- " + _TURN + " }}{%- endif %}"),
    "tools": "{%- for t in (tools or []) %}{{- t | tojson + '\\n' }}{%- endfor %}"
    + _each("{{- '<|im_start|>' + m.role + '\\n' + (m.content or '') }}" + _CALLS + "{{- '<|im_end|>\\n' }}"),
    "reasoning key": _each(
        "{%- if m.role == 'assistant' and loop.last %}{{- '<|im_start|>assistant\\n<think>\\n' + "
        "(m.reasoning_content or '') + '\\n</think>\\n\\n' + m.content + '<|im_end|>\\n' }}"
        "{%- else %}{{- " + _TURN + " }}{%- endif %}"
    ),
    "default system": "{%- if messages[0].role != 'system' %}{{- '<|im_start|>system\\nBe Nimbus.<|im_end|>\\n' }}"
    "{%- endif %}" + _each("{{- " + _TURN + " }}"),
    # R1 distillations: reasoning is cut out of what was said before, and the generation prompt opens it.
    "cuts": _each(
        "{{- '<|im_start|>' + m.role + '\\n' + m.content.split('</think>')[-1] + '<|im_end|>\\n' }}",
    ),
    "R1": _each(
        "{{- '<|im_start|>' + m.role + '\\n' + m.content.split('</think>')[-1] + '<|im_end|>\\n' }}",
        _HEADER + " + '<think>\\n'",
    ),
    # Qwen3.5: an answer without reasoning is written as an empty thought.
    "Qwen3.5": _split_thought(
        _HEADER + " + ('<think>\\n\\n</think>\\n\\n' if enable_thinking is false else '<think>\\n')",
        "'<think>\\n\\n</think>\\n\\n' + c",
        "'<think>\\n' + r.strip() + '\\n</think>\\n\\n' + c.lstrip()",
    ),
    # Nemotron-3: the empty thought has no line between its marks.
    "Nemotron-3": _split_thought(
        _HEADER + " + ('<think></think>' if enable_thinking is false else '<think>\\n')",
        "'<think></think>' + c",
        "'<think>\\n' + r.strip() + '\\n</think>\\n' + c.lstrip()",
    ),
    # DeepSeek-V3.1: the generation prompt closes reasoning, or opens it where it is asked to.
    "DeepSeek-V3.1": _each(
        "{%- if m.role == 'assistant' %}{{- '<|im_start|>assistant\\n</think>' + m.content.split('</think>')[-1] "
        "+ '<|im_end|>\\n' }}{%- else %}{{- " + _TURN + " }}{%- endif %}",
        _HEADER + " + ('<think>' if thinking else '</think>')",
    ),
    "always opens": _each("{{- " + _TURN + " }}", _HEADER + " + '<think>\\n'"),
    "censors": _each(
        "{{- '<|im_start|>' + m.role + '\\n' + m.content | replace('fox', '***') + '<|im_end|>\\n' }}",
    ),
}


@functools.cache
def _core() -> str:
    core = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
    core.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in ("<think>", "</think>")])
    return str(core.to_str())


def chat_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with one of `TEMPLATES`, or with a template of your own."""
    core = Tokenizer.from_str(_core())
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = TEMPLATES.get(template, template)
    return tokenizer
