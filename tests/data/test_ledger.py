"""The ledger over the whole path: it adds up, says what does not, and stops the work when too much is lost."""

from typing import Any

import pytest

from kajiya.data.ledger import CONTAMINATED, LOST, CorpusLedger, data_ledger, ledger_table, ledger_words, require_kept
from kajiya.errors import DataError


def corpus(unreadable: int = 0) -> dict[str, Any]:
    ledger = CorpusLedger()
    for number in range(100 + unreadable + 7):
        ledger.entered.add(10)
        if number < 90:
            ledger.train.add(10)
        elif number < 100:
            ledger.heldout.add(10)
        elif number < 107:
            ledger.drop(CONTAMINATED, "duplicate of a held-out document", 10, f"row {number}")
        else:
            ledger.drop(LOST, "unreadable", 10, f"row {number}: is no JSON")
    return {"ledger": ledger.facts()}


SHARDS = {
    "train": {"documents": 90, "bytes": 900, "tokens": 450},
    "heldout": {"documents": 10, "bytes": 100, "tokens": 50},
}
WHOLE = {"cut_examples": 0, "cut_tokens": 0, "dropped_examples": 0, "dropped_tokens": 0, "dropped_bytes": 0}


def packing(**train: int) -> dict[str, Any]:
    losses = WHOLE | train
    tokens = 450 - losses["cut_tokens"] - losses["dropped_tokens"]
    return {
        "train": {"examples": 90 - losses["dropped_examples"], "tokens": tokens} | losses,
        "heldout": {"examples": 10, "tokens": 50} | WHOLE,
    }


def test_all_three_sums_hold_through_every_stage() -> None:
    for shards, packed in (
        (None, None),
        (SHARDS, None),
        (SHARDS, packing()),
        (SHARDS, packing(cut_examples=3, cut_tokens=12, dropped_examples=2, dropped_tokens=40, dropped_bytes=25)),
    ):
        ledger = data_ledger(corpus(unreadable=1), shards, packed)
        assert ledger.problems == ()
        assert sum(line.rows for line in ledger.lines) == ledger.rows == 108
        assert sum(line.bytes for line in ledger.lines) == ledger.bytes == 1080
        assert sum(line.tokens or 0 for line in ledger.lines) == (ledger.tokens or 0) == (500 if shards else 0)
        table = ledger_table(ledger)
        assert table[0][1:] == table[-1][1:]


def test_what_was_cut_and_dropped_has_lines_of_its_own() -> None:
    losses = {"cut_examples": 3, "cut_tokens": 12, "dropped_examples": 2, "dropped_tokens": 40, "dropped_bytes": 25}
    ledger = data_ledger(corpus(), SHARDS, packing(**losses))
    assert ledger_table(ledger) == [
        ["entered", "107", "1,070", "500"],
        ["to train on, 3 of them cut at their end", "88", "875", "398"],
        ["lost: to train on: cut off", "0", "0", "12"],
        ["lost: to train on: dropped, longer than a row may be", "2", "25", "40"],
        ["held out", "10", "100", "50"],
        ["contaminated: duplicate of a held-out document", "7", "70", "—"],
        ["accounted for", "107", "1,070", "500"],
    ]
    assert ledger.lost == {"rows": (2, 100), "bytes": (25, 1000), "tokens": (52, 500)}
    assert ledger_words(ledger) == (
        "107 rows entered = 88 to train on + 10 held out + 2 lost + 7 contaminated; 52 of 500 tokens lost"
    )
    assert ledger.facts()["lost"] == ledger.lost


@pytest.mark.parametrize(
    ("part", "problem"),
    [
        ({"documents": 89}, "90 rows to train on, but 89 tokenized"),
        ({"bytes": 899}, "900 bytes to train on, but 899 tokenized"),
        ({"tokens": 451}, "451 tokens to train on, but 450 packed, cut or dropped"),
    ],
)
def test_stages_that_counted_differently_are_found_out(part: dict[str, int], problem: str) -> None:
    shards = SHARDS | {"train": SHARDS["train"] | part}
    assert problem in data_ledger(corpus(), shards, packing()).problems


def test_a_corpus_that_does_not_add_up_is_our_own_fault() -> None:
    ledger = CorpusLedger()
    ledger.entered.add(10)
    ledger.train.add(9)
    with pytest.raises(AssertionError, match="does not add up"):
        ledger.facts()


def test_too_much_lost_stops_the_work_and_says_which_setting_would_change_it() -> None:
    require_kept(data_ledger(corpus(unreadable=1)), 0.01)
    with pytest.raises(DataError) as caught:
        require_kept(data_ledger(corpus(unreadable=2)), 0.01)
    assert str(caught.value) == (
        "data.max_lost_fraction=0.01: 1.96% of the rows are lost (2 of 102): unreadable: 2 rows, 20 bytes (for example "
        "row 107: is no JSON).\nChange data.on_unreadable, mend the rows, or allow it with data.max_lost_fraction=0.0197."
    )
    require_kept(data_ledger(corpus(unreadable=2)), 0.0197)
    with pytest.raises(DataError, match=r"1.20% of the tokens are lost \(6 of 500\).*\nChange data.row_tokens"):
        require_kept(data_ledger(corpus(), SHARDS, packing(cut_examples=1, cut_tokens=6)), 0.01)


def test_a_ledger_that_does_not_add_up_stops_the_work() -> None:
    shards = SHARDS | {"train": SHARDS["train"] | {"documents": 89}}
    with pytest.raises(DataError, match=r"does not add up: 90 rows to train on, but 89 tokenized.*\n.*store verify"):
        require_kept(data_ledger(corpus(), shards), 1.0)


def test_prompts_without_room_for_an_answer_are_lost() -> None:
    packed = packing(dropped_examples=2, dropped_tokens=40, dropped_bytes=25, answer_tokens=6)
    with pytest.raises(DataError) as caught:
        require_kept(data_ledger(corpus(), SHARDS, packed), 0.01)
    assert "longer than a row may be, or than leaves room for an answer of 6 tokens: 2 rows" in str(caught.value)
    assert "data.on_long or train.loss.options.max_tokens" in str(caught.value)


def test_what_is_left_out_on_purpose_is_not_lost() -> None:
    require_kept(data_ledger(corpus()), 0.0)
