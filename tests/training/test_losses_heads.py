"""Losses of heads over whole texts, of masked tokens and of encoder–decoders: each value from its formula, each gradient by
finite differences."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from scipy.special import expit, logsumexp
from tests.training.conftest import VOCABULARY, make_batch, make_examples, make_pairs_of_text, random_sequences

from kajiya.config.options import DistillLoss
from kajiya.config.schema import LossConfig, ModelConfig
from kajiya.data.batch import NO_TARGET, Batch, ExampleBatch, Seq2SeqBatch
from kajiya.models.build import build_model
from kajiya.models.tasks import Task
from kajiya.training.losses import load_loss
from kajiya.training.losses.distill import distill

Make = Callable[..., torch.nn.Module]
CLASSES = Task("classes", ("a", "b", "c", "d"))


def _model(task: Task) -> Any:
    """A model with the task's head whose outputs are well apart, without dropout."""
    architecture = {"masked": "bert", "seq2seq": "t5"}.get(task.name, "llama")
    config = ModelConfig(name=architecture, n_params="40k", max_positions=64, init_std=0.2)
    return build_model(config, VOCABULARY, 0, task).module.eval()


def _labelled(labels: torch.Tensor, k: int = 1) -> ExampleBatch:
    return replace(make_examples(random_sequences(len(labels) * k), k=k), labels=labels)


def _alone(model: Any, batch: ExampleBatch) -> np.ndarray:
    """The head's outputs of each sequence, each alone and unpadded, [S, C]."""
    found = []
    for sequence in range(len(batch.last)):
        ids = batch.rows.tokens[batch.owner == sequence][None]
        with torch.no_grad():
            found.append(model(input_ids=ids).logits[0].double().numpy())
    return np.stack(found)


def _masked_rows() -> Batch:
    batch = make_batch(3)
    return replace(batch, targets=torch.where(batch.targets % 3 == 0, batch.tokens, NO_TARGET), is_causal=False)


def _figures(name: str, options: dict[str, Any], model: Any, batch: Any) -> tuple[float, dict[str, float]]:
    terms, metrics = load_loss(LossConfig(name, options))(model, batch)
    ((total, unit),) = terms.values()
    n = {**batch.counts, "targets": float((_targets(batch) != NO_TARGET).sum())}
    told = {key: float(value) / n[str(count)] for key, (value, count) in metrics.items()}
    return float(total.detach()) / n[str(unit)], told


def _targets(batch: Any) -> torch.Tensor:
    return batch.rows.targets if isinstance(batch, ExampleBatch) else batch.targets


def _log_p(logits: np.ndarray) -> np.ndarray:
    return logits - logsumexp(logits, axis=-1, keepdims=True)


def _smoothed(log_p: np.ndarray, targets: np.ndarray, smoothing: float) -> np.ndarray:
    """Szegedy et al., arXiv:1512.00567, section 7: (1 − ε) of the target, ε spread evenly over all outcomes."""
    own = -log_p[np.arange(len(targets)), targets]
    return (1 - smoothing) * own - smoothing * log_p.mean(axis=1)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_classify(smoothing: float) -> None:
    labels = torch.tensor([0, 3, 1, 2, 2, 0, 1])
    model, batch = _model(CLASSES), _labelled(labels)
    value, told = _figures("classify", {"label_smoothing": smoothing}, model, batch)
    log_p = _log_p(_alone(model, batch))
    assert log_p.std() > 0.1
    assert value == pytest.approx(_smoothed(log_p, labels.numpy(), smoothing).mean(), rel=1e-4)
    assert told["nll"] == pytest.approx(_smoothed(log_p, labels.numpy(), 0).mean(), rel=1e-4)
    assert told["accuracy"] == pytest.approx((log_p.argmax(axis=1) == labels.numpy()).mean())


@pytest.mark.parametrize("delta", [None, 0.7])
def test_regress(delta: float | None) -> None:
    """Squared error; past delta as Huber's, in twice his units: 2δ|e| − δ²."""
    model, batch = _model(Task("score")), _labelled(_VALUES)
    # Some answers near what the model says, some far.
    labels = torch.from_numpy(_alone(model, batch)[:, 0]).float() + torch.tensor([0.1, -2.0, 5.0, 0.4, 1.3, -0.2])
    batch = replace(batch, labels=labels)
    value, told = _figures("regress", {} if delta is None else {"huber_delta": delta}, model, batch)
    error = _alone(model, batch)[:, 0] - labels.double().numpy()
    expected = error**2
    if delta is not None:
        is_far = np.abs(error) > delta
        assert 0 < is_far.sum() < len(error)
        expected = np.where(is_far, 2 * delta * np.abs(error) - delta**2, error**2)
    assert value == pytest.approx(expected.mean(), rel=1e-4)
    assert told["squared_error"] == pytest.approx((error**2).mean(), rel=1e-4)
    assert told["absolute_error"] == pytest.approx(np.abs(error).mean(), rel=1e-4)


@pytest.mark.parametrize("has_margin", [False, True])
def test_reward(has_margin: bool) -> None:
    margins = torch.tensor([0.5, 1.0, 0.0, 2.0])
    model, batch = _model(Task("score")), _labelled(margins, k=2)
    batch = batch if has_margin else replace(batch, labels=None)
    value, told = _figures("reward", {"centering": 0.05}, model, batch)
    rewards = _alone(model, batch)[:, 0]
    lead = rewards[0::2] - rewards[1::2]
    expected = -np.log(expit(lead - margins.numpy() if has_margin else lead))
    assert value == pytest.approx((expected + 0.05 * (rewards[0::2] + rewards[1::2]) ** 2).mean(), rel=1e-4)
    assert told["rewards/accuracies"] == pytest.approx((lead > 0).mean())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_masked_lm(smoothing: float) -> None:
    """Each document alone: its own tokens around, at positions from 0."""
    model, batch = _model(Task("masked")), _masked_rows()
    log_p, targets = [], []
    for row in range(len(batch.tokens)):
        for segment in batch.segments[row].unique():
            mine = batch.segments[row] == segment
            with torch.no_grad():
                logits = model(input_ids=batch.tokens[row][mine][None]).logits[0].double().numpy()
            wanted = batch.targets[row][mine].numpy()
            log_p.append(_log_p(logits)[wanted != NO_TARGET])
            targets.append(wanted[wanted != NO_TARGET])
    _check_tokens("masked_lm", smoothing, model, batch, np.concatenate(log_p), np.concatenate(targets))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_seq2seq(smoothing: float) -> None:
    """Each pair alone, without what fills its input and its target up."""
    model, batch = _model(Task("seq2seq")), make_pairs_of_text(4)
    log_p, targets = [], []
    for row in range(len(batch.inputs)):
        wanted = batch.targets[row] != NO_TARGET
        inputs, tokens = batch.inputs[row][batch.inputs_mask[row]][None], batch.tokens[row][wanted][None]
        with torch.no_grad():
            logits = model(input_ids=inputs, decoder_input_ids=tokens, use_cache=False).logits[0].double().numpy()
        log_p.append(_log_p(logits))
        targets.append(batch.targets[row][wanted].numpy())
    _check_tokens("seq2seq", smoothing, model, batch, np.concatenate(log_p), np.concatenate(targets))


def _check_tokens(name: str, smoothing: float, model: Any, batch: Any, log_p: np.ndarray, targets: np.ndarray) -> None:
    value, told = _figures(name, {"label_smoothing": smoothing}, model, batch)
    assert len(targets) > 10
    assert log_p.std() > 0.1
    assert value == pytest.approx(_smoothed(log_p, targets, smoothing).mean(), rel=1e-4)
    assert told["nll"] == pytest.approx(_smoothed(log_p, targets, 0).mean(), rel=1e-4)
    assert told["accuracy"] == pytest.approx((log_p.argmax(axis=1) == targets).mean())


# ---------------------------------------------------------------- gradients

_LABELS = torch.tensor([0, 3, 1, 2, 2, 0])
_VALUES = torch.tensor([0.1, -2.0, 5.0, 0.4, 1.3, -0.2])
_CASES: dict[str, tuple[str, dict[str, Any], Task, Callable[[], Batch | ExampleBatch | Seq2SeqBatch]]] = {
    "classify": ("classify", {"label_smoothing": 0.2}, CLASSES, lambda: _labelled(_LABELS)),
    "regress": ("regress", {}, Task("score"), lambda: _labelled(_VALUES)),
    "regress-huber": ("regress", {"huber_delta": 0.7}, Task("score"), lambda: _labelled(_VALUES)),
    "reward": ("reward", {"centering": 0.05}, Task("score"), lambda: _labelled(_VALUES.abs(), k=2)),
    "masked_lm": ("masked_lm", {"label_smoothing": 0.1}, Task("masked"), _masked_rows),
    "seq2seq": ("seq2seq", {"label_smoothing": 0.1}, Task("seq2seq"), lambda: make_pairs_of_text(4)),
}


class Pair(torch.nn.Module):
    """A user's own encoder–decoder: each token is read with the mean of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(VOCABULARY.size, 16)
        self.inner = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Tanh(), torch.nn.Linear(16, 16))
        self.head = torch.nn.Linear(16, VOCABULARY.size)

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.table

    def forward(self, inputs: torch.Tensor, inputs_mask: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        read = self.table(inputs) * inputs_mask[:, :, None] / inputs_mask.sum(dim=1)[:, None, None]
        logits: torch.Tensor = self.head(self.inner(self.table(tokens) + read.sum(dim=1, keepdim=True)))
        return logits


@pytest.fixture
def in_double() -> Any:
    """The losses' own casts to float32, in which a difference would drown, give float64."""
    with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
        yield


@pytest.mark.parametrize("case", sorted(_CASES))
@pytest.mark.usefixtures("in_double")
def test_the_gradient_by_finite_differences(case: str) -> None:
    name, options, task, rows = _CASES[case]
    if task.name == "seq2seq":
        # T5's own norms compute in float32, in which its steep logits drown a difference.
        torch.manual_seed(0)
        model: Any = Pair().double()
    else:
        model = _model(task).double()
        model.set_attn_implementation("eager")
    batch, loss = rows(), load_loss(LossConfig(name, options))
    _check_slope(model, lambda: loss(model, batch)[0]["loss"][0])


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
@pytest.mark.usefixtures("in_double")
def test_the_gradient_of_distillation_by_finite_differences(divergence: str, tiny_model: Make) -> None:
    student: Any = tiny_model(init_std=0.2).eval().double()
    teacher: Any = tiny_model(1, hidden_size=16, init_std=0.2).eval().double().requires_grad_(False)
    for each in (student, teacher):
        each.set_attn_implementation("eager")
    batch = make_batch(2)
    options = DistillLoss("x", divergence=divergence, temperature=2.0, teacher_weight=0.7, chunk_tokens=5)
    _check_slope(student, lambda: distill(student, batch, options, teacher)[0]["loss"][0])


def _check_slope(model: Any, value: Callable[[], torch.Tensor]) -> None:
    """Along a random direction of the embedding, and along one of every other weight."""
    generator = torch.Generator().manual_seed(0)
    value().backward()
    embedding = model.get_input_embeddings().weight
    others = [each for each in model.parameters() if each is not embedding and each.grad is not None]
    assert len(others) > 5
    for weights in ([embedding], others):
        directions = [torch.randn(each.shape, dtype=torch.float64, generator=generator) for each in weights]
        slope = sum(float((each.grad * way).sum()) for each, way in zip(weights, directions, strict=True))
        assert abs(slope) > 0.1
        ends = []
        for step in (1e-4, -2e-4):
            with torch.no_grad():
                for each, way in zip(weights, directions, strict=True):
                    each.add_(way, alpha=step)
                ends.append(float(value()))
        with torch.no_grad():
            for each, way in zip(weights, directions, strict=True):
                each.add_(way, alpha=1e-4)
        # The models' own norms compute in float32, whose digits end here.
        assert slope == pytest.approx((ends[0] - ends[1]) / 2e-4, rel=5e-3)
