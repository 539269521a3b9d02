"""Products in fp8, emulated: which layers have them, how near the result is, and that what is saved is an ordinary model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.training.conftest import make_batch
from tests.training.test_fit import make_setup

from kajiya.errors import ConfigError
from kajiya.models.open import open_model
from kajiya.training.fit import fit, train_step
from kajiya.training.precision import with_fp8_products
from kajiya.training.state import TrainState
from kajiya.training.terms import drain_window

Make = Callable[..., Any]


def _gradients(model: Any, precision: str) -> tuple[float, dict[str, torch.Tensor]]:
    setup = make_setup(model, [make_batch(4)], precision=precision, clip_norm=None)
    kept: dict[str, torch.Tensor] = {}
    setup.optimizer.step = lambda lr: kept.update(  # type: ignore[method-assign]
        {name: p.grad.float().clone() for name, p in setup.optimizer.parameters.items() if p.grad is not None}
    )
    state = TrainState()
    train_step(setup, state)
    return drain_window(state)["train/nll"], kept


def test_the_products_of_the_blocks_are_rounded_and_the_result_is_near(tiny_model: Make) -> None:
    from torchao.float8.float8_linear import Float8Linear

    model = with_fp8_products(tiny_model(tied=False), emulated=True)
    converted = {name for name, module in model.named_modules() if isinstance(module, Float8Linear)}
    assert len(converted) == 2 * 7
    assert not any("lm_head" in name for name in converted)
    plain_loss, plain = _gradients(tiny_model(tied=False), "fp32")
    loss, gradients = _gradients(model, "fp32")
    assert loss == pytest.approx(plain_loss, rel=2e-3)
    assert gradients.keys() == plain.keys()
    for name, gradient in gradients.items():
        likeness = torch.nn.functional.cosine_similarity(gradient.flatten(), plain[name].flatten(), dim=0)
        assert float(likeness) > 0.98, name
    in_a_block = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(gradients[in_a_block], plain[in_a_block]), "it was rounded"


def test_it_learns_with_masters_and_is_saved_as_any_model(tiny_model: Make, tmp_path: Path) -> None:
    model = with_fp8_products(tiny_model().bfloat16(), emulated=True)
    setup = make_setup(model, [make_batch(2)], precision="bf16", steps=30)
    state = TrainState()
    first = _gradients(model, "bf16")[0]
    fit(setup, state, [], lambda: False)
    assert _gradients(model, "bf16")[0] < first - 0.3
    assert all(master.dtype == torch.float32 for master in setup.optimizer.masters.values())
    model.save_pretrained(tmp_path)
    again = open_model(tmp_path, torch.bfloat16)
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_a_model_of_odd_sizes_is_refused(tiny_model: Make) -> None:
    with pytest.raises(ConfigError, match=r"train\.precision.*multiples of 16"):
        with_fp8_products(tiny_model(hidden_size=24, n_heads=2, ffn_size=40), emulated=True)
