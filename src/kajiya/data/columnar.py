"""Rows of columnar files: parquet, arrow, and data sets of the library `datasets`, from a folder or the hub."""

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kajiya.config.options import HubSource, TableSource
from kajiya.data.entries import Found, Row, Unreadable
from kajiya.data.sources import matching_files, not_opened
from kajiya.errors import ConfigError, DataError

if TYPE_CHECKING:
    import pyarrow as pa

_BATCH_ROWS = 1024


def parquet(options: TableSource) -> Iterator[Found]:
    """One row a row, named `file:row` from 0; memory holds one batch of rows."""
    import pyarrow.parquet as pq

    def batches(path: Path) -> "Iterator[pa.RecordBatch]":
        with pq.ParquetFile(path) as table:
            yield from table.iter_batches(batch_size=_BATCH_ROWS)

    yield from _files(options, batches, "parquet")


def arrow(options: TableSource) -> Iterator[Found]:
    """One row a row of Arrow IPC files (`.arrow`, `.feather`) in either form, file or stream."""
    import pyarrow as pa

    def batches(path: Path) -> "Iterator[pa.RecordBatch]":
        with pa.memory_map(str(path)) as source:
            is_file = source.read(6) == b"ARROW1"
            source.seek(0)
            with (pa.ipc.open_file if is_file else pa.ipc.open_stream)(source) as reader:
                held = (reader.get_batch(i) for i in range(reader.num_record_batches)) if is_file else reader
                for batch in held:
                    for start in range(0, len(batch), _BATCH_ROWS):
                        yield batch.slice(start, _BATCH_ROWS)

    yield from _files(options, batches, "arrow")


def _files(options: TableSource, batches: "Callable[[Path], Iterator[pa.RecordBatch]]", kind: str) -> Iterator[Found]:
    import pyarrow as pa

    for file, path in matching_files(options.files):
        number = 0
        try:
            with closing(batches(path)) as parts:  # type: ignore[type-var]
                for batch in parts:
                    for columns in _rows_of(batch):
                        name = f"{file}:{number}"
                        yield Row(name, columns)
                        number += 1
        except pa.ArrowInvalid as error:
            yield Unreadable(
                file if number == 0 else f"{file}:{number}", f"is no {kind} file ({error})", path.stat().st_size
            )
        except OSError as error:
            yield not_opened(file, path, error)


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
