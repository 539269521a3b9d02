"""Every loss with every way to make a model trainable: it trains that alone, is saved, and computes the same when opened again."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.training.conftest import VOCABULARY, NoTokenizer
from tests.training.test_fit import make_setup
from tests.training.test_kinds import new_batches, task_of

from kajiya.config.compose import compose
from kajiya.config.schema import AdapterConfig, LossConfig, ModelConfig, OptimConfig
from kajiya.config.tables import TABLES
from kajiya.config.validate import validate
from kajiya.errors import ConfigError
from kajiya.models.adapt import has_adapter, rate_ratios, transform
from kajiya.models.adapter_files import Base, save_adapter
from kajiya.models.build import build_model
from kajiya.models.load import load_model
from kajiya.models.quantized import plain_tensors
from kajiya.models.save import save_model
from kajiya.models.weights_digest import weights_digest
from kajiya.training.fit import Setup, train_step
from kajiya.training.losses import load_loss, load_measure
from kajiya.training.optimizers import load_optimizer
from kajiya.training.state import TrainState

LOSSES = sorted(TABLES["loss"])


@dataclass(frozen=True)
class Transform:
    """What is trained of a model, and the form of the weights beside it."""

    adapter: str
    options: dict[str, Any]
    quantized: str = "none"


TRANSFORMS = {
    "dora": Transform("dora", {"r": 4}),
    "dora-nf4": Transform("dora", {"r": 4}, "nf4"),
    "rslora": Transform("lora", {"r": 4, "rslora": True}),
    "pissa": Transform("lora", {"r": 4, "init": "pissa"}),
    "olora": Transform("lora", {"r": 4, "init": "olora"}),
    "lora+": Transform("lora", {"r": 4, "lr_ratio": 4.0}),
    "int8": Transform("lora", {"r": 4}, "int8"),
    "torchao-int8": Transform("lora", {"r": 4}, "torchao-int8"),
    "ia3": Transform("ia3", {}),
    "prefix": Transform("prefix", {"n_tokens": 2}),
    "prompt": Transform("prompt", {"n_tokens": 2}),
    "freeze": Transform("freeze", {"train": r"(layers?|block)\.0\."}),
}
REFUSED = {
    ("masked_lm", "prefix"): r"prefix puts tokens before .* BertForMaskedLM is no causal model.*\n.*adapter\.name=lora",
    ("masked_lm", "prompt"): r"prompt puts tokens before .* BertForMaskedLM is no causal model.*\n.*adapter\.name=lora",
    ("grpo", "prefix"): r"adapter\.name: prefix is no change of weights .* draws the answers.*\n.*adapter\.name=lora",
    ("grpo", "prompt"): r"adapter\.name: prompt is no change of weights .* draws the answers.*\n.*adapter\.name=lora",
}
"""Pairs that do not go together, and in which words they are refused, each with what to do."""
_NOT_TOGETHER = {
    (
        "dora",
        "{r: 4}",
        "int8",
    ): r"model\.quantize: int8 .* dora asks for them .*\n.*quantize=nf4, or adapter\.name=lora",
    **{
        ("lora", f"{{init: {init}}}", form): rf"adapter\.options\.init: {init} takes .*{form}.*\n.*init=default"
        for init in ("pissa", "olora")
        for form in ("nf4", "int8", "torchao-int8")
    },
    **{
        (name, options, form): rf"model\.quantize: .*{form} weights .*\n.*adapter\.name=lora"
        for name, options in (("none", "{}"), ("freeze", "{train: norm}"))
        for form in ("nf4", "int8", "torchao-int8")
    },
}
"""Adapter, its options and the form of the weights, likewise; whatever the loss."""
EACH = [(loss, name) for name in TRANSFORMS for loss in LOSSES if (loss, name) not in REFUSED]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`base(loss)`: the folder of a random model with the loss's head, made once."""
    root = tmp_path_factory.mktemp("bases")

    def make(loss: str) -> Path:
        folder = root / loss
        if not folder.exists():
            name = {"masked_lm": "bert", "seq2seq": "t5"}.get(loss, "llama")
            config = ModelConfig(name=name, n_params="40k", max_positions=64)
            save_model(build_model(config, VOCABULARY, 0, task_of(loss)).module, NoTokenizer(), folder)
        return folder

    return make


def _opened(folder: Path, loss: str, transform_: Transform, seed: int = 1) -> Any:
    module = load_model(folder, task=task_of(loss))
    transform(module, AdapterConfig(transform_.adapter, transform_.options), transform_.quantized, seed)
    return module


def _loss_config(loss: str, base: Callable[[str], Path]) -> LossConfig:
    return LossConfig(loss, {"teacher": str(base("next_token"))} if loss == "distill" else {})


def _setup(module: Any, loss: str, chosen: Transform, base: Callable[[str], Path]) -> Setup:
    config = _loss_config(loss, base)
    torch.manual_seed(0)
    rates = rate_ratios(module, AdapterConfig(chosen.adapter, chosen.options))
    assert bool(rates) == ("lr_ratio" in chosen.options)
    return make_setup(
        module.train(),
        new_batches(loss, module),
        loss=load_loss(config),
        measure=load_measure(config),
        optimizer=load_optimizer(OptimConfig(name="adamw", weight_decay=0.0), module, rates=rates),
        max_skipped=0,
    )


def _values(module: Any, setup: Setup) -> list[float]:
    """What the loss says of one batch."""
    batch = setup.loader.batches[0]  # type: ignore[attr-defined]
    given = batch if setup.measure is None else replace(batch, measured={"kl": 0.0})
    with torch.no_grad():
        return [float(value) for value, _ in setup.loss(module.eval(), given)[0].values()]


@pytest.mark.slow
@pytest.mark.parametrize(("loss", "name"), EACH, ids=[f"{loss}-{name}" for loss, name in EACH])
def test_it_trains_its_part_alone_and_comes_back(
    loss: str, name: str, base: Callable[[str], Path], tmp_path: Path
) -> None:
    chosen = TRANSFORMS[name]
    module = _opened(base(loss), loss, chosen)
    setup = _setup(module, loss, chosen, base)
    before = {key: [part.detach().clone() for part in plain_tensors(each)] for key, each in module.named_parameters()}
    first = _values(module, setup)
    state = TrainState()
    for _ in range(2):
        module.train()
        train_step(setup, state)
        state.step += 1
    is_trained = {key: each.requires_grad for key, each in module.named_parameters()}
    assert 0 < sum(is_trained.values()) < len(is_trained)
    for key, each in module.named_parameters():
        is_same = all(torch.equal(a, b) for a, b in zip(plain_tensors(each), before[key], strict=True))
        assert is_same != is_trained[key], key
    trained = _values(module, setup)
    assert trained != first

    folder = tmp_path / "saved"
    if has_adapter(module):
        labels = task_of(loss).labels
        save_adapter(
            module, NoTokenizer(), folder, Base(str(base(loss)), weights_digest(base(loss)), chosen.quantized, labels)
        )
        again = _opened(base(loss), loss, Transform("load", {"path": str(folder)}, chosen.quantized))
    else:
        save_model(module, NoTokenizer(), folder)
        again = load_model(folder, task=task_of(loss))
    assert _values(again, setup) == pytest.approx(trained, rel=2e-5, abs=2e-5)


def _refused(base: Callable[[str], Path], loss: str, chosen: Transform) -> None:
    """A policy is refused by its config, for the engine's sake; the others by the model."""
    if loss == "grpo":
        validate(replace(compose("stdlib-grpo"), adapter=AdapterConfig(chosen.adapter, chosen.options)))
    else:
        _opened(base(loss), loss, chosen)


@pytest.mark.parametrize(("loss", "name"), REFUSED, ids=[f"{loss}-{name}" for loss, name in REFUSED])
def test_pairs_that_do_not_go_together_are_named(loss: str, name: str, base: Callable[[str], Path]) -> None:
    chosen = TRANSFORMS[name]
    with pytest.raises(ConfigError) as refusal:
        _refused(base, loss, chosen)
    assert re.search(REFUSED[loss, name], str(refusal.value))


@pytest.mark.parametrize(("adapter", "options", "form"), _NOT_TOGETHER)
def test_adapters_and_forms_that_do_not_go_together_are_named(adapter: str, options: str, form: str) -> None:
    settings = [f"adapter.name={adapter}", f"+adapter.options={options}", f"model.quantize={form}"]
    with pytest.raises(ConfigError) as refusal:
        compose("stdlib-pretrain", ["model.init=normal", "model.zero_outputs=false", *settings])
    assert re.search(_NOT_TOGETHER[adapter, options, form], str(refusal.value))
