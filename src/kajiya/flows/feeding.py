"""What a run's loss is fed with: the artifacts it reads, its batches of training and of evaluation, its reference."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from kajiya.config.options import GRPOLoss
from kajiya.config.schema import Config
from kajiya.config.tables import Row, check_choice, loss_row
from kajiya.data.batch import pinned
from kajiya.data.loader import Enrich, Feed, Loader, heldout_rows, heldout_source, open_loader
from kajiya.data.masking import Masking
from kajiya.data.mismatch import add_mismatched
from kajiya.data.pack import ChosenPacking, choose_packing, open_packing
from kajiya.data.render import open_renderer, read_template
from kajiya.data.shards import Rendering, open_split
from kajiya.data.tokenizer import load_tokenizer
from kajiya.errors import ConfigError
from kajiya.flows.heldout import heldout_values
from kajiya.models.adapt import has_adapter
from kajiya.models.beginning import begins_as_base
from kajiya.models.isolation import architecture_isolates, can_isolate
from kajiya.models.tasks import Task
from kajiya.models.weights_digest import tensors_digest
from kajiya.run.code import code_revision
from kajiya.run.store import Artifact, Store, produce
from kajiya.training.fit import Setup
from kajiya.training.portions import rows_at_once
from kajiya.training.precision import Precision
from kajiya.training.reference import (
    add_reference,
    compute_reference,
    open_reference,
    save_reference,
)

MASK = "<|mask|>"
"""The mask token of a tokenizer that does not name one."""
_ALL = 2**62
"""More rows than there are."""


@dataclass(frozen=True)
class Data:
    """The artifacts that training reads."""

    corpus: Artifact
    tokenizer: Artifact
    shards: Artifact
    packing: Artifact | None = None
    """Whole examples in rows; `None` for text that is cut where a row is full."""
    bases: Mapping[str, Artifact] = field(default_factory=dict)
    """Weights that training starts from."""

    def parents(self) -> dict[str, Artifact]:
        """Those that the trained model comes from, by name."""
        parents = {"tokenizer": self.tokenizer, "shards": self.shards, **self.bases}
        return parents if self.packing is None else parents | {"packing": self.packing}

    def artifacts(self) -> dict[str, Artifact]:
        """All of them, by name."""
        return {"corpus": self.corpus, **self.parents()}


def rendering_of(config: Config, corpus: Artifact, tokenizer: Artifact) -> Rendering | None:
    """How the corpus's rows become examples; `None` for plain text."""
    form = corpus.facts["format"]
    if form == "text":
        return None
    classes = corpus.facts["classes"] if form == "labelled" else None
    render = config.data.render
    return Rendering(
        open=partial(open_renderer, tokenizer.path, render, form, classes, config.tokenizer.path),
        segments=2 if form in ("preference", "seq2seq") else 1,
        key={"format": form, "classes": classes, "render": render, "template": read_template(render)},
        code=("kajiya.data.render",),
    )


def task_of(config: Config, corpus: Artifact) -> Task:
    """The head that the config's loss needs. Raises `ConfigError` for labels of the other kind."""
    name = loss_row(config.train.loss.name).task
    if corpus.facts["format"] != "labelled":
        return Task(name)
    classes = corpus.facts["classes"]
    if name == "classes" and classes is None:
        raise ConfigError(
            "train.loss.name", "classify needs classes, and the labels are numbers", "Set train.loss.name=regress."
        )
    if name == "score" and classes is not None:
        shown = ", ".join(map(str, classes[:3]))
        raise ConfigError(
            "train.loss.name",
            f"regress needs numbers, and the labels are classes ({shown} …)",
            "Set train.loss.name=classify.",
        )
    return Task(name, tuple(map(str, classes or ())))


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation during training tells."""

    values: dict[str, float]
    """The first is the one that is to fall."""
    samples: Sequence[Mapping[str, Any]] = ()
    """Answers to look at: prompt, text, reward."""


class Feeds(Protocol):
    """What opens the batches of a run, and evaluates its model on what is held out."""

    @property
    def row_tokens(self) -> int:
        """Tokens of a row, which the plan counts in."""
        ...

    def loader(self, *, batch: int | None = None, rank: int = 0, world: int = 1) -> Any:
        """Training batches of `batch` rows (`None`: the config's micro-batch), from the beginning."""
        ...

    def evaluator(self, setup: Setup, rows: int) -> Callable[[], Evaluation]:
        """What evaluates the model as it is on at most `rows` held-out rows, the same every time."""
        ...


@dataclass(frozen=True)
class Feeding:
    """Opens the batches of both splits for one config."""

    shards: Path
    feed: Feed
    seed: int
    micro_batch: int
    enrich: Callable[[str], Enrich]
    """What is added to each batch of a split."""
    loss: str
    """Name of the loss."""

    @property
    def row_tokens(self) -> int:
        """As `Feeds`'s."""
        return self.feed.row_tokens

    def evaluator(self, setup: Setup, rows: int) -> Callable[[], Evaluation]:
        """As `Feeds`'s."""
        kept = list(self.heldout(rows))
        return lambda: Evaluation(heldout_values(self.loss, setup, kept))

    def loader(self, *, batch: int | None = None, rank: int = 0, world: int = 1) -> Loader:
        """Training batches of `batch` rows (`None`: the config's micro-batch), from the beginning."""
        return open_loader(
            self.shards,
            "train",
            self.feed,
            batch=batch or self.micro_batch,
            seed=self.seed,
            rank=rank,
            world=world,
            enrich=self.enrich("train"),
        )

    def heldout(self, rows: int | None = None) -> Iterator[Any]:
        """Batches of held-out rows, spread evenly over the split; `None`: all of them."""
        batches = heldout_rows(
            self.shards, self.feed, rows=_ALL if rows is None else rows, batch=self.micro_batch, seed=self.seed
        )
        return map(self.enrich("heldout"), batches)

    def examples(self) -> Iterator[tuple[str, Any]]:
        """Each held-out example in a batch of its own, behind its name, in the order of the split.

        Of text that is cut where a row is full, each row, which bears the name of the document that it begins in.
        """
        alone = self.feed if self.feed.packed is None else replace(self.feed, packing="bucketed")
        rows = heldout_source(self.shards, alone, self.seed)
        names = open_split(self.shards, "heldout").names
        document = [rows.documents(place)[0] for place in range(rows.n)]
        enrich = self.enrich("heldout")
        for place in sorted(range(rows.n), key=lambda place: document[place]):
            yield names[document[place]], enrich(rows.batch(np.array([place])))


def open_feeding(
    config: Config,
    data: Data,
    reference: Artifact | None,
    start_id: int | None = None,
    device: torch.device | None = None,
) -> Feeding:
    """The batches of the config's loss; `start_id` is what an encoder–decoder's decoder reads first.

    Training batches for a GPU (`device`) lie in page-locked memory, from which it takes them while it computes.
    """
    row = loss_row(config.train.loss.name)
    feed = Feed(
        row_tokens=config.data.row_tokens,
        isolate=config.data.isolate,
        takes=row.takes,
        packing=packing_of(config, data.corpus.facts["format"]).name,
        packed=None if data.packing is None else data.packing.path,
        is_causal=row.task == "causal",
        masking=_masking(data.tokenizer) if row.takes == "masked" else None,
        start_id=start_id,
    )
    table = None if reference is None else open_reference(reference.path)

    begin = heldout_begin(data)

    def enrich(split: str) -> Enrich:
        steps = _mismatched(row, data, split, config.data.row_tokens)
        if row.needs is not None and split == "heldout":
            steps.append(lambda batch: replace(batch, sources=begin + batch.sources))
        if table is not None:
            steps.append(add_reference(table, split))
        if config.model.future_heads:
            steps.append(lambda batch: batch.with_future(config.model.future_heads))
        if split == "train" and device is not None and device.type == "cuda":
            steps.append(lambda batch: pinned(batch, device))
        return lambda batch: _through(steps, batch)

    return Feeding(data.shards.path, feed, config.seed, rows_at_once(config.train), enrich, config.train.loss.name)


def build_reference(
    config: Config, data: Data, model: Any, precision: Precision, store: Store
) -> tuple[Artifact, bool] | None:
    """The log-probabilities of every example under `model` as it is now, and whether they were there already.

    `None` where the loss compares with none, or with the model's own base (its adapter off).
    """
    row = loss_row(config.train.loss.name)
    if not row.has_reference or (has_adapter(model) and begins_as_base(config.adapter)):
        return None
    options = check_choice("loss", config.train.loss.name, config.train.loss.options, "train.loss")

    def make(folder: Path) -> dict[str, Any]:
        feeding = open_feeding(config, data, None)
        loader = feeding.loader()
        places = range(0, loader.rows_per_epoch, feeding.micro_batch)
        all_places = (np.arange(first, min(first + feeding.micro_batch, loader.rows_per_epoch)) for first in places)
        train = (feeding.enrich("train")(loader.rows.batch(each)) for each in all_places)
        device = next(model.parameters()).device
        table: dict[str, Any] = {}
        for split, batches in (("train", train), ("heldout", feeding.heldout())):
            table |= compute_reference(model, batches, split, device, precision, options.chunk_tokens)
        save_reference(table, folder)
        return {"examples": {split: len(rows) for split, rows in table.items()}}

    return produce(
        store,
        "reference",
        code=code_revision("kajiya.training.reference", "kajiya.flows.feeding", "kajiya.data.mismatch"),
        config={
            "weights": tensors_digest(sorted(model.state_dict().items())),
            "precision": precision.name,
            "row_tokens": config.data.row_tokens,
            "takes": row.takes,
        },
        parents=data.parents(),
        make=make,
    )


def heldout_begin(data: Data) -> int:
    """Where the held-out split's places begin in tables of both."""
    return open_split(data.shards.path, "train").n_tokens


def packing_of(config: Config, form: str) -> ChosenPacking:
    """How sequences of that format share rows under the config's loss and model."""
    takes = loss_row(config.train.loss.name).takes
    if form == "text" and ":" in config.model.name and config.data.packing == "auto":
        return ChosenPacking("concatenate", "text is cut where a row is full; a module of one's own reads whole rows")
    return choose_packing(config.data.packing, takes, form == "text", architecture_isolates(config.model))


def has_many_lengths(config: Config, form: str) -> bool:
    """Whether batches are of many lengths: each as long as its longest sequence, or as an answer that was drawn."""
    return packing_of(config, form).name == "bucketed" or loss_row(config.train.loss.name).takes == "prompts"


def answer_tokens(config: Config) -> int | None:
    """Tokens of an answer for which a row keeps room behind its prompt; `None` where answers are not drawn."""
    if loss_row(config.train.loss.name).takes != "prompts":
        return None
    options = check_choice("loss", config.train.loss.name, config.train.loss.options, "train.loss")
    assert isinstance(options, GRPOLoss)
    return options.max_tokens


def require_isolation(config: Config, form: str, module: torch.nn.Module) -> None:
    """Raise `ConfigError` where rows of that format hold several texts that the module, as it was built, lets see each other."""
    chosen = packing_of(config, form).name
    if chosen == "bucketed" or (chosen == "concatenate" and not config.data.isolate) or can_isolate(module):
        return
    name = type(module).__name__
    why = f"{name}.forward takes no `segments`" if ":" in config.model.name else f"{name} carries a state along the row"
    raise ConfigError(
        "data.isolate",
        f"the texts that share a row are to be kept apart, and this model cannot do it: {why}",
        "Set data.packing=bucketed (a row for each), or data.isolate=false where texts may see each other; a module of one's own "
        "can take `segments` [B, T].",
    )


def _mismatched(row: Row, data: Data, split: str, row_tokens: int) -> list[Enrich]:
    if row.takes != "feedback" or row.measure is None or data.packing is None:
        return []
    return [add_mismatched(open_split(data.shards.path, split), open_packing(data.packing.path, split), row_tokens)]


def _through(steps: list[Enrich], batch: Any) -> Any:
    for step in steps:
        batch = step(batch)
    return batch


def _masking(tokenizer: Artifact) -> Masking:
    vocabulary = load_tokenizer(tokenizer.path)
    mask_id = vocabulary.mask_token_id
    if mask_id is None and MASK in vocabulary.get_vocab():
        mask_id = vocabulary.get_vocab()[MASK]
    if mask_id is None:
        raise ConfigError(
            "tokenizer",
            "has no mask token, which masked_lm hides tokens with",
            f"Set tokenizer.add_special_tokens=['{MASK}'].",
        )
    special = sorted({*vocabulary.all_special_ids, mask_id})
    return Masking(mask_id=int(mask_id), vocab_size=len(vocabulary), special_ids=tuple(special))
