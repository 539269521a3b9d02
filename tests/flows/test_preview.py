"""The preview shows exactly what the batches hold: every token, every target, every boundary; and the ledger."""

import html
import io
import json
import re
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from kajiya.cli import app
from kajiya.data.batch import NO_TARGET, Batch, ExampleBatch, Seq2SeqBatch
from kajiya.data.loader import Feed, open_loader
from kajiya.data.shards import open_split
from kajiya.data.tokenizer import load_tokenizer
from kajiya.errors import ConfigError
from kajiya.flows.preview import Wanted, preview_recipe, write_preview_page
from kajiya.flows.preview_rows import Piece, Preview, Reader, Strand, shown_rows
from kajiya.flows.preview_text import plain_strand, preview_text, print_preview


@pytest.fixture(scope="module")
def reader(finished: Any) -> Reader:
    return Reader(load_tokenizer(finished.trained.model.path))


@pytest.fixture(scope="module")
def preview(finished: Any) -> Preview:
    return preview_recipe(finished.config, finished.store, Wanted(rows=4))


def ids_of(finished: Any, text: str) -> list[int]:
    ids: list[int] = load_tokenizer(finished.trained.model.path)(text, add_special_tokens=False)["input_ids"]
    return ids


def batch_of(sequences: list[list[int]], trained: list[list[int]], width: int, **more: Any) -> Batch:
    """One row of these sequences; `trained` says which tokens of each are targets (1) or not (0)."""
    tokens = torch.zeros((1, width), dtype=torch.int64)
    targets = torch.full((1, width), NO_TARGET)
    segments, at = torch.full((1, width), len(sequences)), 0
    for number, (ids, wanted) in enumerate(zip(sequences, trained, strict=True)):
        tokens[0, at : at + len(ids)] = torch.tensor(ids)
        segments[0, at : at + len(ids)] = number
        for place in range(1, len(ids)):
            if wanted[place]:
                targets[0, at + place - 1] = ids[place]
        at += len(ids)
    return Batch(tokens, targets, torch.zeros_like(tokens), segments, int((targets != NO_TARGET).sum()), **more)


# ---------------------------------------------------------------- rows of a recipe


def test_every_target_of_the_rows_is_shown_once(finished: Any, preview: Preview) -> None:
    config, shards = finished.config, finished.trained.run.manifest()["artifacts"]["shards"]["path"]
    feed = Feed(row_tokens=config.data.row_tokens, isolate=config.data.isolate)
    loader = open_loader(finished.store.root / shards, "train", feed, batch=1, seed=config.seed)
    tokenizer = load_tokenizer(finished.trained.model.path)
    names = set(open_split(finished.store.root / shards, "train").names)
    for number, row in enumerate(preview.rows):
        batch = loader.next()
        assert row.n_targets == batch.n_targets
        assert len(row.strands) == int(batch.segments.max()) + 1
        assert {strand.title for strand in row.strands} <= names
        # The row's own tokens, and behind them the first of the next row where it is this one's last target.
        shown = [piece.id for strand in row.strands for piece in strand.pieces]
        beyond = batch.targets[0, -1:].tolist() if batch.targets[0, -1] != NO_TARGET else []
        assert shown == batch.tokens[0].tolist() + beyond
        for strand in row.strands:
            text = "".join(piece.text for piece in strand.pieces)
            assert text == tokenizer.decode([piece.id for piece in strand.pieces])
        assert row.number == number


def test_the_first_row_the_seed_and_the_held_out_side(finished: Any, preview: Preview) -> None:
    later = preview_recipe(finished.config, finished.store, Wanted(rows=2, first=2))
    assert later.rows == preview.rows[2:]
    other = preview_recipe(finished.config, finished.store, Wanted(rows=4, seed=7))
    assert other.rows != preview.rows
    heldout = preview_recipe(finished.config, finished.store, Wanted(rows=10**6, split="heldout"))
    assert sum(row.n_targets for row in heldout.rows) == heldout.ledger.of("heldout")[0].tokens - len(  # type: ignore[operator]
        {strand.title for row in heldout.rows for strand in row.strands}
    )
    assert heldout.rows[-1].n_filled > 0
    with pytest.raises(ConfigError, match="is not among the"):
        preview_recipe(finished.config, finished.store, Wanted(split="heldout", first=10**6))
    with pytest.raises(ConfigError, match="'test' is not one of train, heldout"):
        preview_recipe(finished.config, finished.store, Wanted(split="test"))


def test_it_builds_no_model(finished: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was built")

    monkeypatch.setattr("kajiya.models.build.build_model", build)
    preview_recipe(finished.config, finished.store, Wanted(rows=1))


# ---------------------------------------------------------------- every kind of batch


def test_trained_parts_boundaries_and_filling(finished: Any, reader: Reader) -> None:
    first, second = ids_of(finished, "def f(x):\n\treturn x"), ids_of(finished, "two")
    batch = batch_of([first, second], [[0] + [1] * (len(first) - 1), [0] * len(second)], len(first) + len(second) + 3)
    (row,) = shown_rows(batch, reader, 5, ["a.py", "b.py"])
    assert (row.number, row.n_filled, row.n_tokens) == (5, 3, len(first) + len(second))
    assert [strand.title for strand in row.strands] == ["a.py", "b.py"]
    assert [strand.n_targets for strand in row.strands] == [len(first) - 1, 0]
    assert plain_strand(row.strands[1], with_ids=False) == "two"
    shown = plain_strand(row.strands[0], with_ids=False)
    assert shown.endswith("»")
    assert shown.replace("«", "").replace("»", "") == "def f(x):↵\n⇥\treturn x"


def test_weights_special_tokens_and_ids() -> None:
    pieces = (Piece(1, "<|bos|>", is_special=True), Piece(5, "a"), Piece(6, "b", 0.5), Piece(2, "<|eos|>", 1.0, True))
    strand = Strand("", pieces)
    assert plain_strand(strand, with_ids=False) == "⟦<|bos|>⟧a«b»×0.5«⟦<|eos|>⟧»"
    assert plain_strand(strand, with_ids=True) == "⟦<|bos|>⟧‹1›a‹5›«b‹6›»×0.5«⟦<|eos|>⟧‹2›»"


def test_chosen_and_rejected_belong_together(finished: Any, reader: Reader) -> None:
    sequences = [ids_of(finished, text) for text in ("ask: yes", "ask: no no", "why: so", "why: not")]
    width = sum(map(len, sequences)) + 2
    rows = batch_of(sequences, [[0] + [1] * (len(ids) - 1) for ids in sequences], width)
    owner = torch.full((1, width), -1)
    ends = np.cumsum([len(ids) for ids in sequences])
    for number, (end, ids) in enumerate(zip(ends, sequences, strict=True)):
        owner[0, end - len(ids) : end] = number
    batch = ExampleBatch(rows, owner, torch.tensor(ends - 1), torch.tensor([4, 9]))
    (row,) = shown_rows(batch, reader, 0, ["one", "two"])
    assert [[strand.title for strand in group] for group in row.groups] == [
        ["one · chosen", "one · rejected"],
        ["two · chosen", "two · rejected"],
    ]
    texts = ["".join(piece.text for piece in strand.pieces) for strand in row.strands]
    assert texts == ["ask: yes", "ask: no no", "why: so", "why: not"]
    assert (row.n_targets, row.n_filled) == (rows.n_targets, 2)


def test_labels_are_shown(finished: Any, reader: Reader) -> None:
    ids = ids_of(finished, "a text")
    rows = batch_of([ids], [[0] * len(ids)], len(ids))
    owner = torch.zeros((1, len(ids)), dtype=torch.int64)
    batch = ExampleBatch(rows, owner, torch.tensor([len(ids) - 1]), torch.tensor([3]), labels=torch.tensor([2]))
    (row,) = shown_rows(batch, reader, 0, ["mail:3"])
    assert [strand.title for strand in row.strands] == ["mail:3 · label 2"]


def test_hidden_tokens_stand_behind_what_hides_them(finished: Any) -> None:
    tokenizer = load_tokenizer(finished.trained.model.path)
    ids = ids_of(finished, "import os")
    targets = torch.full((1, len(ids)), NO_TARGET)
    targets[0, 1] = ids[1]
    shown = torch.tensor([ids])
    shown[0, 1] = tokenizer.pad_token_id
    zeros = torch.zeros((1, len(ids)), dtype=torch.int64)
    (row,) = shown_rows(Batch(shown, targets, zeros, zeros, 1, is_causal=False), Reader(tokenizer, True), 0, [])
    word = tokenizer.decode([ids[1]])
    assert row.n_targets == 1
    assert f"«⟦<|pad|>→{word}⟧»" in plain_strand(row.strands[0], with_ids=False)


def test_input_and_target_of_a_pair(finished: Any, reader: Reader) -> None:
    read, said = ids_of(finished, "def f"), ids_of(finished, "a function")
    inputs = torch.tensor([[*read, 0, 0]])
    targets = torch.tensor([[*said, NO_TARGET]])
    tokens = torch.tensor([[7, *said]])
    batch = Seq2SeqBatch(inputs, inputs * 0 == inputs * 0, tokens, targets, len(said))
    mask = torch.arange(inputs.shape[1])[None] < len(read)
    (row,) = shown_rows(Seq2SeqBatch(inputs, mask, tokens, targets, len(said)), reader, 0, ["pair"])
    assert ["".join(piece.text for piece in strand.pieces) for strand in row.strands] == ["def f", "a function"]
    assert [strand.title for strand in row.strands] == ["pair · input", "target"]
    assert row.n_targets == len(said) == batch.n_targets


def test_a_character_spread_over_tokens_stands_whole_at_its_last(finished: Any, reader: Reader) -> None:
    ids = ids_of(finished, "鍛冶 é")
    pieces = reader.pieces(ids, [0.0] * len(ids))
    assert len(ids) > 4
    assert "".join(piece.text for piece in pieces) == "鍛冶 é"
    assert "\ufffd" not in "".join(piece.text for piece in pieces)
    assert reader.pieces(ids[:1], [0.0])[0].text == "\ufffd"


# ---------------------------------------------------------------- forms


def test_plain_text_has_no_control_codes_and_all_forms_say_the_same(preview: Preview, tmp_path: Path) -> None:
    plain = preview_text(preview, with_ids=False)
    assert not [letter for letter in plain if unicodedata.category(letter) == "Cc" and letter not in "\n\t"]
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    print_preview(console, preview, with_ids=True)
    coloured = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b[" in coloured
    write_preview_page(preview, tmp_path / "sub" / "page.html")
    page = (tmp_path / "sub" / "page.html").read_text()
    assert not re.search(r"(src|href)=|https?://|<script|@import|url\(", page)
    for row in preview.rows:
        assert f"{row.n_tokens:,} tokens, {row.n_targets:,} trained" in plain
        assert f"{row.n_tokens:,} tokens, {row.n_targets:,} trained" in page
    n_targets = sum(row.n_targets for row in preview.rows)
    assert len(re.findall(r'<span class="p t', page)) == n_targets
    strand = preview.rows[0].strands[0]
    words = "".join(piece.text for piece in strand.pieces)
    inside = re.search(r"<pre>(.*?)</pre>", page, re.S)
    assert inside is not None
    without_ids = re.sub(r'<span class="i">\d+</span>', "", inside[1])
    shown = html.unescape(re.sub(r"<[^>]+>", "", without_ids))
    assert shown.replace("↵\n", "\n").replace("⇥\t", "\t") == words
    assert "accounted for" in plain
    assert "accounted for" in page
    assert "accounted for" in coloured


def test_json_holds_every_token(preview: Preview) -> None:
    facts = json.loads(json.dumps(preview.facts()))
    rows = facts["rows"]
    assert [row["targets"] for row in rows] == [row.n_targets for row in preview.rows]
    assert all(
        sum(piece["weight"] > 0 for group in row["groups"] for strand in group for piece in strand["pieces"])
        == row["targets"]
        for row in rows
    )
    assert facts["ledger"]["problems"] == []


def test_the_verb(finished: Any, tmp_path: Path) -> None:
    recipe = Path(finished.trained.report).parent / "recipe.yaml"
    words = ["preview", str(recipe), "--rows", "1", "--store", str(finished.store.root)]
    page = tmp_path / "page.html"
    said = CliRunner().invoke(app, [*words, "--html", str(page)])
    assert said.exit_code == 0, said.output
    assert "===== row 0: " in said.stdout
    assert "Legend: «trained»" in said.stdout
    assert page.is_file()
    found = CliRunner().invoke(app, [*words, "--json", "--split", "heldout", "--row", "1"])
    assert [row["row"] for row in json.loads(found.stdout)["rows"]] == [1]
