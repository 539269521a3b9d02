"""Builds the C++ decoder for this machine, once, and loads it."""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from importlib import resources
from pathlib import Path

from kajiya.errors import KajiyaError
from kajiya.serving.native import layout

SOURCES = ("vectors.h", "linear.h", "attention.h", "phases.h", "decoder.cpp")
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
    """The decoder cannot be built here; the message says what is missing."""


@functools.cache
def load_library() -> ctypes.CDLL:
    """The compiled decoder, from the cache folder or built now (a few seconds). Raises `NativeBuildError`."""
    compiler = next((found for name in _COMPILERS if (found := shutil.which(name))), None)
    texts = {name: resources.files(__package__).joinpath(name).read_text(encoding="utf-8") for name in SOURCES}
    # Code for one processor crashes on another: in a home folder that machines share, each has its own.
    digest = hashlib.sha256("\0".join([*texts.values(), *_FLAGS, compiler or "", _processor()]).encode()).hexdigest()
    target = _cache_folder() / f"decoder-{digest[:24]}.so"
    if not target.exists():
        if compiler is None:
            raise NativeBuildError(
                "no C++ compiler was found (c++ or g++); install one for the fast decoder (Debian: apt install g++)"
            )
        _compile(compiler, texts, target)
    try:
        library = ctypes.CDLL(str(target))
    except OSError as error:
        raise NativeBuildError(f"{target} does not load: {error}") from error
    layout.declare(library)
    return library


def _compile(compiler: str, texts: dict[str, str], target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        for name, text in texts.items():
            (Path(scratch) / name).write_text(text, encoding="utf-8")
        built = Path(scratch) / "decoder.so"
        done = subprocess.run(
            [compiler, *_FLAGS, "decoder.cpp", "-o", str(built)], cwd=scratch, capture_output=True, text=True
        )
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
            raise NativeBuildError(f"{compiler} failed: {(lines or ['no message'])[0]}")
        # Whole or not at all, whoever else builds at the same time.
        os.replace(built, target)


def _cache_folder() -> Path:
    home = Path.home() / ".cache" / "kajiya"
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError:
        return Path(tempfile.gettempdir()) / f"kajiya-{os.getuid()}"
    return home


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()} {platform.node()}"
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))
