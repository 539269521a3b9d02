"""What only a GPU can show; counted as skipped where there is none."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.training.conftest import ListLoader, make_batch

from kajiya.config.schema import LossConfig, OptimConfig
from kajiya.training.checkpoint import load_checkpoint, save_checkpoint
from kajiya.training.fit import Setup, fit
from kajiya.training.losses import load_loss
from kajiya.training.optimizers import load_optimizer
from kajiya.training.precision import resolve_precision
from kajiya.training.state import TrainState
from kajiya.training.strategy import SingleProcess

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


def _setup(model: torch.nn.Module, optim: str, steps: int) -> Setup:
    device = torch.device("cuda")
    precision = resolve_precision("bf16", device)
    strategy = SingleProcess(device, precision)
    model = strategy.prepare(model)
    return Setup(
        model=model,
        loss=load_loss(LossConfig()),
        loader=ListLoader([make_batch(2, seed=s) for s in range(5)]),
        optimizer=load_optimizer(OptimConfig(name=optim), model),
        strategy=strategy,
        precision=precision,
        lr=lambda step: 1e-2,
        steps=steps,
        accumulate=1,
        clip_norm=1.0,
        max_skipped=0,
    )


@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_a_resumed_state_is_on_the_device_and_goes_on(
    optim: str, tiny_model: Callable[..., torch.nn.Module], tmp_path: Path
) -> None:
    first = _setup(tiny_model(), optim, 4)
    state = TrainState()
    fit(first, state, [], lambda: False)
    folder = save_checkpoint(tmp_path, state, first.model, first.optimizer, first.loader.state(), "key")
    rest = _setup(tiny_model(seed=3), optim, 6)
    state, position = load_checkpoint(folder, rest.model, rest.optimizer, "key")
    rest.loader.load_state(position)
    for (name, a), b in zip(first.model.state_dict().items(), rest.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    fit(rest, state, [], lambda: False)
    assert state.step == 6
