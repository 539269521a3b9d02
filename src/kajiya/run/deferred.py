"""Functions that a library takes from heavy packages at its own import and seldom calls: they are loaded at their first call."""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

OF_TRANSFORMERS: Mapping[str, tuple[str, ...]] = {
    "scipy.optimize": ("linear_sum_assignment",),
    "torchao.prototype.safetensors.safetensors_support": ("flatten_tensor_state_dict",),
}
"""By module, functions that Transformers imports with any model: for losses of object detection, and to save torchao's tensors."""


@contextmanager
def deferred(functions: Mapping[str, tuple[str, ...]]) -> Iterator[None]:
    """Within, imports of these functions get ones that import the real one when they are called.

    Any other name of these modules brings in the real module at once, and behind the block every import does. A module that
    is in the process already, or of a package that is not installed, is left alone.
    """
    standing = {
        name: _stand_in(name, wanted)
        for name, wanted in functions.items()
        if name not in sys.modules and importlib.util.find_spec(name.partition(".")[0]) is not None
    }
    sys.modules.update(standing)
    try:
        yield
    finally:
        for name, module in standing.items():
            _withdraw(name, module)


def _stand_in(name: str, functions: tuple[str, ...]) -> ModuleType:
    module = ModuleType(name)

    def real(attribute: str) -> Any:
        if attribute.startswith("__"):  # asked for by the import itself
            raise AttributeError(attribute)
        _withdraw(name, module)
        return getattr(importlib.import_module(name), attribute)

    vars(module).update({each: _later(name, each) for each in functions}, __getattr__=real)
    return module


def _later(module: str, name: str) -> Callable[..., Any]:
    def function(*arguments: Any, **named: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*arguments, **named)

    function.__name__ = function.__qualname__ = name
    function.__module__ = module
    return function


def _withdraw(name: str, stand_in: ModuleType) -> None:
    if sys.modules.get(name) is stand_in:
        del sys.modules[name]
