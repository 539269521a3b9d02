"""Files that hold many documents: cut as an independent reading cuts them, in bounded memory, every byte accounted for."""

import io
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kajiya.config.compose import compose
from kajiya.config.options import TextSource
from kajiya.config.schema import DataConfig, SourceConfig
from kajiya.data import text_documents
from kajiya.data.corpus import SEPARATORS, build_corpus, is_heldout
from kajiya.data.documents import open_documents
from kajiya.data.entries import Document, Unreadable
from kajiya.data.ledger import EMPTY, data_ledger, ledger_table
from kajiya.data.sources import text
from kajiya.data.text_documents import cutter, documents_of
from kajiya.errors import ConfigError, DataError
from kajiya.run.store import Store

END = "<|endoftext|>"


def entries(raw: bytes, split_on: str, encoding: str = "utf-8", limit: int = 2**26) -> list[Document | Unreadable]:
    return list(documents_of("a.txt", io.BytesIO(raw), encoding, cutter(split_on), limit))


def texts(raw: bytes, split_on: str) -> list[str]:
    found = entries(raw, split_on)
    assert [entry.name for entry in found] == [f"a.txt#{number}" for number in range(1, len(found) + 1)]
    assert all(isinstance(entry, Document) and entry.n_bytes == len(entry.text.encode()) for entry in found)
    assert sum(entry.n_bytes + entry.separator_bytes for entry in found) == len(raw)
    return [entry.text for entry in found if isinstance(entry, Document)]


def blank_lines(whole: str) -> list[str]:
    """An independent reading: line by line."""
    found, lines = [], []
    for line in [*whole.splitlines(keepends=True), None]:
        if line is None or (not line.strip() and line.endswith("\n")):
            found += ["".join(lines)] if "".join(lines).strip() else []
            lines = []
        else:
            lines.append(line)
    return found


@pytest.mark.parametrize(
    ("raw", "split_on", "expected"),
    [
        ("one\n<|endoftext|>\ntwo<|endoftext|>", END, ["one\n", "\ntwo"]),
        ("<|endoftext|><|endoftext|>one<|endoftext|> \n <|endoftext|>two", END, ["one", "two"]),
        ("no separator <|endoftext", END, ["no separator <|endoftext"]),
        ("a.b", ".", ["a", "b"]),
        ("First:\nspeak.\n\nAll:\nSpeak, speak.\n", "blank_line", ["First:\nspeak.\n", "All:\nSpeak, speak.\n"]),
        ("\n \t\n  one\r\n\r\n\n two \n   ", "blank_line", ["  one\r\n", " two \n   "]),
        ("", "blank_line", [""]),
        ("\n\n", "blank_line", [""]),
    ],
)
def test_a_file_is_cut(raw: str, split_on: str, expected: list[str]) -> None:
    assert texts(raw.encode(), split_on) == expected


@pytest.mark.parametrize("read_bytes", [1, 2, 3, 7, 64])
def test_where_the_file_is_read_in_parts_makes_no_difference(read_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_documents, "_READ_BYTES", read_bytes)
    chance = random.Random(read_bytes)
    for _ in range(150):
        whole = "".join(chance.choice(["\n", "\n", " ", "a", "é", "木", "\r\n", "<|", "|>", END]) for _ in range(40))
        assert texts(whole.encode(), "blank_line") == (blank_lines(whole) or [""])
        assert texts(whole.encode(), END) == ([each for each in whole.split(END) if each.strip()] or [""])


@pytest.mark.parametrize("split_on", ["blank_line", "--"])
@pytest.mark.parametrize("read_bytes", [1, 5, 1000])
def test_a_document_that_is_too_long_is_passed_over_by_itself(
    split_on: str, read_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_documents, "_READ_BYTES", read_bytes)
    gap = "\n\n" if split_on == "blank_line" else "--"
    for long in ("木" * 700, "word\n" * 500, "\u2028x" * 600):
        found = entries(gap.join(["one", long, "two\n"]).encode(), split_on, limit=1024)
        one, refused, two = found
        assert isinstance(one, Document)
        assert isinstance(two, Document)
        assert isinstance(refused, Unreadable)
        assert (one.text.strip(), two.text) == ("one", "two\n")
        assert re.match(
            r"is a document of [\d,]+ bytes, longer than data.source.options.max_row_bytes=1024", refused.reason
        )
        total = sum(entry.n_bytes + entry.separator_bytes for entry in found)
        assert total == len(gap.join(["one", long, "two\n"]).encode())


def test_a_document_that_is_no_text_is_named_with_its_line_and_the_others_stay() -> None:
    raw = b"one\n\ntwo\nt\xffwo\n\nthree\n"
    one, two, three = entries(raw, "blank_line")
    assert two == Unreadable("a.txt#2", "is not utf-8: byte 0xff on line 4", 9, 1)
    assert isinstance(one, Document)
    assert isinstance(three, Document)
    assert sum(entry.n_bytes + entry.separator_bytes for entry in (one, two, three)) == len(raw)


def test_other_encodings() -> None:
    assert [entry.text for entry in entries("eins--zwä--drei".encode("utf-16"), "--", "utf-16")] == [
        "eins",
        "zwä",
        "drei",
    ]
    assert [entry.text for entry in entries(b"ein\xe4--zw", "--", "latin-1")] == ["einä", "zw"]
    torn = "eins--zwei".encode("utf-16") + b"\x20"
    first, rest = entries(torn, "--", "utf-16")
    assert first.name == "a.txt#1"
    assert isinstance(rest, Unreadable)
    assert re.match(r"is not utf-16 \(truncated data\), and the rest of the file with it, \d+ bytes", rest.reason)


def test_a_disk_that_fails_half_way_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Torn(io.BufferedReader):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell():
                raise OSError(5, "Input/output error")
            return super().read(size)

    monkeypatch.setattr(text_documents, "_READ_BYTES", 7)
    (tmp_path / "a.txt").write_bytes(b"one\n\ntwo\nthree\n")
    with Torn(io.FileIO(tmp_path / "a.txt")) as torn:
        first, rest = documents_of("a.txt", torn, "utf-8", cutter("blank_line"), 2**20)
    reason = "cannot be read on (Input/output error), and the rest of the file with it, 10 bytes"
    assert (first, rest) == (Document("a.txt#1", "one\n", 4, separator_bytes=1), Unreadable("a.txt#2", reason, 10))


def test_options_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"split_on: is empty"):
        list(text(TextSource(f"{tmp_path}/a.txt", split_on="")))


# ---------------------------------------------------------------- as a corpus


def passages(n: int) -> str:
    return "\n".join(f"SPEAKER:\nThis is passage {number}.\n" for number in range(n))


def config(folder: Path, **options: object) -> DataConfig:
    return DataConfig(source=SourceConfig("text", {"files": f"{folder}/*.txt", **options}))


def test_one_file_of_many_documents_is_a_corpus_and_the_ledger_adds_up(tmp_path: Path) -> None:
    whole = passages(400)
    (tmp_path / "one.txt").write_text(whole)
    with pytest.raises(DataError, match=r"of 1 documents .*\n.*data.source.options.split_on=blank_line"):
        build_corpus(config(tmp_path), Store(tmp_path / "store"))
    corpus, _ = build_corpus(config(tmp_path, split_on="blank_line"), Store(tmp_path / "store"))
    ledger = corpus.facts["ledger"]
    assert ledger["entered"] == {"documents": 400, "bytes": len(whole)}
    assert ledger["dropped"] == {SEPARATORS: {"documents": 0, "bytes": 399, "kind": EMPTY}}
    held = list(open_documents(corpus.path, "heldout").names)
    assert held == [name for name in (f"one.txt#{number}" for number in range(1, 401)) if is_heldout(name, 20)]
    table = ledger_table(data_ledger(corpus.facts))
    assert [f"empty: {SEPARATORS}", "0", "399", "—"] in table
    assert table[0][1:3] == table[-1][1:3] == ["400", f"{len(whole):,}"]


def test_separators_beside_lost_documents_are_counted_too(tmp_path: Path) -> None:
    raw = passages(400).encode() + b"\n\nbad \xff\n\n"
    (tmp_path / "one.txt").write_bytes(raw)
    given = DataConfig(
        source=SourceConfig("text", {"files": f"{tmp_path}/one.txt", "split_on": "blank_line"}), on_unreadable="drop"
    )
    ledger = build_corpus(given, Store(tmp_path / "store"))[0].facts["ledger"]
    assert ledger["entered"] == {"documents": 401, "bytes": len(raw)}
    assert ledger["dropped"]["unreadable"]["examples"] == ["one.txt#401: is not utf-8: byte 0xff on line 1202"]


def test_a_separator_on_the_command_line() -> None:
    given = ["data.source.name=text", "data.source.options.files=a.txt", f"data.source.options.split_on='{END}'"]
    assert compose("stdlib-pretrain", given).data.source.options["split_on"] == END


PEAK = """
import resource, sys
from kajiya.config.options import TextSource
from kajiya.data.sources import text
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
n = sum(1 for _ in text(TextSource(sys.argv[1], split_on=sys.argv[2])))
print(n, peak() - before)
"""


@pytest.mark.parametrize("split_on", ["blank_line", END])
def test_memory_holds_a_part_of_a_large_file(tmp_path: Path, split_on: str) -> None:
    gap = "\n\n" if split_on == "blank_line" else END
    with (tmp_path / "large.txt").open("w") as handle:
        for _ in range(96):
            handle.write((("x" * 1000 + "\n") * 10 + gap) * 100)
    size = (tmp_path / "large.txt").stat().st_size
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path / "large.txt"), split_on], capture_output=True, text=True, check=True
    )
    n, more = map(int, done.stdout.split())
    assert n == 9600
    assert size > 90 * 2**20
    assert more < 24 * 2**20
