"""One parser for every command: pure, quick, and patient with every spelling and every mistake."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from preftree.config import answers, check, evaluate, export, merge, prepare, train, winrate
from preftree.config.flags import Kind
from preftree.config.names import TRAINING, aliases
from preftree.config.parser import FlagParser
from preftree.errors import SettingsError

PARSERS: dict[str, FlagParser] = {
    "train": train.parser(),
    "prepare": prepare.parser(),
    "check": check.parser(),
    "evaluate": evaluate.evaluate_parser(),
    "compare": evaluate.compare_parser(),
    "chat": answers.chat_parser(),
    "samples": answers.samples_parser(),
    "winrate": winrate.parser(),
    "merge": merge.parser(),
    "export": export.parser(),
}
TRAIN = ["--model_name_or_path", "M", "--dataset_name", "D", "--output_dir", "O"]
EVALUATE = ["--model", "M", "--out", "O"]
PREPARE = ["--model_name_or_path", "M", "--dataset_name", "D", "--output_dir", "O"]
PURE = """
import os, socket, sys, time
def refused(*_, **__): raise AssertionError("a socket while parsing")
socket.socket = socket.create_connection = refused
before, threads = dict(os.environ), time.thread_time()
from preftree.config import answers, check, evaluate, export, merge, prepare, train, winrate
flags = ["--model_name_or_path", "M", "--dataset_name", "D", "--output_dir", "O", "--use_cpu", "--fsdp"]
train.parse_settings(flags)
prepare.parse_settings(flags[:6])
check.parse_check_settings(["D"])
evaluate.parse_evaluate(["--model", "M", "--out", "O"])
assert dict(os.environ) == before
print({"torch", "transformers", "accelerate", "numpy"} & set(sys.modules), time.process_time() < 1)
"""


def refusals(parse: Callable[[list[str]], Any], words: list[str]) -> str:
    with pytest.raises(SettingsError) as caught:
        parse(words)
    return str(caught.value)


def test_parsing_is_pure_even_among_ranks_and_quick() -> None:
    """No socket, no change of the environment, no torch, under a second of CPU."""
    environment = {**os.environ, "RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    environment |= {"ACCELERATE_USE_FSDP": "true"}
    done = subprocess.run([sys.executable, "-c", PURE], capture_output=True, text=True, env=environment, timeout=60)
    assert done.stdout.strip() == "set() True", done.stderr


@pytest.mark.parametrize("words", [["train", "--help"], ["train", "--bta", "1"], ["evaluate", "-h"], ["prepare"]])
def test_help_and_a_wrong_flag_answer_in_under_a_second(words: list[str]) -> None:
    code = "import sys, time; from preftree.cli import app\ntry: app(sys.argv[1:])\n"
    code += "finally: print(time.process_time(), 'torch' in sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60)
    seconds, torch = done.stderr.split("\n")[-2].split()
    assert float(seconds) < 1
    assert torch == "False"


@pytest.mark.parametrize("name", PARSERS)
def test_help_fits_a_terminal_and_every_flag_is_listed_once(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    parser = PARSERS[name]
    texts = {}
    for flag in ("-h", "--help", "--help-all"):
        with pytest.raises(SystemExit) as ended:
            parser.parse([flag])
        assert ended.value.code == 0
        texts[flag] = capsys.readouterr().out
    assert texts["-h"] == texts["--help"]
    assert texts["--help"].count("\n") < 60
    assert all(len(line) <= 80 for line in texts["--help"].splitlines())
    assert len(parser.command.examples) <= 3
    heads = [line.strip().split("  ")[0] for line in texts["--help-all"].splitlines() if line.startswith("  --")]
    names = [word.strip(",")[2:] for head in heads for word in head.split() if word.startswith("--")]
    assert len(names) == len(set(names))
    positional = {flag.name for flag in parser.table.values() if flag.positional}
    others = {alias for alias, own in parser.aliases.items() if own not in positional}
    assert set(parser.table) | others == set(names) | positional


@pytest.mark.parametrize("name", PARSERS)
def test_the_common_flags_are_flags(name: str) -> None:
    parser = PARSERS[name]
    assert set(parser.command.common) <= set(parser.table)
    assert len(parser.command.common) < 30


def test_one_vocabulary() -> None:
    """What is called --model here is --model_name_or_path there, and both are taken everywhere."""
    for name, words in (("train", TRAIN), ("prepare", PREPARE), ("evaluate", EVALUATE)):
        parser = PARSERS[name]
        for same in (("model_name_or_path", "model"), ("output_dir", "out"), ("torch_dtype", "dtype")):
            found = [parser.parse([f"--{each.replace('_', '-')}", "float32"]) for each in same]
            assert found[0].values == found[1].values
            assert not found[0].problems
        assert not parser.parse([*words, "--use-cpu", "--device=cpu"]).problems
    assert evaluate.parse_evaluate([*EVALUATE, "--use_cpu"]).device == "cpu"
    assert train.parse_settings([*TRAIN, "--device", "cpu"]).train.use_cpu
    assert train.parse_settings([*TRAIN, "--use_cpu"]).train.device == "cpu"


def test_several_values_of_a_number_are_a_sweep(tmp_path: Path) -> None:
    file = tmp_path / "several.yaml"
    file.write_text("learning_rate: [1e-5, 2e-5]\n")
    said = "takes one value; '2e-5' is left over (preftree sweep trains with several values)"
    for words in ([*TRAIN, "--learning_rate", "1e-5", "2e-5"], [str(file), *TRAIN]):
        assert said in refusals(train.parse_settings, words)


def test_no_alias_hides_a_flag() -> None:
    for parser in PARSERS.values():
        assert not set(parser.aliases) & set(parser.table)
        assert set(parser.aliases.values()) <= set(parser.table)
    assert aliases(["out"]) == {"output_dir": "out"}


def test_evaluate_as_before() -> None:
    asked = evaluate.parse_evaluate(
        [
            "--model",
            "M",
            "--out=O",
            "--max-length",
            "9",
            "--num-fewshot",
            "0",
            "--no-cache",
            "--apply_chat_template",
            "--tasks",
            "a,b",
            "--limit",
            "3",
        ]
    )
    assert (asked.model, asked.out, asked.max_length, asked.num_fewshot) == ("M", "O", 9, 0)
    assert (asked.cache, asked.apply_chat_template, asked.tasks, asked.limit) == (False, True, "a,b", 3)
    assert evaluate.parse_evaluate(["--export-data", "F"]).export_data == "F"
    text = refusals(evaluate.parse_evaluate, ["--limit", "0", "--batch_size", "x", "--dtype", "half"])
    pieces = ("--model is missing", "--out is missing", "--limit must be at least 1", "--batch_size must be a whole")
    for piece in (*pieces, "--dtype must be one of"):
        assert piece in text


def test_words_of_compare_stand_anywhere() -> None:
    for line in ("a b c --out O", "--out O a b c", "a --out O b c"):
        asked = evaluate.parse_compare(line.split())
        assert (asked.runs, asked.out) == (["a", "b", "c"], "O"), line
    assert "name the folders" in refusals(evaluate.parse_compare, [])


@pytest.mark.parametrize("name", sorted(TRAINING))
def test_flags_of_other_tools_are_answered(name: str) -> None:
    assert name not in PARSERS["train"].table
    done = TRAINING[name].done_anyway
    if done is None or done:
        settings = train.parse_settings([*TRAIN, f"--{name}", (done or ("1",))[0]])
        assert any(note.startswith(f"--{name}: ignored, ") for note in settings.notes)
    if done is not None:
        assert f"--{name} is not supported here: " in refusals(train.parse_settings, [*TRAIN, f"--{name}", "other"])


def test_flags_of_other_tools_that_mean_the_same() -> None:
    line = "--lora_r 4 --lora_target q_proj,v_proj --lora_all_linear false --cutoff_len 99 --max_prompt_length 9"
    settings = train.parse_settings(
        [*TRAIN, *f"{line} --pref_beta 0.3 --micro_batch_size 3 --num_epochs 2 --lr 1e-3 --no_remove_unused_columns"
         " --optimizer sgd --pref_loss ipo --max_samples 7 --resume O".split()]
    )  # fmt: skip
    assert (settings.lora.lora_rank, settings.lora.lora_target_modules) == (4, ["q_proj", "v_proj"])
    assert (settings.data.max_length, settings.data.max_train_samples) == (99, 7)
    own = settings.train
    assert (own.beta, own.loss_type, own.learning_rate, own.num_train_epochs) == (0.3, ["ipo"], 1e-3, 2.0)
    assert (own.per_device_train_batch_size, own.optim, own.resume_from_checkpoint) == (3, "sgd", "O")


def test_resume_may_stand_alone() -> None:
    assert train.parse_settings([*TRAIN, "--resume_from_checkpoint"]).train.resume_from_checkpoint is True
    assert train.parse_settings([*TRAIN, "--resume_from_checkpoint", "C"]).train.resume_from_checkpoint == "C"


def test_secrets_are_never_echoed() -> None:
    secret = "hf_abcdefghijkl"
    words = [secret, *TRAIN, "--seed", f"https://me:{secret}x@host/x", f"--{secret}", "--token", "a", secret]
    assert secret not in refusals(train.parse_settings, words)
    settings = train.parse_settings([*TRAIN, "--run_name", "https://me:password@host/x", "--token", secret])
    assert "password" not in str(settings.as_dict())
    assert secret not in str(settings.as_dict())


def test_every_kind_has_a_flag_in_train() -> None:
    assert {flag.kind for flag in PARSERS["train"].table.values()} == set(Kind)


def test_run_config_json_is_taken_as_it_stands(tmp_path: Path) -> None:
    from preftree.io.run_folder import RunFolder

    words = [
        "--beta",
        "0.3",
        "--lora_target_modules",
        "q",
        "v",
        "--lora_all_linear",
        "false",
        "--learning_rate",
        "1e-3",
    ]
    before = train.parse_settings([*TRAIN, *words, "--token", "hf_secret", "--lr_scheduler_kwargs", '{"a": 1}'])
    folder = RunFolder(tmp_path)
    folder.claim(resume=False, overwrite=False, fingerprint=before.fingerprint(), config=before.as_dict())
    after = train.parse_settings([str(folder.config_path)])
    assert after.fingerprint() == before.fingerprint()
    assert after.model.token is None
    assert train.parse_settings([str(folder.config_path), "--beta", "0.5"]).train.beta == 0.5
