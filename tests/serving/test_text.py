"""Text from tokens: whole characters, stop strings across tokens, and the bytes of each token."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kajiya.serving.answer import Answer
from kajiya.serving.sequence import Output, TokenLogprob
from kajiya.serving.text import StopMatcher, TextStream, byte_reader, decoder_of, token_text

HARD = "naïve café — 日本語 𝔘𝔫𝔦 👩‍👩‍👧‍👦 ∑∞ \u200d ẹ̃"


def _stream(tokenizer: Any, ids: list[int], context: list[int]) -> list[str]:
    stream = TextStream(tokenizer, context)
    return [stream.push(token) for token in ids]


def test_characters_split_over_tokens_come_out_whole(tokenizer: Any) -> None:
    ids = tokenizer.encode(HARD)
    # The point of the text: the tokenizer has seen none of it, so that characters are cut.
    assert any("\ufffd" in tokenizer.decode([token]) for token in ids)
    pieces = _stream(tokenizer, ids, [])
    assert "".join(pieces) == HARD
    assert not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=60), cut=st.integers(0, 30))
def test_any_text_streams_to_itself(tokenizer: Any, text: str, cut: int) -> None:
    ids = tokenizer.encode(text)
    whole = "".join(_stream(tokenizer, ids, []))
    # U+FFFD itself, at the very end, cannot be told from an unfinished character.
    assert whole == text.rstrip("\ufffd") or whole == text
    before, after = ids[:cut], ids[cut:]
    if "\ufffd" not in tokenizer.decode(before):
        assert tokenizer.decode(before) + "".join(_stream(tokenizer, after, before)) == whole


@settings(max_examples=100, deadline=None)
@given(
    parts=st.lists(st.text(max_size=20) | st.lists(st.integers(0, 511), max_size=5), max_size=8),
    cuts=st.lists(st.integers(0, 40), max_size=12),
    n_before=st.integers(0, 10),
)
def test_tokens_that_come_together_say_what_they_say_one_by_one(
    tokenizer: Any, parts: list[str | list[int]], cuts: list[int], n_before: int
) -> None:
    """Text and bytes that are none, special tokens among them, in portions of any size."""
    ids = [token for part in parts for token in (tokenizer.encode(part) if isinstance(part, str) else part)]
    context, ids = ids[:n_before], ids[n_before:]
    stream, said, first = TextStream(tokenizer, context), "", 0
    for cut in [*cuts, len(ids)]:
        said += stream.push_all(ids[first : first + cut])
        first += cut
        assert said == "".join(_stream(tokenizer, ids[:first], context))


@settings(max_examples=60, deadline=None)
@given(ids=st.lists(st.integers(0, 600), max_size=12))
def test_tokens_are_decoded_as_the_tokenizer_does(tokenizer: Any, ids: list[int]) -> None:
    assert decoder_of(tokenizer)(ids) == tokenizer.decode(ids, skip_special_tokens=True)


def test_a_tokenizer_that_decodes_in_its_own_way_is_asked_itself() -> None:
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    class Shouting(PreTrainedTokenizerFast):
        def _decode(self, *args: Any, **settings: Any) -> str:
            return super()._decode(*args, **settings).upper()

    pieces = Tokenizer(models.WordPiece({"[UNK]": 0, "so": 1, "##me": 2, "!": 3}, unk_token="[UNK]"))
    pieces.decoder = decoders.WordPiece(cleanup=False)
    for kind, cleans, text in (
        (PreTrainedTokenizerFast, False, "some !"),
        (PreTrainedTokenizerFast, True, "some!"),
        (Shouting, False, "SOME !"),
    ):
        tokenizer = kind(tokenizer_object=pieces, clean_up_tokenization_spaces=cleans)
        assert tokenizer.decode([1, 2, 3]) == text
        assert decoder_of(tokenizer)([1, 2, 3]) == text


def test_an_unfinished_character_at_the_end_is_left_out(tokenizer: Any) -> None:
    ids = tokenizer.encode("a日")
    assert len(ids) == 4
    assert "".join(_stream(tokenizer, ids[:-1], [])) == "a"


def test_bytes_that_are_no_text_are_shown_as_such_and_do_not_swallow_what_follows(tokenizer: Any) -> None:
    ids = tokenizer.encode("日")[:1] * 5 + tokenizer.encode("日 done")
    text = "".join(_stream(tokenizer, ids, []))
    assert text == "\ufffd" * 5 + "日 done"
    endless = _stream(tokenizer, tokenizer.encode("日")[:1] * 300, [])
    assert 290 <= len("".join(endless)) <= 300


def test_long_streams_equal_one_decode(tokenizer: Any) -> None:
    text = "def f(x):\n    return x  # " + HARD * 40
    ids = tokenizer.encode(text)
    assert "".join(_stream(tokenizer, ids, [])) == text


@settings(max_examples=200, deadline=None)
@given(
    text=st.text(alphabet="abc", max_size=40),
    stops=st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(1, 4), min_size=40, max_size=40),
)
def test_stop_strings_do_not_depend_on_where_tokens_are_cut(text: str, stops: list[str], cuts: list[int]) -> None:
    matcher = StopMatcher(stops)
    passed, rest = "", text
    for size in cuts:
        passed += matcher.push(rest[:size])
        # Nothing that has been given out is ever regretted.
        assert not any(stop in passed for stop in stops)
        rest = rest[size:]
        if matcher.is_stopped:
            break
    ends = {text.find(stop) + len(stop): stop for stop in sorted(stops, key=len) if stop in text}
    if ends:
        end = min(ends)
        assert matcher.is_stopped
        assert passed == text[: end - len(ends[end])]
    else:
        assert not matcher.is_stopped
        assert passed + matcher.flush() == text


def test_only_what_may_become_a_stop_is_held_back() -> None:
    matcher = StopMatcher(["END", "EX"])
    assert [matcher.push(part) for part in ("one E", "N", "o E", "EN", "D two")] == ["one ", "", "ENo ", "E", ""]
    assert matcher.is_stopped
    assert matcher.push("more") == ""


def test_every_token_has_its_bytes(tokenizer: Any) -> None:
    read = byte_reader(tokenizer)
    ids = tokenizer.encode(HARD)
    assert b"".join(read(token) for token in ids) == HARD.encode()
    assert sorted(read(token) for token in range(1, 257)) == sorted(bytes([byte]) for byte in range(256))
    assert read(0) == b"<|end|>"
    assert read(5000) == b""


def test_bytes_of_a_sentencepiece_kind_of_tokenizer() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + ["▁a", "▁", "b"]
    vocab = {piece: i for i, piece in enumerate(["<unk>", *pieces])}
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace()
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>")
    read = byte_reader(tokenizer)
    assert read(vocab["▁a"]) == b" a"
    assert read(vocab["<0xE6>"]) == b"\xe6"
    ids = [vocab["▁a"], *(vocab[f"<0x{byte:02X}>"] for byte in "日".encode()), vocab["b"]]
    stream = TextStream(tokenizer)
    assert [stream.push(token) for token in ids] == [" a", "", "", "日", "b"]


def test_part_of_a_character_is_written_as_bytes() -> None:
    assert token_text("é".encode()) == "é"
    assert token_text(b"\xc3") == "bytes:\\xc3"


def _outputs(ids: list[int], reason: str) -> list[Output]:
    last = len(ids) - 1
    return [Output("a", TokenLogprob(t, -1.0), None, reason if i == last else None) for i, t in enumerate(ids)]


def test_tokens_behind_a_stop_string_are_not_released(tokenizer: Any) -> None:
    text = "return value STOP and more"
    ids = tokenizer.encode(text)
    answer = Answer(tokenizer, [], ["STOP"])
    pieces = []
    for output in _outputs(ids, "length"):
        pieces.append(answer.take([output]))
        if answer.is_stopped:
            break
    assert "".join(piece.text for piece in pieces) == "return value "
    assert pieces[-1].finish_reason == "stop"
    entries = [entry for piece in pieces for entry in piece.entries]
    assert tokenizer.decode([entry.token for entry in entries]).rstrip() == "return value"
    assert [entry.offset for entry in entries] == sorted(entry.offset for entry in entries)


def test_held_text_comes_out_at_the_end_with_its_tokens(tokenizer: Any) -> None:
    ids = tokenizer.encode("so ST")
    answer = Answer(tokenizer, [], ["STOP"])
    pieces = [answer.take([output]) for output in _outputs(ids, "length")]
    assert "".join(piece.text for piece in pieces) == "so ST"
    assert [entry.token for piece in pieces for entry in piece.entries] == ids
    assert pieces[-1].finish_reason == "length"


def test_an_answer_whose_tokens_are_not_asked_for_has_the_same_text(tokenizer: Any) -> None:
    ids = tokenizer.encode(HARD + " STO and more")
    texts = []
    for with_entries in (True, False):
        answer = Answer(tokenizer, ids[:9], ["STOP"], "echoed: ", with_entries)
        pieces = [answer.take([output]) for output in _outputs(ids, "length")]
        assert any(piece.entries for piece in pieces) == with_entries
        texts.append([piece.text for piece in pieces])
    assert texts[0] == texts[1]
    assert "".join(texts[0]).endswith(" STO and more")


@pytest.mark.parametrize("stops", [[], ["STOP", "n, i"]])
@pytest.mark.parametrize("with_entries", [True, False])
@pytest.mark.parametrize("reason", ["stop", "length"])
def test_outputs_that_come_together_are_those_that_come_one_by_one(
    tokenizer: Any, stops: list[str], with_entries: bool, reason: str
) -> None:
    ids = tokenizer.encode(HARD + " then, in the end, STOPped")
    found = []
    for portion in (1, 3, 7, len(ids)):
        answer, outputs = Answer(tokenizer, [], stops, "echoed: ", with_entries), _outputs(ids, reason)
        pieces = []
        for first in range(0, len(ids), portion):
            pieces.append(answer.take(outputs[first : first + portion]))
            if answer.is_stopped:
                break
        entries = [entry for piece in pieces for entry in piece.entries]
        found.append(("".join(piece.text for piece in pieces), entries, answer.n_tokens, pieces[-1].finish_reason))
    assert found == [found[0]] * 4
    assert found[0][0].startswith("echoed: " + HARD)
    assert found[0][0].endswith(" the") == bool(stops)


@pytest.mark.parametrize("reason", ["stop", "length"])
def test_the_token_that_ends_the_answer_is_no_text(tokenizer: Any, reason: str) -> None:
    ids = [*tokenizer.encode("yes"), 0]
    answer = Answer(tokenizer, [], [])
    pieces = [answer.take([output]) for output in _outputs(ids, reason)]
    assert "".join(piece.text for piece in pieces) == "yes"
    assert answer.n_tokens == len(ids)
    assert len([entry for piece in pieces for entry in piece.entries]) == len(ids) - (reason == "stop")


def test_echo_places_the_answer_behind_the_prompt(tokenizer: Any) -> None:
    prompt, ids = tokenizer.encode("def f"), tokenizer.encode("(x)")
    answer = Answer(tokenizer, prompt, [], echo="def f")
    pieces = [answer.take([output]) for output in _outputs(ids, "length")]
    assert "".join(piece.text for piece in pieces) == "def f(x)"
    entries = [entry for piece in pieces for entry in piece.entries]
    assert [entry.token for entry in entries] == prompt + ids
    assert entries[len(prompt)].offset == len("def f")
