"""What only a GPU can show; counted as skipped where there is none."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.training.conftest import ListLoader, make_batch
from tests.training.test_guard import RowLoader

from kajiya.config.schema import AdapterConfig, LossConfig, OptimConfig
from kajiya.config.tables import TABLES
from kajiya.models.adapt import transform
from kajiya.models.unequal import bounds_problem
from kajiya.training import cross_entropy
from kajiya.training.checkpoint import load_checkpoint, save_checkpoint
from kajiya.training.fit import Hook, Setup, fit, train_step
from kajiya.training.guard import Guard
from kajiya.training.losses import load_loss
from kajiya.training.optimizers import load_optimizer
from kajiya.training.precision import resolve_precision
from kajiya.training.profile import Profile
from kajiya.training.recompute import recompute_activations
from kajiya.training.softmax_choice import triton_problem
from kajiya.training.state import TrainState
from kajiya.training.strategy import SingleProcess
from kajiya.training.terms import drain_window

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


def _setup(
    model: torch.nn.Module,
    optim: str,
    steps: int,
    precision_name: str = "bf16",
    offload: bool = False,
    device: torch.device = torch.device("cuda"),  # noqa: B008 (a value, no state)
    **more: Any,
) -> Setup:
    precision = resolve_precision(precision_name, device)
    strategy = SingleProcess(device, precision)
    model = strategy.prepare(model)
    settings: dict[str, Any] = {
        "model": model,
        "loss": load_loss(LossConfig()),
        "loader": ListLoader([make_batch(2, seed=s) for s in range(5)]),
        "optimizer": load_optimizer(OptimConfig(name=optim, offload=offload), model),
        "strategy": strategy,
        "precision": precision,
        "lr": lambda step: 1e-2,
        "steps": steps,
        "accumulate": 1,
        "clip_norm": 1.0,
        "max_skipped": 0,
    }
    return Setup(**(settings | more))


def _gradients(setup: Setup) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss of a step, and its gradients on the CPU in float32, not clipped; no update is made."""
    kept: dict[str, torch.Tensor] = {}
    setup.optimizer.step = lambda lr: kept.update(  # type: ignore[method-assign]
        {name: gradient.float().cpu() for name, gradient in setup.optimizer.named_grads().items()}
    )
    state = TrainState()
    train_step(replace(setup, clip_norm=None), state)
    return drain_window(state)["train/nll"], kept


def _likeness(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0))


def _losses(setup: Setup) -> list[float]:
    losses: list[float] = []
    log = Hook("log", 1, lambda report: losses.append(drain_window(report.state)["train/nll"]))
    fit(setup, TrainState(), [log], lambda: False)
    return losses


@pytest.mark.parametrize("precision", ["bf16", "bf16-mixed", "fp16-mixed"])
def test_each_precision_learns_what_fp32_learns(precision: str, tiny_model: Callable[..., torch.nn.Module]) -> None:
    expected = _losses(_setup(tiny_model(), "adamw", 20, "fp32"))
    assert _losses(_setup(tiny_model(), "adamw", 20, precision)) == pytest.approx(expected, rel=5e-2)


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="this GPU has no fp8 products"
)
def test_fp8_learns_what_bf16_learns(tiny_model: Callable[..., torch.nn.Module]) -> None:
    from torchao.float8.float8_linear import Float8Linear

    expected = _losses(_setup(tiny_model(), "adamw", 20))
    setup = _setup(tiny_model(), "adamw", 20, "fp8")
    assert sum(isinstance(module, Float8Linear) for module in setup.model.modules()) == 2 * 7
    assert _losses(setup) == pytest.approx(expected, rel=5e-2)


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="this GPU has no fp8 products"
)
def test_the_gradients_of_an_fp8_step_point_as_bf16s_do(tiny_model: Callable[..., torch.nn.Module]) -> None:
    plain_loss, plain = _gradients(_setup(tiny_model(tied=False), "sgd", 1))
    loss, found = _gradients(_setup(tiny_model(tied=False), "sgd", 1, "fp8"))
    assert loss == pytest.approx(plain_loss, rel=1e-2)
    assert found.keys() == plain.keys()
    for name, gradient in found.items():
        assert _likeness(gradient, plain[name]) > 0.95, name


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_an_adapter_takes_the_step_that_it_takes_on_a_cpu(
    quantize: str, tiny_model: Callable[..., torch.nn.Module]
) -> None:
    """The base, in 4 bits too, is moved to the GPU as it is, and the adapter's gradients are the same; nothing else has one."""
    seen = []
    for device in (torch.device("cpu"), torch.device("cuda")):
        model = tiny_model()
        transform(model, AdapterConfig("lora", {"r": 4, "dropout": 0.0}), quantize, 0)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(len(name)))
        setup = _setup(model, "sgd", 1, "fp32", device=device)
        quantized = [each for each in setup.model.parameters() if each.dtype == torch.uint8]
        assert len(quantized) == (2 * 7 if quantize == "nf4" else 0)
        assert {each.device.type for each in setup.model.parameters()} == {device.type}
        seen.append(_gradients(setup))
    (expected_loss, expected), (loss, found) = seen
    assert loss == pytest.approx(expected_loss, rel=1e-3)
    assert found.keys() == expected.keys()
    assert len(found) == 2 * 2 * 7
    assert all("lora_" in name for name in found)
    for name, gradient in found.items():
        assert _likeness(gradient, expected[name]) > 0.999, name
        assert float(gradient.norm()) == pytest.approx(float(expected[name].norm()), rel=1e-2), name


def test_a_loss_scale_that_overflows_is_halved_until_a_step_is_taken(
    tiny_model: Callable[..., torch.nn.Module],
) -> None:
    setup = _setup(tiny_model(), "adamw", 1, "fp16-mixed")
    assert isinstance(setup.strategy, SingleProcess)
    setup.strategy.scale.factor = 2.0**40
    before = [weight.detach().clone() for weight in setup.model.parameters()]
    state = TrainState()
    for step in range(60):
        train_step(setup, state)
        if state.overflows == step:
            break
        assert all(torch.equal(a, b) for a, b in zip(before, setup.model.parameters(), strict=True))
    assert state.overflows >= 1
    assert setup.strategy.scale.factor == 2.0 ** (40 - state.overflows)
    assert all(bool(weight.isfinite().all()) for weight in setup.model.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, setup.model.parameters(), strict=True))


@pytest.mark.parametrize("optim", sorted(set(TABLES["optimizer"]) - {"adamw_8bit"}))
def test_an_optimizer_on_the_host_trains_as_one_on_the_gpu(
    optim: str, tiny_model: Callable[..., torch.nn.Module], tmp_path: Path
) -> None:
    expected = _losses(_setup(tiny_model(), optim, 6))
    apart = _setup(tiny_model(), optim, 6, offload=True)
    assert _losses(apart) == pytest.approx(expected, rel=2e-2)
    assert all(not tensor.is_cuda for tensor in apart.optimizer.state_tensors().values())
    state = TrainState(step=6)
    folder = save_checkpoint(tmp_path, state, apart.model, apart.optimizer, apart.loader.state(), "key")
    again = _setup(tiny_model(seed=3), optim, 6, offload=True)
    load_checkpoint(folder, again.model, again.optimizer, "key")
    for a, b in zip(apart.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_activations_on_the_host_free_the_gpu(tiny_model: Callable[..., torch.nn.Module]) -> None:
    """Many layers and long rows, so that what the blocks keep is most of the memory; the gradient is the same."""
    device = torch.device("cuda")
    peaks, norms = {}, {}
    for how in ("full", "offload"):
        model = tiny_model(n_layers=16, hidden_size=256, ffn_size=256, max_positions=2048)
        recompute_activations(model, how, device)
        batch = make_batch(8, tokens=2048)
        setup = _setup(model, "sgd", 1, loader=ListLoader([batch]))
        torch.cuda.reset_peak_memory_stats()
        norms[how] = train_step(setup, TrainState())
        peaks[how] = torch.cuda.max_memory_allocated()
    assert norms["offload"] == pytest.approx(norms["full"], rel=1e-4)
    assert peaks["offload"] < peaks["full"] - 10 * 8 * 2048 * 256 * 2


def test_a_gpu_that_is_too_small_halves_the_micro_batch(tiny_model: Callable[..., torch.nn.Module]) -> None:
    """The allocator is held under what the whole micro-batch needs."""
    device = torch.device("cuda")
    rows = make_batch(64, tokens=512)
    loader = RowLoader(rows, 64)
    heard: list[str] = []

    def shrink(times: int) -> int:
        loader.batch = 64 >> times
        return 2**times if times < 6 else 0

    setup = _setup(
        tiny_model(hidden_size=256, ffn_size=1024, max_positions=512),
        "sgd",
        1,
        loader=loader,
        guard=Guard(tell=heard.append, shrink=shrink),
    )
    train_step(setup, TrainState())
    whole = torch.cuda.max_memory_allocated()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.5 * whole / torch.cuda.get_device_properties(device).total_memory)
    state = TrainState()
    try:
        train_step(setup, state)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert state.halvings >= 1
    assert state.tokens == 64 * 512
    assert heard


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n_words", [1001, 32_000, 50_257])
def test_the_losss_kernel_is_the_formula(n_words: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits = (torch.randn(40, n_words, device="cuda") * 4).to(dtype)
    targets, weights = torch.randint(0, n_words, (40,), device="cuda"), torch.rand(40, device="cuda")
    weights[::3] = 0
    wanted, *sums = cross_entropy._torch_entropy(logits.double(), targets, weights.double(), 0.1, 0.2, needs_grad=True)
    assert triton_problem() is None
    grad, *found = cross_entropy._triton_entropy(logits, targets, weights, 0.1, 0.2, needs_grad=True)
    assert [float(each) for each in found] == pytest.approx([float(each) for each in sums], rel=1e-4)
    assert wanted is not None
    assert grad is not None
    torch.testing.assert_close(grad.double(), wanted, atol=1e-6, rtol=1e-2 if dtype == torch.bfloat16 else 2e-3)


def test_the_losss_softmax_is_chosen_by_its_time() -> None:
    choice = cross_entropy.softmax_choice(torch.device("cuda", 0), torch.bfloat16, 32_000)
    ours, theirs = (float(number) for number in re.findall(r"\d+\.\d+", choice.words))
    assert ours > 0
    assert choice.way == ("triton" if theirs >= 1.05 * ours else "torch") or theirs == pytest.approx(
        1.05 * ours, rel=0.02
    )
    assert cross_entropy.softmax_choice(torch.device("cuda", 0), torch.bfloat16, 32_000) is choice


def test_the_losss_kernel_is_compared_in_a_benchmark() -> None:
    script = Path(__file__).resolve().parents[2] / "benchmarks" / "loss_kernel.py"
    done = subprocess.run([sys.executable, str(script), "--rounds", "3"], capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == 2 + 4


def test_a_profile_has_the_gpus_memory(tiny_model: Callable[..., torch.nn.Module], tmp_path: Path) -> None:
    setup = _setup(tiny_model(), "adamw", 5)
    state = TrainState()
    profile = Profile(setup.model, torch.device("cuda"), tmp_path / "profile", compiled=False)
    for _ in range(5):
        train_step(setup, state)
        profile.after_step(state)
    assert (tmp_path / "profile" / "memory.pickle").stat().st_size > 1000
    assert max(json.loads((tmp_path / "profile" / "memory.json").read_text())["bytes"]) > 0


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


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0), reason="this GPU has no flash kernel"
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_packed_rows_are_read_without_a_mask(dtype: torch.dtype) -> None:
    assert bounds_problem(torch.device("cuda"), dtype) is None
