"""The code revision of a stage: a hash of the sources that it imports, so that a fixed bug unmakes its old results."""

import ast
import hashlib
from collections.abc import Iterable
from functools import cache
from importlib import resources
from pathlib import Path

_PACKAGE = Path(str(resources.files("kajiya")))
_OUTSIDE = ("kajiya.config", "kajiya.run", "kajiya.errors")
"""Rooms that carry settings and files but compute nothing; a change there leaves results as they are."""


@cache
def code_revision(*modules: str) -> str:
    """Hash of the modules and of all that they import from this package, lazily or not; 16 hex digits.

    `modules` are dotted names, for example `kajiya.data.shards`.
    """
    seen: dict[str, bytes] = {}
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        if name in seen or name.startswith(_OUTSIDE):
            continue
        path = module_path(name)
        if path is None:
            continue
        source = path.read_bytes()
        seen[name] = source
        waiting.extend(imported_modules(source))
    if not seen:
        raise AssertionError(f"no source found for {modules}")
    hasher = hashlib.sha256()
    for name in sorted(seen):
        hasher.update(name.encode() + b"\0" + seen[name] + b"\0")
    return hasher.hexdigest()[:16]


def module_path(name: str) -> Path | None:
    """Source file of one of this package's modules, or `None` when the name is not one."""
    parts = name.split(".")
    if parts[0] != "kajiya":
        return None
    base = _PACKAGE.joinpath(*parts[1:])
    if base.with_suffix(".py").is_file() and len(parts) > 1:
        return base.with_suffix(".py")
    return base / "__init__.py" if (base / "__init__.py").is_file() else None


def imported_modules(source: bytes) -> Iterable[str]:
    """Modules of this package that the source imports anywhere, also inside functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("kajiya"))
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("kajiya"):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
