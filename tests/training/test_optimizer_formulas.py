"""Each optimizer against its paper's formula, written out tensor by tensor; averages of the weights."""

import math
from collections.abc import Callable, Iterator

import pytest
import torch

from kajiya.config.schema import OptimConfig
from kajiya.config.tables import TABLES
from kajiya.errors import StoreError
from kajiya.training.masters import MasterOptimizer
from kajiya.training.optimizers import load_optimizer

Make = Callable[..., torch.nn.Module]
Formula = Iterator[torch.Tensor]
"""Given the first weights; sent each gradient and rate, yields the weights after it."""
RATES = (1e-2, 2e-2, 5e-3, 1e-2)


def _adamw(w: torch.Tensor, decay: float) -> Formula:
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    grad, lr = yield w
    for t in range(1, 9):
        m, v = 0.9 * m + 0.1 * grad, 0.95 * v + 0.05 * grad**2
        w = w - lr * decay * w - lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
        grad, lr = yield w


def _lion(w: torch.Tensor, decay: float) -> Formula:
    m = torch.zeros_like(w)
    grad, lr = yield w
    while True:
        w = w - lr * (torch.sign(0.9 * m + 0.1 * grad) + decay * w)
        m = 0.99 * m + 0.01 * grad
        grad, lr = yield w


def _sgd(w: torch.Tensor, decay: float) -> Formula:
    m = torch.zeros_like(w)
    grad, lr = yield w
    while True:
        m = 0.9 * m + grad + decay * w
        w = w - lr * m
        grad, lr = yield w


def _adafactor(w: torch.Tensor, decay: float) -> Formula:
    """Algorithms 4 and 5: factored second moment for matrices, update clipping, step relative to the tensor's size."""
    row, column, v = torch.zeros(w.shape[:-1]), torch.zeros(w.shape[-1:]), torch.zeros_like(w)
    grad, lr = yield w
    for t in range(1, 9):
        beta = 1 - t**-0.8
        if w.ndim == 2:
            row = beta * row + (1 - beta) * (grad**2).mean(1)
            column = beta * column + (1 - beta) * (grad**2).mean(0)
            second = torch.outer(row, column) / row.mean()
        else:
            second = v = beta * v + (1 - beta) * grad**2
        update = grad / second.sqrt()
        update = update / max(1.0, float(update.pow(2).mean().sqrt()))
        size = max(1e-3, float(w.pow(2).mean().sqrt()))
        w = w - lr * decay * w - min(lr, 1 / math.sqrt(t)) * size * update
        grad, lr = yield w


def _schedule_free(w: torch.Tensor, decay: float) -> Formula:
    """Algorithm 1 with x, y and z each kept; yields y."""
    x = y = z = w
    v, weights = torch.zeros_like(w), 0.0
    grad, lr = yield y
    for t in range(1, 9):
        v = 0.99 * v + 0.01 * grad**2
        z = z - lr * grad / ((v / (1 - 0.99**t)).sqrt() + 1e-8) - lr * decay * y
        weights += lr**2
        share = lr**2 / weights
        x = (1 - share) * x + share * z
        y = 0.1 * z + 0.9 * x
        grad, lr = yield y


FORMULAS: dict[str, Callable[[torch.Tensor, float], Formula]] = {
    "adamw": _adamw,
    "adamw_8bit": _adamw,
    "lion": _lion,
    "sgd": _sgd,
    "adafactor": _adafactor,
    "schedule_free": _schedule_free,
}
TOLERANCES = {"adamw_8bit": 0.05}
"""Largest error of a tensor's whole movement, relative to it: moments in 8 bits are coarse, the others exact to rounding.
Muon, which orthogonalizes by iterations, has a test of its own."""


def test_every_optimizer_has_its_formula() -> None:
    assert set(FORMULAS) | {"muon"} == set(TABLES["optimizer"])


def _grads(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("name", sorted(FORMULAS))
@pytest.mark.parametrize("decayed", [("matrix",), ("matrix", "embedding", "vector")])
def test_the_formula(name: str, decayed: tuple[str, ...], tiny_model: Make) -> None:
    model = tiny_model(hidden_size=64, ffn_size=96)
    optimizer = load_optimizer(OptimConfig(name=name, lr=2e-2, weight_decay=0.1, decayed=decayed), model)
    embedding = model.get_input_embeddings().weight  # type: ignore[operator,union-attr]
    start = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    formulas = {}
    for key, parameter in model.named_parameters():
        role = "embedding" if parameter is embedding else "matrix" if parameter.ndim == 2 else "vector"
        formulas[key] = FORMULAS[name](start[key], 0.1 if role in decayed else 0.0)
        next(formulas[key])
    for step, lr in enumerate(RATES):
        _grads(model, step)
        expected = {key: formulas[key].send((p.grad.clone(), lr)) for key, p in model.named_parameters()}  # type: ignore[union-attr,attr-defined]
        optimizer.step(lr)
    for key, parameter in model.named_parameters():
        error = (parameter.detach() - expected[key]).norm() / (expected[key] - start[key]).norm()
        assert float(error) < TOLERANCES.get(name, 1e-5), key


def test_eight_bits_are_eight_bits(tiny_model: Make) -> None:
    model = tiny_model(hidden_size=64, ffn_size=96)
    optimizer = load_optimizer(OptimConfig(name="adamw_8bit"), model)
    _grads(model, 0)
    optimizer.step(1e-2)
    dtypes = {key: tensor.dtype for key, tensor in optimizer.state_tensors().items() if key.startswith("state")}
    assert dtypes["state1/model.layers.0.mlp.up_proj.weight"] == torch.uint8
    assert dtypes["state1/model.norm.weight"] == torch.float32


# ---------------------------------------------------------------- averages of the weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_exponential_average(dtype: torch.dtype, tiny_model: Make) -> None:
    model = tiny_model().to(dtype)
    optimizer = load_optimizer(OptimConfig(), model, ema_decay=0.5)
    expected = {name: tensor.detach().clone() for name, tensor in optimizer.masters.items()}
    for step in range(1, 12):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step)).to(dtype)
        optimizer.step(1e-2)
        decay = min(0.5, (1 + step) / (10 + step))
        for name, tensor in optimizer.masters.items():
            expected[name] = decay * expected[name] + (1 - decay) * tensor.detach()
    trained = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with optimizer.averaged():
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.detach(), expected[name].to(dtype))
            assert not torch.equal(parameter, trained[name])
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, trained[name]), name
    _comes_back(optimizer, load_optimizer(OptimConfig(), tiny_model(seed=4).to(dtype), ema_decay=0.5))
    with pytest.raises(StoreError, match="ema_decay"):
        load_optimizer(OptimConfig(), tiny_model().to(dtype)).load_state_tensors(optimizer.state_tensors())


def _comes_back(first: MasterOptimizer, second: MasterOptimizer) -> None:
    second.load_state_tensors({key: value.clone() for key, value in first.state_tensors().items()})
    again = second.state_tensors()
    assert again.keys() == first.state_tensors().keys()
    assert all(torch.equal(value, again[key]) for key, value in first.state_tensors().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_schedule_free_is_evaluated_at_its_average(dtype: torch.dtype, tiny_model: Make) -> None:
    model = tiny_model().to(dtype)
    optimizer = load_optimizer(OptimConfig(name="schedule_free", weight_decay=0.0), model)
    x = {name: tensor.detach().clone() for name, tensor in optimizer.masters.items()}
    z, v = {n: t.clone() for n, t in x.items()}, {n: torch.zeros_like(t) for n, t in x.items()}
    for step in range(1, 6):
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step)).to(dtype)
            grad = parameter.grad.float()
            v[name] = 0.99 * v[name] + 0.01 * grad**2
            z[name] = z[name] - 1e-2 * grad / ((v[name] / (1 - 0.99**step)).sqrt() + 1e-8)
            x[name] = (1 - 1 / step) * x[name] + z[name] / step
        optimizer.step(1e-2)
    with optimizer.averaged():
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(
                parameter.detach(), x[name].to(dtype), atol=1e-5, rtol=1e-2 if dtype != torch.float32 else 1e-4
            )
