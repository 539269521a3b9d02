"""The fast encoder gives the tokenizer's own ids, over the whole corpus; where it cannot, the tokenizer is taken, and said."""

import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from kajiya.config.schema import DataConfig, TokenizerConfig
from kajiya.data.corpus import build_corpus
from kajiya.data.documents import open_documents
from kajiya.data.encode import (
    HARD_TEXTS,
    FastBulkEncoder,
    PlainBulkEncoder,
    open_bulk_encoder,
    open_encoder,
)
from kajiya.data.tokenizer import build_tokenizer
from kajiya.run.store import Store


def test_ids_are_equal_over_the_whole_corpus(small) -> None:
    found = open_bulk_encoder(small.tokenizer.path, HARD_TEXTS)
    assert found.is_fast
    assert found.words.startswith("fastokens, its ids equal to the tokenizer's own")
    plain = PlainBulkEncoder(open_encoder(small.tokenizer.path))
    for split in ("train", "heldout"):
        texts = list(open_documents(small.corpus.path, split).texts())
        for fast, slow in zip(found.bulk.encode(texts), plain.encode(texts), strict=True):
            assert fast.dtype == slow.dtype
            assert np.array_equal(fast, slow)


def test_what_the_fast_encoder_keeps_is_bounded(small, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind so much text it is opened anew, with the same ids."""
    monkeypatch.setattr("kajiya.data.encode._KEPT_TEXT", 1000)
    bulk = open_bulk_encoder(small.tokenizer.path, []).bulk
    assert isinstance(bulk, FastBulkEncoder)
    bulk.encode(["a" * 1001])
    first = bulk.encoder
    ids, _ = bulk.encode(["import os\n"])
    assert bulk.encoder is not first
    second = bulk.encoder
    assert np.array_equal(bulk.encode(["import os\n"])[0], ids)
    assert bulk.encoder is second


@pytest.mark.slow
def test_ids_are_equal_over_the_whole_standard_library(tmp_path: Path) -> None:
    store = Store(tmp_path)
    corpus, _ = build_corpus(DataConfig(), store)
    tokenizer, _ = build_tokenizer(TokenizerConfig(), corpus, store)
    found = open_bulk_encoder(tokenizer.path, HARD_TEXTS)
    assert found.is_fast
    plain = PlainBulkEncoder(open_encoder(tokenizer.path))
    n_bytes = 0
    for split in ("train", "heldout"):
        for _, texts in open_documents(corpus.path, split).batches(2**20):
            n_bytes += sum(len(text.encode()) for text in texts)
            for fast, slow in zip(found.bulk.encode(texts), plain.encode(texts), strict=True):
                assert np.array_equal(fast, slow)
    assert n_bytes > 5_000_000


BYTES = pre_tokenizers.ByteLevel.alphabet()
FAMILIES = {
    "gpt2": (
        lambda: models.BPE(),
        None,
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        trainers.BpeTrainer(
            vocab_size=900, initial_alphabet=BYTES, special_tokens=["<|endoftext|>"], show_progress=False
        ),
        True,
    ),
    "sentencepiece with byte fallback": (
        lambda: models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True),
        normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]),
        None,
        trainers.BpeTrainer(
            vocab_size=900, special_tokens=["<unk>", *(f"<0x{i:02X}>" for i in range(256))], show_progress=False
        ),
        True,
    ),
    "bert": (
        lambda: models.WordPiece(unk_token="[UNK]"),
        normalizers.BertNormalizer(),
        pre_tokenizers.BertPreTokenizer(),
        trainers.WordPieceTrainer(vocab_size=900, special_tokens=["[UNK]", "[MASK]"], show_progress=False),
        False,
    ),
    "unigram": (
        lambda: models.Unigram(),
        None,
        pre_tokenizers.Metaspace(),
        trainers.UnigramTrainer(vocab_size=700, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False),
        False,
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_are_equal_for_every_family_of_tokenizers(small, family: str, tmp_path: Path) -> None:
    model, normalizer, pre_tokenizer, trainer, is_fast = FAMILIES[family]
    tokenizer = Tokenizer(model())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    texts = list(open_documents(small.corpus.path, "heldout").texts())[:12]
    tokenizer.train_from_iterator([*texts, *HARD_TEXTS], trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    found = open_bulk_encoder(tmp_path, texts)
    assert found.is_fast == is_fast, found.words
    if not is_fast:
        assert found.words.startswith("tokenizers, since fastokens cannot read this tokenizer: ")
    # Transformers' way, one text at a time, is the truth.
    reference = open_encoder(tmp_path)
    ids, offsets = found.bulk.encode(texts)
    for number, text in enumerate(texts):
        expected = reference.encode(text, add_special_tokens=False).ids
        assert ids[offsets[number] : offsets[number + 1]].tolist() == expected


def test_an_encoder_that_differs_is_not_taken(small, monkeypatch: pytest.MonkeyPatch) -> None:
    right = FastBulkEncoder.encode

    def wrong(self: FastBulkEncoder, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        ids, offsets = right(self, texts)
        return (ids + 1 if "rare" in texts[0] else ids), offsets

    monkeypatch.setattr(FastBulkEncoder, "encode", wrong)
    assert open_bulk_encoder(small.tokenizer.path, ["common"]).is_fast
    found = open_bulk_encoder(small.tokenizer.path, ["common", "a rare word"])
    assert not found.is_fast
    assert found.words == "tokenizers, since fastokens gives other ids for 'a rare word'"


def test_without_the_package_the_tokenizer_is_taken(small, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastokens", None)
    found = open_bulk_encoder(small.tokenizer.path, [])
    assert not found.is_fast
    assert "pip install 'kajiya[fast]'" in found.words
