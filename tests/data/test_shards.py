"""Shards: every document's ids between begin and end of text, whatever the file size; facts that are true."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from kajiya.config.schema import DataConfig
from kajiya.data.documents import open_documents
from kajiya.data.shards import build_shards, open_split
from kajiya.errors import DataError, StoreError
from kajiya.run.store import Artifact, Store


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_documents_are_those_of_the_corpus(small, split: str) -> None:
    # Transformers encodes on its own: `split_special_tokens` is its name for taking special tokens' names as text.
    tokenizer = AutoTokenizer.from_pretrained(small.tokenizer.path)
    documents, shards = open_documents(small.corpus.path, split), open_split(small.shards.path, split)
    assert list(shards.names) == list(documents.names)
    assert shards.document_bytes.tolist() == [len(text.encode()) for text in documents.texts()]
    for index, text in enumerate(documents.texts()):
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert shards.document(index).tolist() == [0, *ids, 1], documents.names[index]


def test_text_never_becomes_a_special_token(small) -> None:
    for split in ("train", "heldout"):
        shards = open_split(small.shards.path, split)
        tokens = shards.read(0, shards.n_tokens)
        assert int((tokens == 0).sum()) == int((tokens == 1).sum()) == shards.n_documents
        assert 2 not in tokens
    named = [name for split in ("train", "heldout") for name in open_split(small.shards.path, split).names]
    assert "hard/special.py" in named


def test_files_hold_whole_documents_up_to_the_size_asked_for(small) -> None:
    assert small.config.shard_bytes == 30_011
    for split in ("train", "heldout"):
        shards = open_split(small.shards.path, split)
        assert sum(len(file) for file in shards.files) == shards.n_tokens
        assert {file.dtype for file in shards.files} == {np.dtype("<u2")}
        begins = np.searchsorted(shards.offsets, np.cumsum([0, *(len(file) for file in shards.files)]))
        assert shards.offsets[begins].tolist() == np.cumsum([0, *(len(file) for file in shards.files)]).tolist()
        for first, last in itertools.pairwise(begins):
            assert last - first == 1 or shards.document_bytes[first:last].sum() <= 30_011
    assert len(open_split(small.shards.path, "train").files) > 3


def test_the_size_of_files_changes_no_token(small, tmp_path: Path) -> None:
    one = DataConfig(source=small.config.source, heldout_every=5, row_tokens=64)
    artifact, reused = build_shards(one, small.corpus, small.tokenizer, Store(tmp_path))
    assert not reused
    for split in ("train", "heldout"):
        many, whole = open_split(small.shards.path, split), open_split(artifact.path, split)
        assert len(whole.files) == 1
        assert many.read(0, many.n_tokens).tolist() == whole.read(0, whole.n_tokens).tolist()
        edge = len(many.files[0])
        for start, stop in ((edge - 7, edge + 9), (edge, edge + 1), (edge - 1, edge), (3, 3)):
            assert many.read(start, stop).tolist() == whole.files[0][start:stop].tolist()


def test_facts(small) -> None:
    facts = small.shards.facts
    for split in ("train", "heldout"):
        shards = open_split(small.shards.path, split)
        ledger = small.corpus.facts["ledger"][split]
        assert facts[split] == {
            "documents": ledger["documents"],
            "bytes": ledger["bytes"],
            "tokens": shards.n_tokens,
            "bytes_per_token": ledger["bytes"] / shards.n_tokens,
            "shards": len(shards.files),
        }
        assert (shards.n_documents, shards.n_bytes) == (ledger["documents"], ledger["bytes"])
    assert (facts["dtype"], facts["bos_id"], facts["eos_id"], facts["is_text"]) == ("<u2", 0, 1, True)


def test_a_large_vocabulary_takes_four_bytes(small, tmp_path: Path) -> None:
    large = Artifact(
        small.tokenizer.path, "tokenizer", "k", "another", dict(small.tokenizer.facts) | {"vocab_size": 65_537}
    )
    artifact, _ = build_shards(small.config, small.corpus, large, Store(tmp_path))
    wide, narrow = open_split(artifact.path, "heldout"), open_split(small.shards.path, "heldout")
    assert wide.files[0].dtype == np.dtype("<u4")
    assert wide.read(0, wide.n_tokens).tolist() == narrow.read(0, narrow.n_tokens).tolist()


def test_another_row_length_reuses_them(small) -> None:
    longer = DataConfig(source=small.config.source, heldout_every=5, row_tokens=128, shard_bytes=30_011)
    assert build_shards(longer, small.corpus, small.tokenizer, small.store) == (small.shards, True)


def test_a_corpus_shorter_than_a_row_is_refused(small) -> None:
    n_tokens = small.shards.facts["train"]["tokens"]
    for row_tokens, fits in ((n_tokens - 1, True), (n_tokens, False)):
        config = DataConfig(source=small.config.source, heldout_every=5, row_tokens=row_tokens, shard_bytes=30_011)
        if fits:
            build_shards(config, small.corpus, small.tokenizer, small.store)
        else:
            with pytest.raises(
                DataError, match=rf"data.row_tokens={n_tokens}: the training text has {n_tokens} tokens"
            ):
                build_shards(config, small.corpus, small.tokenizer, small.store)


def test_text_that_encodes_to_a_special_token_is_refused(small, tmp_path: Path) -> None:
    # A tokenizer whose facts call an ordinary token the end of text.
    wrong = Artifact(small.tokenizer.path, "tokenizer", "k", "wrong", dict(small.tokenizer.facts) | {"eos_id": 260})
    store = Store(tmp_path)
    with pytest.raises(DataError, match=r"\.py: its text is encoded to the special token 0 or 260"):
        build_shards(small.config, small.corpus, wrong, store)
    assert store.artifacts() == []


def test_progress_is_told(small, tmp_path: Path) -> None:
    told = []
    build_shards(small.config, small.corpus, small.tokenizer, Store(tmp_path), lambda kind, **f: told.append((kind, f)))
    n_bytes = sum(open_documents(small.corpus.path, split).n_bytes for split in ("train", "heldout"))
    kind, last = told[-1]
    assert kind == "progress"
    assert last == {"stage": "shards", "done": n_bytes, "total": n_bytes, "unit": "bytes"}


def test_shards_of_nothing(small, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no such file"):
        open_split(tmp_path, "train")
    with pytest.raises(StoreError, match="no shards of a split 'other'"):
        open_split(small.shards.path, "other")
