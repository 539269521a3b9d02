"""What a recipe trains on, before it is trained: its rows as the model gets them, and what became of every row."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from kajiya.config.schema import Config
from kajiya.data.ledger import data_ledger, ledger_table
from kajiya.data.loader import heldout_source
from kajiya.data.progress import OnEvent, silent
from kajiya.data.shards import open_split
from kajiya.data.text_rows import Rows
from kajiya.data.tokenizer import load_tokenizer
from kajiya.errors import ConfigError
from kajiya.flows.feeding import Feeding, open_feeding
from kajiya.flows.preview_rows import Preview, Reader, Shown, shown_rows
from kajiya.flows.preview_text import ledger_notes, piece_text, row_words, strand_words
from kajiya.flows.report_page import html_templates
from kajiya.flows.stages import Stages
from kajiya.flows.train import prepare_data
from kajiya.run.store import Store


@dataclass(frozen=True)
class Wanted:
    """Which rows are shown."""

    rows: int = 2
    """How many."""
    split: str = "train"
    """train, or heldout."""
    first: int = 0
    """Number of the first: in the order of the training, or among the held-out rows."""
    seed: int | None = None
    """Another order than that of the recipe's seed."""


def preview_recipe(config: Config, store: Store, wanted: Wanted, on_event: OnEvent = silent) -> Preview:
    """Rows of a recipe as they would be trained on; the data are prepared (and kept), no model is built.

    Raises `ConfigError` for a split or a row that there is not, and what `prepare_data` raises.
    """
    if wanted.split not in ("train", "heldout"):
        raise ConfigError("--split", f"{wanted.split!r} is not one of train, heldout")
    if wanted.rows < 1 or wanted.first < 0:
        raise ConfigError("--rows", "at least one row is shown, from row 0 on")
    config = config if wanted.seed is None else replace(config, seed=wanted.seed)
    data = prepare_data(config, store, Stages(on_event))
    # What a decoder reads first is of its model; it is not shown, so that any token may stand for it.
    feeding = open_feeding(config, data, None, start_id=int(data.tokenizer.facts["pad_id"]))
    reader = Reader(load_tokenizer(data.tokenizer.path), is_masked=feeding.feed.masking is not None)
    source, places = _places(feeding, wanted)
    names = open_split(data.shards.path, wanted.split).names
    rows: list[Shown] = []
    for number, place in enumerate(places.tolist(), start=wanted.first):
        # One at a time: what fills a row up to the longest of its batch is none of its own.
        own = [names[index] for index in source.documents(place)]
        rows += shown_rows(source.batch(np.array([place])), reader, number, own)
    last = wanted.first + len(rows) - 1
    words = (
        f"{config.name}: rows {wanted.first:,} to {last:,} of the split {wanted.split}, which has {source.n:,}",
        f"format {data.corpus.facts['format']}, loss {config.train.loss.name}, packing {feeding.feed.packing}, "
        f"data.row_tokens={config.data.row_tokens}",
    )
    packing = None if data.packing is None else data.packing.facts
    ledger = data_ledger(data.corpus.facts, data.shards.facts, packing)
    return Preview(config.name, words, wanted.split, tuple(rows), ledger)


def _places(feeding: Feeding, wanted: Wanted) -> tuple[Rows, np.ndarray]:
    """Where the wanted rows come from, and their places there (int64)."""
    if wanted.split == "train":
        loader = feeding.loader(batch=1)
        return loader.rows, loader.order.places(np.arange(wanted.first, wanted.first + wanted.rows))
    source = heldout_source(feeding.shards, feeding.feed, feeding.seed)
    if wanted.first >= source.n:
        raise ConfigError("--row", f"{wanted.first} is not among the {source.n} held-out rows, counted from 0")
    return source, np.arange(wanted.first, min(wanted.first + wanted.rows, source.n))


def write_preview_page(preview: Preview, path: Path) -> None:
    """The preview as one HTML file without anything from outside, for light and dark screens."""
    environment = html_templates()
    environment.filters |= {"row_words": row_words, "strand_words": strand_words}
    environment.filters |= {"piece_text": piece_text, "ledger_notes": ledger_notes}
    page = environment.get_template("preview.html.j2").render(preview=preview, table=ledger_table(preview.ledger))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
