"""The index of Transformers' models, which its import makes twice from the text of some 2,000 files: made once and kept."""

import contextlib
import functools
import hashlib
import marshal
import os
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from kajiya.run.caches import cache_folder

_INDEXER = "transformers.utils.import_utils"
_INDEX = "create_import_structure_from_path"
"""Takes a folder, or a file in it, and returns what each module there exports: dictionaries, sets and strings."""


def keep_model_index() -> None:
    """Have Transformers imported, when it is, with the index that an earlier process made of the same files."""
    if _INDEXER not in sys.modules and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Replaces the function once its module is executed, and goes."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name == _INDEXER else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_replace(module: ModuleType) -> None:
            sys.meta_path.remove(self)
            execute(module)
            if hasattr(module, _INDEX):
                models = Path(str(module.__file__)).parents[1] / "models"
                setattr(module, _INDEX, kept_index(getattr(module, _INDEX), models))

        spec.loader.exec_module = execute_and_replace  # type: ignore[method-assign]
        return spec


def kept_index(make: Callable[[Any], Any], models: Path) -> Callable[[Any], Any]:
    """`make`, which for the folder of all models gives what is kept of it; for any other place it is as it was."""

    @functools.cache
    def of_all_models() -> Any:
        kept = cache_folder() / "model-index" / _digest(models)
        try:
            return marshal.loads(kept.read_bytes())
        except (OSError, EOFError, ValueError, TypeError):
            index = make(models)
        with contextlib.suppress(OSError):  # without a place to keep it, it is made each time
            kept.parent.mkdir(parents=True, exist_ok=True)
            beside = kept.with_name(f".{kept.name}.{os.getpid()}")
            beside.write_bytes(marshal.dumps(index))
            beside.replace(kept)
        return index

    def index(place: Any) -> Any:
        path = Path(place)
        return of_all_models() if (path.parent if path.is_file() else path) == models else make(place)

    return index


def _digest(folder: Path) -> str:
    """Of the Python that keeps it, and of each module below the folder: path, size and time of change."""
    seen = hashlib.sha256(f"{sys.version}\n".encode())
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name != "__pycache__")
        for name in sorted(name for name in names if name.endswith(".py")):
            state = os.stat(os.path.join(place, name))
            seen.update(f"{place}/{name} {state.st_size} {state.st_mtime_ns}\n".encode())
    return seen.hexdigest()
