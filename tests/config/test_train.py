"""Command lines of all ages parse, mistakes are reported together, and tokens are never repeated."""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
from pathlib import Path

import pytest

from preftree.config import train as module
from preftree.config.dpo import LOSS_TYPES
from preftree.config.flags import flags_of
from preftree.config.legacy import OLD_FLAGS
from preftree.config.shared import DataSettings, LoraSettings, ModelSettings
from preftree.config.train import Settings, TrainSettings, parse_settings, parser
from preftree.errors import SettingsError

GROUPS = (ModelSettings, DataSettings, LoraSettings, TrainSettings)
BASE = "--model_name_or_path M --dataset_name D --output_dir O"
CPU = (
    "--model_name_or_path M --output_dir O --per_device_train_batch_size 2 --gradient_accumulation_steps 2"
    " --learning_rate 5e-4 --max_steps 1000 --save_steps 10 --logging_steps 10 --lora_alpha 16 --lora_rank 16"
    " --lora_dropout 0.05 --dataset_name D --bf16 --max_length 1024 --max_prompt_length 512"
    " --lr_scheduler_type cosine --warmup_steps 100 --use_cpu true --gradient_checkpointing true"
    " --lora_all_linear false --lora_target_modules k_proj q_proj v_proj"
)
GPU = (
    "--model_name_or_path mosaicml/mpt-7b --output_dir O --per_device_train_batch_size 1"
    " --gradient_accumulation_steps 8 --learning_rate 5e-4 --max_steps 1000 --save_steps 10 --lora_alpha 16"
    " --lora_rank 16 --lora_dropout 0.05 --dataset_name Intel/orca_dpo_pairs --bf16 --use_auth_token True"
)
GAUDI = (
    f"{GPU} --use_habana --use_lazy_mode --pad_max true --report_to none --torch_dtype bfloat16"
    " --use_hpu_graphs_for_training"
)


def parse(line: str) -> Settings:
    return parse_settings(shlex.split(line))


def problems(line: str) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        parse(line)
    return caught.value.problems


def test_the_cpu_recipe_parses_as_it_stands() -> None:
    settings = parse(CPU)
    train, lora = settings.train, settings.lora
    assert (train.per_device_train_batch_size, train.gradient_accumulation_steps) == (2, 2)
    assert (train.learning_rate, train.max_steps, train.warmup_steps) == (5e-4, 1000, 100)
    assert (train.save_steps, train.logging_steps, train.lr_scheduler_type) == (10, 10, "cosine")
    assert train.bf16
    assert train.use_cpu
    assert train.gradient_checkpointing
    assert train.device == "cpu"
    assert (settings.data.max_length, settings.data.max_prompt_length) == (1024, 512)
    assert (lora.lora_rank, lora.lora_alpha, lora.lora_dropout, lora.lora_all_linear) == (16, 16, 0.05, False)
    assert lora.lora_target_modules == ["k_proj", "q_proj", "v_proj"]
    assert settings.notes == []


def test_the_gpu_recipe_parses_as_it_stands() -> None:
    settings = parse(GPU)
    assert settings.model.auth is True
    assert settings.train.gradient_accumulation_steps == 8
    assert settings.lora.lora_all_linear
    assert settings.train.bf16


def test_the_gaudi_recipe_parses_as_it_stands() -> None:
    settings = parse(GAUDI)
    train = settings.train
    assert train.use_habana
    assert train.use_lazy_mode
    assert train.pad_max
    assert train.use_hpu_graphs_for_training
    assert train.report_to == "none"
    assert settings.model.torch_dtype == "bfloat16"
    assert any("no longer develops" in note for note in settings.notes)


def test_the_recipes_in_runs_are_the_ones_tested_here(repo_root: Path) -> None:
    for script, line in (("cpu", CPU), ("cuda", GPU), ("gaudi", GAUDI)):
        text = (repo_root / "runs" / f"{script}.sh").read_text()
        words = text[text.index("dpo_clm.py --") :].replace("\\\n", " ").replace('"$@"', "")
        flags = shlex.split(words)[1:]
        ours = shlex.split(line)
        for name in ("--model_name_or_path", "--output_dir", "--dataset_name"):
            for command in (flags, ours):
                command[command.index(name) + 1] = "X"
        assert sorted(flags) == sorted(ours), script


def test_defaults_are_the_originals() -> None:
    settings = parse(BASE)
    assert (settings.train.beta, settings.data.validation_split_percentage) == (0.1, 2)
    assert (settings.data.max_length, settings.data.max_prompt_length) == (1024, 512)
    assert settings.lora.lora_all_linear
    assert settings.train.disable_dropout
    assert settings.train.report_to == "none"
    assert not settings.train.remove_unused_columns
    assert settings.model.auth is None


@pytest.mark.parametrize(
    "words",
    ["k_proj q_proj", "'k_proj' 'q_proj'", "k_proj,q_proj", "'k_proj, q_proj'", "\"'k_proj'\" \"'q_proj'\""],
)
def test_lora_targets_in_every_spelling(words: str) -> None:
    settings = parse(f"{BASE} --lora_all_linear false --lora_target_modules {words}")
    assert settings.lora.lora_target_modules == ["k_proj", "q_proj"]


@pytest.mark.parametrize("line", ["--output-dir P", "--output_dir=P", "--output_dir A --output_dir P"])
def test_other_spellings_of_a_flag(line: str) -> None:
    assert parse(f"--model-name-or-path M --dataset_name D {line}").train.output_dir == "P"


def test_booleans_take_a_value_or_none() -> None:
    assert parse(f"{BASE} --bf16").train.bf16
    assert parse(f"{BASE} --bf16 True").train.bf16
    assert not parse(f"{BASE} --bf16 no").train.bf16
    assert not parse(f"{BASE} --no_disable_dropout").train.disable_dropout
    assert parse(f"{BASE} --max_steps -1").train.max_steps == -1
    assert parse(f"{BASE} --ddp_find_unused_parameters").train.ddp_find_unused_parameters is True  # None by default


def test_old_flags_are_accepted_each_with_one_note() -> None:
    values = {"warmup_ratio": "0.1", "evaluation_strategy": "steps", "no_cuda": "", "xpu_backend": "gloo"}
    flags = " ".join(f"--{name} {values.get(name, '2')}" for name in OLD_FLAGS)
    settings = parse(f"{BASE} {flags} {flags}")
    for name, (new, _) in OLD_FLAGS.items():
        notes = [note for note in settings.notes if note.startswith((f"--{name}:", f"--{name} "))]
        assert len(notes) == 1, name
        assert new is None or f"--{new}" in notes[0]
    renamed = parse(f"{BASE} --evaluation_strategy epoch --no_cuda --warmup_ratio 0.1 --per_gpu_train_batch_size 3")
    train = renamed.train
    assert (train.eval_strategy, train.use_cpu, train.warmup_steps) == ("epoch", True, 0.1)
    assert train.per_device_train_batch_size == 3


def test_preprocessing_num_workers_is_accepted_and_said_to_do_nothing() -> None:
    settings = parse(f"{BASE} --preprocessing_num_workers 4")
    assert not hasattr(settings.data, "preprocessing_num_workers")
    assert any("ignored: the tokenizer uses every core" in note for note in settings.notes)


def test_old_flags_that_still_exist_work() -> None:
    line = "--do_train --do_eval --overwrite_output_dir --ddp_find_unused_parameters false --gaudi_config_name G"
    train = parse(f"{BASE} {line}").train
    assert train.do_train
    assert train.do_eval
    assert train.overwrite_output_dir
    assert train.ddp_find_unused_parameters is False


def test_the_table_of_old_flags_has_no_dead_lines() -> None:
    flags = set(parser().table)
    assert not flags & set(OLD_FLAGS), "transformers has these flags (again): drop them from the table"
    assert {new for new, _ in OLD_FLAGS.values() if new} <= flags


def test_all_problems_come_at_once() -> None:
    found = problems(
        "--output_dir O --beta 0 --loss_type sigmod --max_steps abc --bf16 maybe --lora_rnk 3 --max_length 10"
        " --seed 1 stray"
    )
    for piece in (
        "--model_name_or_path is missing",
        "--dataset_name is missing",
        "--beta must be above 0",
        f"--loss_type must be one of {', '.join(LOSS_TYPES)}. Got 'sigmod' instead. Did you mean sigmoid?",
        "--max_steps must be a whole number. Got 'abc' instead.",
        "--bf16 must be true or false. Got 'maybe' instead.",
        "--lora_rnk is not a setting of preftree train. Did you mean --lora_rank",
        "'stray' is left over",
        "--max_prompt_length must be less than --max_length",
    ):
        assert any(piece in problem for problem in found), (piece, found)
    assert len(found) == 9


@pytest.mark.parametrize(
    ("line", "piece"),
    [
        ("--max_length 512", "--max_prompt_length must be less than --max_length"),
        ("--label_smoothing 0.5", "--label_smoothing must be at least 0 and below 0.5"),
        ("--label_smoothing 0.1 --loss_type ipo", "--label_smoothing has no meaning for --loss_type ipo"),
        ("--label_smoothing_factor 0.1", "--label_smoothing_factor is for next-token losses"),
        ("--beta nan", "--beta must be above 0"),
        ("--lora_dropout 1", "--lora_dropout must be at least 0 and below 1"),
        ("--lora_rank 0", "--lora_rank must be at least 1"),
        ("--lora_all_linear false", "--lora_all_linear false needs --lora_target_modules"),
        ("--validation_split_percentage 100", "--validation_split_percentage must be"),
        ("--per_device_train_batch_size 0", "--per_device_train_batch_size must be at least 1"),
        ("--num_train_epochs 0", "--num_train_epochs must be above 0"),
        ("--load_in_4bit --load_in_8bit", "--load_in_4bit and --load_in_8bit contradict each other"),
        ("--torch_dtype bf16", "--torch_dtype must be one of"),
        ("--use_habana --use_cpu", "--use_habana and --use_cpu contradict"),
        ("--use_habana --use_hpu_graphs_for_training", "needs --use_lazy_mode"),
        ("--bf16 --fp16", "At most one of --fp16 and --bf16"),
        ("--load_best_model_at_end", "--load_best_model_at_end requires"),
        ("--lr_scheduler_type cosin", "--lr_scheduler_type must be one of linear, cosine"),
        ("--fsdp full_shard --fsdp_config nowhere.json", "nowhere.json"),
        ("--lora 3", "--lora is not a setting"),  # no silent abbreviations
        ("--lora_rank", "--lora_rank expects a whole number"),
    ],
)
def test_what_cannot_be_used_is_refused(line: str, piece: str) -> None:
    found = problems(f"{BASE} {line}")
    assert any(piece in problem for problem in found), found


def test_a_stray_first_word_is_named() -> None:
    assert "'stray' belongs to no flag" in problems(f"stray {BASE}")[0]


def test_yaml_is_read_and_flags_win(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "model_name_or_path: M\ndataset-name: D\noutput_dir: from-yaml\nlearning_rate: 5e-4\nbf16: true\n"
        "lora_all_linear: false\nlora_target_modules: [q_proj, v_proj]\ncache_dir: null\n"
        "lr_scheduler_kwargs: {a: 1}\nevaluation_strategy: epoch\n"
    )
    settings = parse(f"{path} --output_dir O --lora_target_modules k_proj")
    assert (settings.train.output_dir, settings.train.learning_rate, settings.train.bf16) == ("O", 5e-4, True)
    assert settings.lora.lora_target_modules == ["k_proj"]
    assert json.loads(settings.train.lr_scheduler_kwargs) == {"a": 1}
    assert settings.train.eval_strategy == "epoch"
    assert len(settings.notes) >= 1


@pytest.mark.parametrize(
    ("content", "piece"),
    [
        ("learning_rat: 1", "learning_rat is not a setting of preftree train. Did you mean --learning_rate"),
        ("- a", "must hold 'flag: value' lines"),
        ("a: [", "is not YAML"),
        ("max_steps: soon", "max_steps must be a whole number"),
        (None, "No such file"),
    ],
)
def test_a_yaml_file_with_mistakes(tmp_path: Path, content: str | None, piece: str) -> None:
    path = tmp_path / "run.yml"
    if content is not None:
        path.write_text(content)
    found = problems(f"{path} {BASE}")
    assert len(found) == 1
    assert piece in found[0]
    assert str(path) in found[0]


def test_tokens_are_never_repeated() -> None:
    settings = parse(f"{BASE} --token hf_secret --hub_token hf_secret --push_to_hub_token hf_secret")
    assert settings.model.auth == "hf_secret"
    shown = json.dumps(settings.as_dict()) + repr(settings) + str(settings.notes)
    assert "hf_secret" not in shown
    wrong = problems(f"{BASE} --use_auth_token hf_secret --tokn=hf_secret --token hf_secret hf_secret")
    assert len(wrong) == 3
    assert "hf_secret" not in str(wrong)


def test_as_dict_is_json_of_every_setting() -> None:
    shown = json.loads(json.dumps(parse(CPU).as_dict()))
    for name, cls in zip(("model", "data", "lora"), GROUPS, strict=False):
        assert set(shown[name]) == {field.name for field in dataclasses.fields(cls)}
    assert {"beta", "learning_rate", "seed"} <= set(shown["train"])


@pytest.mark.parametrize(
    "line",
    [
        "--output_dir P",
        "--logging_steps 3",
        "--save_steps 7",
        "--token t",
        "--run_name r",
        "--cache_dir c",
        "--tokens_per_forest 512",
        "--gradient_checkpointing true",
    ],
)
def test_the_fingerprint_ignores_what_does_not_matter(line: str) -> None:
    assert parse(f"{BASE} {line}").fingerprint() == parse(BASE).fingerprint()


@pytest.mark.parametrize(
    "line",
    [
        "--beta 0.2",
        "--learning_rate 1e-3",
        "--seed 1",
        "--lora_rank 4",
        "--max_length 999",
        "--loss_type ipo",
        "--dataset_name E",
        "--max_steps 9",
        "--torch_dtype float32",
    ],
)
def test_the_fingerprint_knows_what_matters(line: str) -> None:
    assert parse(f"{BASE} {line}").fingerprint() != parse(BASE).fingerprint()


def test_names_left_out_of_the_fingerprint_exist() -> None:
    assert set(module._WITHOUT_EFFECT.split()) <= set(parser().table)


def test_every_flag_has_its_help() -> None:
    for cls in GROUPS:
        assert all(flag.help for flag in flags_of(cls).values()), cls
    assert all(flag.help for flag in parser().table.values())


def test_notes_on_flags_without_effect() -> None:
    notes = parse(f"{BASE} --use_cpu --use_lazy_mode --lora_target_modules q_proj --gaudi_config_name G").notes
    assert len(notes) == 3


def test_settings_check_themselves_without_a_command_line() -> None:
    assert LoraSettings(lora_all_linear=False, lora_target_modules=["a,b"]).lora_target_modules == ["a", "b"]
    with pytest.raises(SettingsError, match="lora_alpha"):
        LoraSettings(lora_alpha=0)
    with pytest.raises(SettingsError, match="output_dir"):
        TrainSettings()
    with pytest.raises(SettingsError, match="2 problems"):
        DataSettings(max_length=-1, max_prompt_length=-2, dataset_name="D")
    assert math.isclose(TrainSettings(output_dir="O", beta=0.5).beta, 0.5)


def test_pair_rules_are_those_of_records() -> None:
    from preftree.config.choices import LIST_RULE, PAIR_RULES
    from preftree.data.record import PAIR_RULES as rules

    assert tuple(rules) == (*PAIR_RULES, LIST_RULE)
    assert any("--pair_rule must be one of" in p for p in problems(f"{BASE} --pair_rule best"))
    assert any("--min_margin must be at least 0" in p for p in problems(f"{BASE} --min_margin -1"))
