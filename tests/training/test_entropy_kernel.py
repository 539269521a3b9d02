"""The Triton kernel of the loss's softmax: right under the interpreter, compiled for a GPU, and taken on one."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from kajiya.config.schema import TrainConfig
from kajiya.training import cross_entropy
from kajiya.training.compile import compile_where_it_pays
from kajiya.training.cross_entropy import triton_problem

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


@has_triton
@pytest.mark.parametrize(("dtype", "way"), [(torch.bfloat16, "triton"), (torch.float64, "torch")])
def test_a_gpu_takes_it_and_waits_for_nothing(dtype: torch.dtype, way: str) -> None:
    """On tensors without data, of which nothing could be read."""
    with FakeTensorMode():
        hidden, head = (torch.empty(n, 16, dtype=dtype, device="cuda") for n in (20, 48))
        assert cross_entropy._way(hidden, head) == way
        targets, weights = torch.empty(20, dtype=torch.int64, device="cuda"), torch.ones(20, device="cuda")
        weights = weights.to(cross_entropy._wide(dtype))
        for needs_grad in (False, True):
            grad, *sums = cross_entropy._ENTROPY[way](
                hidden @ head.T, targets, weights, 0.1, 0.1, needs_grad=needs_grad
            )
            assert (grad is not None) == needs_grad
            assert all(each.shape == () for each in sums)
        assert (grad.shape, grad.dtype) == ((20, 48), dtype)


def test_a_machine_without_triton_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "kajiya.training.entropy_kernel", raising=False)
    triton_problem.cache_clear()
    try:
        with FakeTensorMode():
            hidden, head = (torch.empty(n, 16, device="cuda") for n in (20, 48))
            assert cross_entropy._way(hidden, head) == "torch"
        words = compile_where_it_pays(TrainConfig(compile="off"), nn.Linear(2, 2), torch.device("cuda"), "no")
        assert words.startswith("no: set in the config; the loss's softmax by torch: ")
        assert "pip install triton" in words
    finally:
        triton_problem.cache_clear()


@has_triton
def test_a_machine_where_triton_cannot_compile_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC.")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("kajiya.training.entropy_kernel.entropy", fails)
    triton_problem.cache_clear()
    try:
        with FakeTensorMode():
            hidden, head = (torch.empty(n, 16, device="cuda") for n in (20, 48))
            assert cross_entropy._way(hidden, head) == "torch"
        assert triton_problem() == "the kernel cannot be compiled: Failed to find C compiler."
    finally:
        triton_problem.cache_clear()
