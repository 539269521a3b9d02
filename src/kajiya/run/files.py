"""Files that are whole or absent: checked against their hashes, written beside, synced, renamed."""

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kajiya.errors import StoreError
from kajiya.run.hashing import hash_file, remembered_hash


def list_files(folder: Path) -> list[Path]:
    """Every regular file below `folder`, sorted by relative path."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def hash_folder(folder: Path, leave_out: tuple[str, ...] = ("manifest.json",)) -> dict[str, dict[str, Any]]:
    """`{relative path: {bytes, sha256}}` of every file below `folder`."""
    names = {path: path.relative_to(folder).as_posix() for path in list_files(folder)}
    return {
        name: {"bytes": path.stat().st_size, "sha256": hash_file(path)}
        for path, name in names.items()
        if name not in leave_out
    }


def check_files(folder: Path, files: dict[str, dict[str, Any]], reads_all: bool = False) -> None:
    """Raise `StoreError` for the first file that is missing, of another size or of other content than listed.

    Large files that did not change since they were last hashed are not read again, unless `reads_all`.
    """
    hash_of = hash_file if reads_all else remembered_hash
    for name, listed in files.items():
        path = folder / name
        if not path.is_file():
            raise StoreError(f"{path}: listed in the manifest, but missing")
        if path.stat().st_size != listed["bytes"]:
            raise StoreError(f"{path}: {path.stat().st_size} bytes, but the manifest says {listed['bytes']}")
        if hash_of(path) != listed["sha256"]:
            raise StoreError(f"{path}: its content is not what the manifest's hash says; the file is corrupt")


def sync_folder(folder: Path) -> None:
    """fsync every file and folder below `folder`, and itself."""
    for path in [*list_files(folder), *(p for p in folder.rglob("*") if p.is_dir()), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that `path` holds either the old content or the new, never a part."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("w", encoding="utf-8") as handle:
            json.dump(content, handle, indent=1, ensure_ascii=False, allow_nan=False)
            handle.flush()
            os.fsync(handle.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def read_json(path: Path) -> Any:
    """JSON of a file; `StoreError` names it when it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise StoreError(f"{path}: no such file") from error
    except ValueError as error:
        raise StoreError(f"{path}: broken JSON ({error})") from error


@contextmanager
def new_folder(final: Path, keep: Path | None = None) -> Iterator[Path]:
    """A folder written beside `final` and renamed to it when the block ends well; removed when it does not.

    When the file `keep` has appeared meanwhile, another process was faster, and its folder stays.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    beside = final.with_name(f".{final.name}.{os.getpid()}")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        yield beside
        if keep is not None and keep.is_file():
            shutil.rmtree(beside)
            return
        sync_folder(beside)
        aside = final.with_name(f".{final.name}.{os.getpid()}.old")
        if final.exists():
            final.rename(aside)
        beside.rename(final)
        sync_folder_entry(final.parent)
        shutil.rmtree(aside, ignore_errors=True)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def is_full_disk(error: OSError) -> bool:
    """Whether the system has no room for what was to be written: the disk is full, or a quota used up."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def system_errors() -> Iterator[None]:
    """Raise as an `OSError` what a writer wraps into an exception of its own, as safetensors does (`… (os error 28)`)."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        found = re.search(r"\(os error (\d+)\)\s*$", str(error))
        if found is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1]))) from error


@contextmanager
def full_disk_said(folder: Path, purpose: str) -> Iterator[None]:
    """Turn the system's refusal to write more (a full disk, a used-up quota) into a `StoreError` that says so."""
    try:
        with system_errors():
            yield
    except OSError as error:
        if not is_full_disk(error):
            raise
        free = shutil.disk_usage(folder).free
        raise StoreError(
            f"{purpose}: the disk of {folder.parent} is full ({error.strerror}; {free / 2**20:.0f} MiB free). What was "
            "half-written is removed, everything finished is kept.\nFree some space and run the same command again, or "
            "put the store elsewhere with --store."
        ) from error


def sync_folder_entry(folder: Path) -> None:
    """fsync a folder's own list of names, so that a rename in it outlives a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def require_space(folder: Path, needed: int, purpose: str) -> None:
    """Raise `StoreError` when the disk that holds `folder` has less than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise StoreError(
            f"{purpose} needs {needed / 2**20:.0f} MiB on the disk of {folder}, which has {free / 2**20:.0f} MiB free.\n"
            "Free some space, or put the store elsewhere with --store."
        )
