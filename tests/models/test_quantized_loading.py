"""Weights that are quantized as they are read are those that are quantized afterwards, and one alone is whole at a time."""

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.training.conftest import VOCABULARY

from kajiya.config.schema import ModelConfig
from kajiya.errors import ConfigError, StoreError
from kajiya.models import quantized_loading
from kajiya.models.adapter_targets import expert_names
from kajiya.models.build import build_model
from kajiya.models.load import load_model
from kajiya.models.origin import origin_of
from kajiya.models.quantized import dequantize, form_of, is_quantized, quantize, quantize_layer, stored_bytes
from kajiya.models.tasks import Task

KINDS = ("nf4", "int8", "torchao-int8")


@pytest.fixture(params=["llama", "qwen2", "gpt_neox"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A random model in bfloat16, its biases as random as its weights where it has any."""
    module: Any = build_model(ModelConfig(name=request.param, n_params="60k", max_positions=64), VOCABULARY, 0).module
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    module.to(torch.bfloat16).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("kind", KINDS)
def test_they_are_those_that_are_quantized_afterwards(kind: str, folder: Path) -> None:
    found, expected = load_model(folder, quantized=kind), quantize(load_model(folder), kind)
    ours, theirs = found.state_dict(), expected.state_dict()
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        if isinstance(tensor, torch.Tensor):
            same = (
                torch.equal(ours[name].dequantize(), tensor.dequantize())
                if is_quantized(tensor) and kind == KINDS[2]
                else None
            )
            assert torch.equal(ours[name], tensor) if same is None else same, name
    assert [type(part) for part in found.modules()] == [type(part) for part in expected.modules()]
    assert stored_bytes(found) == stored_bytes(expected)
    assert stored_bytes(found)[1] > 0
    frozen = [not each.requires_grad for each in found.parameters()]
    assert frozen == [not each.requires_grad for each in expected.parameters()]
    assert vars(origin_of(found)) == vars(origin_of(expected))
    assert not found.training
    ids = torch.tensor([[5, 9, 33, 7]])
    with torch.no_grad():
        assert torch.equal(found(input_ids=ids).logits, expected(input_ids=ids).logits)
    # Nothing of Transformers' own quantizing stays behind, which would be saved or asked for.
    assert not {"hf_quantizer", "quantization_method", "is_quantized"} & vars(found).keys()
    assert "quantization_config" not in found.config.to_dict()
    assert "quantization_config" not in vars(found.config)


def test_one_weight_is_whole_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[weakref.ref[torch.Tensor]] = []

    def watched(layer: Any, kind: str) -> Any:
        assert layer.weight.dtype == torch.float32
        assert [each for each in seen if each() is not None] == []
        seen.append(weakref.ref(layer.weight))
        return quantize_layer(layer, kind)

    monkeypatch.setattr(quantized_loading, "quantize_layer", watched)
    config = ModelConfig(path=str(folder), quantize="nf4")
    module = build_model(config, VOCABULARY, 0).module
    assert len(seen) == sum(map(is_quantized, module.parameters())) >= 4
    assert quantize(module, "nf4") is module


@pytest.mark.parametrize("kind", KINDS)
def test_experts_are_quantized_as_they_are_read(kind: str, tmp_path: Path) -> None:
    """By nf4; the other kinds leave them as they are."""
    sizes: Any = {"n_params": None, "hidden_size": 64, "n_layers": 2, "n_heads": 2, "n_kv_heads": 2, "ffn_size": 32}
    config = ModelConfig(name="mixtral", max_positions=64, options={"num_local_experts": 3}, **sizes)
    build_model(config, VOCABULARY, 0).module.save_pretrained(tmp_path)  # type: ignore[operator]
    found, plain = load_model(tmp_path, quantized=kind), load_model(tmp_path)
    expected = quantize(load_model(tmp_path), form_of(plain, kind))
    names = expert_names(plain)
    assert names == expert_names(found) == expert_names(expected)
    assert len(names) == 4
    for name in names:
        ours = found.get_parameter(name)
        assert is_quantized(ours) == (kind == "nf4")
        assert not ours.requires_grad or kind != "nf4"
        assert torch.equal(ours.dequantize(), expected.get_parameter(name).dequantize())
        assert torch.equal(ours.dequantize(), plain.get_parameter(name)) != (kind == "nf4")
    assert vars(origin_of(found)) == vars(origin_of(expected))
    ids = torch.tensor([[5, 9, 33, 7]])
    with torch.no_grad():
        logits = found(input_ids=ids).logits
        assert torch.equal(logits, expected(input_ids=ids).logits)
        if kind == "nf4":
            # The layers that they exactly stand for compute the same.
            torch.testing.assert_close(dequantize(found, torch.float32)(input_ids=ids).logits, logits)
            assert not any(map(is_quantized, found.parameters()))


def test_weights_that_do_not_fit_are_said_as_of_any_model(tmp_path: Path) -> None:
    module: Any = build_model(ModelConfig(n_params="60k", max_positions=64), VOCABULARY, 0).module
    module.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(torch.zeros(3, 5))
    module.save_pretrained(tmp_path)
    with pytest.raises(StoreError, match=r"1 mismatched keys \(model.layers.0.mlp.up_proj.weight"):
        load_model(tmp_path, quantized="nf4")


def test_a_new_head_begins_at_random_and_stays_whole(tmp_path: Path) -> None:
    module: Any = build_model(ModelConfig(n_params="60k", max_positions=64), VOCABULARY, 0).module
    module.save_pretrained(tmp_path)
    config = ModelConfig(path=str(tmp_path), quantize="nf4")
    heads = [
        build_model(config, VOCABULARY, seed, Task("classes", ("a", "b"))).module.score.weight for seed in (0, 0, 1)
    ]
    assert heads[0].dtype == torch.float32
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_weights_that_are_stored_in_few_bits_are_not_quantized_again(tmp_path: Path) -> None:
    module: Any = build_model(ModelConfig(n_params="60k", max_positions=64), VOCABULARY, 0).module
    module.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"is nf4, and the weights of .* are stored in few bits already"):
        load_model(tmp_path, quantized="nf4")
