"""A source opened: how to read it, what identifies its content, and what a manifest says of it."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kajiya.config.digest import digest, to_plain
from kajiya.config.options import HubSource, StdlibPairsSource, StdlibSource, TableSource, TextSource
from kajiya.config.schema import SourceConfig
from kajiya.config.tables import resolve
from kajiya.data.entries import Document, Entry, Unreadable, row_entry
from kajiya.data.sources import SourceFile, is_local, matching_files, stdlib_files
from kajiya.errors import DataError
from kajiya.run.files import hash_file, list_files

_PLACES = frozenset({"root", "files", "path"})
"""Options that say where the content is and not what it is; the content's own digest stands for them in a key."""


@dataclass(frozen=True)
class Origin:
    """A source, ready to be read any number of times."""

    read: Callable[[], Iterator[Entry]]
    """Yields its entries from the first one."""
    fingerprint: Callable[[], str]
    """Digest of its content as it is now: names and bytes."""
    settings: dict[str, Any]
    """What the key of an artifact made from it holds, beside the fingerprint."""
    facts: dict[str, Any]
    """Name, options, and the commit that a hub name stood for."""
    is_own: bool = False
    """A function of the user's own: its fingerprint is `EntriesDigest` over all that it yields."""


def open_source(config: SourceConfig) -> Origin:
    """Check the source's options and find what identifies its content. Raises `ConfigError`, `DataError`."""
    function, options = resolve("source", config.name, config.options, "data.source")
    if isinstance(options, dict):
        own = options

        def read() -> Iterator[Entry]:
            return from_function(function, own)

        def fingerprint() -> str:
            hasher = EntriesDigest()
            for _ in hasher.follow(read()):
                pass
            return hasher.hexdigest()

        return Origin(read, fingerprint, to_plain(config), to_plain(config), is_own=True)
    if isinstance(options, HubSource) and options.path and not is_local(options):
        options = replace(options, revision=resolve_commit(options.path, options.revision, "dataset"))
    kept = {key: value for key, value in to_plain(options).items() if key not in _PLACES}
    return Origin(
        read=lambda: function(options),
        fingerprint=lambda: _fingerprint(options),
        settings={"name": config.name, "options": kept},
        facts={"name": config.name, "options": to_plain(options)},
    )


def _fingerprint(options: StdlibSource | StdlibPairsSource | TextSource | TableSource | HubSource) -> str:
    if isinstance(options, (StdlibSource, StdlibPairsSource)):
        return files_digest(stdlib_files(StdlibSource(options.root)))
    if isinstance(options, (TextSource, TableSource)):
        return files_digest(matching_files(options.files))
    if not is_local(options):
        # A commit is immutable: its name is as good as a hash of what it holds.
        return digest({"path": options.path, "commit": options.revision})
    root = Path(options.path).expanduser()
    return files_digest([(path.relative_to(root).as_posix(), path) for path in list_files(root)])


def files_digest(files: Iterable[SourceFile]) -> str:
    """Hash of the files' names and bytes; a file that cannot be read counts as such."""
    hasher = hashlib.sha256()
    for name, path in files:
        try:
            content = hash_file(path)
        except OSError:
            content = "unreadable"
        hasher.update(f"{name}\0{content}\0".encode())
    return hasher.hexdigest()


def from_function(function: Callable[..., Any], options: Mapping[str, Any]) -> Iterator[Entry]:
    """What the user's own function yields: documents, strings, or dicts with `text` and perhaps `name`."""
    where = f"{function.__module__}:{function.__qualname__}"
    found = function(**options)
    if not isinstance(found, Iterable) or isinstance(found, (str, bytes, Mapping)):
        raise DataError(
            f"{where} returned {type(found).__name__}.\nA source yields documents: strings, dicts with 'text' and "
            "perhaps 'name', or kajiya.data.entries.Document."
        )
    for number, item in enumerate(found):
        name = f"{number:08d}"
        if isinstance(item, (Document, Unreadable)):
            yield row_entry(item.name, item.text, "text") if isinstance(item, Document) else item
        elif isinstance(item, Mapping) and "text" in item:
            yield row_entry(str(item["name"]) if "name" in item else name, item["text"], "text")
        elif isinstance(item, str):
            yield row_entry(name, item, "text")
        else:
            has = f" with {', '.join(map(str, item))}" if isinstance(item, Mapping) else ""
            yield Unreadable(name, f"{where} yielded {type(item).__name__}{has}, not text")


class EntriesDigest:
    """Hash of entries' names and texts, in order, taken as they pass."""

    def __init__(self) -> None:
        self._hasher = hashlib.sha256()

    def follow(self, entries: Iterable[Entry]) -> Iterator[Entry]:
        """The same entries, each hashed."""
        for entry in entries:
            is_text = isinstance(entry, Document)
            group = f"{entry.group}\0" if isinstance(entry, Document) and entry.group is not None else ""
            content = (entry.text if isinstance(entry, Document) else entry.reason).encode(errors="backslashreplace")
            head = f"{entry.name}\0{group}{is_text}\0{len(content)}\0"
            self._hasher.update(head.encode(errors="backslashreplace") + content)
            yield entry

    def hexdigest(self) -> str:
        """SHA-256 of what has passed, 64 hex digits."""
        return self._hasher.hexdigest()


def resolve_commit(path: str, revision: str | None, kind: str) -> str:
    """The commit that a hub name and revision stand for now; `kind` is `dataset` or `model`."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        found = HfApi().repo_info(path, revision=revision, repo_type=kind).sha
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"{path}: is no folder here, and the hub has no such {kind} or cannot be reached: {reason}\n"
            "Give an existing folder, or check the name, the revision and the network."
        ) from error
    if found is None:
        raise DataError(f"{path}: the hub names no commit for revision {revision or 'main'!r}")
    return found
