"""A source opened: how to read it, what identifies its content, and what a manifest says of it."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kajiya.config.digest import digest, to_plain
from kajiya.config.options import (
    HubSource,
    LinesSource,
    MixtureSource,
    StdlibBracketsSource,
    StdlibPairsSource,
    StdlibSource,
    TableSource,
    TextSource,
)
from kajiya.config.schema import SourceConfig
from kajiya.config.tables import resolve
from kajiya.data.columnar import is_local
from kajiya.data.entries import Document, Entry, Found, Row, Unreadable
from kajiya.data.sources import SourceFile, matching_files, stdlib_files
from kajiya.data.values import RowError, text_of
from kajiya.errors import DataError
from kajiya.run.files import list_files
from kajiya.run.hashing import remembered_hash

_PLACES = frozenset({"root", "files", "path"})
"""Options that say where the content is and not what it is; the content's own digest stands for them in a key."""


@dataclass(frozen=True)
class Source:
    """A source, ready to be read any number of times."""

    read: Callable[[], Iterator[Found]]
    """Yields what it finds from the first row on."""
    fingerprint: Callable[[], str]
    """Digest of its content as it is now: names and bytes; of a function of the user's own, of what it last yielded."""
    settings: dict[str, Any]
    """What the key of an artifact made from it holds, beside the fingerprint."""
    facts: dict[str, Any]
    """Name, options, and the commit that a hub name stood for."""


@dataclass(frozen=True)
class Origin:
    """The rows of a source as documents, ready to be read any number of times."""

    read: Callable[[], Iterator[Entry]]
    """Yields its entries from the first one."""
    fingerprint: Callable[[], str]
    """As a `Source`'s."""
    settings: dict[str, Any]
    """As a `Source`'s, and how its rows are read."""
    facts: dict[str, Any]
    """As a `Source`'s."""
    form: dict[str, Any]
    """`format`: the kind of the rows; `columns`: our name of each column that makes it → the source's; none of texts."""
    unread: tuple[str, ...] = ()
    """Columns that the first rows have and that are not read."""


def open_source(config: SourceConfig, field: str = "data.source") -> Source | MixtureSource:
    """Check the source's options and find what identifies its content; a mixture's parts are opened by `open_rows`.

    Raises `ConfigError` naming `field`, and `DataError`.
    """
    function, options = resolve("source", config.name, config.options, field)
    if isinstance(options, MixtureSource):
        return options
    if isinstance(options, dict):
        own = options

        followed = _Followed(lambda: from_function(function, own))
        return Source(followed.read, followed.fingerprint, to_plain(config), to_plain(config))
    if isinstance(options, HubSource) and options.path and not is_local(options):
        options = replace(options, revision=resolve_commit(options.path, options.revision, "dataset"))
    kept = {key: value for key, value in to_plain(options).items() if key not in _PLACES}
    return Source(
        read=lambda: function(options),
        fingerprint=lambda: _fingerprint(options),
        settings={"name": config.name, "options": kept},
        facts={"name": config.name, "options": to_plain(options)},
    )


class _Followed:
    """What a function yields, hashed in passing, so that it is not called once more for its digest."""

    def __init__(self, call: Callable[[], Iterator[Found]]) -> None:
        self._call = call
        self._digest: str | None = None

    def read(self) -> Iterator[Found]:
        hasher = hashlib.sha256()
        for found in self._call():
            content = json.dumps([type(found).__name__, to_plain(found)], sort_keys=True, default=repr)
            hasher.update(content.encode() + b"\n")
            yield found
        self._digest = hasher.hexdigest()

    def fingerprint(self) -> str:
        if self._digest is None:
            for _ in self.read():
                pass
        assert self._digest is not None
        return self._digest


_StdlibOptions = StdlibSource | StdlibPairsSource | StdlibBracketsSource
_FileOptions = _StdlibOptions | TextSource | LinesSource | TableSource | HubSource


def _fingerprint(options: _FileOptions) -> str:
    if isinstance(options, (StdlibSource, StdlibPairsSource, StdlibBracketsSource)):
        return files_digest(stdlib_files(StdlibSource(options.root)))
    if isinstance(options, (TextSource, LinesSource, TableSource)):
        return files_digest(matching_files(options.files))
    if not is_local(options):
        # A commit is immutable: its name is as good as a hash of what it holds.
        return digest({"path": options.path, "commit": options.revision})
    root = Path(options.path).expanduser()
    return files_digest([(path.relative_to(root).as_posix(), path) for path in list_files(root)])


def files_digest(files: Iterable[SourceFile]) -> str:
    """Hash of the files' names and bytes; a file that cannot be read counts as such (a large one is read once)."""
    hasher = hashlib.sha256()
    for name, path in files:
        try:
            content = remembered_hash(path)
        except OSError:
            content = "unreadable"
        hasher.update(f"{name}\0{content}\0".encode())
    return hasher.hexdigest()


def from_function(function: Callable[..., Any], options: Mapping[str, Any]) -> Iterator[Found]:
    """What the user's own function yields: texts, or rows as dicts of columns, one of which may be `name`."""
    where = f"{function.__module__}:{function.__qualname__}"
    found = function(**options)
    if not isinstance(found, Iterable) or isinstance(found, (str, bytes, Mapping)):
        raise DataError(
            f"{where} returned {type(found).__name__}.\nA source yields rows: strings, dicts of columns (such as 'text') "
            "and perhaps 'name', or kajiya.data.entries.Document."
        )
    for number, item in enumerate(found):
        name = f"{number:08d}"
        if isinstance(item, (Row, Unreadable)):
            yield item
        elif isinstance(item, Mapping):
            columns = {str(key): value for key, value in item.items() if key != "name"}
            yield Row(str(item["name"]) if "name" in item else name, columns)
        elif isinstance(item, (str, Document)):
            given = item if isinstance(item, Document) else Document(name, item, 0)
            try:
                text = text_of(given.text, "text", is_empty_allowed=True)
            except RowError as error:
                yield Unreadable(given.name, str(error))
            else:
                yield replace(given, text=text, n_bytes=len(text.encode()))
        else:
            yield Unreadable(name, f"{where} yielded {type(item).__name__}, no row")


def resolve_commit(path: str, revision: str | None, kind: str) -> str:
    """The commit that a hub name and revision stand for now; `kind` is `dataset` or `model`.

    Without a network it is the one that the hub's cache on this machine has. Raises `DataError` where there is none.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        found = HfApi().repo_info(path, revision=revision, repo_type=kind).sha
    except (
        Exception
    ) as error:  # of the network come those of the hub's client, which is another from version to version
        is_answer = isinstance(error, (HfHubHTTPError, HFValidationError))
        cached = None if is_answer else _cached_commit(path, revision, kind)
        if cached is not None:
            return cached
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"{path}: is no folder here, and the hub has no such {kind} or cannot be reached: {reason}\n"
            "Give an existing folder, or check the name, the revision and the network."
        ) from error
    if found is None:
        raise DataError(f"{path}: the hub names no commit for revision {revision or 'main'!r}")
    return found


def _cached_commit(path: str, revision: str | None, kind: str) -> str | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, revision=revision, repo_type=kind, local_files_only=True)).name
    except LocalEntryNotFoundError:
        return None
