"""The dataset card: README.md as the hub shows it, with what was done, counts and length histograms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import DatasetCard, DatasetCardData

from preftree.benchmarks import headings
from preftree.io.console import visible
from preftree.prepare.output import PAIR_COLUMNS

_BAR = 40
#: The card names languages with at least this share of the questions; rarer ones are often wrong guesses.
COMMON = 0.05


def card(manifest: Mapping[str, Any], lengths: Mapping[str, Sequence[int]], file: str) -> str:
    """The card's text.

    Args:
        manifest: what `run.py` writes beside it.
        lengths: for prompt, chosen and rejected the number of tokens of each row.
        file: name of the file with the pairs.
    """
    source, model, settings = manifest["source"], manifest["model"], manifest["settings"]
    generate = settings["generate"]
    sampling = ", ".join(f"{name} {generate[name]}" for name in ("temperature", "top_p", "top_k"))
    parts = [
        "# Preference pairs\n",
        f"{manifest['counts']['pairs']} pairs for preference optimization (DPO), made by `preftree prepare`: questions"
        f" and chosen answers from {_code(source['name'])}, rejected answers by {_code(model['name'])}.\n",
        "The source's licence and that of the model apply; nothing here tells them, so set `license:` above before you"
        " publish this.\n",
        "## How it was made\n",
        _table(("stage", "rows"), _stages(manifest["counts"])),
        _decontaminated(settings["select"]["decontaminate"]),
        _table(
            ("rejected answers", ""),
            [
                ("model", _code(f"{model['name']} ({model['revision'] or 'revision unknown'})")),
                ("engine", generate["engine"]),
                ("sampling", sampling),
                ("max_new_tokens", f"{generate['max_new_tokens']} tokens; a cut answer: {generate['cut_answers']}"),
                ("seed", settings["select"]["seed"]),
            ],
        ),
        "Every row records the seed and the sampling of its rejected answer. All settings are in `manifest.yaml`.\n",
        "## Lengths in tokens\n",
        *(f"{name}\n\n```text\n{text_histogram(lengths[name])}\n```\n" for name in lengths),
        _length_verdict(lengths["chosen"], lengths["rejected"]),
        "## Columns\n",
        _table(("column", "what it holds"), [(f"`{name}`", text) for name, text in PAIR_COLUMNS.items()]),
    ]
    data = _card_data(file, manifest["counts"]["pairs"], manifest["languages"])
    return str(DatasetCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(parts)))


def text_histogram(values: Sequence[int]) -> str:
    """Lines of `from-to  bar  count`, in doubling bins, empty ones at the ends left out."""
    if not values:
        return "(no rows)"
    bins: list[tuple[int, int]] = [(0, 0)]
    while bins[-1][1] < max(values):
        bins.append((bins[-1][1] + 1, 2 * bins[-1][1] + 1))
    counts = [sum(low <= value <= high for value in values) for low, high in bins]
    first = next(place for place, count in enumerate(counts) if count)
    most = max(counts)
    ranges = [f"{low}-{high}" for low, high in bins]
    width = max(map(len, ranges[first:]))
    return "\n".join(
        f"{name:>{width}}  {'█' * -(-_BAR * count // most):<{_BAR}}  {count}"
        for name, count in list(zip(ranges, counts, strict=True))[first:]
    )


def _card_data(file: str, pairs: int, languages: Mapping[str, int]) -> DatasetCardData:
    """What the hub reads: its filters and its viewer, and `datasets.load_dataset`."""
    told = sum(languages.values())
    return DatasetCardData(
        license="unknown",  # one of the hub's own words
        language=[code for code, count in languages.items() if count >= COMMON * told] or None,
        task_categories=["text-generation"],
        size_categories=[_size(pairs)],
        tags=["preference", "dpo", "preftree"],
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": file}]}],
    )


def _size(pairs: int) -> str:
    """The hub's name for a size: n<1K, 1K<n<10K, … n>1T."""
    names = ["1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T"]
    place = next((place for place in range(len(names)) if pairs < 1000 * 10**place), len(names))
    if place == 0:
        return "n<1K"
    return f"{names[place - 1]}<n<{names[place]}" if place < len(names) else "n>1T"


def _stages(counts: Mapping[str, Any]) -> list[tuple[str, Any]]:
    lines: list[tuple[str, Any]] = [("rows of the source", counts["source_rows"])]
    lines += [(f"− {reason}", number) for reason, number in counts["removed"].items()]
    lines.append(("candidates drawn from the rest and examined", counts["examined"]))
    lines += [(f"− {reason}", number) for reason, number in counts["rejected_candidates"].items()]
    lines.append((f"selected, of {counts['strata']} strata", counts["selected"]))
    lines += [(f"− answers given up: {reason}", number) for reason, number in counts["given_up"].items()]
    lines.append(("pairs", counts["pairs"]))
    return lines


def _decontaminated(where: str | None) -> str:
    if where is None:
        return f"**Not decontaminated**: questions of {headings('or')} may be among these.\n"
    return (
        f"Decontaminated against the test questions of {headings()} that were given: a row was"
        " removed where runs of 8 words in common cover half of a test question.\n"
    )


def _length_verdict(chosen: Sequence[int], rejected: Sequence[int]) -> str:
    longer = sum(c > r for c, r in zip(chosen, rejected, strict=True))
    shorter = sum(c < r for c, r in zip(chosen, rejected, strict=True))
    return (
        f"The chosen answer is the longer one in {longer} pairs and the shorter one in {shorter}; training may learn"
        " the length rather than the quality where these are far apart.\n"
    )


def _table(head: tuple[str, str], rows: Sequence[tuple[Any, Any]]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "| --- | --- |"]
    lines += [f"| {_cell(left)} | {_cell(right)} |" for left, right in rows]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _code(text: Any) -> str:
    """Names from outside as a code span, which nothing in them can leave."""
    return f"`{visible(str(text)).replace('`', chr(39)).replace(chr(10), ' ')}`"
