"""Near-duplicates: every one that is found is one, and hardly any is missed; contamination likewise."""

import json
import random
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kajiya.config.schema import DataConfig, HeldoutSourceConfig, SourceConfig
from kajiya.data.contamination import HeldoutSequences
from kajiya.data.corpus import build_corpus
from kajiya.data.duplicates import LineIndex
from kajiya.data.minhash import NearDuplicates, rows_of_a_band, signature
from kajiya.data.shingles import plain_text, shingles
from kajiya.errors import DataError
from kajiya.run.store import Store


def sequences(text: str, n: int) -> set[tuple[str, ...]]:
    """The definition, in words and not in hashes."""
    words = re.findall(r"\w+", text.casefold())
    n = min(n, len(words))
    return {tuple(words[start : start + n]) for start in range(len(words) - n + 1)} if words else set()


def jaccard(a: str, b: str, n: int) -> float:
    one, two = sequences(a, n), sequences(b, n)
    return len(one & two) / len(one | two) if one | two else 0.0


def changed(text: str, n_changes: int, rng: random.Random) -> str:
    words = text.split()
    for place in rng.sample(range(len(words)), n_changes):
        words[place] = f"other{rng.randrange(10**6)}"
    return " ".join(words)


def near(texts: list[str], folder: Path, threshold: float = 0.8, n_words: int = 5) -> dict[int, int]:
    """Which text is dropped for which, kept ones alone being compared with."""
    found = NearDuplicates(texts.__getitem__, len(texts), threshold=threshold, n_words=n_words, folder=folder)
    dropped = {}
    for index in range(len(texts)):
        match = found.nearest(index)
        if match is None:
            found.keep(index)
        else:
            dropped[index] = match.index
            assert match.share == pytest.approx(jaccard(texts[index], texts[match.index], n_words))
    found.close()
    assert list(folder.iterdir()) == []
    return dropped


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="abc éÉ_.\n", max_size=60), st.text(alphabet="abc éÉ_.\n", max_size=60), st.integers(1, 6))
def test_shingles_are_the_distinct_word_sequences(one: str, two: str, n: int) -> None:
    hashed = [shingles(text, n) for text in (one, two)]
    exact = [sequences(text, n) for text in (one, two)]
    assert [len(each) for each in hashed] == [len(each) for each in exact]
    assert len(np.intersect1d(*hashed)) == len(exact[0] & exact[1])
    assert all((np.diff(each.astype(np.float64)) >= 0).all() for each in hashed)


def test_the_signature_estimates_the_similarity() -> None:
    rng = random.Random(0)
    text = " ".join(f"word{rng.randrange(10**6)}" for _ in range(2000))
    for n_changes in (0, 20, 100, 400):
        other = changed(text, n_changes, rng)
        agreed = np.mean(signature(shingles(text, 5)) == signature(shingles(other, 5)))
        # 128 hashes: a standard error of 0.044 at most.
        assert agreed == pytest.approx(jaccard(text, other, 5), abs=0.14)


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8, 0.9, 1.0])
def test_bands_miss_at_most_one_in_a_hundred_at_the_threshold(threshold: float) -> None:
    rows = rows_of_a_band(threshold)
    bands = 128 // rows
    assert 1 - (1 - threshold**rows) ** bands >= 0.99 or rows == 1


def test_found_ones_are_near_and_near_ones_are_found(tmp_path: Path) -> None:
    rng = random.Random(1)
    originals = [" ".join(f"w{rng.randrange(500)}" for _ in range(rng.randint(40, 200))) for _ in range(60)]
    texts = originals + [changed(text, rng.choice([0, 1, 2, 4, 15]), rng) for text in originals for _ in range(3)]
    rng.shuffle(texts)
    dropped = near(texts, tmp_path)
    kept = [index for index in range(len(texts)) if index not in dropped]
    for index, twin in dropped.items():
        assert twin < index
        assert twin in kept
        assert jaccard(texts[index], texts[twin], 5) >= 0.8
    # Brute force: what is left over of pairs at or above the threshold.
    left = [(a, b) for b in kept for a in kept if a < b and jaccard(texts[a], texts[b], 5) >= 0.8]
    assert len(dropped) > 80
    assert len(left) <= 0.01 * len(dropped)


def test_empty_short_and_equal_texts(tmp_path: Path) -> None:
    assert near(["", "!?", "one two", "One, TWO!", "one two three", ""], tmp_path) == {3: 2}


def test_a_chain_is_measured_by_its_ends(tmp_path: Path) -> None:
    words = [f"w{number}" for number in range(300)]
    shifted = [" ".join(words[start : start + 200]) for start in range(0, 60, 12)]
    assert all(jaccard(a, b, 5) >= 0.8 for a, b in pairwise(shifted))
    # Each is near the next, but only what is near a text that stays goes: the second, the fourth.
    assert near(shifted, tmp_path) == {1: 0, 3: 2}


def test_a_bucket_full_of_dropped_texts_is_passed_over(tmp_path: Path) -> None:
    assert near(["a b c d e f g"] * 500, tmp_path) == dict.fromkeys(range(1, 500), 0)


def test_rows_that_are_compared_with_some_of_the_likely_ones_alone_are_counted_and_said(tmp_path: Path) -> None:
    """Rows that differ in one word share buckets, and none is equal to another."""
    shared = " ".join(f"w{number}" for number in range(200))
    rows = [f"{shared} v{number}" for number in range(130)]
    for n_rows in (90, 130):
        path = tmp_path / f"{n_rows}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows[:n_rows]))
        said: list[str] = []

        def hear(kind: str, said: list[str] = said, **fields: Any) -> None:
            said += [fields["text"]] if kind == "note" and "minhash" in fields["text"] else []

        config = DataConfig(
            source=SourceConfig("jsonl", {"files": str(path)}),
            heldout_source=HeldoutSourceConfig("jsonl", {"files": str(tmp_path / "held.jsonl")}),
            duplicates="minhash",
            minhash_similarity=1,
            near_duplicate=None,
        )
        (tmp_path / "held.jsonl").write_text('{"text": "something else"}\n')
        facts = build_corpus(config, Store(tmp_path / "store"), hear)[0].facts
        assert facts["ledger"]["train"]["documents"] == n_rows, "none is a double"
        n_limited = facts.get("compared_in_part", 0)
        assert (0 < n_limited < 30) if n_rows > 101 else n_limited == 0
        assert [f"{n_limited} rows have more than 100 likely doubles" in text for text in said] == [True] * (
            n_rows > 101
        )


def test_contamination_against_the_definition() -> None:
    rng = random.Random(2)
    held = [" ".join(f"h{rng.randrange(50)}" for _ in range(rng.randint(0, 60))) for _ in range(30)]
    index = HeldoutSequences(held, 4)
    for _ in range(60):
        piece = rng.choice(held).split()
        inside = " ".join(piece[: rng.randint(0, len(piece))])
        text = f"{inside} " + " ".join(f"t{rng.randrange(50)}" for _ in range(20))
        own = sequences(text, 4)
        shares = [len(own & sequences(each, 4)) / max(1, len(sequences(each, 4))) for each in held]
        match = index.nearest(text, 0.25)
        if max(shares) <= 0.25:
            assert match is None
        else:
            assert match is not None
            assert match.share == pytest.approx(max(shares))
            assert shares[match.index] == max(shares)


def test_thirteen_words_of_a_held_out_text_are_found_in_a_long_one() -> None:
    held = " ".join(f"question{number}" for number in range(40))
    index = HeldoutSequences(["", held], 13)
    inside = " ".join(held.split()[7:20])
    assert index.nearest(f"{'before ' * 100}{inside}{' after' * 100}", 0.0) is not None
    assert index.nearest(f"{'before ' * 100}{' '.join(held.split()[7:19])}{' after' * 100}", 0.0) is None
    match = index.nearest(inside, 0.0)
    assert match is not None
    assert (match.index, match.share) == (1, pytest.approx(1 / 28))


@pytest.mark.parametrize(("name", "value"), [("contamination_words", 3), ("near_duplicate", 0.5)])
def test_an_index_that_does_not_fit_the_memory_is_refused_before_it_is_made(
    name: str, value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cap leaves 28 bytes for each of so many sequences (or lines) of the held-out documents, and then for one fewer."""
    for number in range(60):
        (tmp_path / f"{number}.txt").write_text("".join(f"a{line} b{number} c{line}\n" for line in range(50)))
    off = {"contamination_words": None, "near_duplicate": None, "heldout_every": 3}
    config = DataConfig(source=SourceConfig("text", {"files": f"{tmp_path}/*.txt"}), **(off | {name: value}))
    facts = build_corpus(config, Store(tmp_path / "store"))[0].facts
    n_held = facts["ledger"]["heldout"]["documents"] * {"contamination_words": 148, "near_duplicate": 50}[name]
    monkeypatch.setattr("kajiya.data.cleaning.room_bytes", lambda _: 2**25 + 28 * n_held)
    build_corpus(config, Store(tmp_path / "fits"))
    monkeypatch.setattr("kajiya.data.cleaning.room_bytes", lambda _: 2**25 + 28 * n_held - 1)
    words = rf"^data\.{name}={value}: an index of the held-out rows .*data\.memory_mib=4096 leaves\.\nRaise .*{name}=null\.$"
    with pytest.raises(DataError, match=words):
        build_corpus(config, Store(tmp_path / "other"))


MEASURED = """
import random
from kajiya.config.schema import DataConfig, HeldoutSourceConfig, SourceConfig
from kajiya.data.contamination import HeldoutSequences
from kajiya.run.usage import peak_memory

rng = random.Random(0)
words = [f"w{number}" for number in range(20_000)]
before = peak_memory()
HeldoutSequences((" ".join(rng.choices(words, k=2_000)) for _ in range(1_500)), 3)
print(peak_memory() - before)
"""


@pytest.mark.slow
def test_the_index_of_sequences_takes_what_is_said() -> None:
    done = subprocess.run([sys.executable, "-c", MEASURED], capture_output=True, text=True, check=True)
    assert 20 < int(done.stdout) / 3_000_000 < 32


def test_of_a_structured_row_its_strings_are_compared() -> None:
    row = b'{"messages": [{"role": "user", "content": "one", "n": 3}, {"role": "assistant", "content": "two"}]}'
    assert plain_text(row, is_text=False) == "one\ntwo"
    assert plain_text(row, is_text=True) == row.decode()


def test_a_short_row_is_not_alike_because_of_its_instruction() -> None:
    held = ["Translate this.\nBonjour."]
    assert LineIndex(held).nearest("Translate this.\nAu revoir.", 0.5) is not None
    assert LineIndex(held, few_lines_of_text=20).nearest("Translate this.\nAu revoir.", 0.5) is None
