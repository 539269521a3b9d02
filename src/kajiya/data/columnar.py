"""Rows of columnar files: parquet, arrow, and data sets of the library `datasets`, from a folder or the hub."""

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kajiya.config.options import HubSource, TableSource
from kajiya.data.entries import Found, Row, Unreadable
from kajiya.data.sources import matching_files, not_opened, require_distinct
from kajiya.data.values import RowError
from kajiya.errors import ConfigError, DataError

if TYPE_CHECKING:
    import pyarrow as pa

_BATCH_ROWS = 1024


@dataclass(frozen=True)
class _Part:
    """Rows of a file that can be read when others cannot: a row group, a record batch."""

    batches: "Callable[[], Iterator[pa.RecordBatch]]"
    n_bytes: int
    n_rows: int = 1
    """1 where it is known only by reading them."""


def parquet(options: TableSource) -> Iterator[Found]:
    """One row a row, named `file:row` from 0; memory holds one batch of rows."""
    import pyarrow.parquet as pq

    def parts(path: Path) -> Iterator[_Part]:
        with pq.ParquetFile(path) as table:
            require_distinct(table.schema_arrow.names)
            for number in range(table.num_row_groups):
                group = table.metadata.row_group(number)
                batches = partial(table.iter_batches, batch_size=_BATCH_ROWS, row_groups=[number])
                yield _Part(batches, group.total_byte_size, group.num_rows)

    yield from _files(options, parts, "parquet")


def arrow(options: TableSource) -> Iterator[Found]:
    """One row a row of Arrow IPC files (`.arrow`, `.feather`) in either form, file or stream."""
    import pyarrow as pa

    def sliced(batch: "pa.RecordBatch") -> "Iterator[pa.RecordBatch]":
        return (batch.slice(start, _BATCH_ROWS) for start in range(0, len(batch), _BATCH_ROWS))

    def parts(path: Path) -> Iterator[_Part]:
        with pa.memory_map(str(path)) as source:
            is_file = source.read(6) == b"ARROW1"
            source.seek(0)
            with (pa.ipc.open_file if is_file else pa.ipc.open_stream)(source) as reader:
                require_distinct(reader.schema.names)
                if is_file:
                    n_bytes = source.size() // max(1, reader.num_record_batches)
                    for number in range(reader.num_record_batches):
                        yield _Part(lambda number=number: sliced(reader.get_batch(number)), n_bytes)  # type: ignore[misc]
                    return
                # Where a batch of a stream ends is only known when it was read.
                at = 0
                for batch in reader:
                    yield _Part(partial(sliced, batch), source.tell() - at)
                    at = source.tell()

    yield from _files(options, parts, "arrow")


def _files(options: TableSource, parts: Callable[[Path], Iterator[_Part]], kind: str) -> Iterator[Found]:
    import pyarrow as pa

    for file, path in matching_files(options.files):
        number = n_bytes = 0
        try:
            with closing(parts(path)) as opened:  # type: ignore[type-var]
                for part in opened:
                    first = number
                    try:
                        for columns in (row for batch in part.batches() for row in _rows_of(batch)):
                            yield Row(f"{file}:{number}", columns)
                            number += 1
                    except (pa.ArrowException, OSError) as error:
                        for lost in _lost(part, number - first, _words(error)):
                            yield replace(lost, name=f"{file}:{number}")
                            number += 1
                    n_bytes += part.n_bytes
        except RowError as error:
            yield Unreadable(file, str(error), path.stat().st_size)
        except (pa.ArrowException, OSError) as error:
            if number:
                reason = f"cannot be read, and the rest of the file with it: {_words(error)}"
                yield Unreadable(f"{file}:{number}", reason, max(0, path.stat().st_size - n_bytes))
            elif isinstance(error, OSError):
                yield not_opened(file, path, error)
            else:
                yield Unreadable(file, f"is no {kind} file ({_words(error)})", path.stat().st_size)


def _lost(part: _Part, n_read: int, reason: str) -> Iterator[Unreadable]:
    """The rows of a part behind those that were read, and its bytes that are theirs."""
    n_lost = max(1, part.n_rows - n_read)
    n_bytes = part.n_bytes * n_lost // max(1, part.n_rows)
    count = f", {n_lost:,} rows" if part.n_rows > 1 else ""
    for number in range(n_lost):
        share = n_bytes // n_lost + (n_bytes % n_lost if number == 0 else 0)
        yield Unreadable("", f"cannot be read, and with it the rest of its part of the file{count}: {reason}", share)


def _words(error: Exception) -> str:
    return " ".join(str(error).split())


def _rows_of(batch: "pa.RecordBatch") -> Iterator[dict[str, Any]]:
    """The rows of a batch; a text that is not valid comes as its bytes, so that its row is refused alone."""
    try:
        yield from (without_nulls(row) for row in batch.to_pylist())
    except UnicodeDecodeError:
        raw = {name: _raw_values(batch.column(index)) for index, name in enumerate(batch.schema.names)}
        yield from (without_nulls({name: raw[name][i] for name in raw}) for i in range(len(batch)))


def _raw_values(column: Any) -> list[Any]:
    import pyarrow as pa

    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            return list(column.cast(pa.large_binary()).to_pylist())
        return [_raw_value(value) for value in column]


def _raw_value(value: Any) -> Any:
    """A nested value; bytes that are no value of its type where a text within it is not valid."""
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        return bytes(error.object)


def without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """The row without the nulls within its values: Arrow gives every struct all fields that any row has."""
    return {key: _pruned(value) for key, value in row.items()}


def _pruned(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _pruned(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_pruned(inner) for inner in value]
    return value


# ---------------------------------------------------------------- datasets


def hub(options: HubSource) -> Iterator[Found]:
    """One row a row of a Hugging Face data set: of the hub, of a folder of data files, or saved by `datasets.save_to_disk`.

    Classes are given by their names.
    """
    rows = _load_rows(options)
    names = _class_names(rows)
    for number, row in enumerate(_each(rows, options)):
        classes = {key: names[key][row[key]] for key in names if isinstance(row[key], int) and row[key] >= 0}
        yield Row(f"{options.split}:{number}", without_nulls(row) | classes)


def _each(rows: Any, options: HubSource) -> Iterator[Any]:
    """The rows one by one; what goes wrong on the way, be it the network, is said with the row at which it did."""
    waiting, number = iter(rows), 0
    while True:
        try:
            row = next(waiting)
        except StopIteration:
            return
        except Exception as error:  # the libraries behind a stream have no common one
            raise DataError(
                f"{options.path}: the data set could not be read on at row {options.split}:{number}: {_reason(error)}\n"
                "Run the same command again; with data.source.options.streaming=false the data set is "
                "copied to this machine first."
            ) from error
        yield row
        number += 1


def _reason(error: Exception) -> str:
    """What an error says, in one line; of a wrapped one what it was made from."""
    said = f"{error.__cause__}" if error.__cause__ is not None and str(error.__cause__).strip() else str(error)
    return said.strip().splitlines()[0] if said.strip() else type(error).__name__


def is_local(options: HubSource) -> bool:
    """Whether the data set is a folder on this machine."""
    return Path(options.path).expanduser().is_dir()


def _class_names(rows: Any) -> dict[str, list[str]]:
    import datasets

    features = rows.features or {}
    return {key: feature.names for key, feature in features.items() if isinstance(feature, datasets.ClassLabel)}


def _load_rows(options: HubSource) -> Any:
    import datasets

    if not options.path:
        raise ConfigError("data.source.options.path", "is not set", "Give a hub name or a folder.")
    if is_local(options):
        _refuse_hub_settings(options)
    folder = Path(options.path).expanduser()
    try:
        if _is_saved(folder):
            saved = datasets.load_from_disk(str(folder))
        else:
            return datasets.load_dataset(
                str(folder) if is_local(options) else options.path,
                name=options.subset,
                split=options.split,
                revision=options.revision,
                streaming=options.streaming,
            )
    except Exception as error:  # as above: besides its own, whatever reads the files and the network
        raise DataError(
            f"{options.path}: the data set could not be loaded: {_reason(error)}\n"
            "data.source.options.path is a hub name (which needs the network), or a folder of data files or one saved by "
            "`datasets.save_to_disk`; subset, split and revision must exist in it."
        ) from error
    if isinstance(saved, datasets.DatasetDict):
        _require_split(options, sorted(map(str, saved)))
        return saved[options.split]
    _require_split(options, [str(saved.split or "train")])
    return saved


def _is_saved(folder: Path) -> bool:
    """Whether `datasets.save_to_disk` wrote the folder."""
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _refuse_hub_settings(options: HubSource) -> None:
    """Raise `ConfigError` for a setting that means nothing of a folder."""
    settings: dict[str, str | bool | None] = {"revision": options.revision}
    if _is_saved(Path(options.path).expanduser()):
        settings |= {"subset": options.subset, "streaming": options.streaming or None}
    for name, value in settings.items():
        if value is not None:
            raise ConfigError(
                f"data.source.options.{name}",
                f"is {value}, and {options.path} is a folder of this machine, which has none",
                "Leave it out.",
            )


def _require_split(options: HubSource, splits: list[str]) -> None:
    if options.split not in splits:
        raise ConfigError(
            "data.source.options.split", f"{options.split!r} is not one of {', '.join(splits)} in {options.path}"
        )
