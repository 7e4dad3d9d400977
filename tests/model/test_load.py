"""What a model's name may mean, and one clear sentence for everything that it may not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from preftree.errors import ModelError
from preftree.io.cache import cache_root
from preftree.model import load
from preftree.model.load import load_model, load_tokenizer, resolve
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
