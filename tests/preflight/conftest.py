"""A run that is about to begin, small enough to be proven in a second, whose parts a bug can change."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.training.conftest import VOCABULARY, make_batch, make_rollouts
from tests.training.test_fit import make_setup

from kajiya.config.schema import (
    AdapterConfig,
    Config,
    DataConfig,
    LossConfig,
    ModelConfig,
    PreflightConfig,
    TrainConfig,
)
from kajiya.config.validate import CHECKS
from kajiya.data.batch import NO_TARGET, Batch
from kajiya.data.documents import DocumentWriter
from kajiya.data.shards import Split
from kajiya.models.adapt import transform
from kajiya.models.build import build_model
from kajiya.models.open import open_model
from kajiya.models.trained import save_trained
from kajiya.preflight.prove import Verdict, prove
from kajiya.preflight.subject import Finding, Subject
from kajiya.run.store import Artifact
from kajiya.training.fit import Setup
from kajiya.training.losses import load_loss, load_measure
from kajiya.training.losses.sequences import sequence_log_probs
from kajiya.training.rollouts import own_log_probs

Corpus = Callable[[bool], Artifact]
CLASSES = ("a", "b", "c", "d")
"""Of labelled rows."""


class Tokenizer:
    """As much of a tokenizer as the checks ask for."""

    eos_token_id = VOCABULARY.eos_id
    eos_token = "<eos>"
    chat_template = None

    def __len__(self) -> int:
        return VOCABULARY.size

    def save_pretrained(self, folder: Path) -> None:
        """Nothing to save."""


def text_rows(n_batches: int) -> tuple[list[Batch], Split]:
    """Batches of two rows of two documents each, every token a target and each document ended by end of text; and their shards."""
    batches, tokens, offsets = [], [], [0]
    for seed in range(n_batches):
        batch = make_batch(2, tokens=32, seed=seed, keep=1.1)
        ids, segments = batch.tokens.clone(), batch.segments
        last = torch.ones_like(segments, dtype=torch.bool)
        last[:, :-1] = segments[:, 1:] != segments[:, :-1]
        ids[last] = VOCABULARY.eos_id
        targets = torch.full_like(ids, NO_TARGET)
        targets[:, :-1] = torch.where(last[:, :-1], NO_TARGET, ids[:, 1:])
        sources = len(tokens) + torch.arange(ids.numel()).view_as(ids)
        offsets += [int(place) + 1 for place in sources[last]]
        tokens += ids.flatten().tolist()
        n_targets = int((targets != NO_TARGET).sum())
        batches.append(replace(batch, tokens=ids, targets=targets, n_targets=n_targets, sources=sources))
    return batches, Split(
        folder=Path(),
        name="train",
        files=(np.array(tokens, dtype=np.uint16),),
        offsets=np.array(offsets),
        document_bytes=np.ones(len(offsets) - 1, dtype=np.int64),
        bos_id=VOCABULARY.bos_id,
        eos_id=VOCABULARY.eos_id,
        pad_id=VOCABULARY.pad_id,
    )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """A corpus of a few documents, rows of any kind; with `True`, one of them is in both splits."""

    def make(is_shared: bool) -> Artifact:
        folder = tmp_path_factory.mktemp("corpus")
        for split, texts in {
            "train": ["one", "two", "three"],
            "heldout": ["four", "two" if is_shared else "five!"],
        }.items():
            with DocumentWriter(folder, split) as writer:
                for number, text in enumerate(texts):
                    row = dict.fromkeys(("prompt", "text", "input"), text)
                    writer.add(f"{split}{number}", json.dumps(row).encode())
                writer.finish()
        return Artifact(folder, "corpus", "key", "digest", {"format": "text"})

    return make


@dataclass
class Parts:
    """What a bug can change before the run is proven."""

    model: Any
    batches: list[Any]
    shards: Split
    config: Config
    setup_changes: dict[str, Any]
    is_shared: bool = False
    save: Callable[[Any, Path], object] | None = None
    plan: dict[str, Any] = field(default_factory=lambda: {"peak_bytes": 2**28, "tokens": 64_000, "epochs": 1.5})
    precision: str = "fp32"
    form: str = "text"
    """Kind of the rows (`data.format`)."""

    def save_honestly(self, model: Any, folder: Path) -> object:
        """As a training does at its end."""

        def rebuild() -> torch.nn.Module:
            return build_model(self.config.model, VOCABULARY, 0).module

        return save_trained(self.config.model, model, Tokenizer(), folder, rebuild)


def make_parts(adapter: str = "none", quantize: str = "none", **options: Any) -> Parts:
    """A sound run."""
    sizes: Any = {"n_params": None, "hidden_size": 32, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "ffn_size": 64}
    model = ModelConfig(**sizes, max_positions=64, quantize=quantize)
    config = Config(
        model=model,
        adapter=AdapterConfig(adapter, options),
        data=DataConfig(row_tokens=32),
        train=TrainConfig(minutes=None, steps=100),
    )
    module = build_model(model, VOCABULARY, 0).module
    module.generation_config.eos_token_id = VOCABULARY.eos_id
    transform(module, config.adapter, quantize, 0)
    batches, shards = text_rows(3)
    return Parts(module.train(), batches, shards, config, {})


def with_loss(parts: Parts, form: str, name: str, *, chunk_tokens: int | None = 7, **options: Any) -> Parts:
    """The parts with that loss and rows of that kind; heads over whole texts know no chunks."""
    loss = LossConfig(name, options if chunk_tokens is None else {"chunk_tokens": chunk_tokens, **options})
    parts.form = form
    parts.config = replace(parts.config, train=replace(parts.config.train, loss=loss))
    parts.setup_changes |= {"loss": load_loss(loss), "measure": load_measure(loss)}
    return parts


def as_policy(parts: Parts, sign: float = 1.0, off: float = 0.0, **options: Any) -> Parts:
    """Answers with advantages, drawn by the model that is trained; `off` nats away, or followed with another sign."""
    with_loss(parts, "instruction", "grpo", **options)
    honest = parts.setup_changes["loss"]

    def loss(model: Any, batch: Any) -> Any:
        terms, metrics = honest(model, batch)
        return {name: (sign * value, count) for name, (value, count) in terms.items()}, metrics

    log_probs = own_log_probs(parts.model, lambda: torch.no_grad(), torch.device("cpu"), 64)
    parts.batches = []
    for seed in range(3):
        batch = make_rollouts(4, seed)
        is_target = batch.rows.targets != NO_TARGET
        parts.batches.append(replace(batch, sampled=log_probs(batch.rows) + off * is_target))
    parts.setup_changes["loss"] = loss
    return parts


def only(parts: Parts, *names: str) -> Parts:
    """The parts, with all checks skipped but these."""
    skip = tuple(name for name in CHECKS if name not in names)
    parts.config = replace(parts.config, preflight=PreflightConfig(skip=skip))
    return parts


def verdict_of(parts: Parts, corpus: Corpus) -> tuple[Verdict, Setup]:
    """What all checks say of it, and the setup that they looked at."""

    def lr(step: int) -> float:
        return parts.config.optim.lr * min(step / 10, 0.5 * (1 + math.cos(math.pi * max(0, step - 10) / 90)))

    config = replace(parts.config, schedule=replace(parts.config.schedule, warmup_fraction=0.1))
    given = {"steps": 100, "lr": lr, "precision": parts.precision} | parts.setup_changes
    setup = make_setup(parts.model, parts.batches, **given)
    save = parts.save or parts.save_honestly

    def reopen(folder: Path) -> Any:
        return open_model(folder, torch.float32)

    subject = Subject(
        config=config,
        setup=setup,
        tokenizer=Tokenizer(),
        corpus=replace(corpus(parts.is_shared), facts={"format": parts.form, "classes": list(CLASSES)}),
        shards=replace(parts.shards, is_text=parts.form == "text"),
        plan=parts.plan,
        save=lambda folder: save(setup.model, folder),
        reopen=reopen,
    )
    return prove(subject), setup


def log_probs_of(model: Any, batch: Any) -> torch.Tensor:
    """Log-probability of each sequence's targets."""
    with torch.no_grad():
        return sequence_log_probs(model, batch, 64)[0]


def finding(verdict: Verdict, name: str) -> Finding:
    """What the check of that name found."""
    (found,) = (each for each in verdict.findings if each.name == name)
    return found
