"""Builds the C++ decoder for this machine, once, and loads it."""

import ctypes
import functools

from kajiya.run.native.build import build_library
from kajiya.serving.native import layout

SOURCES = ("linear.h", "activations.h", "attention.h", "patches.h", "phases.h", "pointwise.h", "decoder.cpp")


@functools.cache
def load_library() -> ctypes.CDLL:
    """The compiled decoder, from the cache folder or built now (a few seconds). Raises `NativeBuildError`."""
    library = build_library("decoder", "kajiya.serving.native", SOURCES, "decoder.cpp")
    layout.declare(library)
    return library
