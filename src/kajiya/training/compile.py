"""torch.compile where it pays: block by block, so that compile time does not grow with depth."""

import functools
import warnings
from pathlib import Path

import torch
from torch import nn

from kajiya.config.schema import TrainConfig
from kajiya.models.experts import has_adapted_bits

_PAYS_MINUTES = 6.0
_PAYS_STEPS = 1000
"""A run shorter than this does not repay the compilation (about half a minute on a CPU, for steps 5 to 15 % faster)."""


def takes_whole_blocks(train: TrainConfig, model: nn.Module, device: torch.device) -> bool:
    """Whether a compiler was asked for and can take the blocks as Transformers has them, which then are not joined."""
    return train.compile == "on" and _problem(model, device) is None


def compile_where_it_pays(
    train: TrainConfig, model: nn.Module, device: torch.device, fused: str, *, varies: bool = False
) -> str:
    """Compile where the config and the machine say so; returns what was done and why, in words.

    `varies`: batches are of many lengths. `fused` says whether the blocks were joined (`models.fused`), which leaves a compiler
    nothing to gain, and why they were not.
    """
    state, _, detail = fused.partition(": ")
    words = _compile_if_wanted(train, model, device, is_fused=state == "yes", varies=varies)
    if device.type != "cpu":
        return words
    return f"{words}; joined in C++: {detail}" if state == "yes" else f"{words}; not joined in C++: {detail}"


def _compile_if_wanted(
    train: TrainConfig, model: nn.Module, device: torch.device, *, is_fused: bool, varies: bool
) -> str:
    if train.compile == "off":
        return "no: set in the config"
    if train.compile == "auto" and is_fused:
        return "no: joined products and C++ operators take its place"
    problem = _problem(model, device)
    if problem is not None:
        return f"no: {problem}"
    is_short = (train.minutes or _PAYS_MINUTES) < _PAYS_MINUTES or (train.steps or _PAYS_STEPS) < _PAYS_STEPS
    if train.compile == "auto" and is_short:
        return "no: the run is too short to repay it"
    return f"yes: {compile_blocks(model, varies=varies)} blocks" + (", for any length" if varies else "")


def _problem(model: nn.Module, device: torch.device) -> str | None:
    """Why this model cannot be compiled for `device` on this machine, in words; `None` when it can."""
    problem = compiler_problem(device)
    if problem is None and has_adapted_bits(model):
        return "PEFT's adapters of experts in 4 bits cannot be compiled"
    return problem


def compiler_problem(device: torch.device) -> str | None:
    """Why this machine cannot compile for `device`, in words; `None` when it can."""
    if device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            return "no C++ compiler was found (on Debian or Ubuntu: apt install g++)"
        return None
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return None if has_triton() else "Triton is not installed"
    return f"torch.compile is not relied on for {device.type}"


def compile_blocks(model: nn.Module, *, varies: bool = False) -> int:
    """Compile each repeated block of the model in place; returns how many. A model without a stack is compiled whole.

    Each shape is compiled for itself, which is fastest where there are few; where lengths vary, the second one is compiled
    for all: torch gives up, and runs what comes then uncompiled, behind the eighth.
    """
    # torch counts the shapes of a block's code over the whole process: those of a run before would leave this one uncompiled.
    torch.compiler.reset()
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) > 0]
    uniform = [stack for stack in stacks if len({type(block) for block in stack}) == 1]
    if not uniform:
        _compile(model, varies=varies)
        return 1
    longest = max(uniform, key=lambda stack: sum(parameter.numel() for parameter in stack.parameters()))
    for block in longest:
        _compile(block, varies=varies)
    return len(longest)


def _compile(module: nn.Module, *, varies: bool) -> None:
    # Inductor warns of CPUs with few cores and of its own deprecations; neither is the user's to mend.
    warnings.filterwarnings("ignore", module=r"torch\._(inductor|dynamo).*")
    # Said by torch of its own source, at Inductor's first import.
    warnings.filterwarnings("ignore", message=r"`torch\.jit\.script_method` is deprecated", category=DeprecationWarning)
    _keep_probes()
    module.compile(dynamic=None if varies else False)


def _keep_probes() -> None:
    """Have Inductor's trial of the CPU's vectors, a process each, made once for each library of its cache."""
    from torch._inductor.cpu_vec_isa import VecISA

    probe = getattr(VecISA, "_probe_load", None)
    if probe is None or hasattr(probe, "__wrapped__"):  # of another version of torch, or here already
        return

    @functools.wraps(probe)
    def kept(isa: VecISA, output_path: str) -> bool:
        verdict = Path(f"{output_path}.loads")
        if verdict.exists():
            return True
        does_load: bool = probe(isa, output_path)
        if does_load:
            verdict.touch()
        return does_load

    VecISA._probe_load = kept  # type: ignore[method-assign, assignment]
