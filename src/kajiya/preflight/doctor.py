"""What this machine and this installation can do, what is missing, and the command that mends it."""

import importlib.metadata
import os
import platform
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kajiya.config.quantities import format_bytes
from kajiya.evals.confine import why_unconfined
from kajiya.preflight.installation import (
    PROJECT,
    declared_extras,
    distribution_of,
    install_command,
    pip_command,
    requirements_of,
)
from kajiya.run.native.build import find_compiler
from kajiya.run.provenance import machine_facts, package_version, usable_cores

_LITTLE_MEMORY = 4 * 2**30
_LITTLE_DISK = 5 * 2**30
_CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "amx_int8")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    state: str
    """ok; warn: it works, worse than it could; missing: what needs it does not work."""
    value: str
    remedy: str = ""
    """The command or the step that mends it; empty where nothing needs mending."""


def diagnose(store_root: Path) -> list[Finding]:
    """Look at interpreter, packages, processor, memory, disk, compiler, GPUs and extras.

    Of the heavy packages only torch is imported; other versions come from their metadata.
    """
    findings = [_interpreter(), _installation()]
    torch, problem = _load_torch()
    findings.append(_torch_build(torch, problem))
    findings += [_processor(torch), _cores(torch), _memory(), _disk(store_root), _compiler(), _operators(), _programs()]
    if torch is not None:
        findings += [_precision(torch), *_gpus(torch)]
    findings += _torchvision(torch)
    return findings + [_extra(name) for name in declared_extras()]


# ---------------------------------------------------------------- software


def _interpreter() -> Finding:
    from packaging.specifiers import SpecifierSet

    value = f"{platform.python_implementation()} {platform.python_version()} at {sys.executable}"
    asked = importlib.metadata.metadata(PROJECT)["Requires-Python"]
    if SpecifierSet(asked).contains(platform.python_version(), prereleases=True):
        return Finding("python", "ok", value)
    return Finding(
        "python", "missing", f"{value}, and {asked} is needed", f"Make a new environment with Python {asked}."
    )


def _installation() -> Finding:
    """The package itself and the requirements that it always has."""
    absent = [text for text, is_met in requirements_of("").items() if not is_met]
    value = f"{package_version(PROJECT)} at {Path(__file__).parents[1]}"
    if not absent:
        return Finding(PROJECT, "ok", value)
    return Finding(PROJECT, "missing", f"{value}; without {', '.join(absent)}", install_command(""))


def _extra(name: str) -> Finding:
    needed = requirements_of(name)
    absent = [text for text, is_met in needed.items() if not is_met]
    title = f"extra {name}"
    if not absent:
        versions = (f"{distribution_of(text)} {package_version(distribution_of(text))}" for text in needed)
        return Finding(title, "ok", ", ".join(versions))
    return Finding(title, "missing", f"without {', '.join(absent)}", install_command(name))


def _load_torch() -> tuple[Any, str | None]:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a library that it links to is not there
        return None, f"{type(error).__name__}: {error}"
    return torch, None


def _torch_build(torch: Any, problem: str | None) -> Finding:
    if torch is None:
        return Finding("torch", "missing", f"does not load ({problem})", pip_command("install --force-reinstall torch"))
    builds = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip}
    build = next((f"{name} {version}" for name, version in builds.items() if version), "CPU")
    return Finding("torch", "ok", f"{torch.__version__}, {build} build")


def _torchvision(torch: Any) -> list[Finding]:
    """A torchvision made for another torch fails at import, and its presence alone breaks Transformers and others."""
    try:
        found = importlib.metadata.distribution("torchvision")
    except importlib.metadata.PackageNotFoundError:
        return []
    if torch is None:
        return [
            Finding("torchvision", "warn", f"{found.version}, not checked: torch does not load", "Mend torch first.")
        ]
    is_cpu = torch.version.cuda is None and torch.version.hip is None
    links_cuda = any(
        path.name.startswith("_C.") and b"libtorch_cuda" in Path(str(path.locate())).read_bytes()
        for path in found.files or ()
        if Path(str(path.locate())).is_file()
    )
    if is_cpu and links_cuda:
        return [
            Finding(
                "torchvision",
                "warn",
                f"{found.version} is a CUDA build beside a CPU torch: it fails at import, and Transformers with it",
                pip_command("uninstall torchvision") + "   (or install its CPU build of the same version)",
            )
        ]
    wanted = [text for text in found.requires or () if text.replace(" ", "").startswith("torch==")]
    from packaging.requirements import Requirement

    for text in wanted:
        if not Requirement(text).specifier.contains(torch.__version__.split("+")[0], prereleases=True):
            value = f"{found.version} was built for {text}, and torch is {torch.__version__}"
            return [Finding("torchvision", "warn", value, pip_command("uninstall torchvision"))]
    return [Finding("torchvision", "ok", found.version)]


# ---------------------------------------------------------------- hardware


def _processor(torch: Any) -> Finding:
    flags = _cpu_flags(Path("/proc/cpuinfo"))
    present = [name for name in _CPU_FEATURES if name in flags]
    value = f"{machine_facts()['processor']}: {', '.join(present) or 'no vector extension that matters here is listed'}"
    if torch is not None:
        value += f"; torch uses {torch.backends.cpu.get_cpu_capability()}"
    return Finding("processor", "ok", value)


def _cpu_flags(cpuinfo: Path) -> set[str]:
    """Feature flags of the first processor, as Linux lists them; empty elsewhere."""
    if not cpuinfo.is_file():
        return set()
    for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
        name, _, words = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return set(words.split())
    return set()


def _precision(torch: Any) -> Finding:
    from kajiya.training.precision import resolve_device, resolve_precision

    device = resolve_device("auto", "train.device")
    chosen = resolve_precision("auto", device)
    return Finding("precision", "ok", f"auto picks {chosen.name} on {device}: {chosen.reason}")


def _cores(torch: Any) -> Finding:
    usable, present = usable_cores(), os.cpu_count() or 1
    value = f"{usable} usable of {present}"
    if torch is not None:
        value += f", torch uses {torch.get_num_threads()} threads"
    quota = _cgroup_cores(Path("/sys/fs/cgroup/cpu.max"))
    if quota is not None and quota < usable:
        value += f"; this container may use {quota:g} cores' time"
        return Finding(
            "cores", "warn", value, "Give the container more processor time, or expect its share of the speed."
        )
    return Finding("cores", "ok", value)


def _cgroup_cores(path: Path) -> float | None:
    """Cores' worth of time that the container may use, or `None` where nothing limits it."""
    if not path.is_file():
        return None
    quota, period = path.read_text().split()
    return None if quota == "max" else int(quota) / int(period)


def _memory() -> Finding:
    total = machine_facts()["memory_bytes"]
    limit = _cgroup_memory(Path("/sys/fs/cgroup/memory.max"))
    is_limited = limit is not None and limit < total
    usable = limit if limit is not None and is_limited else total
    value = format_bytes(usable) + (" (limit of this container)" if is_limited else "")
    available = _available_memory(Path("/proc/meminfo"))
    if available is not None:
        usable = min(usable, available)
        value += f", {format_bytes(available)} available"
    if usable < _LITTLE_MEMORY:
        return Finding("memory", "warn", value, "Close other programs, or lower model.n_params and train.micro_batch.")
    return Finding("memory", "ok", value)


def _cgroup_memory(path: Path) -> int | None:
    text = path.read_text().strip() if path.is_file() else "max"
    return None if text == "max" else int(text)


def _available_memory(meminfo: Path) -> int | None:
    """Bytes that new programs can have, as Linux estimates them; `None` elsewhere."""
    if not meminfo.is_file():
        return None
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _disk(store_root: Path) -> Finding:
    place = next(folder for folder in (store_root, *store_root.parents) if folder.is_dir())
    free = shutil.disk_usage(place).free
    value = f"{format_bytes(free)} free at {place}"
    if not os.access(place, os.W_OK):
        return Finding("disk", "missing", f"{place} cannot be written to", "Put the store elsewhere with --store.")
    if free < _LITTLE_DISK:
        return Finding(
            "disk", "warn", value, "Free some space (kajiya store gc), or put the store elsewhere with --store."
        )
    return Finding("disk", "ok", value)


def _compiler() -> Finding:
    """The C++ compiler that `torch.compile` needs on a CPU, looked for as Inductor does, whose import takes seconds."""
    name = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    path = shutil.which(name)
    if path is not None:
        return Finding("compiler", "ok", path)
    return Finding("compiler", "warn", f"no {name}: training runs without torch.compile", _compiler_remedy())


def _operators() -> Finding:
    """The C++ compiler that the operators of training and serving are built with, looked for as their builder does."""
    path = find_compiler()
    if path is not None:
        return Finding("operators", "ok", f"built by {path}")
    value = "no c++ or g++: on a processor training and serving run on torch's own operators, which are slower"
    return Finding("operators", "warn", value, _compiler_remedy())


def _programs() -> Finding:
    """Whether programs that a model wrote, which pass@k and the reward `unit_test` run, can be kept to a folder of their own."""
    why = why_unconfined()
    if why is None:
        return Finding("programs", "ok", "what a model wrote changes files in a folder of its own alone")
    return Finding("programs", "warn", f"what a model wrote can change your files: {why}", "Run it within a container.")


def _compiler_remedy() -> str:
    return "xcode-select --install" if sys.platform == "darwin" else "apt install g++   (or your system's C++ compiler)"


def _gpus(torch: Any) -> list[Finding]:
    if torch.cuda.is_available():
        return [_gpu(torch, index) for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        return [Finding("gpu", "ok", "Apple GPU (mps)")]
    if Path("/proc/driver/nvidia/version").is_file():
        if torch.version.cuda is None:
            value = "an NVIDIA driver is here, but this torch is a CPU build"
            return [
                Finding(
                    "gpu", "warn", value, "Install the CUDA build of torch: https://pytorch.org/get-started/locally"
                )
            ]
        value = f"an NVIDIA driver is here, but CUDA {torch.version.cuda} finds no device"
        return [Finding("gpu", "warn", value, "nvidia-smi says more; a newer driver, or access to /dev/nvidia*")]
    return [Finding("gpu", "ok", "none: training and serving run on the processor")]


def _gpu(torch: Any, index: int) -> Finding:
    facts = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    bf16 = "bf16" if facts.major >= 8 else "no bf16"
    value = f"{facts.name}, {format_bytes(total)} ({format_bytes(free)} free), sm_{facts.major}{facts.minor}, {bf16}"
    return Finding(f"gpu {index}", "ok", value)
