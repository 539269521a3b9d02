"""Sources: what they yield, byte for byte, and what they say of bad input."""

import errno
import gzip
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kajiya.config.options import HubSource, LinesSource, StdlibSource, TableSource, TextSource
from kajiya.config.schema import DataConfig, SourceConfig
from kajiya.data.columnar import hub
from kajiya.data.entries import Document, Entry, Found, Row, Unreadable
from kajiya.data.origin import Origin, Source, from_function, open_source
from kajiya.data.reading import open_rows
from kajiya.data.sources import csv_rows, jsonl, stdlib, text
from kajiya.errors import ConfigError, DataError


def read(name: str, text: str = "text", **options: object) -> list[Entry]:
    """The documents of a source whose column `text` is a text."""
    return list(texts_of(name, text, **options).read())


def texts_of(name: str, text: str = "text", **options: object) -> Origin:
    columns = {} if text == "text" else {"text": text}
    return open_rows(DataConfig(source=SourceConfig(name, dict(options)), format="text", columns=columns))


def documents(entries: list[Entry] | list[Found]) -> dict[str, str]:
    assert all(isinstance(entry, Document) for entry in entries)
    assert all(entry.n_bytes == len(entry.text.encode()) for entry in entries)
    return {entry.name: entry.text for entry in entries}


def reasons(entries: list[Entry] | list[Found]) -> dict[str, str]:
    return {entry.name: entry.reason for entry in entries if isinstance(entry, Unreadable)}


# ---------------------------------------------------------------- stdlib


def test_stdlib_is_this_interpreters_library() -> None:
    entries = list(stdlib(StdlibSource()))
    names = [entry.name for entry in entries]
    assert names == sorted(names)
    assert {"os.py", "json/decoder.py", "asyncio/base_events.py"} <= set(names)
    assert not [name for name in names if {"site-packages", "test", "tests"} & set(name.split("/"))]
    assert sum(entry.n_bytes for entry in entries) > 5_000_000
    assert next(entry for entry in entries if entry.name == "os.py").text.encode() == Path(os.__file__).read_bytes()


def test_stdlib_leaves_out_tests_and_keeps_bytes(tmp_path: Path) -> None:
    files = {
        "a.py": b"\xef\xbb\xbfx = 1\r\n\r",
        "b/c.py": b"",
        "test/d.py": b"x",
        "b/tests/e.py": b"x",
        "b/idle_test/f.py": b"x",
        "site-packages/g.py": b"x",
        "h.txt": b"x",
        "testing.py": b"y",
    }
    for name, raw in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(raw)
    found = documents(list(stdlib(StdlibSource(str(tmp_path)))))
    assert {name: text.encode() for name, text in found.items()} == {
        name: files[name] for name in ("a.py", "b/c.py", "testing.py")
    }


def test_stdlib_says_why_a_file_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\n# caf\xe9\n")
    (tmp_path / "plain.py").write_bytes(b"x\n\n\xff")
    assert reasons(list(stdlib(StdlibSource(str(tmp_path))))) == {
        "latin.py": "is not utf-8: byte 0xe9 on line 2 (it declares iso-8859-1)",
        "plain.py": "is not utf-8: byte 0xff on line 3",
    }


def test_stdlib_names_a_missing_root(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.source.options.root: '.*gone' is no folder"):
        list(stdlib(StdlibSource(str(tmp_path / "gone"))))


# ---------------------------------------------------------------- text


def test_text_files_keep_their_bytes_and_are_named_below_the_glob(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "b.txt").write_bytes("ü\r\n".encode())
    (tmp_path / "deep" / "er" / "a.txt").write_bytes(b"a")
    (tmp_path / "deep" / "no.md").write_bytes(b"no")
    assert documents(list(text(TextSource(f"{tmp_path}/**/*.txt")))) == {"b.txt": "ü\r\n", "deep/er/a.txt": "a"}
    assert documents(list(text(TextSource(str(tmp_path / "b.txt"))))) == {"b.txt": "ü\r\n"}


def test_text_in_another_encoding(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("café".encode("latin-1"))
    assert documents(list(text(TextSource(f"{tmp_path}/*.txt", "latin-1")))) == {"a.txt": "café"}
    assert reasons(list(text(TextSource(f"{tmp_path}/*.txt")))) == {"a.txt": "is not utf-8: byte 0xe9 on line 1"}
    with pytest.raises(ConfigError, match=r"data.source.options.encoding: 'latin-one' is no text encoding"):
        list(text(TextSource(f"{tmp_path}/*.txt", "latin-one")))


def test_an_empty_glob_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.source.options.files: is not set"):
        list(text(TextSource()))
    with pytest.raises(ConfigError, match=r"matches no file in"):
        list(text(TextSource(f"{tmp_path}/*.txt")))
    with pytest.raises(ConfigError, match=r"is a folder"):
        list(jsonl(LinesSource(str(tmp_path))))


def test_a_vanished_file_is_said(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt", "c.txt"):
        (tmp_path / name).write_text(name)
    entries = text(TextSource(f"{tmp_path}/*.txt"))
    first = next(entries)
    (tmp_path / "b.txt").unlink()
    rest = list(entries)
    assert [entry.name for entry in [first, *rest]] == ["a.txt", "b.txt", "c.txt"]
    assert reasons(rest) == {"b.txt": "vanished: it was listed and is no longer there"}


def test_a_file_without_permission_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("a")

    def refuse(path: Path) -> bytes:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    (entry,) = text(TextSource(f"{tmp_path}/*.txt"))
    assert reasons([entry]) == {"a.txt": "cannot be read: Permission denied"}
    assert entry.n_bytes == 1


# ---------------------------------------------------------------- tables


def test_jsonl_rows(tmp_path: Path) -> None:
    rows = ["plain", "line\u2028separator \U0001f525", "", "a\r\nb"]
    lines = [json.dumps({"id": i, "body": row}, ensure_ascii=i % 2 == 0) for i, row in enumerate(rows)]
    (tmp_path / "a.jsonl").write_text("\ufeff" + "\n".join([*lines[:2], "", *lines[2:]]), encoding="utf-8", newline="")
    found = documents(read("jsonl", "body", files=f"{tmp_path}/*.jsonl"))
    assert found == {"a.jsonl:1": rows[0], "a.jsonl:2": rows[1], "a.jsonl:4": rows[2], "a.jsonl:5": rows[3]}


def test_jsonl_names_the_line_and_the_fault(tmp_path: Path) -> None:
    lines = [
        b'{"text": "good"}',
        b'{"text": "half',
        b'{"words": "a", "id": 1}',
        b'{"text": 5}',
        b'{"text": null}',
        b'["text"]',
        b'{"text": "lone \\ud800 surrogate"}',
        b'{"text": "caf\xe9"}',
        b'{"text": "\\udc80"}',
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    entries = read("jsonl", files=f"{tmp_path}/a.jsonl")
    assert len(entries) == len(lines)
    found = reasons(entries)
    assert found.pop("a.jsonl:2").startswith("is no JSON: Unterminated string")
    assert found == {
        "a.jsonl:3": "has no column 'text' (it has: words, id)",
        "a.jsonl:4": "holds a value of type int under 'text', not text",
        "a.jsonl:5": "holds nothing (null) under 'text', not text",
        "a.jsonl:6": "is a JSON list, not an object with columns",
        "a.jsonl:7": "holds a lone surrogate (\\ud800) under 'text'",
        "a.jsonl:8": "is not utf-8: byte 0xe9 at 13",
        "a.jsonl:9": "holds a lone surrogate (\\udc80) under 'text'",
    }


def test_a_file_of_another_form_is_said_with_what_would_read_it(tmp_path: Path) -> None:
    rows = json.dumps({"text": "a"}) + "\n"
    array, utf16 = json.dumps([{"text": "a"}, {"text": "b"}]), rows.encode("utf-16")
    for raw, words in (
        (gzip.compress(rows.encode()), "is packed by gzip: unpack it first"),
        (b"\x28\xb5\x2f\xfd\0\0", "is packed by zstd: unpack it first"),
        (utf16, "is UTF-16: write it as UTF-8, for example by iconv -f UTF-16 -t UTF-8"),
        (array.encode(), "is one JSON array, not a row a line: write a line for each, for example by jq -c '.[]'"),
        (b"\xef\xbb\xbf [\n" + rows.encode() + b"]\n", "is one JSON array, not a row a line: write"),
    ):
        (tmp_path / "a.jsonl").write_bytes(raw)
        (tmp_path / "b.jsonl").write_text(rows)
        for settings in ({}, {"format": "chat"}):
            source = SourceConfig("jsonl", {"files": f"{tmp_path}/a.jsonl"})
            (entry,) = open_rows(DataConfig(source=source, **settings)).read()
            assert entry.name == "a.jsonl"
            assert entry.reason.startswith(words)
            assert entry.n_bytes == len(raw)
        assert documents(read("jsonl", files=f"{tmp_path}/*.jsonl")[1:]) == {"b.jsonl:1": "a"}
    for raw in (gzip.compress(b"text\na\n"), "text\na\n".encode("utf-16")):
        (tmp_path / "a.csv").write_bytes(raw)
        (entry,) = csv_rows(TableSource(f"{tmp_path}/a.csv"))
        assert (entry.name, entry.n_bytes) == ("a.csv", len(raw))
        assert entry.reason.startswith(("is packed by gzip", "is UTF-16"))
    (tmp_path / "a.txt").write_bytes(utf16)
    (entry,) = text(TextSource(f"{tmp_path}/a.txt"))
    assert entry.reason == "is not utf-8: byte 0xff on line 1 (it is UTF-16)"


def test_csv_rows(tmp_path: Path) -> None:
    long = "x" * 200_000
    (tmp_path / "a.csv").write_bytes(
        b'\xef\xbb\xbfid,text\r\n1,plain\r\n2,"two\r\nlines, and ""quotes"""\r\n\r\n3,' + long.encode() + b"\r\n"
    )
    assert documents(read("csv", files=f"{tmp_path}/a.csv")) == {
        "a.csv:2": "plain",
        "a.csv:3": 'two\r\nlines, and "quotes"',
        "a.csv:6": long,
    }


def test_csv_names_the_line_and_the_fault(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'id,text\n1,good\n2\n3,caf\xe9\n4,good\n5,"never closed\n6,lost\n')
    entries = read("csv", files=f"{tmp_path}/a.csv")
    assert [entry.name for entry in entries if isinstance(entry, Document)] == ["a.csv:2", "a.csv:5"]
    assert reasons(entries) == {
        "a.csv:3": "has 1 fields, the header has 2",
        "a.csv:4": "is not utf-8 under 'text': byte 0xe9 on line 1",
        "a.csv:6": "is broken CSV, and the rest of the file with it, 23 bytes: unexpected end of data",
    }
    assert entries[-1].n_bytes == len(b'5,"never closed\n6,lost\n')
    with pytest.raises(ConfigError, match=r"data.columns.text: there is no column 'body'; there is: id, text"):
        read("csv", "body", files=f"{tmp_path}/a.csv")
    rows = [row for row in csv_rows(TableSource(f"{tmp_path}/a.csv")) if isinstance(row, Row)]
    assert rows[0] == Row("a.csv:2", {"id": "1", "text": "good"}, 6, is_typed=False)


def test_all_that_stands_behind_a_quote_that_is_never_closed_is_counted(tmp_path: Path) -> None:
    rest = b'2,"never\rclosed\r\n3,caf\xe9\n4,x'
    (tmp_path / "a.csv").write_bytes(b'\xef\xbb\xbfid,text\r\n1,"two\nlines"\r\n' + rest)
    *_, last = csv_rows(TableSource(f"{tmp_path}/a.csv"))
    assert (last.name, last.n_bytes) == ("a.csv:4", len(rest))


def test_parquet_rows(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [f"row {i} ü" for i in range(3000)]
    rows[7] = None
    pq.write_table(pa.table({"text": rows, "n": list(range(3000))}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": pa.array(["x", "y", "x"]).dictionary_encode()}), tmp_path / "b.parquet")
    entries = read("parquet", files=f"{tmp_path}/*.parquet")
    assert reasons(entries) == {"a.parquet:7": "holds nothing (null) under 'text', not text"}
    found = documents([entry for entry in entries if isinstance(entry, Document)])
    expected = {f"a.parquet:{i}": row for i, row in enumerate(rows) if row is not None}
    assert found == expected | {"b.parquet:0": "x", "b.parquet:1": "y", "b.parquet:2": "x"}


def test_parquet_faults(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    offsets = pa.py_buffer(b"\0\0\0\0\4\0\0\0\x08\0\0\0")
    not_text = pa.StringArray.from_buffers(2, offsets, pa.py_buffer(b"finecaf\xe9"))
    pq.write_table(pa.table({"text": not_text, "n": [1, 2]}), tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(b"no parquet at all")
    entries = read("parquet", files=f"{tmp_path}/*.parquet")
    found = reasons(entries)
    assert isinstance(entries[0], Document)
    assert found.pop("b.parquet").startswith("is no parquet file (")
    assert found == {"a.parquet:1": "is not utf-8 under 'text': byte 0xe9 on line 1"}
    assert reasons(read("parquet", "n", files=f"{tmp_path}/a.parquet")) == {
        "a.parquet:0": "holds a value of type int under 'text', not text",
        "a.parquet:1": "holds a value of type int under 'text', not text",
    }


def _spoiled(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at : at + 64] = b"\xff" * 64
    path.write_bytes(raw)


def test_a_broken_part_of_a_parquet_file_loses_its_own_rows(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"row {i:04d}" for i in range(4000)]}), path, row_group_size=1000)
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    _spoiled(path, (column.dictionary_page_offset or column.data_page_offset) + 10)
    entries = read("parquet", files=str(path))
    assert [entry.name for entry in entries] == [f"a.parquet:{i}" for i in range(4000)]
    lost = entries[1000:2000]
    assert len(reasons(entries)) == len(reasons(lost)) == 1000
    assert lost[0].reason.startswith("cannot be read, and with it the rest of its part of the file, 1,000 rows: ")
    assert "\n" not in lost[0].reason
    whole = pq.ParquetFile(path).metadata.row_group(1).total_byte_size
    assert sum(entry.n_bytes for entry in lost) == whole


def test_a_broken_part_of_an_arrow_file_loses_its_own_bytes(tmp_path: Path) -> None:
    import pyarrow as pa

    table = pa.table({"text": [f"row {i:04d}" for i in range(4000)]})
    for opened in (pa.ipc.new_file, pa.ipc.new_stream):
        path = tmp_path / f"{opened.__name__}.arrow"
        with opened(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=500)
        size = path.stat().st_size
        raw = path.read_bytes()
        # The head of the fifth batch, behind the mark with which it begins and its length.
        _spoiled(path, raw.rindex(b"\xff\xff\xff\xff", 0, raw.index(b"row 2100")) + 8)
        entries = read("arrow", files=str(path))
        (broken,) = [entry for entry in entries if isinstance(entry, Unreadable)]
        assert entries.index(broken) == 2000
        assert broken.name == f"{path.name}:2000"
        is_file = opened is pa.ipc.new_file
        assert len(entries) == (3501 if is_file else 2001)
        assert broken.n_bytes == pytest.approx(size / 8 if is_file else size / 2, rel=0.1)


def test_two_columns_of_one_name_in_a_table(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table([["a"], ["b"]], names=["text", "text"]), tmp_path / "a.parquet")
    assert reasons(read("parquet", files=f"{tmp_path}/a.parquet")) == {
        "a.parquet": "has two columns of the name 'text'; name each of them otherwise"
    }


# ---------------------------------------------------------------- datasets


def test_a_saved_dataset(tmp_path: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"text": ["a", "b", None], "n": [1, 2, 3]})
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows, "other": rows.select([1])}).save_to_disk(tmp_path / "many")
    entries = read("hub", path=str(tmp_path / "one"))
    assert documents(entries[:2]) == {"train:0": "a", "train:1": "b"}
    assert reasons(entries) == {"train:2": "holds nothing (null) under 'text', not text"}
    assert documents(read("hub", path=str(tmp_path / "many"), split="other")) == {"other:0": "b"}
    with pytest.raises(ConfigError, match=r"data.source.options.split: 'test' is not one of other, train in"):
        list(hub(HubSource(str(tmp_path / "many"), split="test")))
    with pytest.raises(ConfigError, match=r"there is no column 'body'; there is: text, n"):
        read("hub", "body", path=str(tmp_path / "one"))


def test_a_folder_of_data_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    (folder / "test.jsonl").write_text('{"text": "c"}\n')
    for streaming in (False, True):
        entries = read("hub", path=str(folder), streaming=streaming)
        assert documents(entries) == {"train:0": "a", "train:1": "b"}
    assert documents(read("hub", path=str(folder), split="test")) == {"test:0": "c"}
    with pytest.raises(DataError, match=r'could not be loaded: Unknown split "nosuch"'):
        list(hub(HubSource(str(folder), split="nosuch")))
    with pytest.raises(ConfigError, match=r"data.source.options.revision: is abc, and .* is a folder of this machine"):
        list(hub(HubSource(str(folder), revision="abc")))


@pytest.mark.parametrize(
    ("field", "value"), [("revision", "abc"), ("subset", "q"), ("streaming", True), ("split", "nosuch")]
)
def test_a_saved_dataset_has_no_such_thing(field: str, value: object, tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path)
    given: dict[str, Any] = {field: value}
    with pytest.raises(ConfigError, match=rf"data.source.options.{field}: .*{value}"):
        list(hub(HubSource(str(tmp_path), **given)))


def test_a_folder_that_is_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the data set could not be loaded: .*\n.*save_to_disk"):
        list(hub(HubSource(str(tmp_path))))
    with pytest.raises(ConfigError, match=r"data.source.options.path: is not set"):
        list(hub(HubSource()))


def test_a_hub_name_is_pinned_to_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub

    asked = []

    class Api:
        def repo_info(self, path: str, revision: str | None, repo_type: str) -> object:
            asked.append((path, revision, repo_type))
            return type("Info", (), {"sha": "c0ffee"})

    def load_dataset(path: str, **given: object) -> object:
        asked.append((path, given))
        return datasets.Dataset.from_dict({"text": ["a"]}).to_iterable_dataset()

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    options = {"path": "someone/words", "revision": "main", "subset": "en", "streaming": True}
    origin = texts_of("hub", **options)
    assert origin.facts["options"]["revision"] == "c0ffee"
    assert origin.settings["options"]["revision"] == "c0ffee"
    assert documents(list(origin.read())) == {"train:0": "a"}
    opened = ("someone/words", {"name": "en", "split": "train", "revision": "c0ffee", "streaming": True})
    assert asked == [("someone/words", "main", "dataset"), opened, opened]


class HangUpError(Exception):
    """An error of no library's."""


def test_a_stream_that_breaks_off_is_said_with_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def rows() -> Iterator[dict[str, str]]:
        yield {"text": "a"}
        raise HangUpError("the server hung up")

    monkeypatch.setattr(datasets, "load_dataset", lambda path, **_: datasets.IterableDataset.from_generator(rows))
    found = hub(HubSource("someone/words", streaming=True))
    assert next(found) == Row("train:0", {"text": "a"})
    with pytest.raises(
        DataError, match=r"someone/words: the data set could not be read on at row train:1: the server hung up"
    ):
        next(found)


def test_a_data_set_that_cannot_be_made_is_said_with_its_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load_dataset(path: str, **_: object) -> object:
        try:
            raise TypeError("column 'n' is a text in file 3")
        except TypeError as cause:
            raise datasets.exceptions.DatasetGenerationError(
                "An error occurred while generating the dataset"
            ) from cause

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        DataError, match=r"someone/words: the data set could not be loaded: column 'n' is a text in file 3"
    ):
        list(hub(HubSource("someone/words")))


def test_a_hub_that_cannot_be_reached_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    class Api:
        def repo_info(self, path: str, revision: str | None, repo_type: str) -> object:
            raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    with pytest.raises(DataError, match=r"someone/words: is no folder here, .* no route to host\nGive an existing"):
        open_source(SourceConfig("hub", {"path": "someone/words"}))


# ---------------------------------------------------------------- the user's own


def test_a_users_own_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_source.py").write_text(
        "from kajiya.data.sources import Document\n"
        "def rows(n, word='x'):\n"
        "    yield word * n\n"
        "    yield {'text': 'named', 'name': 'its/name'}\n"
        "    yield {'text': 'unnamed'}\n"
        "    yield Document('given', 'text', 4)\n"
        "    yield 5\n"
        "    yield {'body': 'x'}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    origin = texts_of("own_source:rows", n=3)
    entries = list(origin.read())
    assert documents(entries[:4]) == {"00000000": "xxx", "its/name": "named", "00000002": "unnamed", "given": "text"}
    assert reasons(entries) == {
        "00000004": "own_source:rows yielded int, no row",
        "00000005": "has no column 'text' (it has: body)",
    }
    assert origin.fingerprint() == origin.fingerprint()
    assert origin.fingerprint() != texts_of("own_source:rows", n=4).fingerprint()
    with pytest.raises(ConfigError, match=r"data.source.options.m: own_source:rows takes no such argument"):
        open_source(SourceConfig("own_source:rows", {"m": 3}))
    del sys.modules["own_source"]


def test_a_function_that_is_no_source() -> None:
    for returned in (None, "text", {"text": "x"}):
        with pytest.raises(DataError, match=r"A source yields rows"):
            list(from_function(lambda returned=returned: returned, {}))


# ---------------------------------------------------------------- fingerprints


def test_a_fingerprint_follows_names_and_bytes_and_not_places(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text("a")
        (tmp_path / folder / "b.txt").write_text("b")

    def opened(folder: str) -> object:
        origin = open_source(SourceConfig("text", {"files": f"{tmp_path}/{folder}/*.txt"}))
        assert isinstance(origin, Source)
        return origin.settings, origin.fingerprint()

    assert opened("one") == opened("two")
    before = opened("one")
    (tmp_path / "one" / "a.txt").write_text("A")
    assert opened("one") != before
    (tmp_path / "two" / "a.txt").rename(tmp_path / "two" / "c.txt")
    assert opened("two") != before
