"""Checkpoints that are stored in few bits: read as the weights that they stand for, or refused in words."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from kajiya.errors import ConfigError, MissingExtraError
from kajiya.models.load import load_model

KINDS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=128, **sizes, num_key_value_heads=2, initializer_range=0.6)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_what_bitsandbytes_has_stored_is_read_as_the_weights_that_it_stands_for(
    folder: Path, tmp_path: Path, kind: str
) -> None:
    settings = BitsAndBytesConfig(**KINDS[kind])
    stored: Any = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=settings, device_map="cpu", dtype=torch.float32
    )
    stored.save_pretrained(tmp_path / "stored")
    loaded, plain = (load_model(path, dtype=torch.float32) for path in (tmp_path / "stored", folder))
    assert all(type(layer) is nn.Linear for name, layer in loaded.named_modules() if name.endswith("_proj"))
    # What Transformers makes of it.
    weights, wanted = loaded.state_dict(), stored.dequantize(torch.float32).state_dict()
    torch.testing.assert_close(weights, wanted)
    assert sum(not torch.equal(weights[name], tensor) for name, tensor in plain.state_dict().items()) == 7
    assert loaded.config.to_dict().keys() == plain.config.to_dict().keys()
    with torch.no_grad():
        ids = torch.tensor([[1, 2, 3, 4, 5]])
        torch.testing.assert_close(loaded(ids).logits, stored(ids).logits)
    # Saved again, it is a model like any other.
    loaded.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(load_model(tmp_path / "again").state_dict(), loaded.state_dict())


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "compressed-tensors", "mxfp4", "of-tomorrow"])
def test_what_is_stored_otherwise_is_refused_in_words(folder: Path, tmp_path: Path, method: str) -> None:
    _say_quantized(folder, tmp_path / "stored", {"quant_method": method, "bits": 4, "group_size": 128})
    with pytest.raises(ConfigError, match=rf"model\.path: .* is stored quantized \({method}\), which is not read here"):
        load_model(tmp_path / "stored")


def test_a_missing_package_names_its_extra(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _say_quantized(folder, tmp_path / "stored", {"quant_method": "bitsandbytes", "load_in_4bit": True})
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingExtraError, match=r"stored quantized \(bitsandbytes\), needs the package 'bitsandbytes'"):
        load_model(tmp_path / "stored")


def _say_quantized(folder: Path, to: Path, fields: dict[str, Any]) -> None:
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(config | {"quantization_config": fields}))
