"""Packing against a slow best-fit-decreasing; it loses, doubles and divides nothing, and never overfills."""

import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kajiya.config.schema import DataConfig, RenderConfig, SourceConfig
from kajiya.data.corpus import build_corpus
from kajiya.data.documents import open_documents
from kajiya.data.effects import require_effect
from kajiya.data.examples import Example, Segment
from kajiya.data.pack import best_fit, build_packing, choose_packing, cut_to, open_packing
from kajiya.data.shards import Rendering, build_shards, open_split
from kajiya.errors import ConfigError, DataError
from kajiya.run.store import Store


def rows_of(order: np.ndarray, rows: np.ndarray) -> list[list[int]]:
    return [order[start:stop].tolist() for start, stop in itertools.pairwise(rows)]


def slow_best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """As a textbook has it: one item at a time, longest first, into the fullest row that holds it."""
    rooms: list[int] = []
    rows: list[list[int]] = []
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [(room, row) for row, room in enumerate(rooms) if room >= lengths[item]]
        if fitting:
            _, row = min(fitting)
            rooms[row] -= lengths[item]
            rows[row].append(item)
        else:
            rooms.append(capacity - lengths[item])
            rows.append([item])
    return rows


@settings(deadline=None, max_examples=200)
@given(st.data(), st.integers(1, 70))
def test_nothing_is_lost_doubled_or_overfilled_and_rows_are_as_few_as_the_slow_ones(
    data: st.DataObject, room: int
) -> None:
    lengths = data.draw(st.lists(st.integers(1, room), max_size=90))
    packed = rows_of(*best_fit(np.array(lengths, dtype=np.int64), room))
    assert sorted(item for row in packed for item in row) == list(range(len(lengths)))
    assert all(row and row == sorted(row) and sum(lengths[item] for item in row) <= room for row in packed)
    expected = slow_best_fit(lengths, room)
    # Where two rows have the same room left, either may take the item.
    assert sorted(sum(lengths[i] for i in row) for row in packed) == sorted(
        sum(lengths[i] for i in row) for row in expected
    )


@pytest.mark.parametrize("room", [512, 2048])
def test_real_lengths_fill_the_rows(room: int) -> None:
    # Lengths of instruction data are about log-normal, with a mean of 119 tokens.
    lengths = np.random.default_rng(0).lognormal(4.5, 0.75, size=20_000).astype(np.int64).clip(1, room)
    _, rows = best_fit(lengths, room)
    assert lengths.sum() / ((len(rows) - 1) * room) > 0.99


@given(st.lists(st.integers(1, 50), min_size=1, max_size=4), st.integers(4, 100))
def test_a_cut_is_fair(lengths: list[int], room: int) -> None:
    kept = cut_to(np.array(lengths), room)
    assert (kept <= lengths).all()
    assert kept.sum() == min(sum(lengths), room) or sum(lengths) - kept.sum() < sum(lengths)
    assert kept.sum() <= room
    assert (kept >= np.minimum(lengths, room // len(lengths))).all()
    if sum(lengths) > room:
        assert kept.sum() == room


# ---------------------------------------------------------------- the artifact


def words(row: str) -> Example:
    """A rendering for tests: the prompt's characters, not trained, then the answer's."""
    prompt, answer = json.loads(row).values()
    ids = np.frombuffer((prompt + answer).encode(), dtype=np.uint8).astype(np.int64)
    return Example((Segment(ids, np.array([0.0] * len(prompt) + [1.0] * len(answer), dtype=np.float32)),))


def render_words(rows: Iterable[tuple[str, str]]) -> Iterator[Example | str]:
    for name, row in rows:
        yield f"{name}: no answer" if "bad" in row else words(row)


RENDERING = Rendering(lambda: render_words, 1, {"format": "words"}, ("kajiya.data.examples",))


@pytest.fixture
def made(small, tmp_path: Path):
    """Shards of rows with these (prompt, answer) lengths."""

    def make(lengths: list[tuple[int, int]]):
        rows = [{"prompt": f"{i:03d}" + "p" * (p - 3), "answer": "a" * a} for i, (p, a) in enumerate(lengths)]
        (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": json.dumps(row)}) for row in rows))
        config = replace(
            DataConfig(),
            source=SourceConfig("jsonl", {"files": str(tmp_path / "rows.jsonl")}),
            heldout_every=3,
            near_duplicate=None,
            row_tokens=32,
        )
        store = Store(tmp_path / "store")
        corpus, _ = build_corpus(config, store)
        shards, _ = build_shards(config, corpus, small.tokenizer, store, rendering=RENDERING)
        return config, shards, store

    return make


def test_shards_hold_the_examples(made) -> None:
    lengths = [(4 + i % 5, 1 + i % 7) for i in range(40)]
    _, shards, store = made(lengths)
    corpus = next(artifact for artifact in store.artifacts() if artifact.stage == "corpus")
    for split in ("train", "heldout"):
        documents, opened = open_documents(corpus.path, split), open_split(shards.path, split)
        assert opened.n_documents == len(documents) == shards.facts[split]["documents"]
        assert not opened.is_text
        assert opened.has_weights
        assert not opened.weighs
        for index, text in enumerate(documents.texts()):
            (segment,) = words(text).segments
            start, stop = opened.offsets[index : index + 2].tolist()
            assert opened.document(index).tolist() == segment.ids.tolist()
            assert opened.read_weights(start, stop).tolist() == segment.weights.tolist()


def test_what_is_too_long_is_cut_dropped_or_refused_and_counted(made) -> None:
    # Rows of 32: the last three are too long, and of one the cut leaves no answer.
    lengths = [(5, 6)] * 40 + [(10, 30)] * 20 + [(40, 5)] * 20
    config, shards, store = made(lengths)
    n = {split: shards.facts[split]["documents"] for split in ("train", "heldout")}
    with pytest.raises(DataError, match=r"rows\.jsonl:\d+: 45 tokens, more than a row of data\.row_tokens=32"):
        build_packing(config, shards, store)
    cut, reused = build_packing(replace(config, on_long="cut"), shards, store)
    assert not reused
    assert build_packing(replace(config, on_long="cut"), shards, store) == (cut, True)
    dropped, _ = build_packing(replace(config, on_long="drop"), shards, store)
    for split in ("train", "heldout"):
        opened = open_split(shards.path, split)
        totals = np.diff(opened.offsets)
        n_hopeless, n_cut = int((totals == 45).sum()), int((totals == 40).sum())
        assert n_hopeless
        assert n_cut
        facts = cut.facts[split]
        assert (facts["long"], facts["dropped_examples"], facts["dropped_tokens"]) == (
            n_hopeless + n_cut,
            n_hopeless,
            45 * n_hopeless,
        )
        assert (facts["cut_examples"], facts["cut_tokens"]) == (n_cut, 8 * n_cut)
        assert facts["examples"] + facts["dropped_examples"] == n[split]
        assert facts["tokens"] + facts["cut_tokens"] + facts["dropped_tokens"] == shards.facts[split]["tokens"]
        facts = dropped.facts[split]
        assert (facts["cut_tokens"], facts["dropped_examples"]) == (0, n_hopeless + n_cut)
        packing = open_packing(dropped.path, split)
        assert sorted(packing.examples.tolist()) == np.flatnonzero(totals <= 32).tolist()


def test_a_prompt_that_leaves_no_room_for_an_answer_is_dropped_or_refused_and_counted(made) -> None:
    config, shards, store = made([(5, 6)] * 40 + [(28, 3)] * 20)
    with pytest.raises(
        DataError, match=r"\d+ prompts of the split 'train' leave no room for the 8 tokens .*rows\.jsonl:"
    ):
        build_packing(config, shards, store, answer_tokens=8)
    whole, _ = build_packing(config, shards, store)
    for on_long in ("cut", "drop"):
        packed, reused = build_packing(replace(config, on_long=on_long), shards, store, answer_tokens=8)
        assert not reused
        for split in ("train", "heldout"):
            totals = np.diff(open_split(shards.path, split).offsets)
            n_full = int((totals == 31).sum())
            assert n_full
            assert whole.facts[split]["dropped_examples"] == 0
            facts = packed.facts[split]
            assert (facts["dropped_examples"], facts["dropped_tokens"]) == (n_full, 31 * n_full)
            assert (facts["long"], facts["cut_examples"], facts["answer_tokens"]) == (n_full, 0, 8)
            kept = np.sort(open_packing(packed.path, split).examples)
            assert kept.tolist() == np.flatnonzero(totals == 11).tolist()


def test_a_sequence_longer_than_max_tokens_is_cut_dropped_or_refused_and_counted(made) -> None:
    config, shards, store = made([(5, 6)] * 40 + [(10, 15)] * 20)
    whole, _ = build_packing(config, shards, store)
    limited = replace(config, max_tokens=20)
    with pytest.raises(
        DataError, match=r"a sequence of 25 tokens, more than data\.max_tokens=20 .*\nRaise data\.max_tokens"
    ):
        build_packing(limited, shards, store)
    cut, reused = build_packing(replace(limited, on_long="cut"), shards, store)
    assert not reused
    dropped, _ = build_packing(replace(limited, on_long="drop"), shards, store)
    for split in ("train", "heldout"):
        n_long = int((np.diff(open_split(shards.path, split).offsets) == 25).sum())
        assert n_long
        assert whole.facts[split]["long"] == 0
        assert (cut.facts[split]["cut_examples"], cut.facts[split]["cut_tokens"]) == (n_long, 5 * n_long)
        assert open_packing(cut.path, split).lengths.max() == 20
        assert (dropped.facts[split]["dropped_examples"], dropped.facts[split]["dropped_tokens"]) == (
            n_long,
            25 * n_long,
        )
        assert open_packing(dropped.path, split).lengths.max() == 11


def test_long_documents_of_text_are_packed_in_pieces_and_no_target_is_lost(small) -> None:
    packed, _ = build_packing(replace(small.config, packing="best_fit"), small.shards, small.store)
    for split in ("train", "heldout"):
        opened, packing = open_split(small.shards.path, split), open_packing(packed.path, split)
        targets = np.concatenate(
            [np.arange(s + 1, s + n) for (s,), (n,) in zip(packing.starts, packing.lengths, strict=True)]
        )
        firsts = set(opened.offsets[:-1].tolist())
        assert sorted(targets.tolist()) == [i for i in range(opened.n_tokens) if i not in firsts]
        assert packing.lengths.max() == 64
        assert packed.facts[split]["fill"] > 0.98


# ---------------------------------------------------------------- which packing


@pytest.mark.parametrize(
    ("wanted", "takes", "is_text", "can_isolate", "name"),
    [
        ("auto", "tokens", True, True, "concatenate"),
        ("auto", "masked", True, True, "concatenate"),
        ("auto", "tokens", False, True, "best_fit"),
        ("auto", "preference", False, True, "best_fit"),
        ("auto", "preference", False, False, "bucketed"),
        ("auto", "tokens", True, False, "bucketed"),
        ("auto", "seq2seq", False, True, "bucketed"),
        ("best_fit", "tokens", True, True, "best_fit"),
        ("concatenate", "tokens", True, False, "concatenate"),
    ],
)
def test_the_packing_is_chosen_and_said(wanted: str, takes: str, is_text: bool, can_isolate: bool, name: str) -> None:
    chosen = choose_packing(wanted, takes, is_text, can_isolate)
    assert chosen.name == name
    assert chosen.why


@pytest.mark.parametrize(
    ("wanted", "takes", "is_text", "can_isolate"),
    [
        ("best_fit", "tokens", False, False),
        ("concatenate", "tokens", False, True),
        ("best_fit", "seq2seq", False, True),
    ],
)
def test_a_packing_that_cannot_be_is_refused(wanted: str, takes: str, is_text: bool, can_isolate: bool) -> None:
    with pytest.raises(ConfigError, match=f"data.packing: {wanted}"):
        choose_packing(wanted, takes, is_text, can_isolate)


def test_rows_that_cannot_be_rendered_stop_the_work_or_are_counted(small, tmp_path: Path) -> None:
    rows = [{"prompt": f"{i:03d}", "answer": "bad" if i % 10 == 0 else "fine"} for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": json.dumps(row)}) for row in rows))
    source = SourceConfig("jsonl", {"files": str(tmp_path / "rows.jsonl")})
    config = DataConfig(source=source, heldout_every=3, near_duplicate=None, row_tokens=32, shard_bytes=1024)
    store = Store(tmp_path / "store")
    corpus, _ = build_corpus(config, store)
    with pytest.raises(
        DataError, match=r"rows\.jsonl:\d+: no answer\nMend or remove it, or set data\.on_unreadable=drop"
    ):
        build_shards(config, corpus, small.tokenizer, store, rendering=RENDERING)
    shards, _ = build_shards(replace(config, on_unreadable="drop"), corpus, small.tokenizer, store, rendering=RENDERING)
    with pytest.raises(DataError, match="no answer"):  # and shards without these rows are not taken for whole ones
        build_shards(config, corpus, small.tokenizer, store, rendering=RENDERING)
    n_dropped = 0
    for split in ("train", "heldout"):
        documents, opened, facts = (
            open_documents(corpus.path, split),
            open_split(shards.path, split),
            shards.facts[split],
        )
        good = [index for index, text in enumerate(documents.texts()) if "bad" not in text]
        assert list(opened.names) == [documents.names[index] for index in good]
        assert [bytes(opened.document(place).tolist()).decode() for place in range(len(good))] == [
            "".join(json.loads(documents.text(index)).values()) for index in good
        ]
        assert facts["documents"] == opened.n_documents == len(good)
        lost = facts.get("dropped", {"documents": 0, "bytes": 0, "examples": []})
        assert lost["documents"] == len(documents) - len(good)
        assert facts["bytes"] + lost["bytes"] == documents.n_bytes
        assert all("no answer" in example for example in lost["examples"])
        n_dropped += lost["documents"]
    assert n_dropped == 6


# ---------------------------------------------------------------- settings without effect


@pytest.mark.parametrize(
    ("settings", "form", "packing", "words"),
    [
        (
            {"render": {"train_on": "all"}},
            "preference",
            "best_fit",
            "render.train_on: all changes nothing for preference rows",
        ),
        (
            {"render": {"train_on": "last"}},
            "text",
            "concatenate",
            "render.train_on: last changes nothing for text rows",
        ),
        (
            {"render": {"prompt_style": "plain"}},
            "chat",
            "best_fit",
            "render.prompt_style: plain changes nothing for chat",
        ),
        ({"render": {"append_eos": "never"}}, "seq2seq", "bucketed", "render.append_eos: never changes nothing"),
        (
            {"on_long": "drop"},
            "text",
            "concatenate",
            "on_long: drop changes nothing for text rows with the packing concat",
        ),
        ({"max_tokens": 64}, "text", "concatenate", "max_tokens: 64 changes nothing"),
        (
            {"isolate": False},
            "chat",
            "best_fit",
            "isolate: false changes nothing for chat rows with the packing best_fit",
        ),
    ],
)
def test_a_setting_that_changes_nothing_for_the_rows_is_refused(
    settings: dict[str, Any], form: str, packing: str, words: str
) -> None:
    given = dict(settings)
    if "render" in given:
        given["render"] = RenderConfig(**given["render"])
    with pytest.raises(
        ConfigError, match=rf"^data\.{words}[^\n]*\nLeave it at (assistant|chat|auto|error|null|true)\.$"
    ):
        require_effect(DataConfig(**given), form, packing)


def test_every_setting_has_an_effect_on_some_rows() -> None:
    whole = DataConfig(isolate=False)
    require_effect(whole, "text", "concatenate")
    whole = DataConfig(on_long="cut", max_tokens=64, render=RenderConfig(train_on="all", append_eos="always"))
    require_effect(whole, "chat", "bucketed")
    require_effect(
        replace(whole, render=RenderConfig(prompt_style="plain", train_on="last")), "instruction", "best_fit"
    )
    require_effect(DataConfig(render=RenderConfig(template="a.jinja", options={"x": 1})), "text", "concatenate")
