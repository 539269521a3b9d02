"""Mixtures: drawn by weight from rows of several sources, each row counted; what was found in the parts is said."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.data.families import tokenizer_of
from tests.data.test_reading import HI, HO

from kajiya.config.schema import DataConfig, RenderConfig, SourceConfig
from kajiya.data.corpus import build_corpus
from kajiya.data.entries import Document, Omitted
from kajiya.data.reading import open_rows
from kajiya.data.render import Renderer
from kajiya.errors import ConfigError
from kajiya.preflight.said import texts_of
from kajiya.run.store import Store


def mixture(tmp_path: Path, *parts: dict[str, Any], **settings: Any) -> DataConfig:
    given = []
    for number, part in enumerate(parts):
        path = tmp_path / f"part{number}.jsonl"
        rows = part.pop("rows")
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        given.append({"source": {"name": "jsonl", "options": {"files": str(path)}}, "label": f"p{number}"} | part)
    options = {"parts": given, "seed": settings.pop("seed", 0)}
    return DataConfig(source=SourceConfig("mixture", options), **settings)


def texts(count: int, word: str) -> list[dict[str, Any]]:
    return [{"text": f"{word} {i}"} for i in range(count)]


def drawn(config: DataConfig) -> tuple[dict[str, int], int]:
    entries = list(open_rows(config).read())
    kept = [entry.name.partition("/")[0] for entry in entries if isinstance(entry, Document)]
    return {label: kept.count(label) for label in sorted(set(kept))}, sum(isinstance(e, Omitted) for e in entries)


def test_a_mixture_is_drawn_by_weight_and_every_row_is_counted(tmp_path: Path) -> None:
    parts = [{"rows": texts(100, "a"), "weight": 3}, {"rows": texts(60, "b"), "weight": 1}]
    assert drawn(mixture(tmp_path, *map(dict, parts))) == ({"p0": 100, "p1": 33}, 27)
    parts[0]["max_rows"] = 30
    assert drawn(mixture(tmp_path, *map(dict, parts))) == ({"p0": 30, "p1": 10}, 120)
    plain = [{"rows": texts(100, "a")}, {"rows": texts(60, "b"), "max_rows": 7}]
    assert drawn(mixture(tmp_path, *map(dict, plain))) == ({"p0": 100, "p1": 7}, 53)
    config = mixture(tmp_path, *map(dict, parts), heldout_every=4, near_duplicate=None)
    corpus, _ = build_corpus(config, Store(tmp_path / "store"))
    ledger = corpus.facts["ledger"]
    assert ledger["entered"]["documents"] == 160
    assert ledger["dropped"]["not drawn for the mixture"]["documents"] == 120
    assert ledger["train"]["documents"] + ledger["heldout"]["documents"] == 40


def test_a_mixture_is_a_function_of_its_seed(tmp_path: Path) -> None:
    def names(seed: int, count: int = 200) -> set[str]:
        config = mixture(tmp_path, {"rows": texts(count, "a"), "max_rows": 20}, {"rows": texts(5, "b")}, seed=seed)
        return {entry.name for entry in open_rows(config).read() if isinstance(entry, Document)}

    assert names(1) == names(1)
    assert len(names(1) & names(2)) < 15
    # A row more at the end leaves most of the draw as it was.
    assert len(names(1) & names(1, 201)) >= 24


def test_instructions_and_conversations_go_together(tmp_path: Path) -> None:
    parts = [{"rows": [{"instruction": "Hi", "input": "", "output": "Ho"}]}, {"rows": [{"messages": [HI, HO]}]}]
    origin = open_rows(mixture(tmp_path, *parts))
    assert origin.form["format"] == "chat"
    assert {entry.text for entry in origin.read() if isinstance(entry, Document)} == {
        json.dumps({"messages": [HI, HO]}, separators=(",", ":"))
    }
    assert [part["format"] for part in origin.facts["options"]["parts"]] == ["instruction", "chat"]


@pytest.mark.parametrize(
    ("train_on", "said"), [("assistant", "Right.<|eos|>"), ("all", "### User\nHi\n\n### Assistant\nHo<|eos|>\n\n")]
)
def test_an_instruction_among_conversations_is_trained_as_among_its_own(
    tmp_path: Path, train_on: str, said: str
) -> None:
    row = {"prompt": [HI, HO, {"role": "user", "content": "So?"}], "completion": [HO | {"content": "Right."}]}
    origin = open_rows(mixture(tmp_path, {"rows": [row]}, {"rows": [{"messages": [HI, HO]}]}))
    text = next(entry.text for entry in origin.read() if isinstance(entry, Document) and "Right" in entry.text)
    tokenizer, config = tokenizer_of("default"), RenderConfig(train_on=train_on)
    segment = Renderer(tokenizer, config, "chat").render(text).segments[0]
    alone = Renderer(tokenizer, config, "instruction").render(json.dumps(row)).segments[0]
    assert (segment.ids.tolist(), segment.weights.tolist()) == (alone.ids.tolist(), alone.weights.tolist())
    assert said in tokenizer.decode(segment.ids[segment.weights > 0])
    # The proof of the targets reads the rows by itself.
    assert texts_of(json.loads(text), "chat", config) == texts_of(row, "instruction", config)


@pytest.mark.parametrize(
    ("parts", "settings", "words"),
    [
        ([{"rows": texts(2, "a")}], {}, r"data.source.options.parts: holds 1 parts; a mixture has two or more"),
        (
            [{"rows": texts(2, "a")}, {"rows": [{"messages": [HI, HO]}]}],
            {},
            r"do not go together \(part 0: text, part 1: chat\)",
        ),
        (
            [{"rows": texts(2, "a"), "weight": 1}, {"rows": texts(2, "b")}],
            {},
            "is set for some parts and not for others",
        ),
        (
            [{"rows": texts(2, "a"), "wieght": 1}, {"rows": texts(2, "b")}],
            {},
            r"parts\[0\].wieght: unknown option; did you mean",
        ),
        ([{"rows": texts(2, "a"), "label": "p1"}, {"rows": texts(2, "b")}], {}, r"two parts have one label"),
        (
            [{"rows": texts(2, "a")}, {"rows": texts(2, "b")}],
            {"columns": {"text": "x"}},
            "a mixture's parts have columns each",
        ),
        (
            [{"rows": texts(2, "a"), "columns": {"text": "x"}}, {"rows": texts(2, "b")}],
            {},
            r"parts\[0\].columns.text: there is no",
        ),
    ],
)
def test_a_mixture_that_cannot_be_is_named(tmp_path: Path, parts: Any, settings: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        open_rows(mixture(tmp_path, *map(dict, parts), **settings))


def test_what_is_found_in_the_parts_of_a_mixture_is_said(tmp_path: Path) -> None:
    said: list[tuple[str, dict[str, Any]]] = []
    parts = [
        {"rows": [{"question": f"Q{i}", "answer": f"A{i}"} for i in range(20)]},
        {"rows": [{"messages": [HI | {"content": f"Hi {i}"}, HO]} for i in range(20)]},
        {"rows": [{"messages": [HI | {"content": f"He {i}"}, HO]} for i in range(20)], "format": "chat"},
    ]
    parts[0]["columns"] = {"prompt": "question", "completion": "answer"}
    config = mixture(tmp_path, *parts, heldout_every=4)
    build_corpus(config, Store(tmp_path / "store"), lambda kind, **fields: said.append((kind, fields)))
    (found,) = (fields["values"] for kind, fields in said if kind == "derived")
    where = "data.source.options.parts"
    assert found == {
        f"{where}[0].format": "instruction",
        f"{where}[0].columns": {"completion": "answer", "prompt": "question"},
        f"{where}[1].format": "chat",
        f"{where}[1].columns": {"messages": "messages"},
    }
    (note,) = (fields["text"] for kind, fields in said if kind == "note")
    assert note.startswith(
        f"found in the rows: {where}[0].format=instruction, {where}[0].columns={{completion: answer, "
    )
