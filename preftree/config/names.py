"""Other names of flags: one table of aliases for all commands, and answers to flags of other tools.

A flag of TRL, LLaMA-Factory or Axolotl that means the same as one of ours is an alias. One that asks for what is done
anyway is taken with a note; one that asks for something else is refused with the reason.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

#: Names of one and the same flag: a command that has one of them as its own takes them all.
_SAME = (
    ("model_name_or_path", "model", "base_model"),
    ("output_dir", "out"),
    ("torch_dtype", "dtype", "infer_dtype"),
    ("dataset_name", "dataset"),
    ("dataset_config_name", "dataset_config"),
    ("max_train_samples", "max_samples"),
    ("max_length", "cutoff_len", "sequence_len"),
    ("lora_rank", "lora_r"),
    ("lora_target_modules", "lora_target"),
    ("beta", "pref_beta", "rl_beta"),
    ("loss_type", "pref_loss"),
    ("label_smoothing", "dpo_label_smoothing"),
    ("per_device_train_batch_size", "micro_batch_size"),
    ("num_train_epochs", "num_epochs"),
    ("learning_rate", "lr"),
    ("lr_scheduler_type", "lr_scheduler"),
    ("optim", "optimizer"),
    ("resume_from_checkpoint", "resume"),
    ("validation_split_percentage", "validation_split"),
    ("from_stage", "from"),
)


#: The aliases that the short help shows.
SHORT = ("model", "out", "dtype", "from")


def aliases(flags: Collection[str]) -> dict[str, str]:
    """Alias -> the flag that it means, for a command with these flags."""
    found: dict[str, str] = {}
    for names in _SAME:
        own = next((name for name in names if name in flags), None)
        if own is not None:
            found |= {name: own for name in names if name not in flags}
    return found


@dataclass(frozen=True)
class Foreign:
    """A flag of another tool that has no counterpart here.

    Args:
        reason: what is done here instead.
        done_anyway: the values that ask for what is done anyway; None for all.
    """

    reason: str
    done_anyway: tuple[str, ...] | None = ()

    def asks_for_more(self, words: Collection[str]) -> bool:
        """Whether the values behind the flag ask for something that is not done."""
        return self.done_anyway is not None and not all(word.lower() in self.done_anyway for word in words or ("true",))


_NO = ("false", "no", "none", "0", "null")
_YES = ("true", "yes", "1")
_QUANTIZED = Foreign("quantized weights are asked for by --load_in_4bit or --load_in_8bit", _NO)
_OWN_TEMPLATE = "the tokenizer's own chat template renders prompts; --tokenizer_name names a tokenizer with another"
_SPLIT = "the split named train is used; name a file by --dataset_name, and by --validation_file, for another"

#: Flags of `trl dpo`, `llamafactory-cli train` and Axolotl that `preftree train` answers.
TRAINING: dict[str, Foreign] = {
    "use_peft": Foreign("LoRA is what this command trains", _YES),
    "finetuning_type": Foreign("LoRA is what this command trains", ("lora",)),
    "adapter": Foreign("LoRA is what this command trains; its rank is --lora_rank", ("lora",)),
    "stage": Foreign("DPO is what this command trains", ("dpo",)),
    "rl": Foreign("DPO is what this command trains; --loss_type names the objective", ("dpo",)),
    "precompute_ref_batch_size": Foreign("forests of the reference pass are as large as those of training", None),
    "padding_free": Foreign("forests are packed without padding", _YES),
    "packing": Foreign("forests are packed to a token budget", _YES),
    "sample_packing": Foreign("forests are packed to a token budget", _YES),
    "flash_attention": Foreign("the fastest exact attention is chosen; --attention names one", None),
    "flash_attn": Foreign("the fastest exact attention is chosen; --attention names one", None),
    "dataset_num_proc": Foreign("the tokenizer uses every core", None),
    "quantization_bit": _QUANTIZED,
    "quantization_method": _QUANTIZED,
    "truncation_mode": Foreign("a prompt that is too long keeps its end, and an answer its start"),
    "max_completion_length": Foreign("an answer has what --max_length leaves after its prompt"),
    "template": Foreign(_OWN_TEMPLATE),
    "chat_template": Foreign(_OWN_TEMPLATE),
    "chat_template_path": Foreign(_OWN_TEMPLATE),
    "dataset_train_split": Foreign(_SPLIT, ("train",)),
    "dataset_test_split": Foreign(_SPLIT),
    "dataset_dir": Foreign("--dataset_name takes a folder, a file or a hub id as it stands"),
    "val_size": Foreign("--validation_split_percentage is the share in percent: 10 where val_size is 0.1"),
    "val_set_size": Foreign("--validation_split_percentage is the share in percent: 10 where val_set_size is 0.1"),
    "ref_model": Foreign("the reference is the model itself without its adapter"),
    "ref_model_name_or_path": Foreign("the reference is the model itself without its adapter"),
    "sync_ref_model": Foreign("the reference stays as it is", _NO),
    "use_dora": Foreign("plain LoRA is trained", _NO),
    "use_rslora": Foreign("LoRA's scale is --lora_alpha / --lora_rank", _NO),
    "lora_modules_to_save": Foreign("nothing but LoRA is trained"),
    "trl": Foreign("flags are written as they stand, not in groups of other tools"),
}
