"""Names and digests kept out of memory: as a list and a dictionary would have them."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kajiya.data.digests import Digests, digest_of
from kajiya.data.documents import DocumentWriter, close_up, open_documents, write_names
from kajiya.data.names import open_names


def test_names_come_back_whatever_they_hold(tmp_path: Path) -> None:
    wanted = ["a.py", "", "two\nlines", "名前", "\ud800 alone", "x" * 5000]
    write_names(tmp_path, "train", wanted)
    names = open_names(tmp_path, "train")
    assert list(names) == wanted
    assert (names[-1], names[1:3], len(names)) == (wanted[-1], wanted[1:3], 6)
    assert names.index("名前") == 3
    with pytest.raises(IndexError):
        names[6]


def test_no_names(tmp_path: Path) -> None:
    write_names(tmp_path, "train", [])
    assert list(open_names(tmp_path, "train")) == []


def test_a_split_is_closed_up_in_place(tmp_path: Path) -> None:
    with DocumentWriter(tmp_path, "train") as writer:
        for number in range(50):
            writer.add(f"{number}.txt", b"text %d " % number * number)
        documents = writer.finish()
    stays = np.arange(50) % 3 != 1
    close_up(documents, stays)
    left = open_documents(tmp_path, "train")
    kept = np.flatnonzero(stays).tolist()
    assert list(left.names) == [f"{number}.txt" for number in kept]
    assert [left.read(index) for index in range(len(left))] == [b"text %d " % number * number for number in kept]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "train.bin",
        "train.names.bin",
        "train.names.npy",
        "train.offsets.npy",
    ]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 3000), max_size=4000))
def test_digests_are_a_dictionary(numbers: list[int]) -> None:
    digests, truth = Digests(), {}
    for place, number in enumerate(numbers):
        key = digest_of(b"%d" % number)
        assert digests.first(key) == truth.get(number)
        if number not in truth:
            digests.add(key, place)
            truth[number] = place
    assert len(digests) == len(truth)
    assert all(digests.first(digest_of(b"%d" % number)) == place for number, place in truth.items())
