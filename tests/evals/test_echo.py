"""Texts that come back in tokens: every byte has one, however they are spelt; windows over them add up to the whole text."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kajiya.data.tokenizer import train_bpe
from kajiya.errors import ConfigError, KajiyaError
from kajiya.evals.echo import Echo, Piece, read_echo
from kajiya.evals.endpoint import RefusedError
from kajiya.evals.evaluate_endpoint import score_text
from kajiya.serving.text import byte_reader, token_text

LETTERS = "ab ß日🙂\n"


def _spans(text: str, tokens: list[str]) -> list[tuple[str, int]]:
    """The stretches of a text and how many tokens each has, under −1 a token."""
    raw = text.encode()
    echo = read_echo(text, tokens, [-1.0] * len(tokens))
    assert [each.start for each in echo.pieces] == [0, *(each.end for each in echo.pieces[:-1])]
    assert echo.pieces[-1].end == len(raw)
    assert all(each.logprob == -each.n_tokens for each in echo.pieces)
    return [(raw[each.start : each.end].decode(), each.n_tokens) for each in echo.pieces]


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (["a", " ", "日本", "é"], [("a", 1), (" ", 1), ("日本", 1), ("é", 1)]),
        # Parts of letters: spelt out as this project and OpenAI do, as U+FFFD, empty but for the last one of a letter.
        (
            ["a", "bytes: \\xe6\\x97", "bytes:\\xa5", "bytes:\\xe6\\x9c", "bytes:\\xac", "é"],
            [("a", 1), (" 日", 2), ("本", 2), ("é", 1)],
        ),
        (["a", " \ufffd", "\ufffd", "\ufffd\ufffd", "\ufffd", "é"], [("a", 1), (" 日本", 4), ("é", 1)]),
        (["a", " ", "", "", "日", "", "本", "\ufffd", "\ufffd"], [("a", 1), (" ", 1), ("日", 3), ("本", 2), ("é", 2)]),
        (["a", "日本é"], [("a", 1), (" 日本é", 1)]),  # without the space in front
        ([" a", " 日本", "é"], [("a", 1), (" 日本", 1), ("é", 1)]),  # with one that the text does not have
        ([" ", "a", " 日本", "é"], [("a", 2), (" 日本", 1), ("é", 1)]),
        (["<s>", "a", " 日本é", "</s>"], [("a", 1), (" 日本é", 1)]),
    ],
)
def test_tokens_are_found_however_they_are_spelt(tokens: list[str], expected: list[tuple[str, int]]) -> None:
    assert _spans("a 日本é", tokens) == expected


def test_what_looks_spelt_out_may_be_the_text_itself() -> None:
    assert _spans("bytes:\\xe2\ufffd!", ["bytes:", "\\xe2", "\ufffd", "!"]) == [
        ("bytes:", 1), ("\\xe2", 1), ("\ufffd", 1), ("!", 1),
    ]  # fmt: skip


def test_a_start_token_is_none_of_the_text_and_a_first_token_has_no_log_probability() -> None:
    assert read_echo("ab", ["<s>", "a", "b"], [None, -1.0, -2.0]) == Echo(
        [Piece(0, 1, -1.0, 1), Piece(1, 2, -2.0, 1)], 1
    )
    assert read_echo("ab", ["a", "b"], [None, -2.0]) == Echo([Piece(0, 1, None, 1), Piece(1, 2, -2.0, 1)], 0)
    found = read_echo("éb", ["bytes:\\xc3", "bytes:\\xa9", "b"], [None, -1.0, -2.0])
    assert found == Echo([Piece(0, 2, None, 2), Piece(2, 3, -2.0, 1)], 0)


@pytest.mark.parametrize("tokens", [["a"], ["a", "c"], ["A", "b"], ["Ġa", "b"], ["b"], [], ["a", "\ufffd", "x"]])
def test_tokens_of_another_text_are_refused(tokens: list[str]) -> None:
    with pytest.raises(KajiyaError, match="The endpoint's tokens are not those of the text"):
        read_echo("ab", tokens, [-1.0] * len(tokens))


# ---------------------------------------------------------------- windows


def _cost(text: str) -> float:
    return sum(1 + ord(letter) % 7 for letter in text)


def _unsteady(limit: int | None) -> Callable[[str], Echo]:
    """Tokens of two or three letters, by the first letter of what is asked: they lie otherwise in every other window."""

    def ask(text: str) -> Echo:
        size = 2 + ord(text[0]) % 2
        tokens = [text[i : i + size] for i in range(0, len(text), size)]
        if limit is not None and len(tokens) + 1 > limit:
            raise RefusedError("too long")
        return read_echo(text, ["<s>", *tokens], [None, *(-_cost(each) for each in tokens)])

    return ask


@given(
    text=st.text(LETTERS, max_size=500),
    context=st.integers(8, 40),
    share=st.floats(0.4, 1),
    is_limited=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_every_byte_is_scored_once(text: str, context: int, share: float, is_limited: bool) -> None:
    ask = _unsteady(context * 3 // 2 if is_limited else None)
    found = score_text(ask, text, context, max(1, round(context * share)))
    assert found.n_bytes == len(text.encode())
    assert found.n_unscored_bytes == 0
    assert found.nats == pytest.approx(_cost(text))


@pytest.fixture(scope="module")
def bpe() -> Any:
    """A byte-level BPE that has whole words."""
    from transformers import PreTrainedTokenizerFast

    backend = train_bpe(iter([TEXT]), 400, 2)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|bos|>", eos_token="<|eos|>")


TEXT = "".join(
    f"Line {n} says that the unbelievably long {word} was seen again: naïve, 東京, «ça» 🙂!\n"
    for n, word in enumerate(("otter", "badger", "swallow", "kingfisher", "hedgehog") * 8)
)


def _bigram(before: int, token: int) -> float:
    return -((17 * before + 31 * token) % 97) / 10


@pytest.mark.parametrize("has_start", [True, False])
@pytest.mark.parametrize(("context", "stride"), [(2000, 1000), (64, 32), (64, 64), (33, 6), (16, 8)])
@pytest.mark.parametrize("limit", [None, 65])
def test_windows_score_the_tokens_of_the_whole_text(
    bpe: Any, has_start: bool, context: int, stride: int, limit: int | None
) -> None:
    read = byte_reader(bpe)
    longest = 0

    def ask(text: str) -> Echo:
        nonlocal longest
        ids = bpe.encode(text, add_special_tokens=has_start)
        if limit is not None and len(ids) > limit:
            raise RefusedError("too long")
        longest = max(longest, len(ids))
        logprobs = [None, *(_bigram(*pair) for pair in pairwise(ids))]
        return read_echo(text, [token_text(read(token)) for token in ids], logprobs)

    if limit is not None and context > limit:
        with pytest.raises(KajiyaError, match=r"too long\nIt was sent .* lower eval\.context_tokens"):
            score_text(ask, TEXT, context, stride)
        return
    ids = bpe.encode(TEXT, add_special_tokens=has_start)
    found = score_text(ask, TEXT, context, stride)
    expected = [-_bigram(*pair) for pair in pairwise(ids)]
    assert found.n_tokens == len(expected)
    assert found.nats == pytest.approx(sum(expected))
    assert found.n_unscored_bytes == (0 if has_start else len(read(ids[0])))
    assert found.n_bytes == len(TEXT.encode()) - found.n_unscored_bytes
    assert longest > min(context, len(ids)) * 0.5


def test_windows_that_never_end_a_token_are_an_error() -> None:
    def ask(text: str) -> Echo:
        return Echo([Piece(0, len(text), -1.0, len(text))], 0)

    with pytest.raises(ConfigError, match=r"eval\.context_tokens: windows of 8 tokens do not get on"):
        score_text(ask, "x" * 100, 8, 4)
