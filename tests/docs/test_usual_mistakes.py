"""The usual mistakes that the guide names: each is shown to be caught, or not to be possible.

Where it can be, the mistake itself is made beside, to show that it would have made a difference.
"""

import json
import multiprocessing
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tests.docs import pages
from torch import nn
from torch.nn import functional

from kajiya.config.compose import compose, option_paths
from kajiya.config.schema import Config, ModelConfig, SourceConfig
from kajiya.data.batch import NO_TARGET, Batch
from kajiya.data.corpus import build_corpus
from kajiya.data.documents import open_documents
from kajiya.data.loader import Feed, Loader, heldout_rows, open_loader
from kajiya.data.shards import build_shards, open_split
from kajiya.data.tokenizer import build_tokenizer, load_tokenizer
from kajiya.errors import ConfigError, StoreError, TrainingError
from kajiya.evals.results import bits_per_byte
from kajiya.evals.scoring import heldout_loss, score_documents
from kajiya.models.build import Vocabulary, build_model, vocabulary_of
from kajiya.models.hidden import all_logits
from kajiya.run.store import Artifact, Store
from kajiya.training.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from kajiya.training.fit import Setup, fit, train_step
from kajiya.training.losses import load_loss
from kajiya.training.optimizers import load_optimizer
from kajiya.training.precision import resolve_precision
from kajiya.training.state import TrainState
from kajiya.training.strategy import SingleProcess

CPU = torch.device("cpu")
FP32 = resolve_precision("fp32", CPU)


# ---------------------------------------------------------------- a small run to make mistakes with


class WithDropout(nn.Module):
    """Logits of the next token from the token alone, through dropout."""

    def __init__(self, n_tokens: int = 512, dropout: float = 0.2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_tokens, 16)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(16, n_tokens)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.dropout(self.embedding(tokens)))
        return logits


@dataclass(frozen=True)
class Small:
    config: Config
    store: Store
    corpus: Artifact
    tokenizer: Artifact
    shards: Artifact

    def loader(self, rows: int = 4, row_tokens: int = 32, seed: int = 0) -> Loader:
        return open_loader(self.shards.path, "train", Feed(row_tokens), batch=rows, seed=seed)

    def setup(self, model: nn.Module, **changes: Any) -> Setup:
        model = SingleProcess(CPU, FP32).prepare(model)
        setup = Setup(
            model=model,
            loss=load_loss(self.config.train.loss),
            loader=self.loader(),
            optimizer=load_optimizer(self.config.optim, model),
            strategy=SingleProcess(CPU, FP32),
            precision=FP32,
            lr=lambda _step: 1e-2,
            steps=6,
            accumulate=1,
            clip_norm=1.0,
            max_skipped=0,
        )
        return replace(setup, **changes)


@pytest.fixture(scope="module")
def small(small_config: Any, tmp_path_factory: pytest.TempPathFactory) -> Small:
    config = small_config("optim=adamw")
    store = Store(tmp_path_factory.mktemp("store"))
    corpus, _ = build_corpus(config.data, store)
    tokenizer, _ = build_tokenizer(config.tokenizer, corpus, store)
    shards, _ = build_shards(config.data, corpus, tokenizer, store)
    return Small(config, store, corpus, tokenizer, shards)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def never() -> bool:
    return False


# ---------------------------------------------------------------- the guide and these tests


def test_every_box_of_the_guide_names_its_tests_and_no_test_is_left_out() -> None:
    text = (pages.DOCS / "from-scratch.md").read_text(encoding="utf-8")
    boxes = re.findall(r'!!! danger "Usual mistake: [^"]+"\n((?:    .*\n|\n)+)', text)
    assert len(boxes) >= 12
    named = [set(re.findall(r"`(test_\w+)`", box.partition("Shown by")[2])) for box in boxes]
    assert all(named), "a box without a test"
    here = {name for name in globals() if name.startswith("test_")}
    assert set().union(*named) == here - {test_every_box_of_the_guide_names_its_tests_and_no_test_is_left_out.__name__}


# ---------------------------------------------------------------- data


def test_a_copy_of_heldout_text_is_not_trained_on(small: Small, tmp_path: Path) -> None:
    held = open_documents(small.corpus.path, "heldout")
    text = max(held.texts(), key=len)
    lines = text.split("\n")
    for name, body in {
        "copy.py": text,
        "nearly.py": "\n".join(["# changed", *lines[3:]]),
        "mine.py": "x = 1\n",
    }.items():
        (tmp_path / name).write_text(body, encoding="utf-8")
    for index, name in enumerate(held.names):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(held.read(index))
    source = SourceConfig("stdlib", {"root": str(tmp_path)})
    corpus, _ = build_corpus(replace(small.config.data, source=source), small.store)
    ledger = corpus.facts["ledger"]
    assert list(open_documents(corpus.path, "train").names) == ["mine.py"]
    assert ledger["heldout"]["documents"] == len(held)
    assert {reason: part["documents"] for reason, part in ledger["dropped"].items()} == {
        "duplicate of a held-out document": 1,
        "near-duplicate of a held-out document": 1,
    }


def test_a_target_is_the_next_token_of_the_same_document(small: Small) -> None:
    loader = small.loader(rows=64, row_tokens=64)
    split = open_split(small.shards.path, "train")
    n_ends = 0
    while loader.epoch == 0:
        batch = loader.next()
        is_last = torch.ones_like(batch.segments, dtype=torch.bool)
        is_last[:, :-1] = batch.segments[:, 1:] != batch.segments[:, :-1]
        inside = ~is_last
        assert torch.equal(batch.targets[:, :-1][inside[:, :-1]], batch.tokens[:, 1:][inside[:, :-1]])
        ends = batch.tokens == split.eos_id
        assert (batch.targets[ends] == NO_TARGET).all()
        n_ends += int(ends.sum())
        assert batch.n_targets == int((batch.targets != NO_TARGET).sum())
    assert n_ends >= split.n_documents


def test_the_loss_equals_that_of_transformers(small: Small) -> None:
    """Transformers shifts its labels itself: given unshifted ids, it must come to the same figure."""
    vocabulary = vocabulary_of(load_tokenizer(small.tokenizer.path))
    model: Any = build_model(small.config.model, vocabulary, 0).module.eval()
    row = next(row for row in range(100) if not small.loader(rows=1).at(row).segments.any())
    batch = small.loader(rows=1).at(row)
    ids = torch.cat([batch.tokens, batch.targets[:, -1:]], dim=1)
    theirs = model(input_ids=ids, labels=ids).loss
    total, unit = load_loss(small.config.train.loss)(model, batch)[0]["loss"]
    count = batch.counts[str(unit)]
    torch.testing.assert_close(total / count, theirs, rtol=1e-5, atol=1e-5)
    twice = replace(batch, targets=batch.targets.roll(-1, dims=1))  # the mistake: shifted once more
    wrong, _ = load_loss(small.config.train.loss)(model, twice)[0]["loss"]
    assert abs(float(wrong.detach() / count - theirs.detach())) > 1e-3


def test_documents_of_a_row_do_not_see_each_other(small: Small) -> None:
    vocabulary = vocabulary_of(load_tokenizer(small.tokenizer.path))
    model = build_model(small.config.model, vocabulary, 0).module.eval()
    loader = small.loader(rows=1)
    batch = next(
        found
        for found in map(loader.at, range(loader.rows_per_epoch))
        if found.segments.max() == 1 and 2 < cut_of(found) < 30
    )
    cut = cut_of(batch)
    assert batch.positions[0, cut] == 0
    changed = replace(batch, tokens=batch.tokens.clone())
    changed.tokens[0, :cut] = batch.tokens[0, :cut].flip(0)
    with torch.no_grad():
        before, after = (all_logits(model, each)[0] for each in (batch, changed))
    assert not torch.equal(before[:cut], after[:cut])
    assert torch.equal(before[cut:], after[cut:])


def cut_of(batch: Batch) -> int:
    """Where the second document of a one-row batch begins."""
    return int((batch.segments[0] == 0).sum())


def test_there_are_no_loader_workers(small: Small) -> None:
    assert not [option for option in option_paths() if "worker" in option]
    with pytest.raises(ConfigError, match="unknown key"):
        compose("stdlib-pretrain", ["train.num_workers=4"])
    before = multiprocessing.active_children()  # a library's, which an earlier test has started
    loader = small.loader()
    loader.next()
    assert set(multiprocessing.active_children()) <= set(before)
    assert not loader.rows.split.files[0].flags.owndata, "the tokens are mapped, not read"


def test_rows_do_not_depend_on_the_batch_size(small: Small) -> None:
    ones, eights = small.loader(rows=1), small.loader(rows=8)
    for _ in range(3):
        one_by_one = [ones.next() for _ in range(8)]
        at_once = eights.next()
        for field in ("tokens", "targets", "positions", "segments"):
            assert torch.equal(torch.cat([getattr(batch, field) for batch in one_by_one]), getattr(at_once, field))
    resumed = small.loader(rows=2)
    resumed.load_state(eights.state())
    assert torch.equal(resumed.next().tokens, eights.next().tokens[:2])


# ---------------------------------------------------------------- modules and modes


def test_layers_in_a_plain_list_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "listed_layers.py").write_text(
        "from torch import nn\n"
        "class Model(nn.Module):\n"
        "    def __init__(self, kind):\n"
        "        super().__init__()\n"
        "        self.embedding = nn.Embedding(8, 4)\n"
        "        self.layers = kind([nn.Linear(4, 4)])\n"
        "def plain():\n"
        "    return Model(list)\n"
        "def known():\n"
        "    return Model(nn.ModuleList)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    vocabulary = Vocabulary(8, 0, 1, 2)
    with pytest.raises(ConfigError, match="'layers' is a plain list of layers"):
        build_model(ModelConfig(name="listed_layers:plain"), vocabulary, 0)
    assert build_model(ModelConfig(name="listed_layers:known"), vocabulary, 0).derived["model.n_params"] == 32 + 20


def test_dropout_is_off_while_scoring_and_the_mode_returns(small: Small) -> None:
    model = WithDropout().train()
    frozen = model.dropout  # a layer that someone keeps in evaluation mode on purpose
    rows = list(heldout_rows(small.shards.path, Feed(32), rows=8))
    ids = [open_split(small.shards.path, "heldout").document(0)[:200]]

    def score() -> float:
        return float(score_documents(model, ids, context_tokens=32, stride=16, batch=4, device=CPU)[0])

    for figure in (lambda: heldout_loss(model, rows, CPU), score):
        assert figure() == figure(), "dropout is off"
        assert all(module.training for module in model.modules())
    frozen.eval()
    score()
    heldout_loss(model, rows, CPU)
    assert model.training
    assert not frozen.training
    frozen.train()
    ids = [np.array([0, 10_000])]  # a token that does not exist
    with pytest.raises(IndexError):
        score()
    assert all(module.training for module in model.modules())


def test_training_in_evaluation_mode_is_refused(small: Small) -> None:
    setup = small.setup(WithDropout().eval())
    assert setup.model.training, "prepare() puts a model into training mode"
    setup.model.eval()
    before = weights(setup.model)
    with pytest.raises(TrainingError, match="evaluation mode"):
        train_step(setup, TrainState())
    assert equal(before, weights(setup.model))


# ---------------------------------------------------------------- the step


def test_gradients_do_not_pile_up(small: Small) -> None:
    setup = small.setup(WithDropout())
    fit(setup, TrainState(), [], never)
    assert all(parameter.grad is None for parameter in setup.model.parameters())


class GivenBatches:
    """A loader over given batches."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = iter(batches)

    def next(self) -> Any:
        return next(self.batches)

    def state(self) -> dict[str, int]:
        return {}

    def load_state(self, state: dict[str, int]) -> None:
        raise AssertionError("not needed")


def test_accumulation_is_no_mean_of_means(small: Small) -> None:
    """One batch of eight rows, rows of very different numbers of targets, against eight micro-batches of one."""
    whole = small.loader(rows=8).next()
    targets = whole.targets.clone()
    for row in range(8):
        targets[row, 4 * row + 1 :] = NO_TARGET
    whole = replace(whole, targets=targets, n_targets=int((targets != NO_TARGET).sum()))
    parts = [
        Batch(*(getattr(whole, name)[row : row + 1] for name in ("tokens", "targets", "positions", "segments")), count)
        for row in range(8)
        if (count := int((targets[row] != NO_TARGET).sum()))
    ]
    assert sum(part.n_targets for part in parts) == whole.n_targets

    def gradient(batches: list[Batch]) -> torch.Tensor:
        torch.manual_seed(0)
        setup = small.setup(WithDropout(dropout=0), loader=GivenBatches(batches), accumulate=len(batches))
        kept: list[torch.Tensor] = []
        setup.strategy.step = lambda optimizer, lr: kept.extend(optimizer.grads())  # type: ignore[method-assign]
        train_step(replace(setup, clip_norm=None), TrainState())
        return torch.cat([grad.flatten() for grad in kept])

    at_once, in_parts = gradient([whole]), gradient(parts)
    torch.testing.assert_close(at_once, in_parts, rtol=1e-4, atol=1e-7)

    torch.manual_seed(0)
    model = WithDropout(dropout=0)
    for part in parts:  # the mistake
        loss = functional.cross_entropy(model(part.tokens).flatten(0, 1), part.targets.flatten())
        (loss / len(parts)).backward()
    means = torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])
    assert (means - at_once).norm() > 0.1 * at_once.norm()


def test_a_gradient_that_is_not_finite_changes_no_weight(small: Small) -> None:
    setup = small.setup(WithDropout(), max_skipped=1)

    def broken(model: Any, batch: Batch) -> Any:
        terms, metrics = setup.loss(model, batch)
        return {name: (total * float("inf"), count) for name, (total, count) in terms.items()}, metrics

    before, state = weights(setup.model), TrainState()
    train_step(replace(setup, loss=broken), state)
    assert (state.step, state.skipped) == (1, 1)
    assert equal(before, weights(setup.model))
    with pytest.raises(TrainingError, match="not finite"):
        train_step(replace(setup, loss=broken), state)
    assert equal(before, weights(setup.model))


# ---------------------------------------------------------------- device and dtype


def test_every_batch_is_moved_to_the_device_of_the_model(small: Small) -> None:
    """The loader's batches cannot be used as they are: only what `to` gives has tensors."""
    real = [small.loader().at(4 * index) for index in range(3)]
    moved: list[torch.device] = []

    def on_device(batch: Batch, device: Any) -> Batch:
        moved.append(device)
        return batch.to(device)

    elsewhere = [
        SimpleNamespace(
            n_targets=batch.n_targets,
            n_tokens=batch.n_tokens,
            counts=batch.counts,
            to=lambda device, batch=batch: on_device(batch, device),
        )
        for batch in real
    ]
    setup = small.setup(WithDropout(), loader=GivenBatches(elsewhere), accumulate=3)
    train_step(setup, TrainState())
    heldout_loss(setup.model, [SimpleNamespace(n_targets=1, to=lambda device: on_device(real[0], device))], CPU)
    assert moved == [setup.strategy.device] * 4
    assert {parameter.device for parameter in setup.model.parameters()} == {setup.strategy.device}


@pytest.mark.parametrize(
    ("name", "stored", "computed"),
    [
        ("fp32", torch.float32, torch.float32),
        ("bf16", torch.bfloat16, torch.bfloat16),
        ("bf16-mixed", torch.float32, torch.bfloat16),
    ],
)
def test_the_dtype_is_decided_in_one_place(name: str, stored: torch.dtype, computed: torch.dtype, small: Small) -> None:
    precision = resolve_precision(name, CPU)
    strategy = SingleProcess(CPU, precision)
    model = strategy.prepare(WithDropout())
    seen: list[torch.dtype] = []
    model.head.register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))
    losses: list[torch.dtype] = []

    def watched(of: Any, batch: Batch) -> Any:
        terms, metrics = load_loss(small.config.train.loss)(of, batch)
        losses.extend(total.dtype for total, _ in terms.values())
        return terms, metrics

    setup = small.setup(model, precision=precision, strategy=strategy, loss=watched)
    model.to(stored)
    setup = replace(setup, optimizer=load_optimizer(small.config.optim, model))
    train_step(setup, TrainState())
    assert seen == [computed]
    assert losses == [torch.float32]
    assert {parameter.dtype for parameter in model.parameters()} == {stored}
    assert {master.dtype for master in setup.optimizer.masters.values()} == {torch.float32}


def test_small_updates_are_not_lost_in_bf16(small: Small) -> None:
    """A hundred updates of a thousandth of the rounding step of bf16 near 1, against the same without masters."""
    config = replace(small.config.optim, weight_decay=0.0)
    model = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    naive = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    for each in (model, naive):
        nn.init.ones_(each.weight)
    optimizer = load_optimizer(config, model)
    plain = torch.optim.AdamW(naive.parameters(), lr=2e-4, weight_decay=0.0)
    for _ in range(100):
        model.weight.grad = torch.ones_like(model.weight)
        naive.weight.grad = torch.ones_like(naive.weight)
        optimizer.step(2e-4)
        plain.step()
    assert abs(model.weight.item() - 0.98) < 0.004
    assert naive.weight.item() == 1.0, "the mistake: every update is rounded away"


# ---------------------------------------------------------------- seeds


def test_the_seed_alone_decides(small: Small) -> None:
    vocabulary = vocabulary_of(load_tokenizer(small.tokenizer.path))

    def made(seed: int, drawn_before: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        torch.manual_seed(drawn_before)
        torch.rand(drawn_before)
        np.random.seed(drawn_before)
        model = build_model(small.config.model, vocabulary, seed).module
        return weights(model), small.loader(seed=seed).next().tokens

    first, again, other = made(3, 17), made(3, 41), made(4, 17)
    assert equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not equal(first[0], other[0])
    assert not torch.equal(first[1], other[1])
    assert "seed" in set(option_paths())


# ---------------------------------------------------------------- checkpoints


@pytest.fixture
def saved(small: Small, tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint after step 3 of 6, and the weights after all 6 without interruption."""
    torch.manual_seed(0)
    setup, state = small.setup(WithDropout(), steps=3), TrainState()
    fit(setup, state, [], never)
    folder = save_checkpoint(tmp_path, state, setup.model, setup.optimizer, setup.loader.state(), "key")
    fit(replace(setup, steps=6), state, [], never)
    return folder, weights(setup.model)


def resumed(small: Small, folder: Path, leave_out: str = "") -> dict[str, torch.Tensor]:
    """Weights after step 6, gone on with from the checkpoint in fresh objects, one part of the state left out."""
    torch.manual_seed(99)
    setup = small.setup(WithDropout())
    generator = torch.get_rng_state()
    state, position = load_checkpoint(folder, setup.model, setup.optimizer, "key")
    if leave_out == "optimizer":
        for optimizer in setup.optimizer.optimizers:
            optimizer.state.clear()
    if leave_out == "generators":
        torch.set_rng_state(generator)
    if leave_out != "position":
        setup.loader.load_state(position)
    if leave_out == "weights":
        fresh = WithDropout().state_dict()
        setup.model.load_state_dict(fresh)
    if leave_out == "step":
        state.step = 0
    fit(setup, state, [], never)
    return weights(setup.model)


def test_every_part_of_a_checkpoint_matters(small: Small, saved: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, uninterrupted = saved
    assert equal(resumed(small, folder), uninterrupted)
    for part in ("weights", "optimizer", "generators", "position", "step"):
        assert not equal(resumed(small, folder, part), uninterrupted), part


def test_a_checkpoint_that_lacks_a_part_is_refused(
    small: Small, saved: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    folder, _ = saved
    setup = small.setup(WithDropout())
    files = sorted(json.loads((folder / "manifest.json").read_text())["files"])
    assert files == ["index.json", "state.json", "state.safetensors"]
    for name in files:
        for number, spoil in enumerate((_delete, _cut, _flip)):
            broken = tmp_path / f"{name}-{number}" / folder.name
            shutil.copytree(folder, broken)
            spoil(broken / name)
            before = weights(setup.model)
            with pytest.raises(StoreError, match=re.escape(name)):
                load_checkpoint(broken, setup.model, setup.optimizer, "key")
            assert equal(before, weights(setup.model)), "nothing was loaded from it"
    half = tmp_path / "half" / folder.name  # what a crash leaves, had it been renamed too early
    shutil.copytree(folder, half)
    (half / "manifest.json").unlink()
    assert list_checkpoints(half.parent) == []


def _delete(path: Path) -> None:
    path.unlink()


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_checkpoint_of_another_run_is_refused(small: Small, saved: tuple[Path, dict[str, torch.Tensor]]) -> None:
    setup = small.setup(WithDropout())
    with pytest.raises(StoreError, match="another config, data or code"):
        load_checkpoint(saved[0], setup.model, setup.optimizer, "another key")


# ---------------------------------------------------------------- figures


class Uniform(nn.Module):
    """Every token is as probable as any other."""

    def __init__(self, n_tokens: int) -> None:
        super().__init__()
        self.n_tokens = n_tokens
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.zeros(*tokens.shape, self.n_tokens)


def test_bits_per_byte_do_not_depend_on_the_tokenizer() -> None:
    """The same knowledge, none, in two vocabularies: 256 tokens of one byte, and 65,536 of two. 8 bits a byte, both times.

    The perplexities, 256 and 65,536, would say that the second is far worse.
    """
    n_bytes = np.array([100.0])
    figures, perplexities = [], []
    for bytes_per_token in (1, 2):
        n_tokens = 256**bytes_per_token
        ids = np.zeros(1 + 100 // bytes_per_token, dtype=np.int64)
        nats = score_documents(Uniform(n_tokens), [ids], context_tokens=16, stride=8, batch=2, device=CPU)
        figures.append(bits_per_byte(nats, n_bytes))
        perplexities.append(float(np.exp(nats.sum() / (len(ids) - 1))))
    assert figures == pytest.approx([8.0, 8.0], rel=1e-5)
    assert perplexities == pytest.approx([256, 65_536], rel=1e-4)
