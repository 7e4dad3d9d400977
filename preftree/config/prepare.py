"""Everything `preftree prepare` can be told. The docstring below a field is its help text.

A wrong value raises SettingsError, which lists everything that is wrong at once.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar
from urllib.parse import urlsplit

from preftree.benchmarks import headings
from preftree.config.checks import one_of, refuse, within
from preftree.config.choices import DEVICES, DTYPES
from preftree.config.parser import Command, FlagParser, filled
from preftree.errors import SettingsError

STRATA = ("family", "teacher", "system")
ENGINES = ("transformers", "vllm", "openai")

# Settings that decide how fast something is done, where, or what is said about it, but not what comes out.
_WITHOUT_EFFECT = """
    output_dir cache_dir token use_auth_token base_url api_key_env concurrency timeout max_retries ray ray_workers
    ray_gpus
""".split()  # noqa: SIM905 (a list of words)


@dataclass
class SourceSettings:
    """Where the questions and the good answers come from."""

    _argument_group_name: ClassVar[str] = "source"

    dataset_name: str | None = None
    """Hub id, or a local jsonl, csv or parquet file, a folder of them, or a pattern ("orca/*.parquet")."""
    dataset_config_name: str | None = None
    """Configuration of the hub data set, where it has several."""
    dataset_split: str = "train"
    """Split to read."""
    dataset_revision: str | None = None
    """Branch, tag or commit of the data set on the hub."""
    cache_dir: str | None = None
    """Where data and models from the hub are kept."""
    use_auth_token: bool = False
    """Use the token that the hub's own login command has stored."""
    token: str | None = field(default=None, repr=False)
    """A hub token for private models and data; it is never written anywhere."""

    def __post_init__(self) -> None:
        if not self.dataset_name:
            raise SettingsError("--dataset_name is missing: name a hub id, a file, a folder or a pattern.")

    @property
    def auth(self) -> str | bool | None:
        """What the hub's loaders take as their `token`."""
        return self.token or (True if self.use_auth_token else None)


@dataclass
class SelectSettings:
    """Which rows are taken."""

    _argument_group_name: ClassVar[str] = "select"

    num_samples: int = 12000
    """How many rows to select."""
    seed: int = 42
    """Seed of the selection and of every sampled answer."""
    stratify_by: list[str] = field(default_factory=lambda: list(STRATA))
    """Of family (the id's flan, t0, cot, niv), teacher (gpt-4, gpt-3.5) and system (the system prompt); none: not."""
    allocation: str = "proportional"
    """Rows per stratum: proportional to its size, or equal as far as it has that many."""
    min_prompt_length: int = 1
    """Shortest prompt under the chat template, in tokens."""
    max_prompt_length: int = 512
    """Longest prompt under the chat template, in tokens; training's default."""
    min_answer_length: int = 1
    """Shortest chosen answer, in tokens."""
    max_answer_length: int = 512
    """Longest chosen answer, in tokens."""
    near_duplicates: float = 0.8
    """Similarity (Jaccard, runs of three words) from which a question repeats an earlier one; 0 keeps them all."""
    keep_refusals: bool = False
    """Keep rows whose chosen answer declines to answer."""
    decontaminate: str | None = None
    """Remove questions of ARC, HellaSwag, MMLU and TruthfulQA: a folder with these test sets, or 'hub'."""

    def __post_init__(self) -> None:
        problems: list[str] = []
        for name in ("num_samples", "min_prompt_length", "min_answer_length"):
            within(problems, name, getattr(self, name), 1)
        within(problems, "seed", self.seed, 0)
        within(problems, "max_prompt_length", self.max_prompt_length, self.min_prompt_length)
        within(problems, "max_answer_length", self.max_answer_length, self.min_answer_length)
        within(problems, "near_duplicates", self.near_duplicates, 0, 1)
        one_of(problems, "allocation", self.allocation, ("proportional", "equal"))
        self.stratify_by = [word for word in ",".join(self.stratify_by).split(",") if word and word != "none"]
        for word in self.stratify_by:
            one_of(problems, "stratify_by", word, STRATA)
        refuse(problems)


@dataclass
class GenerateSettings:
    """Which model writes the rejected answers, and how."""

    _argument_group_name: ClassVar[str] = "generate"

    model_name_or_path: str | None = None
    """The weaker chat model: a folder, a hub id, 'smollm2', or the name a server knows it by."""
    model_revision: str = "main"
    """Branch, tag or commit of the model on the hub."""
    tokenizer_name: str | None = None
    """Tokenizer that counts lengths, where it is not the model's own; needed with --engine openai."""
    engine: str = "transformers"
    """transformers, vllm (if installed), or openai: any server that speaks that protocol."""
    chat_template: str | None = None
    """llama-2, chatml or a Jinja file, for a tokenizer without a template of its own."""
    torch_dtype: str = field(default="auto", metadata={"choices": DTYPES})
    """Precision of weights and computation: auto (what is fast here), float32, bfloat16 or float16."""
    use_cpu: bool = False
    """Compute on the CPU even if there is an accelerator."""
    device: str = field(default="auto", metadata={"choices": DEVICES})
    """Where to compute; auto takes a GPU or another accelerator if there is one."""
    num_rejected: int = 1
    """Rejected answers for each prompt; each makes a row of its own."""
    max_new_tokens: int = 512
    """Longest rejected answer, in tokens."""
    cut_answers: str = "trim"
    """An answer that reaches the limit: trim it to its last full sentence, keep it as it is, or drop it."""
    temperature: float = 0.7
    """Sampling temperature; 0 is greedy decoding."""
    top_p: float = 0.95
    """Sample among the fewest tokens that together have this probability (nucleus sampling)."""
    top_k: int = 0
    """Sample among the top-k tokens; 0: all."""
    max_rounds: int = 4
    """Attempts at an answer before its prompt is dropped."""
    max_similarity: float = 0.8
    """A rejected answer this similar to the chosen one (Jaccard, runs of three words) is sampled again."""
    batch_size: int | None = None
    """Prompts answered at once: 16 for transformers, 512 for vllm; one for openai, see --concurrency."""

    def __post_init__(self) -> None:
        problems: list[str] = []
        if not self.model_name_or_path:
            problems.append("--model_name_or_path is missing: name the model that writes the rejected answers.")
        one_of(problems, "engine", self.engine, ENGINES)
        one_of(problems, "torch_dtype", self.torch_dtype, DTYPES)
        one_of(problems, "cut_answers", self.cut_answers, ("trim", "keep", "drop"))
        for name in ("num_rejected", "max_new_tokens", "max_rounds", "batch_size"):
            within(problems, name, getattr(self, name), 1)
        within(problems, "temperature", self.temperature, 0)
        within(problems, "top_p", self.top_p, 0, 1, above=True)
        within(problems, "top_k", self.top_k, 0)
        within(problems, "max_similarity", self.max_similarity, 0, 1, above=True)
        if self.temperature == 0 and self.num_rejected > 1:
            problems.append("--num_rejected above 1 needs --temperature above 0: greedy answers are all the same.")
        if self.engine == "vllm" and importlib.util.find_spec("vllm") is None:
            problems.append("--engine vllm: vllm is not installed. pip install vllm, or take --engine transformers.")
        if self.engine == "openai":
            for name in ("chat_template", "batch_size"):
                if getattr(self, name) is not None:
                    problems.append(f"--{name} is the server's business with --engine openai: leave it out.")
            if not self.tokenizer_name:
                problems.append("--engine openai needs --tokenizer_name: lengths are in tokens. 'smollm2' will do.")
        if self.use_cpu and self.device not in ("auto", "cpu"):
            problems.append(f"--use_cpu and --device {self.device} contradict each other: leave one of them out.")
        refuse(problems)
        if self.use_cpu:
            self.device = "cpu"
        if self.batch_size is None:
            self.batch_size = {"transformers": 16, "vllm": 512, "openai": 1}[self.engine]

    @property
    def rounds(self) -> int:
        """Rounds worth trying: greedy answers do not change."""
        return self.max_rounds if self.temperature > 0 else 1


@dataclass
class ServerSettings:
    """The server of --engine openai."""

    _argument_group_name: ClassVar[str] = "server"

    base_url: str | None = None
    """Address up to and including the version, as in http://localhost:8000/v1."""
    api_key_env: str = "OPENAI_API_KEY"
    """Name of the environment variable that holds the key; the key itself is never written anywhere."""
    concurrency: int = 16
    """Requests in flight at once."""
    timeout: float = 120
    """Seconds to wait for an answer."""
    max_retries: int = 8
    """How often a request is repeated, with exponential backoff, when the server is busy or fails."""
    skip_failed: bool = False
    """Drop prompts whose requests fail to the end, rather than stop there."""

    def __post_init__(self) -> None:
        problems: list[str] = []
        for name in ("concurrency", "max_retries"):
            within(problems, name, getattr(self, name), 1)
        within(problems, "timeout", self.timeout, 0, above=True)
        parts = urlsplit(self.base_url or "http://x")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            problems.append(f"--base_url must begin with http:// or https://. Got {self.base_url!r} instead.")
        elif parts.username is not None:
            problems.append("--base_url holds a user name: give the key in the environment, see --api_key_env.")
        if self.api_key_env != ServerSettings.api_key_env and not os.environ.get(self.api_key_env):
            problems.append(f"--api_key_env {self.api_key_env}: there is no such variable, or it is empty. Export it.")
        refuse(problems)


@dataclass
class OutputSettings:
    """Where the pairs go, and what does the work."""

    _argument_group_name: ClassVar[str] = "output"

    output_dir: str | None = None
    """Folder for the pairs, the manifest and the card; the same command goes on there after a stop."""
    output_format: str = "jsonl"
    """jsonl or parquet."""
    ray: str | None = None
    """Work on a Ray cluster: its address, 'auto' for the one this machine is in, 'local' to start one here."""
    ray_workers: int = 2
    """Actors, hence models, that generate at once on the cluster."""
    ray_gpus: float = 0
    """GPUs for each of these actors."""

    def __post_init__(self) -> None:
        problems: list[str] = []
        if not self.output_dir:
            problems.append("--output_dir is missing: name a folder for the pairs.")
        one_of(problems, "output_format", self.output_format, ("jsonl", "parquet"))
        within(problems, "ray_workers", self.ray_workers, 1)
        within(problems, "ray_gpus", self.ray_gpus, 0)
        if self.ray and importlib.util.find_spec("ray") is None:
            problems.append("--ray: Ray is not installed. pip install 'preftree[ray]'.")
        refuse(problems)


@dataclass
class PrepareSettings:
    """All settings of a preparation; `notes` are words for the user about how they were read."""

    source: SourceSettings
    select: SelectSettings
    generate: GenerateSettings
    server: ServerSettings
    output: OutputSettings
    notes: list[str] = field(default_factory=list)

    def with_effect(self) -> dict[str, dict[str, Any]]:
        """The settings that the result depends on, by group: no place, no secret, nothing about speed."""
        names = ("source", "select", "generate", "server", "output")
        groups = {name: dataclasses.asdict(getattr(self, name)) for name in names}
        return {
            name: {key: value for key, value in group.items() if key not in _WITHOUT_EFFECT}
            for name, group in groups.items()
        }


def parse_settings(argv: Sequence[str]) -> PrepareSettings:
    """Read `[settings.yaml] --flag value …`.

    Raises SettingsError with every problem found; `--help` prints the flags and exits with 0.
    """
    parsed = parser().parse(argv)
    problems = parsed.problems
    groups: list[Any] = filled(COMMAND.groups, parsed)
    if parsed.values.get("engine") == "openai" and not parsed.values.get("base_url"):
        problems.append("--engine openai needs --base_url: the server's address, as in http://localhost:8000/v1.")
    refuse(problems)
    settings = PrepareSettings(*groups)
    settings.notes = parsed.notes
    if settings.select.decontaminate is None:
        settings.notes.append(
            f"nothing is removed for being a test question of {headings('or')}: give --decontaminate"
            " a folder with these sets, or 'hub'"
        )
    return settings


COMMAND = Command(
    name="prepare",
    summary="Make preference pairs from an instruction set: its answers are chosen, a weaker model's are rejected.",
    groups=(SourceSettings, SelectSettings, GenerateSettings, ServerSettings, OutputSettings),
    common=(
        "dataset_name", "model_name_or_path", "output_dir", "num_samples", "seed", "stratify_by", "max_prompt_length",
        "max_answer_length", "near_duplicates", "decontaminate", "engine", "chat_template", "torch_dtype", "device",
        "max_new_tokens", "num_rejected", "temperature", "top_p", "batch_size", "base_url", "concurrency",
        "output_format", "ray",
    ),
    examples=(
        "preftree prepare --dataset_name Open-Orca/OpenOrca --model smollm2 --out pairs",
        "preftree prepare settings.yaml --num_samples 500 --out trial",
        "preftree prepare --dataset_name rows.jsonl --model NAME --engine openai \\\n"
        "      --base_url http://localhost:8000/v1 --tokenizer_name FOLDER --out pairs",
    ),
)  # fmt: skip


@functools.cache
def parser() -> FlagParser:
    """The parser of `preftree prepare`."""
    return FlagParser(COMMAND)
