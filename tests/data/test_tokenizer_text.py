"""Which text a tokenizer is trained on when all of it would take too much memory."""

import random
from pathlib import Path

from kajiya.config.schema import TokenizerConfig
from kajiya.data.documents import Documents, DocumentWriter, open_documents
from kajiya.data.tokenizer import build_tokenizer, words
from kajiya.data.tokenizer_text import TrainingText, needs_no_cap, text_within
from kajiya.run.store import Artifact, Store


def documents_of(folder: Path, texts: list[str], split: str = "train") -> Documents:
    folder.mkdir(exist_ok=True)
    with DocumentWriter(folder, split) as writer:
        for number, text in enumerate(texts):
            writer.add(f"{number}", text.encode())
        return writer.finish()


def random_words(n_bytes: int, seed: int) -> str:
    letters = random.Random(seed)
    made, size = [], 0
    while size < n_bytes:
        made.append("".join(letters.choices("abcdefghijklmnop", k=12)))
        size += 13
    return " ".join(made)


def test_all_text_comes_in_order_and_long_documents_in_pieces(tmp_path: Path) -> None:
    long = "".join(f"line {number} of a long document\n" for number in range(100_000))
    texts = ["one", "", long, "x" * (2**20 + 5), "last"]
    given = list(TrainingText(documents_of(tmp_path, texts), "text").texts())
    assert "".join(given) == "".join(texts)
    assert max(map(len, given)) < 1.5 * 2**20
    assert all(piece.endswith("\n") for piece in given[2:5])


def test_one_piece_in_so_many_is_spread_evenly(tmp_path: Path) -> None:
    texts = [f"{number} " * (200_000 if number == 3 else 1) for number in range(20)]
    documents = documents_of(tmp_path, texts)
    whole = list(TrainingText(documents, "text").texts())
    for every in (2, 3, 7):
        assert list(TrainingText(documents, "text", every).texts()) == whole[::every]


def test_the_cap_is_kept_by_text_of_ever_new_words_and_left_alone_by_text_that_repeats(tmp_path: Path) -> None:
    fresh = documents_of(tmp_path / "fresh", [random_words(100_000, seed) for seed in range(60)])
    again = documents_of(tmp_path / "again", [random_words(100_000, 0)] * 60)
    assert not needs_no_cap(fresh, 256)
    assert needs_no_cap(fresh, 4096)
    assert text_within(again, "text", 256, words()).every == 1
    taken = text_within(fresh, "text", 256, words())
    assert taken.every > 1
    assert 0.5 * 128 * 2**20 < sum(map(len, taken.texts())) * 110 <= 1.1 * 128 * 2**20
    assert taken == text_within(fresh, "text", 256, words())


def test_a_tokenizer_of_a_part_is_said_and_keyed_by_the_cap(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    documents_of(folder, [random_words(100_000, seed) for seed in range(30)])
    documents_of(folder, ["held out"], "heldout")
    corpus, store = Artifact(folder, "corpus", "k", "d", {"format": "text"}), Store(tmp_path / "store")
    said: list[str] = []
    config = TokenizerConfig(vocab_size=300)

    def hear(kind: str, **fields: object) -> None:
        if kind == "warning":
            said.append(str(fields["text"]))

    part, _ = build_tokenizer(config, corpus, store, hear, memory_mib=128)
    assert part.facts["trained_on"]["every"] > 1
    assert any("data.memory_mib" in text for text in said)
    whole, reused = build_tokenizer(config, corpus, store, memory_mib=4096)
    assert not reused
    assert whole.facts["trained_on"] == {"bytes": open_documents(folder, "train").n_bytes, "every": 1}
    assert build_tokenizer(config, corpus, store, memory_mib=8192) == (whole, True)
