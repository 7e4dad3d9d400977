"""What a model's name may mean, and one clear sentence for everything that it may not."""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from preftree.errors import ModelError
from preftree.io.cache import cache_root
from preftree.model import load
from preftree.model.load import load_model, load_tokenizer, resolve
from preftree.model.lora import load_adapter
from preftree.model.weights import refuse_larger_tokenizer
from tests.support import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "small"
    tiny.llama(num_hidden_layers=2).save_pretrained(path)
    tiny.word_tokenizer().save_pretrained(path)
    return path


def test_a_folder(folder: Path) -> None:
    source = resolve(str(folder))
    assert source.local
    assert (source.place, source.gguf) == (str(folder), None)
    model = load_model(source, torch.bfloat16)
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    exact = load_model(source, torch.float32)
    for name, parameter in tiny.llama(num_hidden_layers=2).state_dict().items():
        assert torch.equal(exact.state_dict()[name], parameter)
    assert load_tokenizer(source)("w20 w30")["input_ids"] == [20, 30]


def test_a_missing_folder_names_its_neighbours(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"smal: no such folder\. Did you mean small\?"):
        resolve(str(folder.parent / "smal"))
    with pytest.raises(ModelError, match="no such folder"):
        resolve("./nowhere")
    with pytest.raises(ModelError, match="no such folder"):
        resolve("a/b/c")  # no hub id has two slashes


def test_a_file(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json is a file; give the folder"):
        resolve(str(folder / "config.json"))


def test_a_folder_without_weights(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ModelError, match=r"no weights \(\*\.safetensors\); it holds config\.json"):
        resolve(str(tmp_path))


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json; it holds nothing"):
        resolve(str(tmp_path))
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ModelError, match=r"no config\.json; it holds notes\.txt"):
        resolve(str(tmp_path))


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="PEFT adapter, not a model"):
        resolve(str(tmp_path))


def test_several_gguf_files(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ModelError, match="holds 2 GGUF files"):
        resolve(str(tmp_path))
    (tmp_path / "b.gguf").unlink()
    assert resolve(str(tmp_path)).gguf == "a.gguf"


def test_damaged_weights(tmp_path: Path, folder: Path) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "config.json").write_text("{not json")
    with pytest.raises(ModelError, match=r"the model in folder .* cannot be loaded"):
        load_model(resolve(str(tmp_path)), torch.float32)


def test_truncated_weights(tmp_path: Path, folder: Path) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"the model in folder .* cannot be loaded"):
        load_model(resolve(str(tmp_path)), torch.float32)


def test_a_hub_id_offline() -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    source = resolve("nobody/no-such-model")
    assert not source.local
    assert source.described == "nobody/no-such-model from the hub"
    for loader in (load_tokenizer, lambda source: load_model(source, torch.float32)):
        with pytest.raises(ModelError, match=r"nobody/no-such-model .*check the spelling and the network"):
            loader(source)


def test_a_tokenizer_without_an_end(tmp_path: Path) -> None:
    tokenizer = tiny.word_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    tiny.llama(num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no end-of-text token"):
        load_tokenizer(resolve(str(tmp_path)))


def test_a_tokenizer_without_padding(tmp_path: Path) -> None:
    tokenizer = tiny.word_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    tiny.llama(num_hidden_layers=1).save_pretrained(tmp_path)
    assert load_tokenizer(resolve(str(tmp_path))).pad_token_id == 2


def test_the_bundled_model(smollm2_folder: Path) -> None:
    source = resolve("smollm2")
    assert source.local
    assert source.gguf is not None
    assert Path(source.place) == smollm2_folder
    tokenizer, model = load_tokenizer(source), load_model(source, torch.bfloat16)
    # What was loaded is the copy in the cache, and the copy is the file.
    assert len(list((cache_root() / "models").glob("*/model.safetensors"))) == 1
    direct = load._from_gguf(source).to(torch.bfloat16).state_dict()
    assert all(torch.equal(weight, direct[name]) for name, weight in model.state_dict().items())
    assert tokenizer.chat_template
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert not hasattr(model.config, "quantization_config")
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)


def test_a_folder_named_like_the_bundled_model(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the user has in front of them comes first."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2").symlink_to(folder)
    assert resolve("smollm2").gguf is None


def copied(folder: Path, target: Path) -> Path:
    """A copy of the model's folder, to be damaged."""
    shutil.copytree(folder, target, dirs_exist_ok=True)
    return target


def rewrite(folder: Path, change) -> None:  # type: ignore[no-untyped-def]
    """Put the weights through `change` (name → tensor, in place)."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


DAMAGE = {
    "missing": (
        lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"),
        r"1 weights missing from the files: model\.layers\.1\.mlp\.up_proj\.weight",
    ),
    "unexpected": (
        lambda weights: weights.update({"model.layers.7.extra.weight": torch.ones(3)}),
        r"1 weights without a place in the model: model\.layers\.7\.extra\.weight",
    ),
    "mismatched": (
        lambda weights: weights.update({"model.layers.0.mlp.up_proj.weight": torch.ones(3, 3)}),
        r"1 weights of another shape: .*up_proj\.weight \(3, 3\) instead of \(48, 32\)",
    ),
    "nan": (
        lambda weights: weights["model.layers.0.mlp.up_proj.weight"][2, 3:5].fill_(torch.nan),
        r"1 weights in folder .* hold NaN or infinite values: model\.layers\.0\.mlp\.up_proj\.weight",
    ),
    "infinite": (
        lambda weights: weights["model.norm.weight"][:1].fill_(-torch.inf),
        r"hold NaN or infinite values: model\.norm\.weight",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_weights_that_are_not_the_models_own_are_listed(tmp_path: Path, folder: Path, damage: str) -> None:
    change, message = DAMAGE[damage]
    rewrite(copied(folder, tmp_path), change)
    with pytest.raises(ModelError, match=message):
        load_model(resolve(str(tmp_path)), torch.float32)


def test_a_config_of_another_model(tmp_path: Path, folder: Path) -> None:
    config = json.loads((copied(folder, tmp_path) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "vocab_size": config["vocab_size"]}))
    with pytest.raises(ModelError, match=r"not those of a BertLMHeadModel \(model_type bert.*missing from the files"):
        load_model(resolve(str(tmp_path)), torch.float32)


def test_tied_weights_are_complete(tmp_path: Path) -> None:
    tiny.llama(num_hidden_layers=1, tie_word_embeddings=True).save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    load_model(resolve(str(tmp_path)), torch.float32)


def test_pickled_weights(tmp_path: Path, folder: Path) -> None:
    (copied(folder, tmp_path) / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pickled file \(pytorch_model\.bin\), which can run code"):
        resolve(str(tmp_path))


def test_code_that_comes_with_a_model_is_not_run(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even if somebody, or `yes |`, answers the question that transformers would ask."""
    copied(folder, tmp_path)
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((tmp_path / name).read_text())
        content |= {"model_type": "own", "auto_map": dict.fromkeys(("AutoConfig", "AutoModelForCausalLM"), "own.Own")}
        content |= {"tokenizer_class": "OwnTokenizer"}
        content["auto_map"]["AutoTokenizer"] = ["own.Own", "own.Own"]
        (tmp_path / name).write_text(json.dumps(content))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: ...\n")
    monkeypatch.setattr("builtins.input", lambda prompt="": "y")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    for loader in (load_tokenizer, lambda source: load_model(source, torch.float32)):
        with pytest.raises(ModelError, match=r"custom code \(auto_map\), which is run by training alone"):
            loader(resolve(str(tmp_path)))
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_larger_than_the_vocabulary(folder: Path) -> None:
    tokenizer, model = tiny.word_tokenizer(), tiny.llama(num_hidden_layers=1)
    refuse_larger_tokenizer(tokenizer, model, "this model")
    tokenizer.add_tokens(["one more"])
    with pytest.raises(ModelError, match=r"1 tokens without an embedding in this model, .* id 96: 'one more' \(97\)"):
        refuse_larger_tokenizer(tokenizer, model, "this model")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop(next(iter(weights))), "1 weights are missing, the first"),
        (lambda weights: weights.update(extra=torch.ones(2)), "1 weights are without a place, the first"),
        (lambda weights: next(iter(weights.values())).view(-1)[:1].fill_(torch.nan), "NaN or infinite values"),
    ],
    ids=["missing", "unexpected", "nan"],
)
def test_an_adapter_that_is_damaged(tmp_path: Path, change, message: str) -> None:  # type: ignore[no-untyped-def]
    tiny.with_lora(tiny.llama(num_hidden_layers=1)).save_pretrained(tmp_path)
    load_adapter(tiny.llama(num_hidden_layers=1), str(tmp_path))
    file = tmp_path / "adapter_model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=message):
        load_adapter(tiny.llama(num_hidden_layers=1), str(tmp_path))
    file.rename(tmp_path / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"pickled file \(adapter_model\.bin\)"):
        load_adapter(tiny.llama(num_hidden_layers=1), str(tmp_path))
