"""The corpus: what is held out stays, what is dropped is counted, and the ledger adds up."""

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kajiya.config.compose import compose
from kajiya.config.options import StdlibSource
from kajiya.config.schema import DataConfig, HeldoutSourceConfig, SourceConfig, TokenizerConfig
from kajiya.data.cleaning import (
    DUPLICATE_IN_TRAIN,
    DUPLICATE_OF_HELDOUT,
    NEAR_DUPLICATE_IN_TRAIN,
    NEAR_DUPLICATE_OF_HELDOUT,
    NOTHING,
    SHARES_SEQUENCES,
)
from kajiya.data.corpus import UNREADABLE, build_corpus, is_heldout
from kajiya.data.documents import Documents, open_documents
from kajiya.data.duplicates import FEW_LINES, distinct_lines
from kajiya.data.entries import Document
from kajiya.data.shards import build_shards
from kajiya.data.sources import stdlib
from kajiya.data.tokenizer import build_tokenizer
from kajiya.errors import ConfigError, DataError, StoreError
from kajiya.run.store import Artifact, Store, open_artifact


def lines(start: int, stop: int) -> str:
    return "".join(f"line {number}\n" for number in range(start, stop))


def names(heldout: bool, count: int) -> list[str]:
    """File names that the hash puts on one side at one in 20."""
    tried = (f"{number}.txt" for number in range(10_000))
    return [name for name in tried if is_heldout(name, 20) is heldout][:count]


def write(folder: Path, files: dict[str, bytes | str]) -> DataConfig:
    for name, content in files.items():
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return DataConfig(source=SourceConfig("text", {"files": f"{folder}/*.txt"}))


def contents(corpus: Artifact, split: str) -> dict[str, str]:
    documents = open_documents(corpus.path, split)
    return dict(zip(documents.names, documents.texts(), strict=True))


# ---------------------------------------------------------------- the standard library


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return build_corpus(DataConfig(), Store(tmp_path_factory.mktemp("store")))[0]


def test_nothing_held_out_is_dropped_and_bytes_are_the_files(library: Artifact) -> None:
    read = [entry for entry in stdlib(StdlibSource()) if isinstance(entry, Document)]
    expected = {entry.name: entry.text for entry in read if is_heldout(entry.name, 20)}
    assert len(expected) > 20
    assert contents(library, "heldout") == expected
    raw = open_documents(library.path, "heldout").raw.tobytes()
    assert raw == "".join(expected.values()).encode()
    assert library.facts["ledger"]["heldout"] == {"documents": len(expected), "bytes": len(raw)}


def test_no_near_duplicate_is_left_and_none_is_dropped_without_cause(library: Artifact) -> None:
    heldout = [distinct_lines(text) for text in contents(library, "heldout").values()]
    train = contents(library, "train")

    def share(text: str) -> float:
        own = distinct_lines(text)
        return max(
            (len(own & other) / min(len(own), max(len(other), FEW_LINES)) for other in heldout if own), default=0
        )

    assert max(share(text) for text in train.values()) < 0.5
    dropped = {
        entry.name: entry.text
        for entry in stdlib(StdlibSource())
        if isinstance(entry, Document) and entry.name not in train and not is_heldout(entry.name, 20)
    }
    ledger = library.facts["ledger"]["dropped"]
    assert sum(share(text) >= 0.5 for text in dropped.values()) == sum(
        ledger[reason]["documents"] for reason in (NEAR_DUPLICATE_OF_HELDOUT, DUPLICATE_OF_HELDOUT) if reason in ledger
    )
    # The table-driven modules of `encodings` are alike; that is what the rule is for.
    assert any(name.startswith("encodings/cp") for name in dropped)


def test_the_ledger_adds_up(library: Artifact) -> None:
    ledger = library.facts["ledger"]
    parts = [ledger["train"], ledger["heldout"], *ledger["dropped"].values()]
    for unit in ("documents", "bytes"):
        assert ledger["entered"][unit] == sum(part[unit] for part in parts)
    entries = list(stdlib(StdlibSource()))
    assert ledger["entered"] == {"documents": len(entries), "bytes": sum(entry.n_bytes for entry in entries)}
    assert all(1 <= len(part["examples"]) <= 5 for part in ledger["dropped"].values())


# ---------------------------------------------------------------- each rule, by hand


def test_each_rule(tmp_path: Path) -> None:
    held = names(True, 3)
    train = names(False, 8)
    files: dict[str, bytes | str] = {
        held[0]: lines(0, 100),
        held[1]: lines(0, 100),
        held[2]: "",
        train[0]: lines(0, 100),
        train[1]: lines(40, 140),
        train[2]: lines(60, 160),
        train[3]: lines(1000, 1010),
        train[4]: lines(1000, 1010),
        train[5]: "",
        train[6]: b"\xff\xfe",
        train[7]: lines(2000, 2001),
    }
    config = write(tmp_path, files)
    config = DataConfig(source=config.source, on_unreadable="drop")
    corpus, _ = build_corpus(config, Store(tmp_path / "store"))
    assert contents(corpus, "heldout") == {name: files[name] for name in sorted(held)}
    kept_twin = min(train[3], train[4])
    assert contents(corpus, "train") == {name: files[name] for name in sorted([train[2], kept_twin, train[7]])}
    dropped = corpus.facts["ledger"]["dropped"]
    assert {reason: part["documents"] for reason, part in dropped.items()} == {
        UNREADABLE: 1,
        NOTHING: 1,
        DUPLICATE_OF_HELDOUT: 1,
        DUPLICATE_IN_TRAIN: 1,
        NEAR_DUPLICATE_OF_HELDOUT: 1,
    }
    first_held = min(held[0], held[1])
    assert dropped[UNREADABLE]["examples"] == [f"{train[6]}: is not utf-8: byte 0xff on line 1 (it is UTF-16)"]
    assert dropped[UNREADABLE]["bytes"] == 2
    assert dropped[DUPLICATE_OF_HELDOUT]["examples"] == [f"{train[0]} is {first_held}"]
    assert dropped[NEAR_DUPLICATE_OF_HELDOUT]["examples"] == [f"{train[1]} shares 60% of its lines with {first_held}"]


def test_near_duplicates_can_stay(tmp_path: Path) -> None:
    (held,), train = names(True, 1), names(False, 2)
    config = write(tmp_path, {held: lines(0, 100), train[0]: lines(1, 100), train[1]: lines(0, 100)})
    corpus, _ = build_corpus(DataConfig(source=config.source, near_duplicate=None), Store(tmp_path / "store"))
    assert list(contents(corpus, "train")) == [train[0]]
    assert list(corpus.facts["ledger"]["dropped"]) == [DUPLICATE_OF_HELDOUT]


def write_rows(folder: Path, rows: dict[str, str]) -> DataConfig:
    """A function of the user's own that yields these rows, by name."""
    path = folder / "rows.json"
    path.write_text(json.dumps([{"name": name, "text": text} for name, text in rows.items()]))
    return DataConfig(source=SourceConfig("tests.data.test_corpus:read_rows", {"path": str(path)}))


def read_rows(path: str) -> Any:
    return json.loads(Path(path).read_text())


def test_the_kinds_of_duplicates(tmp_path: Path) -> None:
    (held,), train = names(True, 1), sorted(names(False, 5))
    words = " ".join(f"word{number}" for number in range(100))
    rows = {
        held: "held " * 3,
        train[0]: words,
        train[1]: words,
        train[2]: words.upper() + " and one more",
        train[3]: " ".join(reversed(words.split())),
        train[4]: "Held, held, held!",
    }
    config = write_rows(tmp_path, rows)
    kept = {}
    for kind in ("off", "exact", "minhash"):
        corpus, _ = build_corpus(replace(config, duplicates=kind), Store(tmp_path / "store"))
        kept[kind] = list(contents(corpus, "train"))
        ledger = corpus.facts["ledger"]
        assert ledger["entered"]["documents"] == 6
        assert not list(corpus.path.glob("minhash*"))
    assert kept["off"] == train
    assert kept["exact"] == [name for name in train if name != train[1]]
    assert kept["minhash"] == [train[0], train[3]]
    assert {reason: (part["kind"], part["examples"]) for reason, part in ledger["dropped"].items()} == {
        DUPLICATE_IN_TRAIN: ("duplicate", [f"{train[1]} is {train[0]}"]),
        NEAR_DUPLICATE_IN_TRAIN: ("duplicate", [f"{train[2]} is to 97% {train[0]}"]),
        NEAR_DUPLICATE_OF_HELDOUT: ("contaminated", [f"{train[4]} is to 100% {held}"]),
    }


def test_contamination(tmp_path: Path) -> None:
    (held,), train = names(True, 1), sorted(names(False, 3))
    words = [f"word{number}" for number in range(30)]
    some, many = " ".join(words[:13]), " ".join(words[:25])
    rows = {held: " ".join(words), train[0]: f"once {some} again", train[1]: f"{many} again", train[2]: "free of it"}
    config = write_rows(tmp_path, rows)
    for share, expected in ((0.0, train[2:]), (0.5, [train[0], train[2]])):
        config = replace(config, contamination_words=13, contamination_share=share)
        corpus, _ = build_corpus(config, Store(tmp_path / "store"))
        assert list(contents(corpus, "train")) == expected
    assert corpus.facts["ledger"]["dropped"][SHARES_SEQUENCES] == {
        "documents": 1,
        "bytes": len(rows[train[1]]),
        "kind": "contaminated",
        "examples": [f"{train[1]} holds 72.2% of the 13-word sequences of {held}"],
    }


def test_rows_of_one_prompt_are_held_out_together(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{n // 4}", "chosen": f"a{n}", "rejected": "b"} for n in range(160)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = SourceConfig("jsonl", {"files": str(tmp_path / "rows.jsonl")})
    config = DataConfig(source=source, heldout_every=4, near_duplicate=None)

    def prompts(config: DataConfig) -> tuple[list[str], list[str]]:
        corpus, _ = build_corpus(config, Store(tmp_path / "store"))
        train, heldout = (contents(corpus, split).values() for split in ("train", "heldout"))
        return [json.loads(row)["prompt"] for row in train], [json.loads(row)["prompt"] for row in heldout]

    train, heldout = prompts(config)
    assert set(train) & set(heldout)
    train, heldout = prompts(replace(config, heldout_by="prompt"))
    assert heldout
    assert not set(train) & set(heldout)
    assert len(train) + len(heldout) == 160
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n')
    with pytest.raises(ConfigError, match=r"data.heldout_by: text rows have no prompt apart"):
        build_corpus(replace(config, heldout_by="prompt"), Store(tmp_path / "store"))


def test_a_source_of_held_out_rows_is_not_split_by_prompt() -> None:
    given = ["data.heldout_source.name=stdlib", "data.heldout_by=prompt"]
    with pytest.raises(ConfigError, match=r"data.heldout_by: prompt changes nothing"):
        compose("stdlib-pretrain", given)


def test_held_out_rows_of_a_source_of_their_own(tmp_path: Path) -> None:
    for folder, texts in (("train", ["a", "b", "c", "same"]), ("held", ["x", "same"])):
        (tmp_path / folder).mkdir()
        for number, text in enumerate(texts):
            (tmp_path / folder / f"{number}.txt").write_text(text)
    config = DataConfig(
        source=SourceConfig("text", {"files": f"{tmp_path}/train/*.txt"}),
        heldout_source=HeldoutSourceConfig("text", {"files": f"{tmp_path}/held/*.txt"}),
    )
    store = Store(tmp_path / "store")
    corpus, _ = build_corpus(config, store)
    assert contents(corpus, "heldout") == {"0.txt": "x", "1.txt": "same"}
    assert contents(corpus, "train") == {"0.txt": "a", "1.txt": "b", "2.txt": "c"}
    assert corpus.facts["ledger"]["entered"] == {"documents": 6, "bytes": 12}
    assert list(corpus.facts["ledger"]["dropped"]) == [DUPLICATE_OF_HELDOUT]
    assert build_corpus(replace(config, heldout_every=7), store) == (corpus, True)
    (tmp_path / "held" / "0.txt").write_text("y")
    assert not build_corpus(config, store)[1]


def test_two_rows_of_one_name_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    rows = [{"name": str(number), "text": f"row {number}"} for number in range(60)]
    path.write_text(json.dumps([*rows, {"name": "7", "text": "another"}]))
    source = SourceConfig("tests.data.test_corpus:read_rows", {"path": str(path)})
    config = DataConfig(source=source, heldout_every=5)
    with pytest.raises(DataError, match="7: has the name of an earlier row; give each row a name of its own\nMend"):
        build_corpus(config, Store(tmp_path / "store"))
    corpus, _ = build_corpus(replace(config, on_unreadable="drop"), Store(tmp_path / "store"))
    assert corpus.facts["ledger"]["dropped"][UNREADABLE]["documents"] == 1
    assert "another" not in {**contents(corpus, "train"), **contents(corpus, "heldout")}.values()


def test_the_split_is_a_hash_of_the_name_alone() -> None:
    # A frozen sample, so that no later version holds out other files.
    every = [f"package/module_{number}.py" for number in range(40)]
    assert [name for name in every if is_heldout(name, 20)] == ["package/module_39.py"]


# ---------------------------------------------------------------- reuse


def test_unchanged_content_is_reused_and_changed_content_is_not(tmp_path: Path) -> None:
    (held,), train = names(True, 1), names(False, 2)
    config = write(tmp_path, {held: "held", train[0]: "a", train[1]: "b"})
    store = Store(tmp_path / "store")
    first, reused = build_corpus(config, store)
    assert not reused
    (tmp_path / train[0]).touch()
    assert build_corpus(config, store) == (first, True)
    (tmp_path / train[0]).write_text("A")
    second, reused = build_corpus(config, store)
    assert not reused
    assert second.key != first.key
    assert contents(second, "train")[train[0]] == "A"


def test_content_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    (held,), (train,) = names(True, 1), names(False, 1)
    config = write(tmp_path, {held: "held", train: "a"})

    def change(kind: str, **fields: Any) -> None:
        (tmp_path / train).write_text("changed")

    store = Store(tmp_path / "store")
    with pytest.raises(DataError, match="changed while it was read"):
        build_corpus(config, store, on_event=change)
    assert store.artifacts() == []


@pytest.mark.parametrize("steady", [True, False])
def test_a_users_own_function_must_yield_the_same_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steady: bool
) -> None:
    (tmp_path / "own_rows.py").write_text(
        "calls = []\n"
        "def rows(steady):\n"
        "    calls.append(steady)\n"
        "    yield from (f'row {number} {1 if steady else len(calls)}' for number in range(100))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = DataConfig(source=SourceConfig("own_rows:rows", {"steady": steady}))
    store = Store(tmp_path / "store")
    try:
        if steady:
            corpus, reused = build_corpus(config, store)
            assert not reused
            # Called for its first row, for its fingerprint and for its text.
            assert len(sys.modules["own_rows"].calls) == 3
            assert corpus.facts["ledger"]["entered"]["documents"] == 100
            assert build_corpus(config, store) == (corpus, True)
        else:
            with pytest.raises(DataError, match="differs from one reading to the next"):
                build_corpus(config, store)
            assert store.artifacts() == []
    finally:
        sys.modules.pop("own_rows", None)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"0.txt": b"\xff"}, r"0.txt: is not utf-8: byte 0xff on line 1\n.*data.on_unreadable=drop"),
        ({names(False, 1)[0]: "x"}, r"data.heldout_every=20: of 1 documents none is held out.*\nLower"),
        ({names(True, 1)[0]: "x"}, r"of 1 documents 1 are held out and none is left to train on.*\nAdd documents"),
        (
            {names(True, 1)[0]: "x", names(False, 1)[0]: "x"},
            r"none is left to train on. Dropped: 1 duplicate of a held-out document \(for example 0.txt is",
        ),
    ],
)
def test_what_cannot_be_a_corpus(tmp_path: Path, files: dict[str, bytes | str], message: str) -> None:
    store = Store(tmp_path / "store")
    with pytest.raises(DataError, match=message):
        build_corpus(write(tmp_path, files), store)
    assert store.artifacts() == []


def test_a_source_without_documents(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n\n")
    config = DataConfig(source=SourceConfig("jsonl", {"files": f"{tmp_path}/a.jsonl"}))
    with pytest.raises(DataError, match=r"data.source: it holds no documents"):
        build_corpus(config, Store(tmp_path / "store"))


def test_all_rows_dropped_says_why(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": None}) for _ in range(3)))
    config = DataConfig(source=SourceConfig("jsonl", {"files": f"{tmp_path}/a.jsonl"}), on_unreadable="drop")
    with pytest.raises(
        DataError, match=r"Dropped: 3 unreadable \(for example a.jsonl:1: holds nothing \(null\) under 'text'"
    ):
        build_corpus(config, Store(tmp_path / "store"))


def test_documents_of_nothing() -> None:
    with pytest.raises(StoreError, match="no corpus with a split 'train'"):
        open_documents(Path("nowhere"), "train")


def test_batches_of_documents_are_bounded_and_whole(library: Artifact) -> None:
    documents: Documents = open_documents(library.path, "train")
    texts, sizes = [], []
    for first, batch in documents.batches(50_000):
        assert first == len(texts)
        texts += batch
        sizes.append((len(batch), sum(len(text.encode()) for text in batch)))
    assert texts == list(documents.texts())
    assert all(n_bytes <= 50_000 or n_documents == 1 for n_documents, n_bytes in sizes)


# ---------------------------------------------------------------- killed

KILLED = """
import os, signal, sys
from pathlib import Path
from kajiya.config.schema import DataConfig, HeldoutSourceConfig, SourceConfig, TokenizerConfig
from kajiya.data.corpus import build_corpus
from kajiya.data.shards import build_shards
from kajiya.data.tokenizer import build_tokenizer
from kajiya.run.store import Store

def on_event(kind, *, stage="", **fields):
    if stage == sys.argv[3]:
        os.kill(os.getpid(), signal.SIGKILL)

config = DataConfig(source=SourceConfig("stdlib", {"root": sys.argv[1]}), heldout_every=5, row_tokens=64)
store = Store(Path(sys.argv[2]))
corpus, _ = build_corpus(config, store, on_event)
tokenizer, _ = build_tokenizer(TokenizerConfig(vocab_size=300), corpus, store, on_event)
build_shards(config, corpus, tokenizer, store, on_event)
"""


def test_killed_at_each_stage_leaves_nothing_half_and_ends_the_same(small, tmp_path: Path) -> None:
    interrupted = Store(tmp_path / "interrupted")
    for number, stage in enumerate(("corpus", "tokenizer", "shards")):
        killed = subprocess.run(
            [sys.executable, "-c", KILLED, str(small.root / "json"), str(interrupted.root), stage],
            capture_output=True,
            text=True,
        )
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        finished = interrupted.artifacts()
        assert [artifact.stage for artifact in finished] == ["corpus", "tokenizer"][:number]
        for artifact in finished:
            open_artifact(artifact.path, verify=True)
    digests = []
    for store in (interrupted, Store(tmp_path / "whole")):
        config = DataConfig(
            source=SourceConfig("stdlib", {"root": str(small.root / "json")}), heldout_every=5, row_tokens=64
        )
        corpus, _ = build_corpus(config, store)
        tokenizer, _ = build_tokenizer(TokenizerConfig(vocab_size=300), corpus, store)
        digests.append(build_shards(config, corpus, tokenizer, store)[0].digest)
    assert digests[0] == digests[1]
    # What was finished before a kill was taken up, not made again.
    assert len(interrupted.artifacts()) == 3
