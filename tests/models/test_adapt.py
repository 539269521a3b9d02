"""Every transform: trains, resumes bit for bit, is saved, and plain PEFT computes the same from what was saved."""

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tests.training.conftest import VOCABULARY, NoTokenizer, make_batch
from tests.training.test_fit import make_setup

from kajiya.config.schema import AdapterConfig, ModelConfig
from kajiya.data.batch import Batch
from kajiya.errors import ConfigError, StoreError
from kajiya.models.adapt import adapter_names, adapter_off, has_adapter, rate_ratios, transform, use_adapter
from kajiya.models.adapter_files import Base, load_adapter, save_adapter
from kajiya.models.adapter_targets import expert_names, lora_targets
from kajiya.models.build import build_model
from kajiya.models.experts import left_out
from kajiya.models.hidden import all_logits, has_split_head
from kajiya.models.injection import merge
from kajiya.models.load import load_model
from kajiya.models.merged import merged_tensors
from kajiya.models.open import open_adapters, open_model
from kajiya.models.quantized import (
    count_params,
    dequantize,
    form_of,
    is_quantized,
    plain_tensors,
    quantize,
    stored_bytes,
)
from kajiya.models.tasks import CLASS_HEADS, Task
from kajiya.models.weights_digest import weights_digest
from kajiya.training import cross_entropy
from kajiya.training.checkpoint import load_checkpoint, save_checkpoint
from kajiya.training.fit import Setup, fit
from kajiya.training.optimizers import load_optimizer
from kajiya.training.state import TrainState


@dataclass(frozen=True)
class Case:
    """A transform, and what is true of it."""

    name: str
    options: dict[str, Any]
    quantized: str = "none"
    tied: bool = False
    begins_as_identity: bool = True
    """Within the rounding of a singular value decomposition."""
    architecture: str = "llama"

    @property
    def id(self) -> str:
        words = [self.name, *(f"{key}={value}" for key, value in self.options.items()), self.quantized]
        return "-".join(
            [*words, "tied" if self.tied else "untied", *([] if self.architecture == "llama" else ["experts"])]
        )


CASES = [
    Case("lora", {}),
    Case("lora", {"rslora": True, "targets": "attention", "lr_ratio": 4.0}),
    Case("lora", {"targets": "mlp", "train_embeddings": True}, tied=True),
    Case("lora", {"r": 4, "train_head": True}),
    Case("lora", {"r": 4, "train_head": True}, tied=True),
    Case("lora", {"r": 4, "targets": r".*\.(q_proj|lm_head)|lm_head"}),
    Case("lora", {"init": "pissa", "r": 4}),
    Case("lora", {"init": "pissa", "r": 32}),
    Case("lora", {"init": "olora", "r": 4, "rslora": True}),
    Case("dora", {"r": 4}),
    Case("ia3", {}),
    Case("ia3", {"targets": "attention", "feedforward": None}),
    Case("prefix", {"n_tokens": 3}, begins_as_identity=False),
    Case("prompt", {"n_tokens": 3}, begins_as_identity=False),
    Case("lora", {"r": 4}, quantized="nf4"),
    Case("lora", {"r": 4}, quantized="int8"),
    Case("lora", {"r": 4}, quantized="torchao-int8"),
    Case("dora", {"r": 4}, quantized="nf4"),
    Case("lora", {"r": 4}, architecture="mixtral"),
    Case("lora", {"r": 4, "targets": "experts", "lr_ratio": 4.0}, quantized="nf4", architecture="mixtral"),
]
EACH = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


def _adapted(folder: Path, case: Case) -> Any:
    module = load_model(folder)
    transform(module, AdapterConfig(case.name, case.options), case.quantized, seed=5)
    return module.train()


def _setup(folder: Path, case: Case, steps: int) -> Setup:
    module = _adapted(folder, case)
    return make_setup(module, [make_batch(2, seed=s) for s in range(5)], steps=steps)


def _copies(tensor: torch.Tensor) -> list[torch.Tensor]:
    return [part.detach().clone() for part in plain_tensors(tensor)]


def _are_equal(tensor: torch.Tensor, parts: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(plain_tensors(tensor), parts, strict=True))


def _one_document(batch: Batch) -> dict[str, torch.Tensor]:
    return {"input_ids": batch.tokens}


def _alone(batch: Batch) -> Batch:
    places = torch.arange(batch.tokens.shape[1]).expand_as(batch.tokens).clone()
    return Batch(batch.tokens, batch.targets, places, torch.zeros_like(places), batch.n_targets)


@pytest.mark.parametrize(
    ("name", "outputs", "inputs"),
    [
        ("llama", {"k_proj", "v_proj"}, {"down_proj"}),
        ("qwen3", {"k_proj", "v_proj"}, {"down_proj"}),
        ("olmo2", {"k_proj", "v_proj"}, {"down_proj"}),
        ("granite", {"k_proj", "v_proj"}, {"down_proj"}),
        ("phi3", {"qkv_proj"}, {"down_proj"}),
        ("gpt2", {"c_attn"}, {"c_proj"}),
        ("gpt_neox", {"query_key_value"}, {"dense_4h_to_h"}),
        ("opt", {"k_proj", "v_proj"}, {"fc2"}),
    ],
)
def test_ia3_finds_keys_values_and_the_way_back_of_any_architecture(
    name: str, outputs: set[str], inputs: set[str]
) -> None:
    module = build_model(ModelConfig(name=name, n_params="60k", max_positions=64), VOCABULARY, 0).module
    transform(module, AdapterConfig("ia3"), "none", seed=0)
    found: dict[bool, set[str]] = {True: set(), False: set()}
    for path, part in module.named_modules():
        if hasattr(part, "ia3_l"):
            found[part.is_feedforward].add(path.rpartition(".")[2])
            # The way back within attention is none out of a feed-forward block.
            assert not (part.is_feedforward and "attn" in path)
    assert (found[False], found[True]) == (outputs, inputs)


def test_ia3_takes_other_layers_by_word_and_by_expression() -> None:
    def factors(**options: Any) -> dict[str, bool]:
        module = build_model(ModelConfig(n_params="60k", n_layers=1, max_positions=64), VOCABULARY, 0).module
        transform(module, AdapterConfig("ia3", options), "none", seed=0)
        return {
            path.rpartition(".")[2]: part.is_feedforward
            for path, part in module.named_modules()
            if hasattr(part, "ia3_l")
        }

    assert factors(feedforward=None) == {"k_proj": False, "v_proj": False}
    assert factors(targets=r".*\.q_proj", feedforward=r".*\.(up|gate)_proj") == {
        "q_proj": False,
        "up_proj": True,
        "gate_proj": True,
    }
    with pytest.raises(ConfigError, match=r"adapter.options.feedforward: 'dwn' matches no .*\n.*keys-values, down"):
        factors(feedforward="dwn")


@EACH
def test_it_begins_as_the_base_and_can_be_turned_off(case: Case, base: Callable[..., Path]) -> None:
    folder = base(case.tied, name=case.architecture)
    reference = load_model(folder)
    if case.quantized != "none":
        quantize(reference, form_of(reference, case.quantized))
    module = _adapted(folder, case)
    batch = make_batch(2, seed=3)
    with torch.no_grad():
        expected, found = all_logits(reference.train(), batch), all_logits(module, batch)
        if case.begins_as_identity:
            torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
        changed = all_logits(module, batch)
        assert (changed - expected).abs().max() > 1e-3
        flags = {name: each.requires_grad for name, each in module.named_parameters()}
        with adapter_off(module):
            torch.testing.assert_close(all_logits(module, batch), expected, atol=2e-5, rtol=0)
        assert torch.equal(all_logits(module, batch), changed)
        assert flags == {name: each.requires_grad for name, each in module.named_parameters()}


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")  # PEFT's own prefixes
@EACH
def test_it_trains_alone_resumes_bit_for_bit_and_plain_peft_loads_it(
    case: Case, base: Callable[..., Path], tmp_path: Path
) -> None:
    folder = base(case.tied, name=case.architecture)
    whole = _setup(folder, case, 6)
    before = {name: _copies(each) for name, each in whole.model.named_parameters()}
    fit(whole, TrainState(), [], lambda: False)
    for name, parameter in whole.model.named_parameters():
        assert _are_equal(parameter, before[name]) != parameter.requires_grad, name

    half = _setup(folder, case, 3)
    state = TrainState()
    fit(half, state, [], lambda: False)
    saved = save_checkpoint(tmp_path / "checkpoints", state, half.model, half.optimizer, half.loader.state(), "key")
    trained = sum(each.numel() * 4 for each in half.optimizer.parameters.values())
    assert (saved / "state.safetensors").stat().st_size < 5 * trained + 40_000
    rest = _setup(folder, case, 6)
    state, position = load_checkpoint(saved, rest.model, rest.optimizer, "key")
    rest.loader.load_state(position)
    fit(rest, state, [], lambda: False)
    for (name, a), b in zip(whole.model.named_parameters(), rest.model.parameters(), strict=True):
        assert _are_equal(a, _copies(b)), name

    adapter = tmp_path / "adapter"
    save_adapter(
        whole.model,
        NoTokenizer(),
        adapter,
        Base(str(folder), weights_digest(folder), form_of(whole.model, case.quantized)),
    )
    plain = load_model(folder, attention="eager")
    if case.quantized != "none":
        dequantize(quantize(plain, form_of(plain, case.quantized)), torch.float32)
    with warnings.catch_warnings():
        # PEFT says of prompt learning that it is told no task for tied weights; nothing that this test is about.
        warnings.simplefilter("ignore")
        peft = PeftModel.from_pretrained(plain, adapter).eval()
    batch = _alone(make_batch(2, seed=9))
    # LLM.int8 rounds the activations too, which the weights that it stands for do not.
    tolerance = 2e-2 if case.quantized == "int8" else 5e-5
    with torch.no_grad():
        expected = peft(**_one_document(batch)).logits[:, -batch.tokens.shape[1] :]
        torch.testing.assert_close(all_logits(whole.model, batch), expected, atol=tolerance, rtol=0)
        torch.testing.assert_close(all_logits(open_model(adapter, torch.float32), batch), expected, atol=5e-5, rtol=0)
        if case.name in ("prefix", "prompt"):
            with pytest.raises(ConfigError, match="cannot be merged"):
                open_model(adapter, torch.float32, is_merged=True)
        else:
            merged = open_model(adapter, torch.float32, is_merged=True)
            assert not has_adapter(merged)
            torch.testing.assert_close(all_logits(merged, batch), expected, atol=5e-5, rtol=0)


@EACH
def test_the_frozen_base_costs_neither_weight_gradients_nor_optimizer_state(
    case: Case, base: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = _setup(base(case.tied, name=case.architecture), case, 1)
    made: list[Any] = []
    add_product = cross_entropy._add_product

    def watched(*arguments: Any) -> torch.Tensor:
        made.append(arguments)
        return add_product(*arguments)

    monkeypatch.setattr(cross_entropy, "_add_product", watched)
    terms, _ = setup.loss(setup.model, setup.loader.next())
    terms["loss"][0].backward()
    parameters = dict(setup.model.named_parameters())
    trained = {name for name, each in parameters.items() if each.requires_grad}
    assert {name for name, each in parameters.items() if each.grad is not None} == trained
    head = setup.model.get_output_embeddings().weight  # type: ignore[operator]
    if has_split_head(setup.model):
        # The chunked head makes its gradient by hand.
        assert bool(made) == head.requires_grad
    setup.optimizer.clear_grads()
    fit(setup, TrainState(), [], lambda: False)
    state = setup.optimizer.state_tensors()
    assert {name.partition("/")[2] for name in state} == trained
    n_trained = count_params(setup.model, trainable=True)
    assert sum(each.numel() for each in state.values()) <= 3 * n_trained + len(trained)


@EACH
def test_documents_of_a_row_do_not_see_each_other(case: Case, base: Callable[..., Path]) -> None:
    module = _adapted(base(case.tied, name=case.architecture), case).eval()
    batch = make_batch(1, seed=1)
    cut = int((batch.segments[0] == 0).sum())
    other = batch.tokens.clone()
    other[0, :cut] = (other[0, :cut] + 7) % VOCABULARY.size
    changed = Batch(other, batch.targets, batch.positions, batch.segments, batch.n_targets)
    with torch.no_grad():
        first, second = all_logits(module, batch), all_logits(module, changed)
    # LLM.int8 takes its outlier columns from the whole batch, and so lets a trace of its rounding through.
    torch.testing.assert_close(second[:, cut:], first[:, cut:], atol=1e-3 if case.quantized == "int8" else 1e-6, rtol=0)
    assert (second[:, :cut] - first[:, :cut]).abs().max() > 1e-3


def test_a_part_is_trained_and_the_rest_is_neither_moved_nor_saved_in_checkpoints(base: Callable[..., Path]) -> None:
    module = load_model(base())
    derived = transform(module, AdapterConfig("freeze", {"train": r"layers\.1\."}), "none", 0)
    setup = make_setup(module, [make_batch(2, seed=0)], steps=2)
    before = {name: each.detach().clone() for name, each in module.named_parameters()}
    fit(setup, TrainState(), [], lambda: False)
    moved = {name for name, each in module.named_parameters() if not torch.equal(each, before[name])}
    assert moved
    assert all("layers.1." in name for name in moved)
    assert set(setup.optimizer.state_tensors()) == {
        f"{slot}/{name}" for name in moved for slot in ("master", "step", "exp_avg", "exp_avg_sq")
    }
    assert derived["adapter.n_trainable"] == count_params(module, trainable=True) < count_params(module)


def test_a_checkpoint_beside_other_frozen_weights_is_refused(base: Callable[..., Path], tmp_path: Path) -> None:
    case = Case("lora", {"r": 4})
    setup = _setup(base(seed=0), case, 1)
    saved = save_checkpoint(tmp_path / "c", TrainState(), setup.model, setup.optimizer, setup.loader.state(), "key")
    other = _setup(base(seed=1), case, 1)
    with pytest.raises(StoreError, match="frozen weights"):
        load_checkpoint(saved, other.model, other.optimizer, "key")


def test_an_adapter_is_refused_on_another_base(base: Callable[..., Path], tmp_path: Path) -> None:
    folder, other = base(seed=0), base(seed=1)
    module = _adapted(folder, CASES[0])
    save_adapter(module, NoTokenizer(), tmp_path / "a", Base(str(folder), weights_digest(folder), "none"))
    with pytest.raises(StoreError, match="belongs to weights of digest"):
        load_adapter(load_model(other), tmp_path / "a")
    with pytest.raises(StoreError, match="belongs to weights of digest"):
        open_model(tmp_path / "a", torch.float32, base=str(other))


_NAMED: dict[str, dict[str, Any]] = {
    "one": {"r": 4},
    "two": {"r": 2, "targets": "attention"},
    "head": {"r": 2, "targets": r".*q_proj", "train_head": True},
}


@pytest.mark.parametrize("quantized", ["none", "nf4"])
def test_several_named_adapters_on_one_base(quantized: str, base: Callable[..., Path], tmp_path: Path) -> None:
    """Of other layers each, one with a head of its own; opened, switched between and merged, one at a time."""
    folder = base()
    expected, batch = {}, make_batch(2, seed=4)
    for seed, (name, options) in enumerate(_NAMED.items()):
        module = load_model(folder)
        transform(module, AdapterConfig("lora", options), quantized, seed)
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
            expected[name] = all_logits(module, batch)
        save_adapter(module, NoTokenizer(), tmp_path / name, Base(str(folder), weights_digest(folder), quantized))
    several = open_adapters(folder, {name: tmp_path / name for name in _NAMED}, torch.float32)
    with torch.no_grad():
        assert adapter_names(several) == list(_NAMED)
        torch.testing.assert_close(all_logits(several, batch), expected["one"])
        for name in ("one", "two", "head", "one", "head", "two"):
            use_adapter(several, name)
            torch.testing.assert_close(all_logits(several, batch), expected[name])
            plain = load_model(folder)
            plain.load_state_dict(merged_tensors(several, torch.float32))
            torch.testing.assert_close(all_logits(plain, batch), expected[name], atol=5e-5, rtol=0)
        with adapter_off(several):
            plain = dequantize(quantize(load_model(folder), quantized), torch.float32)
            torch.testing.assert_close(all_logits(several, batch), all_logits(plain, batch))
        assert not any(each.requires_grad for each in several.parameters())
        merge(several)
        torch.testing.assert_close(all_logits(several, batch), expected["two"], atol=5e-5, rtol=0)


def test_adapters_that_cannot_stand_beside_each_other_are_refused(base: Callable[..., Path], tmp_path: Path) -> None:
    folder = base()
    for name, kind in (("one", "lora"), ("tokens", "prefix")):
        module = load_model(folder)
        transform(module, AdapterConfig(kind), "none", 0)
        save_adapter(module, NoTokenizer(), tmp_path / name, Base(str(folder), weights_digest(folder), "none"))
    both = open_adapters(folder, {"one": tmp_path / "one"}, torch.float32)
    with pytest.raises(ConfigError, match="'three' is no adapter"):
        use_adapter(both, "three")
    with pytest.raises(ConfigError, match=r"tokens: .* adds virtual tokens, beside which no other"):
        open_adapters(folder, {"one": tmp_path / "one", "tokens": tmp_path / "tokens"}, torch.float32)
    with pytest.raises(ConfigError, match=r"'a\.b' is no name"):
        open_adapters(folder, {"a.b": tmp_path / "one"}, torch.float32)
    with pytest.raises(StoreError, match="belongs to weights of digest"):
        open_adapters(base(seed=1), {"one": tmp_path / "one"}, torch.float32)


def test_the_second_matrices_learn_faster(base: Callable[..., Path]) -> None:
    from kajiya.config.schema import OptimConfig

    module = _adapted(base(), CASES[0])
    config = AdapterConfig("lora", {"lr_ratio": 16.0})
    optimizer = load_optimizer(OptimConfig(name="adamw", lr=1e-3), module, rates=rate_ratios(module, config))
    names = {id(master): name for name, master in optimizer.masters.items()}
    rates = {
        names[id(each)]: group["lr"]
        for inner in optimizer.optimizers
        for group in inner.param_groups
        for each in group["params"]
    }
    assert {round(rate / 1e-3) for name, rate in rates.items() if "lora_B" in name} == {16}
    assert {round(rate / 1e-3) for name, rate in rates.items() if "lora_A" in name} == {1}


def test_the_chunked_head_serves_adapters_and_a_head_that_is_trained_whole(base: Callable[..., Path]) -> None:
    assert has_split_head(_adapted(base(), Case("lora", {"train_head": True})))
    assert has_split_head(_adapted(base(True), Case("lora", {"train_embeddings": True})))
    assert not has_split_head(_adapted(base(), Case("lora", {"targets": "lm_head"})))


def test_an_nf4_base_takes_half_a_byte_a_parameter() -> None:
    sizes: Any = {"n_params": None, "hidden_size": 512, "n_layers": 1, "n_heads": 8, "n_kv_heads": 8, "ffn_size": 1024}
    module = build_model(ModelConfig(**sizes), VOCABULARY, 0).module
    n_params = count_params(module)
    quantize(module, "nf4")
    n_bytes, n_quantized = stored_bytes(module)
    assert n_bytes / n_quantized <= 0.53
    assert n_quantized == 4 * 512 * 512 + 3 * 512 * 1024
    assert count_params(module) == n_params
    before = module.model.layers[0].mlp.up_proj.weight  # type: ignore[union-attr,index]
    assert before.dtype == torch.uint8


def _mixture(name: str = "mixtral", **options: Any) -> Any:
    sizes: Any = {"n_params": None, "hidden_size": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "ffn_size": 128}
    return build_model(ModelConfig(name=name, options=options, **sizes), VOCABULARY, 0).module


def test_experts_in_nf4_take_half_a_byte_a_parameter_and_autograd_keeps_them_so() -> None:
    sizes: Any = {"n_params": None, "hidden_size": 256, "n_layers": 1, "n_heads": 4, "n_kv_heads": 4, "ffn_size": 512}
    options = {"num_local_experts": 4, "num_experts_per_tok": 2}
    module: Any = build_model(ModelConfig(name="mixtral", options=options, **sizes), VOCABULARY, 0).module
    n_params, n_experts = count_params(module), 4 * 3 * 256 * 512
    quantize(module, form_of(module, "nf4"))
    n_bytes, n_quantized = stored_bytes(module)
    assert n_quantized == 4 * 256 * 256 + n_experts
    assert n_bytes / n_quantized <= 0.53
    assert count_params(module) == n_params
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    ids = torch.arange(3, 35)[None]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        embedded = module.get_input_embeddings()(ids).detach().requires_grad_()
        logits = module(inputs_embeds=embedded).logits
    in_bits = [each for each in kept if each.ndim == 3 and len(each) == 4]
    assert len(in_bits) == 2
    assert all(is_quantized(each) for each in in_bits)
    (found,) = torch.autograd.grad(logits.square().sum(), embedded)
    dequantize(module, torch.float32)
    logits = module(inputs_embeds=embedded).logits
    (expected,) = torch.autograd.grad(logits.square().sum(), embedded)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("form", ["nf4", "nf4-experts"])
def test_an_adapter_opens_beside_experts_in_the_form_that_it_was_trained_beside(
    form: str, base: Callable[..., Path], tmp_path: Path
) -> None:
    folder = base(name="mixtral")
    module = load_model(folder, quantized="nf4")
    transform(module, AdapterConfig("lora", {"r": 4}), "nf4", seed=0)
    save_adapter(module, NoTokenizer(), tmp_path / "a", Base(str(folder), weights_digest(folder), form))
    name = "model.layers.0.mlp.experts.down_proj"
    whole = load_model(folder).get_parameter(name)
    found = open_model(tmp_path / "a", torch.float32, is_merged=True).get_parameter(name)
    assert torch.equal(found, whole) == (form == "nf4")
    again = load_model(folder, quantized="nf4")
    if form == "nf4":
        with pytest.raises(StoreError, match="experts that were not in 4 bits"):
            load_adapter(again, tmp_path / "a")
    else:
        load_adapter(again, tmp_path / "a")


@pytest.mark.parametrize(
    ("targets", "quantized", "lacks"),
    [
        ("all-linear", "none", []),
        ("attention", "none", ["adapted"]),
        ("attention", "nf4", ["adapted"]),
        ("attention", "int8", ["quantized", "adapted"]),
    ],
)
def test_experts_that_stay_as_they_are_are_named(targets: str, quantized: str, lacks: list[str]) -> None:
    module = _mixture(num_local_experts=4)
    n_experts = 2 * 4 * 3 * 64 * 128
    n_all = count_params(module)
    assert left_out(module) == ""
    transform(module, AdapterConfig("lora", {"r": 4, "targets": targets}), quantized, seed=0)
    n_all += count_params(module, trainable=True)
    assert left_out(module) == "; ".join(
        f"{100 * n_experts / n_all:.0f} % of them are experts that are not {what} "
        "(model.layers.0.mlp.experts.gate_up_proj and 3 more)"
        for what in lacks
    )
    assert left_out(transformed_llama(quantized)) == ""


_ATTENTION = {f"{side}_proj" for side in "qkvo"}


@pytest.mark.parametrize(
    ("targets", "adapted"),
    [
        ("all-linear", _ATTENTION | {"gate_up_proj", "down_proj"}),
        ("attention", _ATTENTION),
        ("mlp", {"gate_up_proj", "down_proj"}),
        ("attention, experts", _ATTENTION | {"gate_up_proj", "down_proj"}),
        (r".*\.experts\.down_proj|.*\.q_proj", {"q_proj", "down_proj"}),
    ],
)
def test_experts_are_adapted_as_targets_say(targets: str, adapted: set[str]) -> None:
    module = _mixture(num_local_experts=3)
    shapes = {name.rpartition(".")[2]: each.shape for name, each in module.named_parameters() if each.ndim == 3}
    derived = transform(module, AdapterConfig("lora", {"r": 4, "targets": targets}), "none", seed=0)
    found = {
        part.parameter_name if type(part).__name__ == "ParamWrapper" else path.rpartition(".")[2]
        for path, part in module.named_modules()
        if hasattr(part, "lora_A")
    }
    assert found == adapted
    of_experts = sum(2 * 3 * 4 * (shape[1] + shape[2]) for name, shape in shapes.items() if name in adapted)
    of_linear = sum(2 * 4 * (64 + (64 if name in ("q_proj", "o_proj") else 32)) for name in adapted & _ATTENTION)
    assert derived["adapter.n_trainable"] == of_experts + of_linear


def test_other_tensors_of_three_axes_are_no_experts() -> None:
    from transformers import XLNetConfig, XLNetLMHeadModel

    sizes: dict[str, Any] = {"vocab_size": 17, "d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 16}
    module = XLNetLMHeadModel(XLNetConfig(**sizes))
    assert max(each.ndim for each in module.parameters()) == 3
    assert expert_names(module) == []
    assert lora_targets(module, "all-linear").parameters == []


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_layers_that_peft_takes_for_experts_of_old_are_adapted_for_what_they_are(tmp_path: Path) -> None:
    """A dense layer and the expert that all tokens share have names that experts had before they became one tensor."""
    module = _mixture("glm4_moe", **_PARTLY_DENSE)
    module.save_pretrained(tmp_path / "base")
    transform(module, AdapterConfig("lora", {"r": 4, "targets": "mlp", "init": "gaussian"}), "none", seed=0)
    trained = {name for name, each in module.named_parameters() if each.requires_grad}
    assert {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"} == {
        ".".join(name.split(".")[3:5]) for name in trained if name.startswith("model.layers.0.")
    }
    assert sum("shared_experts.down_proj" in name for name in trained) == 2
    assert sum("mlp.experts" in name for name in trained) == 4
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    base = tmp_path / "base"
    save_adapter(module, NoTokenizer(), tmp_path / "a", Base(str(base), weights_digest(base), "none"))
    tokens = make_batch(2, seed=1).tokens
    peft = PeftModel.from_pretrained(load_model(base), tmp_path / "a").eval()
    with torch.no_grad():
        expected = peft(input_ids=tokens).logits
        assert (expected - load_model(base)(input_ids=tokens).logits).abs().max() > 1e-2
        torch.testing.assert_close(module.eval()(input_ids=tokens).logits, expected, atol=5e-5, rtol=0)
        merge(module)
        torch.testing.assert_close(module(input_ids=tokens).logits, expected, atol=5e-5, rtol=0)
    with pytest.raises(
        ConfigError, match=r"layers\.0\.mlp\.gate_proj\.weight and 5 more.*not where these are quantized"
    ):
        transform(_mixture("glm4_moe", **_PARTLY_DENSE), AdapterConfig("lora"), "nf4", seed=0)


_PARTLY_DENSE: dict[str, Any] = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1}
_PARTLY_DENSE |= {"first_k_dense_replace": 1, "moe_intermediate_size": 32}


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        (
            "dora",
            {},
            r"adapter.name: is dora, which has no magnitudes for model.layers.0.mlp.experts.gate_up_proj and 3 more",
        ),
        ("lora", {"init": "pissa"}, "adapter.options.init: is pissa, which takes nothing out of .*experts"),
        ("lora", {"dropout": 0.1}, "adapter.options.dropout: is 0.1, and what .*experts"),
        ("ia3", {}, r"adapter.options.feedforward: 'down' matches no module.*are experts(?s:.*)feedforward=null"),
    ],
    ids=lambda each: each if isinstance(each, str) and each.isalnum() else "",
)
def test_what_experts_cannot_have_is_refused_by_name(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        transform(_mixture(num_local_experts=3), AdapterConfig(name, options), "none", seed=0)


def transformed_llama(kind: str) -> torch.nn.Module:
    module = build_model(ModelConfig(n_params="40k"), VOCABULARY, 0).module
    transform(module, AdapterConfig("lora", {"r": 4}), kind, seed=0)
    return module


def test_the_weights_digest_is_of_the_weights_alone(base: Callable[..., Path], tmp_path: Path) -> None:
    folder = base()
    digest = weights_digest(folder)
    load_model(folder).save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert weights_digest(tmp_path / "sharded") == digest
    assert weights_digest(base(seed=1)) != digest


@pytest.mark.parametrize(
    ("name", "options", "quantized", "words"),
    [
        ("lora", {"targets": "no_such_layer"}, "none", "matches no module"),
        ("lora", {"targets": "("}, "none", "no regular expression"),
        *(
            (
                name,
                {"targets": rf".*\.(q_proj|{odd})"} | options,
                "none",
                rf"options\.targets: .* matches \S*{odd} \(\w+\), which has no matrix .*\n.*like \S*q_proj",
            )
            for name, options, odd in (
                ("lora", {}, "act_fn"),
                ("lora", {"init": "pissa"}, "act_fn"),
                ("dora", {}, "input_layernorm"),
                ("ia3", {}, "act_fn"),
            )
        ),
        (
            "lora",
            {"init": "pissa", "r": 33},
            "none",
            r"options\.r: is 33, and pissa .* of which model.*k_proj \[32, 64\] has 32",
        ),
        ("lora", {"init": "olora", "r": 64}, "none", "Set adapter.options.r=32 at most"),
        ("freeze", {"train": "no_such"}, "none", "found in no parameter"),
        ("freeze", {}, "none", "required"),
        ("lora", {"rank": 4}, "none", "unknown option"),
        ("lorra", {}, "none", "did you mean 'lora'"),
    ],
)
def test_mistakes_are_named(
    name: str, options: dict[str, Any], quantized: str, words: str, base: Callable[..., Path]
) -> None:
    with pytest.raises(ConfigError, match=words):
        transform(load_model(base()), AdapterConfig(name, options), quantized, 0)


@pytest.mark.parametrize("name", ["prefix", "prompt"])
def test_virtual_tokens_say_what_they_miss(name: str, base: Callable[..., Path]) -> None:
    folder, config = base(), AdapterConfig(name, {"n_tokens": 2})
    with pytest.raises(ConfigError, match=f"{name} needs attention by sdpa, and LlamaForCausalLM is computed by eager"):
        transform(load_model(folder, attention="eager"), config, "none", 0)
    for task in (Task("classes", ("a", "b")), Task("masked")):
        encoder: Any = build_model(ModelConfig("bert", n_params="40k", max_positions=64), VOCABULARY, 0, task).module
        with pytest.raises(
            ConfigError, match=f"{name} puts tokens before a text .* {type(encoder).__name__} is no causal model"
        ):
            transform(encoder, config, "none", 0)


@pytest.mark.parametrize("name", ["lora", "dora", "ia3"])
@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_a_new_head_is_trained_whole_and_comes_back(name: str, architecture: str, tmp_path: Path) -> None:
    task = Task("classes", ("a", "b", "c"))
    folder = tmp_path / "base"
    made: Any = build_model(
        ModelConfig(name=architecture, n_params="40k", max_positions=64), VOCABULARY, 0, task
    ).module
    made.save_pretrained(folder)
    module = load_model(folder, task=task)
    transform(module, AdapterConfig(name), "none", seed=5)
    trained = {each for each, parameter in module.named_parameters() if parameter.requires_grad}
    head = {each for each in trained if each.startswith(CLASS_HEADS)}
    assert head
    assert len(head) < len(trained)
    with torch.no_grad():
        for each, parameter in module.named_parameters():
            if each in trained:
                parameter.add_(0.1)
    saved = tmp_path / "adapter"
    save_adapter(module, NoTokenizer(), saved, Base(str(folder), weights_digest(folder), "none", task.labels))
    again = load_model(folder, task=task)
    load_adapter(again, saved)
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        expected, got = (each.eval()(input_ids=ids).logits for each in (module, again))
    assert torch.equal(expected, got)


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
def test_a_beginning_out_of_weights_that_are_kept_the_other_way_round(init: str) -> None:
    """GPT-2's layers hold [in, out]: PEFT's OLoRA takes them for [out, in], its PiSSA does not."""
    module: Any = build_model(ModelConfig(name="gpt2", n_params="40k", max_positions=64), VOCABULARY, 0).module.eval()
    batch = make_batch(2)
    with torch.no_grad():
        before = all_logits(module, batch)
    config = AdapterConfig("lora", {"init": init, "r": 4})
    if init == "olora":
        with pytest.raises(ConfigError, match="the other way round"):
            transform(module, config, "none", 0)
        return
    transform(module, config, "none", 0)
    with torch.no_grad():
        torch.testing.assert_close(all_logits(module, batch), before, atol=1e-4, rtol=1e-4)


def test_an_nf4_base_computes_in_what_it_reads_whatever_it_read_first(base: Callable[..., Path]) -> None:
    """A first pass under autocast does not round those without it."""
    first, second = (_adapted(base(), Case("lora", {"r": 4}, "nf4")).eval() for _ in range(2))
    batch = make_batch(2)
    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = all_logits(first, batch)
        plain = all_logits(second, batch)
        assert not torch.equal(rounded.float(), plain)
        assert torch.equal(all_logits(first, batch), plain)


def test_merging_into_quantized_weights_is_refused(base: Callable[..., Path]) -> None:
    module = _adapted(base(), Case("lora", {}, "nf4"))
    with pytest.raises(ConfigError, match="quantized"):
        merge(module)


def test_a_folder_says_its_base(base: Callable[..., Path], tmp_path: Path) -> None:
    folder = base()
    save_adapter(_adapted(folder, CASES[0]), NoTokenizer(), tmp_path / "a", Base("../base-False-0", "x", "none"))
    listed = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert listed["base_model_name_or_path"] == str(folder)
    assert listed["inference_mode"] is True
    assert (
        sorted(path.name for path in (tmp_path / "a").iterdir())
        == [
            "README.md",
            "adapter_config.json",
            "adapter_model.safetensors",
            "base.json",
        ][1:]
    )
