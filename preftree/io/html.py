"""Foreign text in HTML: shown as it is, never obeyed."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined

from preftree.io.console import visible


def html_templates(package: str) -> Environment:
    """The templates of a package: every text is escaped, and what could not be seen in it is written out."""
    return Environment(
        loader=PackageLoader(package),
        autoescape=True,
        # Text that a template marked as HTML is of another class, and is left alone.
        finalize=lambda value: visible(value) if type(value) is str else value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
