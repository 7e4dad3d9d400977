"""Hooks of mkdocs.yml: pages generated from the code, and links that leave the documentation.

    flags.md      every flag of every command, from the settings classes
    reference.md  what `import preftree` exports, from the docstrings

Both exist in the site only, so they are never out of date.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

from mkdocs.structure.files import File, Files

import preftree
from preftree.cli import PARSERS, parser_of
from preftree.config.flags import Flag, Kind

_OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)#]+)(#[^)]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages."""
    for name, content in (("flags.md", flags_page()), ("reference.md", reference_page())):
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, **others: Any) -> str:
    """Links to files of the repository become their names: the site does not hold them."""
    return _OUTSIDE.sub(lambda found: f"{found[1]} (`{found[2]}` of the repository)", markdown)


def flags_page() -> str:
    """All commands with all of their flags."""
    lines = [
        "# Flags",
        "",
        "Dashes or underscores; a YAML or JSON file has the same names. Generated from the settings.",
    ]
    for name in PARSERS:
        parser = parser_of(name)
        assert parser is not None
        lines += ["", f"## preftree {name}", "", parser.command.summary, ""]
        groups = dict.fromkeys([*parser.command.group_names, *(flag.group for flag in parser.table.values())])
        for group in groups:
            flags = [flag for flag in parser.table.values() if flag.group == group]
            if flags:
                lines += ["", f"### {name}: {group}", "", "| flag | default | what it does |", "| --- | --- | --- |"]
                lines += [_row(flag) for flag in flags]
    return "\n".join(lines) + "\n"


def _row(flag: Flag) -> str:
    default = "" if flag.default in (None, [], "") or flag.secret else str(flag.default)
    default = default.lower() if flag.kind is Kind.BOOL else default
    said = flag.help + (f" Choices: {', '.join(flag.choices)}." if flag.choices else "")
    cells = (f"`--{flag.name}`", f"`{default}`" if default else "", said)
    return "| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells) + " |"


def reference_page() -> str:
    """Signatures and docstrings of what `import preftree` exports."""
    lines = ["# Python reference", "", "What `import preftree` exports; see [Python API](api.md) for how it is used."]
    for name in sorted(preftree.__all__):
        value = getattr(preftree, name)
        lines += ["", f"## {name}", "", "```python", f"{name}{_signature(value)}", "```", ""]
        lines += ["```text", inspect.getdoc(value) or "", "```"]
    return "\n".join(lines) + "\n"


def _signature(value: Any) -> str:
    return str(inspect.signature(value)) if callable(value) else ""
