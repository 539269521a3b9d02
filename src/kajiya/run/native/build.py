"""Builds C++ for this machine, once, and loads it."""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from importlib import resources
from pathlib import Path

from kajiya.errors import KajiyaError
from kajiya.run.caches import cache_folder

_SHARED = ("vectors.h",)
_COMPILERS = ("c++", "g++")
_FLAGS = (
    "-O3",
    "-march=native",
    "-std=c++17",
    "-fPIC",
    "-shared",
    "-fopenmp",
    "-fno-math-errno",
    "-Wno-psabi",
)


class NativeBuildError(KajiyaError):
    """The library cannot be built here; the message says what is missing."""


def build_library(name: str, package: str, sources: tuple[str, ...], main: str) -> ctypes.CDLL:
    """The library of `package`'s sources (resources of it), from the cache folder or built now (a few seconds).

    `main` is the one source that is compiled; it includes the others and the shared vector types. Raises `NativeBuildError`.
    """
    compiler = find_compiler()
    places = [(__package__, shared) for shared in _SHARED] + [(package, source) for source in sources]
    texts = {file: resources.files(place).joinpath(file).read_text(encoding="utf-8") for place, file in places}
    # Code for one processor crashes on another: in a home folder that machines share, each has its own.
    digest = hashlib.sha256("\0".join([*texts.values(), *_FLAGS, compiler or "", _processor()]).encode()).hexdigest()
    target = cache_folder() / f"{name}-{digest[:24]}.so"
    if not target.exists():
        if compiler is None:
            raise NativeBuildError(
                f"no C++ compiler was found (c++ or g++); install one for the fast {name} (Debian: apt install g++)"
            )
        try:
            _compile(compiler, texts, main, target)
        except OSError as error:
            raise NativeBuildError(f"{target.parent} cannot be written: {error.strerror or error}") from error
    try:
        return ctypes.CDLL(str(target))
    except OSError as error:
        raise NativeBuildError(f"{target} does not load: {error}") from error


def find_compiler() -> str | None:
    """Path of the C++ compiler that the libraries are built with; `None` where there is none."""
    return next((found for each in _COMPILERS if (found := shutil.which(each))), None)


def _compile(compiler: str, texts: dict[str, str], main: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        for name, text in texts.items():
            (Path(scratch) / name).write_text(text, encoding="utf-8")
        built = Path(scratch) / "built.so"
        done = subprocess.run([compiler, *_FLAGS, main, "-o", str(built)], cwd=scratch, capture_output=True, text=True)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
            raise NativeBuildError(f"{compiler} failed: {(lines or ['no message'])[0]}")
        # Whole or not at all, whoever else builds at the same time.
        os.replace(built, target)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()} {platform.node()}"
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))
