"""Groups of settings that are part of a training run: the model, the data, the adapter."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import ClassVar

from preftree.config.checks import one_of, refuse, within
from preftree.config.choices import DTYPES, LIST_RULE, PAIR_RULES


@dataclass
class ModelSettings:
    """Which model and tokenizer, and how they are loaded."""

    _argument_group_name: ClassVar[str] = "model"

    model_name_or_path: str | None = None
    """Model to train: a folder, a hub id, or smollm2, the small model that comes with the demo."""
    tokenizer_name: str | None = None
    """Hub id or folder of the tokenizer, where it is not the model's own."""
    model_revision: str = "main"
    """Branch, tag or commit of the model on the hub."""
    use_fast_tokenizer: bool = True
    """Use the tokenizer's fast implementation."""
    use_auth_token: bool = False
    """Use the token that the hub's own login command has stored, for private models and data."""
    token: str | None = field(default=None, repr=False)
    """A hub token for private models and data; it is never written anywhere."""
    cache_dir: str | None = None
    """Where models and data from the hub are kept."""
    torch_dtype: str = field(default="auto", metadata={"choices": DTYPES})
    """Precision of weights and computation: auto (what is fast here), float32, bfloat16 or float16."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model, as you; without it such a model is refused."""
    load_in_4bit: bool = False
    """Quantize the frozen weights to 4 bits (QLoRA); needs bitsandbytes."""
    load_in_8bit: bool = False
    """Quantize the frozen weights to 8 bits; needs bitsandbytes."""
    bnb_4bit_quant_type: str = field(default="nf4", metadata={"choices": ("nf4", "fp4")})
    """Data type of 4-bit weights: nf4 (as in QLoRA) or fp4."""
    use_bnb_nested_quant: bool = False
    """Quantize the scales of 4-bit weights as well (QLoRA's double quantization)."""
    attention: str = "auto"
    """Attention backend; auto takes the fastest one that agrees with the model's own attention."""

    def __post_init__(self) -> None:
        problems: list[str] = []
        if not self.model_name_or_path:
            problems.append("--model_name_or_path is missing: name a hub id or a model folder.")
        one_of(problems, "torch_dtype", self.torch_dtype, DTYPES)
        one_of(problems, "bnb_4bit_quant_type", self.bnb_4bit_quant_type, ("nf4", "fp4"))
        if self.load_in_4bit and self.load_in_8bit:
            problems.append("--load_in_4bit and --load_in_8bit contradict each other: leave one of them out.")
        if (self.load_in_4bit or self.load_in_8bit) and find_spec("bitsandbytes") is None:
            bits = 4 if self.load_in_4bit else 8
            problems.append(f"--load_in_{bits}bit needs a package that is not installed: pip install bitsandbytes")
        refuse(problems)

    @property
    def auth(self) -> str | bool | None:
        """What the hub's loaders take as their `token`."""
        return self.token or (True if self.use_auth_token else None)


@dataclass
class DataSettings:
    """Which preference pairs, how many, and how long they may be."""

    _argument_group_name: ClassVar[str] = "data"

    dataset_name: str | None = None
    """Preference pairs: a file (jsonl, json, csv, parquet), a folder of such files, or a hub id."""
    dataset_config_name: str | None = None
    """Configuration of the hub data set, where it has several."""
    validation_file: str | None = None
    """A file to validate on; without it a validation split is used, or a share of the training pairs."""
    validation_split_percentage: float = 2
    """Share of the training pairs held out for validation where no validation data is given, in percent."""
    streaming: bool = False
    """Read a hub data set row by row without downloading all of it."""
    overwrite_cache: bool = False
    """Prepare the data again even if a prepared copy exists."""
    max_length: int = 1024
    """Longest prompt and answer together, in tokens; longer answers are cut at their end."""
    max_prompt_length: int = 512
    """Longest prompt, in tokens; longer prompts are cut at their start."""
    max_train_samples: int | None = None
    """Train on at most this many pairs, the first ones."""
    max_eval_samples: int | None = None
    """Validate on at most this many pairs, the first ones."""
    pair_rule: str | None = field(default=None, metadata={"choices": (*PAIR_RULES, LIST_RULE)})
    """Pairs made of a prompt's ranked answers: best_worst, best_each (best against each other one), all, or list (all
    answers as one ranked list); by default best_worst, with --loss_type listwise list."""
    min_margin: float = 0.0
    """Make pairs only of answers whose scores differ by more than this."""

    def __post_init__(self) -> None:
        problems: list[str] = []
        if self.pair_rule is not None:
            one_of(problems, "pair_rule", self.pair_rule, (*PAIR_RULES, LIST_RULE))
        within(problems, "min_margin", self.min_margin, 0)
        if not self.dataset_name:
            problems.append("--dataset_name is missing: name a hub id, a file or a folder with preference pairs.")
        within(problems, "validation_split_percentage", self.validation_split_percentage, 0, 99)
        for name in ("max_train_samples", "max_eval_samples", "max_prompt_length"):
            within(problems, name, getattr(self, name), 1)
        within(problems, "max_length", self.max_length, 2)
        if self.max_prompt_length >= self.max_length:
            problems.append(
                f"--max_prompt_length must be less than --max_length, or no token is left for an answer. Got"
                f" {self.max_prompt_length} and {self.max_length}."
            )
        refuse(problems)


@dataclass
class LoraSettings:
    """The adapter that is trained."""

    _argument_group_name: ClassVar[str] = "lora"

    lora_rank: int = 8
    """Rank of the adapter's matrices."""
    lora_alpha: int = 16
    """Scale of the adapter: its output is multiplied by alpha / rank."""
    lora_dropout: float = 0.05
    """Dropout before the adapter; it acts only with --disable_dropout false."""
    lora_all_linear: bool = True
    """Adapt every linear layer except the head; false when only --lora_target_modules are meant."""
    lora_target_modules: list[str] | None = None
    """Names of the linear layers to adapt (words or a comma list); needs --lora_all_linear false."""

    def __post_init__(self) -> None:
        problems: list[str] = []
        within(problems, "lora_rank", self.lora_rank, 1)
        within(problems, "lora_alpha", self.lora_alpha, 1)
        within(problems, "lora_dropout", self.lora_dropout, 0, 1, below=True)
        given: str | list[str] = self.lora_target_modules or []
        words = (given if isinstance(given, str) else ",".join(given)).replace("'", "").replace('"', "").split(",")
        self.lora_target_modules = [word.strip() for word in words if word.strip()] or None
        if not self.lora_all_linear and not self.lora_target_modules:
            problems.append("--lora_all_linear false needs --lora_target_modules: name the layers to adapt.")
        refuse(problems)
