"""Tokens added to a tokenizer: rows for them in the embedding and the head, each the mean of the known ones."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from kajiya.config.schema import AdapterConfig, ModelConfig
from kajiya.errors import ConfigError
from kajiya.models.adapt import adapter_off, trains_tokens, transform
from kajiya.models.build import Vocabulary, build_model
from kajiya.models.load import load_model
from kajiya.models.open import open_model
from kajiya.models.save import save_model
from kajiya.models.trained import save_trained


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("spare", [0, 10])
def test_added_tokens_begin_as_the_mean(tied: bool, spare: int, tmp_path: Path, small_tokenizer: Any) -> None:
    known, added = 300, 3
    base = build_model(ModelConfig(n_params="150k", tied=tied), Vocabulary(known + spare, 0, 1, 2), 0).module
    save_model(base, small_tokenizer, tmp_path / "base")
    config = ModelConfig(path=str(tmp_path / "base"))
    built = build_model(config, Vocabulary(known + added, 0, 1, 2, n_added=added), 0)
    assert built.derived["model.added_tokens"] == added
    for layer in ("get_input_embeddings", "get_output_embeddings"):
        before, after = (getattr(model, layer)().weight.detach() for model in (base, built.module))
        assert len(after) == max(known + added, known + spare)
        assert torch.equal(after[:known], before[:known])
        torch.testing.assert_close(after[known : known + added], before[:known].mean(0).expand(added, -1))
    is_shared = built.module.get_input_embeddings().weight is built.module.get_output_embeddings().weight
    assert is_shared is tied
    tokens = torch.arange(20)[None]
    logits = built.module.eval()(tokens).logits
    torch.testing.assert_close(logits[..., :known], base.eval()(tokens).logits[..., :known])
    save_model(built.module, small_tokenizer, tmp_path / "grown")
    assert torch.equal(load_model(tmp_path / "grown").eval()(tokens).logits, logits)


def test_a_tokenizer_with_more_tokens_than_the_model_knows_is_refused(tmp_path: Path, small_tokenizer: Any) -> None:
    base = build_model(ModelConfig(n_params="150k"), Vocabulary(300, 0, 1, 2), 0).module
    save_model(base, small_tokenizer, tmp_path)
    with pytest.raises(ConfigError, match=r"has 300 embeddings, the tokenizer 310 tokens\n.*tokenizer.add_tokens"):
        build_model(ModelConfig(path=str(tmp_path)), Vocabulary(313, 0, 1, 2, n_added=3), 0)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("spare", [0, 10])
@pytest.mark.parametrize("quantized", ["none", "nf4"])
def test_an_adapter_brings_the_rows_of_added_tokens_along(
    tied: bool, spare: int, quantized: str, tmp_path: Path, small_tokenizer: Any
) -> None:
    tokenizer = copy.deepcopy(small_tokenizer)
    known, added = len(tokenizer), 3
    base = build_model(ModelConfig(n_params="150k", tied=tied), Vocabulary(known + spare, 0, 1, 2), 0).module
    save_model(base, tokenizer, tmp_path / "base")
    tokenizer.add_tokens([f"<new {number}>" for number in range(added)])
    config = ModelConfig(path=str(tmp_path / "base"), quantize=quantized)
    module = build_model(config, Vocabulary(known + added, 0, 1, 2, n_added=added), 0).module
    whole = {"train_embeddings": True, "train_head": True}
    transform(module, AdapterConfig("lora", {"r": 2, **whole}), quantized, seed=0)
    assert trains_tokens(module)
    chance = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=chance))
    save_trained(config, module, tokenizer, tmp_path / "adapter", lambda: module, added)
    tokens = torch.arange(known + added - 20, known + added)[None]
    with torch.no_grad():
        logits = module.eval()(tokens).logits
        opened, merged = (open_model(tmp_path / "adapter", torch.float32, is_merged=each) for each in (False, True))
        for each in (opened, merged):
            torch.testing.assert_close(each(tokens).logits, logits, atol=1e-4, rtol=0)
        with adapter_off(module), adapter_off(opened):
            torch.testing.assert_close(opened(tokens).logits, module(tokens).logits, atol=1e-4, rtol=0)
        if quantized == "none":
            plain = load_model(tmp_path / "base")
            if not spare:
                plain.resize_token_embeddings(known + added, mean_resizing=False)
            peft = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
            torch.testing.assert_close(peft(tokens).logits, logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("tied", "options", "expected"),
    [
        (False, {}, False),
        (False, {"train_embeddings": True}, False),
        (False, {"train_head": True}, False),
        (False, {"train_embeddings": True, "train_head": True}, True),
        (True, {}, False),
        (True, {"train_embeddings": True}, True),
    ],
)
def test_which_adapters_train_the_rows_of_tokens(tied: bool, options: dict[str, bool], expected: bool) -> None:
    module = build_model(ModelConfig(n_params="150k", tied=tied), Vocabulary(300, 0, 1, 2), 0).module
    transform(module, AdapterConfig("lora", {"r": 2, **options}), "none", seed=0)
    assert trains_tokens(module) is expected
