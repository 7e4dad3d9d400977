"""Chat templates by name, for models whose tokenizer carries none."""

from __future__ import annotations

from pathlib import Path

from preftree.errors import SettingsError, did_you_mean

TEMPLATES = {
    # As in Meta's llama repository: the system text inside the first user turn, a BOS before each turn of the user.
    "llama-2": (
        "{% set held = namespace(system='') %}"
        "{% for message in messages %}"
        "{% if message['role'] == 'system' %}"
        "{% set held.system = '<<SYS>>\n' ~ message['content'] ~ '\n<</SYS>>\n\n' %}"
        "{% elif message['role'] == 'user' %}"
        "{{ bos_token ~ '[INST] ' ~ (held.system ~ message['content']) | trim ~ ' [/INST]' }}"
        "{% set held.system = '' %}"
        "{% else %}"
        "{{ ' ' ~ message['content'] | trim ~ ' ' ~ eos_token }}"
        "{% endif %}"
        "{% endfor %}"
    ),
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' ~ message['role'] ~ '\n' ~ message['content'] ~ '<|im_end|>\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
}
"""Name -> Jinja template, as transformers' `apply_chat_template` takes it."""


def chat_template(name: str) -> str:
    """The template called `name`, or the content of the file of that name.

    Raises SettingsError where it is neither.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(
            f"--chat_template {name} is none of {', '.join(TEMPLATES)} and cannot be read as a file "
            f"({getattr(error, 'strerror', None) or 'not UTF-8'}).{did_you_mean(name, TEMPLATES)}"
        ) from None
