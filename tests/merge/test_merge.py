"""`preftree merge` through the real command: any adapter, verified; corruption has a name; nothing is overwritten."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from preftree.cli import app
from preftree.model.lora import without_chatter
from tests.support import tiny
from tests.support.command import TEMPLATE, write_inputs

IDS = torch.arange(5, 45)[None]
LINEAR = ["q_proj", "v_proj", "up_proj"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder and pairs."""
    return write_inputs(tmp_path_factory.mktemp("inputs"), pairs=4)


def make_adapter(folder: Path, base: Path, config: Any, *, tokens: int | None = None) -> Path:
    """An adapter whose every weight is drawn at random, with the tokenizer beside it."""
    model = AutoModelForCausalLM.from_pretrained(base)
    if tokens is not None:
        torch.manual_seed(5)
        model.resize_token_embeddings(tokens, mean_resizing=False)
    with without_chatter():
        peft = get_peft_model(model, config)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=random))
    peft.save_pretrained(str(folder), save_embedding_layers=tokens is not None)
    tiny.word_tokenizer(TEMPLATE).save_pretrained(folder)
    return folder


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": LINEAR, "task_type": "CAUSAL_LM", **options})


def merge(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["merge", *map(str, words)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result.exit_code, result.output


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits  # type: ignore[no-any-return]


ADAPTERS: dict[str, Any] = {
    "lora": lora(),
    "dora": lora(use_dora=True),
    "rslora": lora(use_rslora=True),
    "bias": lora(bias="lora_only"),
    "modules_to_save": lora(modules_to_save=["lm_head"]),
    "embeddings": lora(target_modules=[*LINEAR, "embed_tokens"]),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_any_adapter(name: str, tied: bool, inputs: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny.llama(num_hidden_layers=2, tie_word_embeddings=tied).save_pretrained(base, max_shard_size="20KB")
    assert len(list(base.glob("*.safetensors"))) > 1
    run, out = make_adapter(tmp_path / "run", base, copy.deepcopy(ADAPTERS[name])), tmp_path / "out"
    code, said = merge(run, "--out", out, "--pairs", inputs / "pairs.jsonl")
    assert code == 0, said
    assert "merged one layer at a time" in said
    for check in ("weights", "template", "eos", "log-probs"):
        assert f"verified   {check}" in said
    with without_chatter():
        expected = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run))
    plain = logits(AutoModelForCausalLM.from_pretrained(base))
    found = logits(AutoModelForCausalLM.from_pretrained(out))
    assert (found - expected).abs().max() < 2e-4
    assert (found - plain).abs().max() > 1e-2
    assert "base_model" not in json.loads((out / "config.json").read_text())
    assert AutoTokenizer.from_pretrained(out).chat_template == TEMPLATE
    assert "library_name: transformers" in (out / "README.md").read_text()


def test_another_vocabulary(inputs: Path, tmp_path: Path) -> None:
    run = make_adapter(tmp_path / "run", inputs / "model", lora(), tokens=tiny.VOCABULARY + 8)
    code, said = merge(run, "--out", tmp_path / "out", "--pairs", inputs / "pairs.jsonl")
    assert code == 0, said
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.config.vocab_size == tiny.VOCABULARY + 8 == merged.get_input_embeddings().weight.shape[0]


def test_experts_are_merged_as_a_whole(inputs: Path, tmp_path: Path) -> None:
    """transformers stacks a mixture's experts while it loads them, so the files have other names than the model."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    sizes = {**tiny._SIZES, "num_hidden_layers": 2, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
    base = tmp_path / "base"
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, moe_intermediate_size=16)).save_pretrained(base)
    run = make_adapter(tmp_path / "run", base, lora(target_modules=["q_proj"]))
    code, said = merge(run, "--out", tmp_path / "out", "--pairs", inputs / "pairs.jsonl")
    assert code == 0, said
    assert "the whole model is loaded" in said


@pytest.fixture(scope="module")
def merged(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `run` and its merged model `out`, in bfloat16."""
    folder = tmp_path_factory.mktemp("merged")
    make_adapter(folder / "run", inputs / "model", lora())
    code, said = merge(
        folder / "run", "--out", folder / "out", "--pairs", inputs / "pairs.jsonl", "--dtype", "bfloat16"
    )
    assert code == 0, said
    assert {t.dtype for t in load_file(folder / "out" / "model.safetensors").values()} == {torch.bfloat16}
    return folder


def _change_template(folder: Path) -> None:
    file = folder / "chat_template.jinja"
    file.write_text(file.read_text().replace("<turn>", "<turn> "))


def _drop_end(folder: Path) -> None:
    file = folder / "generation_config.json"
    config = json.loads(file.read_text())
    del config["eos_token_id"]
    file.write_text(json.dumps(config))


def _perturb(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] += 0.5
    save_file(tensors, file, {"format": "pt"})


def _lose(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file, {"format": "pt"})


CORRUPTIONS = {
    "template": (_change_template, "(template): a conversation is rendered as"),
    "eos": (_drop_end, "(eos): generation ends at tokens []"),
    "matrix": (_perturb, "(weights): 1 of 21 tensors differ, the first is model.layers.1.mlp.up_proj.weight"),
    "missing": (_lose, "(weights): model.norm.weight is missing"),
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corruption_fails_by_name(name: str, merged: Path, inputs: Path, tmp_path: Path) -> None:
    damage, words = CORRUPTIONS[name]
    copied = tmp_path / "copy"
    shutil.copytree(merged / "out", copied)
    damage(copied)
    code, said = merge(merged / "run", "--verify", copied, "--pairs", inputs / "pairs.jsonl")
    assert code == 2
    assert words in said


def test_a_wrong_merge_leaves_nothing(
    inputs: Path, merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error that the files do not show, since they are what was meant: the log-probs do."""
    from preftree.merge.layers import MergedLayers

    value = MergedLayers._value
    monkeypatch.setattr(
        MergedLayers, "_value", lambda self, name: value(self, name) * (1.5 if "up_proj" in name else 1)
    )
    code, said = merge(merged / "run", "--out", tmp_path / "out", "--pairs", inputs / "pairs.jsonl")
    assert code == 2
    assert "(log-probs): an answer of pairs.jsonl:" in said
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten_unless_asked(merged: Path, inputs: Path, tmp_path: Path) -> None:
    pairs = ("--pairs", inputs / "pairs.jsonl")
    code, said = merge(merged / "run", "--out", merged / "out", *pairs)
    assert (code, "holds a merged model; nothing is overwritten" in said) == (2, True)
    other = tmp_path / "mine"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    code, said = merge(merged / "run", "--out", other, "--overwrite", *pairs)
    assert (code, "files that preftree merge did not write" in said) == (2, True)
    assert (other / "notes.txt").read_text() == "mine"
    copied = tmp_path / "copy"
    shutil.copytree(merged / "out", copied)
    (copied / "stale.safetensors").write_text("")
    code, said = merge(merged / "run", "--out", copied, "--overwrite", *pairs)
    assert code == 0, said
    assert not (copied / "stale.safetensors").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "mine"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere", "--out", "o"], "nowhere: no such folder"),
        (["--out", "o"], "name the folder of a run"),
        (["run"], "give either --out"),
        (["run", "--out", "o", "--dtype", "int8"], "--dtype must be one of"),
        (["run", "--out", "o", "--push", "name"], "--push takes ORGANIZATION/NAME"),
    ],
)
def test_wrong_input_is_one_sentence(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, said = merge(*words)
    assert (code, message in said) == (2, True), said
    assert list(tmp_path.iterdir()) == []


def test_a_model_is_no_adapter(inputs: Path, tmp_path: Path) -> None:
    code, said = merge(inputs / "model", "--out", tmp_path / "out")
    assert (code, "is a whole model, so there is no adapter to merge" in said) == (2, True)


def test_pushing_is_checked_before_anything_is_loaded(
    merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from preftree.publish import hub

    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "hub_reachable", lambda: False)
    code, said = merge(merged / "run", "--out", tmp_path / "out", "--push", "me/mine")
    assert code == 2
    assert "has no address here" in said
    assert "merge  " not in said
