"""The code revision of a stage: a hash of the sources that it imports, so that a fixed bug unmakes its old results."""

import ast
import hashlib
import importlib.util
import re
from collections.abc import Iterable, Iterator
from functools import cache
from importlib import resources
from pathlib import Path

_PACKAGE = Path(str(resources.files("kajiya")))
_OUTSIDE = ("kajiya.config", "kajiya.run", "kajiya.errors")
"""Rooms that carry settings and files but compute nothing; a change there leaves results as they are."""
_COMPUTING = "kajiya.run.native"
"""Within them, what all C++ is written in."""


@cache
def code_revision(*modules: str) -> str:
    """Hash of the modules and of all that they import from this package, lazily or not, C++ beside them too; 16 hex digits.

    `modules` are dotted names, for example `kajiya.data.shards`.
    """
    seen: dict[str, bytes] = {}
    known: set[str] = set()
    folders: set[Path] = set()
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        if name in known:
            continue
        known.add(name)
        if name.startswith(_OUTSIDE) and not name.startswith(_COMPUTING):
            continue
        path = module_path(name)
        if path is None:
            continue
        source = path.read_bytes()
        seen[name] = source
        if path.parent not in folders:
            folders.add(path.parent)
            seen |= {str(each.relative_to(_PACKAGE)): each.read_bytes() for each in _native_sources(path.parent)}
        waiting.extend(imported_modules(source))
    if not seen:
        raise AssertionError(f"no source found for {modules}")
    hasher = hashlib.sha256()
    for name in sorted(seen):
        hasher.update(name.encode() + b"\0" + seen[name] + b"\0")
    return hasher.hexdigest()[:16]


def _native_sources(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.suffix in (".h", ".cpp")]


def own_code(names: Iterable[str]) -> dict[str, str]:
    """Hash of the sources behind each `my_pkg.mod:fn` among `names`; names without a colon are no code of the user's.

    It covers the module and what it imports from its own package or folder, so that an edited function is another one.
    """
    return {name: _hash_of_own(name.partition(":")[0]) for name in sorted(set(names)) if ":" in name}


def _hash_of_own(module: str) -> str:
    top = module.split(".")[0]
    root = _source_file(top)
    beside = None
    if root is not None and "site-packages" not in root.parts:
        beside = root.parent.parent if root.name == "__init__.py" else root.parent
    seen: dict[str, bytes] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in seen or not (name.split(".")[0] == top or "." not in name):
            continue
        path = _source_file(name)
        if path is None or not (name.split(".")[0] == top or path.parent == beside):
            continue
        seen[name] = path.read_bytes()
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        waiting.extend(_imports_of_own(seen[name], package))
    hasher = hashlib.sha256()
    for name in sorted(seen):
        hasher.update(name.encode() + b"\0" + seen[name] + b"\0")
    return hasher.hexdigest()[:16]


def _source_file(name: str) -> Path | None:
    """Source of a module that is found on the path, without running it (its packages are run)."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    return Path(spec.origin) if spec is not None and spec.origin and spec.origin.endswith(".py") else None


def _imports_of_own(source: bytes, package: str) -> Iterable[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def module_path(name: str) -> Path | None:
    """Source file of one of this package's modules, or `None` when the name is not one."""
    parts = name.split(".")
    if parts[0] != "kajiya":
        return None
    base = _PACKAGE.joinpath(*parts[1:])
    if base.with_suffix(".py").is_file() and len(parts) > 1:
        return base.with_suffix(".py")
    return base / "__init__.py" if (base / "__init__.py").is_file() else None


@cache
def imported_modules(source: bytes) -> tuple[str, ...]:
    """Modules of this package that the source imports anywhere, also inside functions.

    Read off the lines, thirty times as fast as a parsed source says it; of this package, formatted as it is, the two agree.
    """
    return tuple(_imports(source))


_IMPORT = re.compile(
    rb"^[ \t]*(?:from[ \t]+(kajiya[\w.]*)[ \t]+import[ \t]+(?:\(([^)]*)\)|([^\n]*))|import[ \t]+(kajiya[^\n]*))", re.M
)
_COMMENT = re.compile(rb"#[^\n]*")


def _imports(source: bytes) -> Iterator[str]:
    for module, several, some, whole in _IMPORT.findall(source):
        names = [
            part.split()[0].decode() for part in _COMMENT.sub(b"", several or some or whole).split(b",") if part.strip()
        ]
        if whole:
            yield from names
        else:
            yield module.decode()
            yield from (f"{module.decode()}.{name}" for name in names)
