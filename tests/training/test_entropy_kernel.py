"""The Triton kernel of the loss's softmax: right under the interpreter, compiled for a GPU, and taken on one."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.training.conftest import make_model
from torch import nn
from torch._subclasses import FakeTensorMode

from kajiya.training import cross_entropy, softmax_choice
from kajiya.training.cross_entropy import settle_softmax
from kajiya.training.ranks import Ranks
from kajiya.training.softmax_choice import triton_problem

ROOT = Path(__file__).resolve().parents[2]
has_triton = pytest.mark.skipif(find_spec("triton") is None, reason="no Triton, which is published for Linux")


@has_triton
def test_it_is_the_formula_under_tritons_interpreter(tmp_path: Path) -> None:
    """In a process of its own: Triton reads the variable when it is imported, and this one may have imported it."""
    cases = "tests/training/interpreted_entropy.py"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'own'}", cases],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    n_passed = int(re.findall(r"(\d+) passed", done.stdout)[-1])
    assert n_passed >= 25
    assert "skipped" not in done.stdout


@has_triton
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_it_compiles_for_a_gpu(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's own compiler and assembler make an H100's program of it, whose values all fit its registers."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from kajiya.training.entropy_kernel import _WIDEST, _entropy

    signature = {
        **dict.fromkeys(("logits", "grad"), f"*{dtype}"),
        "targets": "*i64",
        **dict.fromkeys(("weights", "total", "nll"), "*fp32"),
        **dict.fromkeys(("stride", "n_words"), "i32"),
        **dict.fromkeys(("z_loss", "smoothing"), "fp32"),
        **dict.fromkeys(("NEEDS_GRAD", "SMOOTHS", "WIDTH"), "constexpr"),
    }
    source = ASTSource(_entropy, signature, constexprs={"NEEDS_GRAD": True, "SMOOTHS": True, "WIDTH": _WIDEST})
    options = {"num_warps": 16, "enable_fp_fusion": True}
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert made.asm["cubin"]
    assert ".target sm_90" in made.asm["ptx"]
    assert "ld.local" not in made.asm["ptx"]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, float]]:
    """What a chunk takes in each way, milliseconds, in place of a GPU's clock; `calls` counts the measurements."""
    times = {"triton": 1.0, "torch": 3.0, "calls": 0.0}

    def elapsed(call: Any) -> float:
        times["calls"] += 1
        return times["triton" if call.args == ("triton",) else "torch"]

    monkeypatch.setattr(softmax_choice, "elapsed_ms", elapsed)
    monkeypatch.setattr(cross_entropy, "_settled", {})
    for cached in (triton_problem, cross_entropy._timed_choice):
        cached.cache_clear()
    yield times
    for cached in (triton_problem, cross_entropy._timed_choice):
        cached.cache_clear()


def _settled(model: Any, dtype: torch.dtype = torch.bfloat16, kept: str | None = None) -> tuple[str, str]:
    choice = settle_softmax(model, torch.device("cuda"), dtype, Ranks(), kept)
    assert choice is not None
    return choice.way, choice.words


def _way(dtype: torch.dtype = torch.bfloat16, n_words: int = 48) -> str:
    """Which way is taken, for tensors without data, of which nothing could be read."""
    with FakeTensorMode():
        hidden, head = (torch.empty(n, 16, dtype=dtype, device="cuda") for n in (20, n_words))
        return cross_entropy._way(hidden, head)


@has_triton
@pytest.mark.parametrize(("dtype", "way"), [(torch.bfloat16, "triton"), (torch.float64, "torch")])
def test_each_way_waits_for_nothing_on_a_gpu(dtype: torch.dtype, way: str) -> None:
    """On tensors without data, of which nothing could be read."""
    with FakeTensorMode():
        logits = torch.empty(20, 48, dtype=dtype, device="cuda")
        targets, weights = torch.empty(20, dtype=torch.int64, device="cuda"), torch.ones(20, device="cuda")
        weights = weights.to(cross_entropy._wide(dtype))
        for needs_grad in (False, True):
            grad, *sums = cross_entropy._ENTROPY[way](logits, targets, weights, 0.1, 0.1, needs_grad=needs_grad)
            assert (grad is not None) == needs_grad
            assert all(each.shape == () for each in sums)
        assert (grad.shape, grad.dtype) == ((20, 48), dtype)


@has_triton
def test_a_gpu_takes_the_way_that_was_faster_on_it(clock: dict[str, float]) -> None:
    """Timed once for each vocabulary and dtype, in the process."""
    assert _way() == "triton"
    n_calls = clock["calls"]
    assert n_calls >= 2
    clock.update(triton=3.0, torch=1.0)
    assert _way() == "triton"
    assert clock["calls"] == n_calls
    assert _way(n_words=64) == "torch"
    assert _way(torch.float16) == "torch"
    assert _way(torch.float64) == "torch"
    assert clock["calls"] == 3 * n_calls


@has_triton
def test_a_gain_within_the_noise_is_none(clock: dict[str, float]) -> None:
    clock.update(triton=1.0, torch=1.04)
    assert _way() == "torch"


@has_triton
def test_a_run_keeps_what_it_began_with_and_says_why(clock: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    model: Any = make_model()
    with FakeTensorMode():
        model.lm_head.weight = nn.Parameter(torch.empty(97, 32, device=gpu))
        assert _settled(model) == ("triton", "Triton: 1.00 ms a chunk by Triton, 3.00 by torch")
        clock.update(triton=2.0, torch=1.0)
        assert _settled(model, torch.float16) == ("torch", "torch: 2.00 ms a chunk by Triton, 1.00 by torch")
        n_calls = clock["calls"]
        assert _settled(model, torch.float16, kept="triton") == ("triton", "triton, as the run began")
        assert _settled(model, kept="torch") == ("torch", "torch, as the run began")
        assert _way(n_words=97) == "torch"
        assert clock["calls"] == n_calls
        assert _settled(model)[0] == "triton"  # another run of the process
        monkeypatch.setattr(cross_entropy, "agreed", lambda _ranks, own, _names: "torch")
        assert _settled(model) == ("torch", "torch, as the run began")
        assert settle_softmax(nn.Linear(2, 2), gpu, torch.bfloat16, Ranks()) is None
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
        assert _settled(model, kept="triton") == ("torch", "torch: a deterministic run chooses nothing by the clock")
    assert settle_softmax(make_model(), torch.device("cpu"), torch.bfloat16, Ranks()) is None


@has_triton
@pytest.mark.usefixtures("clock")
def test_without_memory_to_time_both_torch_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_call: object) -> float:
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(softmax_choice, "elapsed_ms", fails)
    assert _way() == "torch"


@pytest.mark.usefixtures("clock")
def test_a_machine_without_triton_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "kajiya.training.entropy_kernel", raising=False)
    assert _way() == "torch"
    choice = cross_entropy.softmax_choice(torch.device("cuda"), torch.bfloat16, 48)
    assert choice.words.startswith("torch: ")
    assert "pip install triton" in choice.words


@has_triton
@pytest.mark.usefixtures("clock")
def test_a_machine_where_triton_cannot_compile_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC.")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("kajiya.training.entropy_kernel.entropy", fails)
    assert _way() == "torch"
    assert triton_problem() == "the kernel cannot be compiled: Failed to find C compiler."
