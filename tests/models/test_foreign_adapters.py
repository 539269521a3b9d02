"""Adapters that plain PEFT has made and saved: they compute here what they compute there, and are trained on."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, VeraConfig, get_peft_model
from safetensors.torch import load_file
from tests.training.conftest import VOCABULARY, make_batch

from kajiya.config.schema import AdapterConfig, ModelConfig
from kajiya.errors import ConfigError, StoreError
from kajiya.models.adapt import adapter_off, rate_ratios, transform
from kajiya.models.build import build_model
from kajiya.models.hidden import all_logits
from kajiya.models.injection import merge
from kajiya.models.load import load_model
from kajiya.models.merged import merged_tensors
from kajiya.models.open import open_model

_LORA: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
_MADE: dict[str, Callable[[], Any]] = {
    "lora": lambda: LoraConfig(**_LORA),
    "rslora": lambda: LoraConfig(**_LORA, use_rslora=True, lora_alpha=3),
    "dora": lambda: LoraConfig(**_LORA, use_dora=True),
    "pissa": lambda: LoraConfig(**_LORA, init_lora_weights="pissa"),
    "olora": lambda: LoraConfig(**_LORA, init_lora_weights="olora"),
    "modules_to_save": lambda: LoraConfig(**_LORA, modules_to_save=["lm_head", "embed_tokens"]),
    "all-linear": lambda: LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    "patterns": lambda: LoraConfig(**_LORA, rank_pattern={"q_proj": 2}, alpha_pattern={"down_proj": 1}),
    "no task": lambda: LoraConfig(r=4, target_modules=["v_proj"]),
    "ia3": lambda: IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    ),
}
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def _theirs(kind: str, folder: Path, base: Path) -> Any:
    """PEFT's model of that kind, its adapter moved and saved in `folder` by PEFT alone."""
    torch.manual_seed(0)
    made: Any = get_peft_model(load_model(base), _MADE[kind]())
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    if kind in ("pissa", "olora"):
        # As PEFT's guide says: what was taken out of the base is given along, or it belongs to other weights.
        first: Any = get_peft_model(load_model(base), _MADE[kind]())
        first.peft_config["default"].init_lora_weights = True
        first.save_pretrained(folder / "beginning")
        with warnings.catch_warnings():
            # That another adapter stands beside it while it is converted.
            warnings.simplefilter("ignore")
            made.save_pretrained(folder, path_initial_model_for_weight_conversion=str(folder / "beginning"))
    else:
        made.save_pretrained(folder)
    return made.eval()


@pytest.mark.parametrize("kind", sorted(_MADE))
def test_an_adapter_of_plain_peft_gives_pefts_own_logits(kind: str, base: Callable[..., Path], tmp_path: Path) -> None:
    folder = base()
    _theirs(kind, tmp_path / "theirs", folder)
    tokens = make_batch(2, seed=2).tokens
    peft = PeftModel.from_pretrained(load_model(folder), tmp_path / "theirs").eval()
    with torch.no_grad():
        expected = peft(input_ids=tokens).logits
        plain = load_model(folder)(input_ids=tokens).logits
        assert (expected - plain).abs().max() > 1e-2
        module = load_model(folder)
        transform(module, AdapterConfig("load", {"path": str(tmp_path / "theirs")}), "none", 0)
        torch.testing.assert_close(module.eval()(input_ids=tokens).logits, expected)
        for is_merged in (False, True):
            again = open_model(tmp_path / "theirs", torch.float32, base=str(folder), is_merged=is_merged)
            torch.testing.assert_close(again(input_ids=tokens).logits, expected, atol=5e-5, rtol=1e-4)
    trained = {name for name, each in module.named_parameters() if each.requires_grad}
    theirs = sum(each.numel() for each in _trainable(kind, folder))
    assert sum(each.numel() for name, each in module.named_parameters() if name in trained) == theirs


@pytest.mark.parametrize("name", ["qwen2", "llama"])
def test_a_bias_beside_the_matrices_is_merged_or_refused(name: str, tmp_path: Path) -> None:
    """Layers of Qwen2 have a bias that it can be added to, those of Llama have none."""
    made = build_model(ModelConfig(name=name, n_params="40k", max_positions=64), VOCABULARY, 0).module
    made.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it cannot be merged into Llama's layers
        config = LoraConfig(r=4, target_modules=["q_proj"], lora_bias=True, task_type="CAUSAL_LM")
        theirs: Any = get_peft_model(load_model(tmp_path / "base"), config)
        with torch.no_grad():
            for parameter in theirs.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn_like(parameter))
        theirs.save_pretrained(tmp_path / "theirs")
        module = open_model(tmp_path / "theirs", torch.float32, base=str(tmp_path / "base"))
    if name == "llama":
        for merged in (lambda: merged_tensors(module, torch.float32), lambda: merge(module)):
            with pytest.raises(ConfigError, match="lora_bias"):
                merged()
        return
    plain = load_model(tmp_path / "base")
    plain.load_state_dict(merged_tensors(module, torch.float32))
    tokens = make_batch(2, seed=2).tokens
    with torch.no_grad():
        expected = theirs.eval()(input_ids=tokens).logits
        torch.testing.assert_close(module(input_ids=tokens).logits, expected)
        torch.testing.assert_close(plain(input_ids=tokens).logits, expected, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["lm_head", "embed_tokens", "resized"])
def test_embeddings_that_peft_saves_along_are_taken(kind: str, base: Callable[..., Path], tmp_path: Path) -> None:
    """Where it adapts them they are the base's own; where tokens were added they make another base, which is not trained on."""
    folder, plain = base(), load_model(base())
    if kind == "resized":
        plain.resize_token_embeddings(VOCABULARY.size + 3, mean_resizing=False)
    config = LoraConfig(r=4, target_modules=["q_proj", *([] if kind == "resized" else [kind])], task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that embeddings are saved along
        theirs: Any = get_peft_model(plain, config)
        theirs.peft_config["default"].base_model_name_or_path = str(folder)
        with torch.no_grad():
            for parameter in theirs.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        theirs.save_pretrained(tmp_path / "theirs")
    saved = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    assert any(name.endswith(("embed_tokens.weight", "lm_head.weight", "base_layer.weight")) for name in saved)
    tokens = make_batch(2, seed=2).tokens
    with torch.no_grad():
        expected = theirs.eval()(input_ids=tokens).logits
        for is_merged in (False, True):
            again = open_model(tmp_path / "theirs", torch.float32, base=str(folder), is_merged=is_merged)
            torch.testing.assert_close(again(input_ids=tokens).logits, expected, atol=5e-5, rtol=1e-4)
        module, load = load_model(folder), AdapterConfig("load", {"path": str(tmp_path / "theirs")})
        if kind == "resized":
            with pytest.raises(StoreError, match=r"brings an embedding or head of its own(?s:.*)kajiya merge"):
                transform(module, load, "none", 0)
            return
        transform(module, load, "none", 0)
        torch.testing.assert_close(module.eval()(input_ids=tokens).logits, expected)


def _trainable(kind: str, base: Path) -> list[torch.Tensor]:
    config = _MADE[kind]()
    if kind in ("pissa", "olora"):
        # Beside a whole base the change has twice the rank.
        config.r, config.init_lora_weights = 2 * config.r, True
    made: Any = get_peft_model(load_model(base), config)
    return [each for each in made.parameters() if each.requires_grad]


def test_what_is_trained_on_is_the_adapter(base: Callable[..., Path], tmp_path: Path) -> None:
    folder = base()
    made = _theirs("lora", tmp_path / "theirs", folder)
    batch = make_batch(2, seed=2)
    alone = {"input_ids": batch.tokens}
    module = load_model(folder)
    transform(module, AdapterConfig("load", {"path": str(tmp_path / "theirs"), "lr_ratio": 2.0}), "none", 0)
    with torch.no_grad():
        torch.testing.assert_close(module.eval()(**alone).logits, made(**alone).logits)
        assert torch.isfinite(all_logits(module, batch)).all()
    trained = {name for name, each in module.named_parameters() if each.requires_grad}
    assert len(trained) == 2 * 2 * 2
    assert all("lora_" in name for name in trained)
    assert rate_ratios(module, AdapterConfig("load", {"path": "", "lr_ratio": 2.0})) == {
        name: 2.0 for name in trained if "lora_B" in name
    }


def test_weights_in_a_pickle_are_refused_with_what_converts_them(base: Callable[..., Path], tmp_path: Path) -> None:
    """The remedy is run as it stands."""
    made = _theirs("lora", tmp_path / "adapter", base())
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    torch.save(tensors, tmp_path / "adapter" / "adapter_model.bin")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(StoreError, match=r"are in adapter_model.bin alone; only safetensors are loaded") as refused:
        open_model(tmp_path / "adapter", torch.float32)
    remedy = str(refused.value).partition('python -c "')[2].removesuffix('"')
    exec(remedy, {})
    batch = make_batch(1)
    with torch.no_grad():
        found = open_model(tmp_path / "adapter", torch.float32)(input_ids=batch.tokens).logits
        torch.testing.assert_close(found, made(input_ids=batch.tokens).logits, atol=1e-5, rtol=0)


_EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
_BESIDES: dict[str, tuple[dict[str, Any], bool]] = {
    "experts": ({"target_parameters": _EXPERTS}, False),
    "one tensor": ({"target_parameters": _EXPERTS[1:], "use_rslora": True}, False),
    "router": ({"target_parameters": ["mlp.gate.weight"]}, False),
    "all-linear": ({"target_modules": "all-linear"}, False),
    "tokens": ({"trainable_token_indices": [1, 2]}, False),
    "tied tokens": ({"trainable_token_indices": [1, 2]}, True),
    "all": ({"target_parameters": _EXPERTS, "trainable_token_indices": [1], "modules_to_save": ["lm_head"]}, False),
}
"""What PEFT adapts besides linear layers, and whether head and embedding are one."""


@pytest.mark.parametrize("kind", sorted(_BESIDES))
def test_experts_and_single_tokens_are_used_and_merged_as_by_peft(kind: str, tmp_path: Path) -> None:
    options, is_tied = _BESIDES[kind]
    made = _of_mixture({"target_modules": ["q_proj"]} | options, tmp_path, is_tied)
    tokens = make_batch(2, seed=2).tokens
    beside = open_model(tmp_path / "theirs", torch.float32, base=str(tmp_path / "base"))
    plain = load_model(tmp_path / "base")
    with torch.no_grad():
        expected = made(input_ids=tokens).logits
        assert (expected - plain(input_ids=tokens).logits).abs().max() > 1e-2
        torch.testing.assert_close(beside(input_ids=tokens).logits, expected)
        with adapter_off(beside):
            torch.testing.assert_close(beside(input_ids=tokens).logits, plain(input_ids=tokens).logits)
        tensors = merged_tensors(beside, torch.float32)
        merge(beside)
        assert tensors.keys() == beside.state_dict().keys() == plain.state_dict().keys()
        theirs = made.merge_and_unload().state_dict()
        for name, tensor in beside.state_dict().items():
            torch.testing.assert_close(tensor, theirs[name], atol=1e-6, rtol=1e-6)
            torch.testing.assert_close(tensors[name], theirs[name], atol=1e-6, rtol=1e-6)
        plain.load_state_dict(tensors)
        torch.testing.assert_close(plain(input_ids=tokens).logits, expected, atol=5e-5, rtol=1e-4)
    assert beside.get_parameter("model.embed_tokens.weight") is beside.get_input_embeddings().weight
    assert (beside.get_output_embeddings().weight is beside.get_input_embeddings().weight) == is_tied


def _of_mixture(options: dict[str, Any], folder: Path, is_tied: bool = False) -> Any:
    """PEFT's adapter, moved, of a small mixture of experts; both are saved in the folder."""
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = MixtralConfig(
        vocab_size=VOCABULARY.size, num_hidden_layers=1, num_local_experts=3, tie_word_embeddings=is_tied, **sizes
    )
    torch.manual_seed(0)
    MixtralForCausalLM(config).save_pretrained(folder / "base")
    with warnings.catch_warnings():
        # That an embedding tied to the head is trained, and that no module is named as the ranks of PEFT's own parameters.
        warnings.simplefilter("ignore")
        made: Any = get_peft_model(load_model(folder / "base"), LoraConfig(r=2, **options))
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn_like(parameter))
        made.eval().save_pretrained(folder / "theirs")
    return made


def test_a_model_begins_from_it_and_it_is_trained_on(tmp_path: Path) -> None:
    """Both ways of going on: added to the weights, and as the adapter that it is."""
    options = {"target_modules": ["q_proj"], "target_parameters": _EXPERTS, "trainable_token_indices": [1, 2]}
    made = _of_mixture(options, tmp_path)
    batch = make_batch(2, seed=2)
    begun = build_model(ModelConfig(path=str(tmp_path / "theirs")), VOCABULARY, 0).module
    module = load_model(tmp_path / "base")
    transform(module, AdapterConfig("load", {"path": str(tmp_path / "theirs")}), "none", 0)
    with torch.no_grad():
        expected = made(input_ids=batch.tokens).logits
        for each in (begun, module):
            torch.testing.assert_close(each.eval()(input_ids=batch.tokens).logits, expected, atol=5e-5, rtol=1e-4)
    assert all_logits(module, batch).square().mean().backward() is None
    for name, each in module.named_parameters():
        assert (each.grad is not None) == each.requires_grad == ("lora_" in name or "trainable_tokens" in name), name


def test_a_kind_whose_layers_share_matrices_is_refused_with_what_merges_it(
    base: Callable[..., Path], tmp_path: Path
) -> None:
    """The remedy is run as it stands."""
    folder = base()
    made: Any = get_peft_model(load_model(folder), VeraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    made.save_pretrained(tmp_path / "theirs")
    with pytest.raises(ConfigError, match="of the kind VERA, whose layers all share matrices") as refused:
        open_model(tmp_path / "theirs", torch.float32)
    remedy = str(refused.value).partition('python -c "')[2].partition('"')[0]
    exec(remedy, {})
    tokens = make_batch(1).tokens
    with torch.no_grad():
        found = load_model(tmp_path / "theirs-merged")(input_ids=tokens).logits
        torch.testing.assert_close(found, made.eval()(input_ids=tokens).logits, atol=1e-5, rtol=0)
