"""What a library takes from heavy packages at its own import and seldom calls, functions and classes: loaded at the first call.

torch's compiler, `torch._dynamo`, is one of those packages: half a second for decorators that mean something to it alone.
"""

import functools
import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import ModuleType
from typing import Any

OF_TRANSFORMERS: Mapping[str, tuple[str, ...]] = {
    "scipy.optimize": ("linear_sum_assignment",),
    "torchao.prototype.safetensors.safetensors_support": ("flatten_tensor_state_dict",),
    "torch._dynamo._trace_wrapped_higher_order_op": ("TransformGetItemToIndex",),
}
"""By module, functions that Transformers imports with any model: for losses of object detection, to save torchao's tensors, and for
masks under `vmap`."""


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


@contextmanager
def compiler_deferred() -> Iterator[None]:
    """Within, what is decorated for torch's compiler is remembered for it, and the compiler itself is not imported.

    It learns of them when it is imported after all, before it compiles anything. In a process that has it, nothing changes.
    """
    if _DYNAMO in sys.modules:
        yield
        return
    marks = next((each for each in sys.meta_path if isinstance(each, _Marks)), None) or _Marks()
    marks.leave_optimizers()
    stand_in = _stand_in(_DYNAMO, ())
    vars(stand_in).update(disable=marks.disable, allow_in_graph=marks.allow_in_graph, assume_constant_result=_constant)
    sys.modules[_DYNAMO] = stand_in
    if marks not in sys.meta_path:
        sys.meta_path.insert(0, marks)
    try:
        yield
    finally:
        _withdraw(_DYNAMO, stand_in)


def uncompiled() -> AbstractContextManager[Any]:
    """Within, what was compiled runs as it is written; where the compiler has not been imported there is no such thing."""
    if _DYNAMO not in sys.modules:
        return nullcontext()
    import torch

    eager: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return eager


_DYNAMO = "torch._dynamo"
_KEPT_OUT = "__dynamo_disable"
"""Where torch keeps what the compiler has made of a function that it is to be kept out of."""


class _Marks(importlib.abc.MetaPathFinder):
    """What the compiler has to be told at its import, which this finds out by standing first among the finders."""

    def __init__(self) -> None:
        self._allowed: list[Callable[..., Any]] = []
        self._left: list[Callable[..., Any]] = []
        self._is_looking = False

    def allow_in_graph(self, function: Any) -> Any:
        self._allowed.append(function)
        return function

    def disable(self, function: Any = None, recursive: bool = True, **settings: Any) -> Any:
        """As the compiler's own, which is asked at the first call that it could see."""
        if function is None:
            return lambda later: self.disable(later, recursive, **settings)
        real: list[Callable[..., Any]] = []

        @functools.wraps(function)
        def inner(*arguments: Any, **named: Any) -> Any:
            if not real and _DYNAMO not in sys.modules:
                return function(*arguments, **named)
            if not real:
                real.append(importlib.import_module(_DYNAMO).disable(function, recursive, **settings))
            return real[0](*arguments, **named)

        return inner

    def leave_optimizers(self) -> None:
        """torch's optimizers bring the compiler in only to keep it from what they do at their beginning: no need without it."""
        from torch.optim import Optimizer

        begin = getattr(vars(Optimizer)["add_param_group"], "__wrapped__", None)
        if begin is not None and not hasattr(begin, _KEPT_OUT):
            setattr(begin, _KEPT_OUT, begin)
            self._left.append(begin)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != _DYNAMO or self._is_looking:
            return None
        self._is_looking = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._is_looking = False
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def tell(module: ModuleType) -> None:
            sys.meta_path.remove(self)
            for function in self._left:
                delattr(function, _KEPT_OUT)
            execute(module)
            for function in self._allowed:
                module.allow_in_graph(function)

        spec.loader.exec_module = tell  # type: ignore[method-assign]
        return spec


def _constant(function: Any) -> Any:
    function._dynamo_marked_constant = True
    return function


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
