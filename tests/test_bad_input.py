"""Mistakes on every command's line: one message that names the flag or file, exit code 2, and nothing written.

Only what is found without loading a model is here; docs/reliability.md says where broken data, models, adapters,
checkpoints and results are tested.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from preftree.cli import app
from tests.support import tiny
from tests.support.command import TEMPLATE

TRAIN = "train --model_name_or_path model --dataset_name d.jsonl --output_dir O --use_cpu true"
PREPARE = "prepare --dataset_name d.jsonl --model_name_or_path model --output_dir O"
EVALUATE = "evaluate --model model --data data --out R"
MANY = "[" * 1200

#: Command line -> pieces of what is said: what is wrong, where, and what to do.
CASES: dict[str, list[str]] = {
    # --- train: values ---
    f"{TRAIN} --seed -1": ["--seed must be at least 0", "Got -1"],
    f"{TRAIN} --seed {2**70}": ["--seed must be at least 0 and at most", f"Got {2**70}"],
    f"{TRAIN} --adam_beta1 2": ["--adam_beta1 must be at least 0 and below 1", "Got 2.0"],
    f"{TRAIN} --max_memory infGB": ["--max_memory infGB: write a number and a unit, such as 2GB"],
    f"{TRAIN} --max_memory 2gbit": ["--max_memory 2gbit: write a number and a unit"],
    f"{TRAIN} --save_steps 0": ["--save_steps must be above 0"],
    f"{TRAIN} --beta 1e38": ["--beta must be above 0 and at most 10000"],
    f"{TRAIN} --beta nan": ["--beta must be above 0", "Got nan"],
    f"{TRAIN} --learning_rate inf": ["--learning_rate must be at least 0 and finite. Got inf"],
    f"{TRAIN} --weight_decay -inf": ["--weight_decay must be at least 0"],
    f"{TRAIN} --dataloader_num_workers -1": ["--dataloader_num_workers must be at least 0"],
    f"{TRAIN} --per_device_train_batch_size 0": ["--per_device_train_batch_size must be at least 1"],
    f"{TRAIN} --num_train_epochs 0": ["--num_train_epochs must be above 0"],
    f"{TRAIN} --max_steps ten": ["--max_steps must be a whole number. Got 'ten'"],
    f"{TRAIN} --gradient_checkpointing maybe": ["must be true or false. Got 'maybe'"],
    f"{TRAIN} --lora_rank 0": ["--lora_rank must be at least 1"],
    f"{TRAIN} --lora_dropout 1.5": ["--lora_dropout must be at least 0 and below 1"],
    f"{TRAIN} --max_length 100 --max_prompt_length 100": ["must be less than --max_length", "Got 100 and 100"],
    f"{TRAIN} --label_smoothing 0.7": ["--label_smoothing must be at least 0 and below 0.5"],
    f"{TRAIN} --validation_split_percentage 150": ["must be at least 0 and at most 99"],
    f"{TRAIN} --save_total_limit 0": ["--save_total_limit must be at least 1"],
    # --- train: names ---
    f"{TRAIN} --betta 3": ["--betta is not a setting of preftree train. Did you mean --beta"],
    f"{TRAIN} --beta": ["--beta expects a number"],
    f"{TRAIN} extra": ["'extra' is left over"],
    f"{TRAIN} --loss_type dpo": ["--loss_type must be one of sigmoid", "Did you mean rdpo?"],
    f"{TRAIN} --device tpu": ["--device must be one of auto, cpu", "Got 'tpu'"],
    f"{TRAIN} --torch_dtype int8": ["--torch_dtype must be one of auto, float32", "Got 'int8' instead."],
    f"{TRAIN} --lr_scheduler_type cosin": ["--lr_scheduler_type must be one of", "Did you mean cosine?"],
    f"{TRAIN} --optim adamw_bnb_8bit": ["not installed: pip install bitsandbytes"],
    f"{TRAIN} --report_to wandb": ["not installed: pip install wandb"],
    f"{TRAIN} --trust_remote_code perhaps": ["--trust_remote_code must be true or false. Got 'perhaps'"],
    f"{TRAIN} --hub_token": ["--hub_token: no such value"],
    # --- train: contradictions ---
    f"{TRAIN} --eval_strategy steps --validation_split_percentage 0": ["needs validation data: give --validation_file"],
    f"{TRAIN} --save_strategy best": ["--save_strategy best needs --eval_strategy steps"],
    f"{TRAIN} --push_to_hub": ["--push_to_hub cannot work while HF_HUB_OFFLINE is set: unset it"],
    f"{TRAIN} --bf16 --fp16": ["At most one of --fp16 and --bf16", "leave one of them out"],
    f"{TRAIN} --device cuda": ["--use_cpu and --device cuda contradict each other"],
    f"{TRAIN} --fsdp nonsense": ["--fsdp nonsense is not known: use --fsdp true"],
    f"{TRAIN} --fsdp_config none.json": ["--fsdp_config needs --fsdp true"],
    f"{TRAIN} --deepspeed broken.json": ["--deepspeed broken.json cannot be read", "line 1"],
    # --- train: files and folders ---
    f"{TRAIN} --resume_from_checkpoint nowhere": ["--resume_from_checkpoint nowhere: there is no such folder"],
    f"{TRAIN} --output_dir file": ["--output_dir file is a file. Give a folder"],
    f"{TRAIN} --output_dir file/x": ["--output_dir file/x is a file. Give a folder"],
    f"{TRAIN} --output_dir occupied": ["holds other files (thesis.txt); nothing is overwritten", "Give another folder"],
    f"{TRAIN} --output_dir data --dataset_name data": ["--output_dir data", "data"],
    f"{TRAIN} --model_name_or_path empty": ["--model_name_or_path empty: the folder has no config.json"],
    f"{TRAIN} --model_name_or_path pickled": ["a pickled file (pytorch_model.bin)", "only safetensors files are read"],
    f"{TRAIN} --model_name_or_path adapter": ["is a PEFT adapter, not a model", "Give the base model"],
    f"{TRAIN} --model_name_or_path https://u:hunter2@h/m": ["https://<redacted>@h/m: no such folder"],
    "train": ["3 problems", "--model_name_or_path is missing: name a hub id", "--output_dir is missing"],
    # --- a file of settings ---
    "train none.yaml": ["none.yaml cannot be read: No such file"],
    "train token.yaml": ["token.yaml is not YAML: line 2"],
    "train deep.yaml": ["deep.yaml is nested too deeply"],
    "train list.yaml": ["list.yaml must hold 'flag: value' lines. Got a list"],
    "train bytes.yaml": ["bytes.yaml cannot be read: it is not UTF-8 text"],
    "train unknown.yaml": ["unknown.yaml: betta is not a setting", "Did you mean --beta"],
    # --- prepare ---
    "prepare": ["3 problems", "--dataset_name is missing", "--output_dir is missing: name a folder"],
    f"{PREPARE} --num_samples 0": ["--num_samples must be at least 1"],
    f"{PREPARE} --temperature inf": ["--temperature must be at least 0 and finite"],
    f"{PREPARE} --top_p 2": ["--top_p must be above 0 and at most 1"],
    f"{PREPARE} --engine gpt": ["--engine must be one of transformers, vllm, openai"],
    f"{PREPARE} --base_url ftp://x": ["--base_url must begin with http:// or https://"],
    f"{PREPARE} --output_dir occupied": ["holds other files (thesis.txt); nothing is written over"],
    f"{PREPARE} --dataset_name none.jsonl": ["There is no file or folder none.jsonl", "Check the path"],
    f"{PREPARE} --decontaminate nowhere": ["nowhere is no folder. Give the folder with the test sets"],
    f"{PREPARE} --chat_template nowhere.jinja": ["--chat_template nowhere.jinja is none of", "cannot be read"],
    # --- check ---
    "check": ["name what to check: preftree check PATH"],
    "check none.jsonl": ["There is no file or folder none.jsonl. Did you mean"],
    "check pipe.jsonl": ["pipe.jsonl is a pipe or a device and not a file", "save it first"],
    "check /dev/zero": ["is a pipe or a device and not a file"],
    "check file": ["file cannot be read: its ending is none of", "Convert it"],
    "check d.jsonl --fix d.jsonl": ["--fix d.jsonl exists already", "Name a new one"],
    "check d.jsonl --html no/x.html": ["there is no folder no. Make it first"],
    "check d.jsonl --min_margin nan": ["--min_margin must be at least 0"],
    "check d.jsonl --split nope": ["has only the split train, not 'nope'"],
    "check d.jsonl --eval_data nowhere": ["nowhere is no folder"],
    # --- evaluate and compare ---
    "evaluate": ["2 problems", "--model is missing: name a hub id", "--out is missing: name a folder"],
    f"{EVALUATE} --limit -3": ["--limit must be at least 1"],
    f"{EVALUATE} --num_fewshot -1": ["--num_fewshot must be at least 0"],
    f"{EVALUATE} --dtype int4": ["--dtype must be one of auto, float32"],
    f"{EVALUATE} --preferences none.jsonl": ["There is no file or folder none.jsonl"],
    f"{EVALUATE} --tasks arc_challenge --data odd": ["odd/arc_challenge_test.jsonl", "answerKey"],
    f"{EVALUATE} --tasks hellaswag": ["hellaswag_train.jsonl is missing", "--export-data data downloads it"],
    f"{EVALUATE} --out file": ["--out file is a file. Give a folder"],
    "compare": ["name the folders of two evaluations at least"],
    "compare empty": ["name the folders of two evaluations at least"],
    "compare empty nowhere": ["empty: no evaluation here"],
    "compare empty data --out file": ["--out file is a file. Give a folder"],
    # --- the others ---
    "cache destroy": ["preftree cache destroy: choose info or clear"],
    "cache clear more": ["unexpected extra argument"],
    "demo --bogus 3": ["--bogus is not a setting"],
    "demo --output_dir file": ["--output_dir file is a file"],
    "env extra": ["unexpected extra argument"],
    "frobnicate": ["No such command 'frobnicate'"],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the command lines name."""
    here = tmp_path_factory.mktemp("bad")
    rows = [{"prompt": f"q{i}", "chosen": "yes", "rejected": "no"} for i in range(4)]
    question = {"question": "Why?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "C"}
    files = {
        "d.jsonl": "".join(json.dumps(row) + "\n" for row in rows),
        "file": "mine",
        "occupied/thesis.txt": "mine",
        "pickled/config.json": '{"model_type": "llama"}',
        "pickled/pytorch_model.bin": "",
        "adapter/adapter_config.json": "{}",
        "data/pairs.jsonl": json.dumps(rows[0]) + "\n",
        "odd/arc_challenge_train.jsonl": json.dumps(question | {"answerKey": "A"}) + "\n",
        "odd/arc_challenge_test.jsonl": json.dumps(question) + "\n",
        "broken.json": "{",
        "token.yaml": "beta: 0.1\ntoken: hf_topsecret: [\n",
        "deep.yaml": f"a: {MANY}",
        "list.yaml": "- beta\n",
        "unknown.yaml": "betta: 0.1\n",
    }
    for name, content in files.items():
        (here / name).parent.mkdir(exist_ok=True)
        (here / name).write_text(content)
    (here / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    tiny.llama(num_hidden_layers=1).save_pretrained(here / "model")
    tiny.word_tokenizer(TEMPLATE).save_pretrained(here / "model")
    (here / "empty").mkdir()
    os.mkfifo(here / "pipe.jsonl")
    return here


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def test_there_are_sixty_and_every_command_is_among_them() -> None:
    assert len(CASES) >= 60
    commands = {line.split()[0] for line in CASES}
    assert {"train", "prepare", "check", "evaluate", "compare", "cache", "demo"} <= commands


@pytest.mark.parametrize("line", CASES)
def test_one_message_and_nothing_written(place: Path, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    monkeypatch.chdir(place)
    before = contents(place)
    result = CliRunner().invoke(app, shlex.split(line))
    said = " ".join(result.output.replace("│", " ").split())
    assert result.exit_code == 2, (said, result.exception)
    for piece in CASES[line]:
        assert piece in said, said
    assert "Traceback" not in said
    assert "hunter2" not in said
    assert "topsecret" not in said
    assert not re.search(r"\w[.?]\.( |$)", said)  # a sentence that ends twice
    assert contents(place) == before
