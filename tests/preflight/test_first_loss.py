"""What theory has for the first loss of a student and of heads over whole texts, and the bugs that it finds there."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from tests.preflight.conftest import CLASSES, Corpus, Parts, finding, make_parts, only, verdict_of, with_loss
from tests.training.conftest import VOCABULARY, make_examples, random_sequences
from torch import nn
from torch.distributions import Categorical, kl_divergence

from kajiya.config.schema import LossConfig
from kajiya.config.tables import TABLES, check_choice
from kajiya.data.batch import NO_TARGET, Batch
from kajiya.models.build import build_model
from kajiya.models.hidden import all_logits
from kajiya.models.outputs import sequence_logits
from kajiya.models.tasks import Task
from kajiya.preflight.portion import portion
from kajiya.preflight.prove_start import AT_FIRST
from kajiya.preflight.subject import Finding
from kajiya.training.losses.distill import distill
from kajiya.training.teacher import CachedTeacher


def start_of(parts: Parts, corpus: Corpus) -> Finding:
    """What the check of the first loss found."""
    return finding(verdict_of(only(parts, "start"), corpus)[0], "start")


def test_theory_is_asked_about_every_loss() -> None:
    """A policy's answers are looked at in the place of its loss."""
    assert AT_FIRST.keys() | {"grpo"} == TABLES["loss"].keys()


# ---------------------------------------------------------------- heads over whole texts


def headed(task: Task, name: str, labels: list[float] | list[int] | None = None, **options: Any) -> Parts:
    """Sequences with labels (pairs of them, of `reward`), and a model with a new head."""
    k = 2 if name == "reward" else 1
    parts = with_loss(make_parts(), "preference" if k == 2 else "labelled", name, chunk_tokens=None, **options)
    parts.model = build_model(parts.config.model, VOCABULARY, 0, task).module.train()
    examples = [make_examples(random_sequences(4 * k, seed), k=k) for seed in range(3)]
    parts.batches = [replace(each, labels=None if labels is None else torch.tensor(labels)) for each in examples]
    return parts


SCORE = Task("score")
MARGINS, VALUES, NUMBERS = [1.0, 3.0, 2.0, 3.0], [3.0, -1.0, 2.0, 5.0], [0, 3, 1, 2]
HEADS: dict[str, tuple[Callable[[], Parts], float]] = {
    "rewards": (lambda: headed(SCORE, "reward"), math.log(2)),
    "rewards, centred": (lambda: headed(SCORE, "reward", centering=0.1), math.log(2)),
    "rewards with margins": (
        lambda: headed(SCORE, "reward", MARGINS),
        sum(math.log1p(math.exp(margin)) for margin in MARGINS) / 4,
    ),
    "values": (lambda: headed(SCORE, "regress", VALUES), (9 + 1 + 4 + 25) / 4),
    "values, Huber": (lambda: headed(SCORE, "regress", VALUES, huber_delta=2.0), (8 + 1 + 4 + 16) / 4),
    "classes": (lambda: headed(Task("classes", CLASSES), "classify", NUMBERS), math.log(4)),
    "classes, smoothed": (
        lambda: headed(Task("classes", CLASSES), "classify", NUMBERS, label_smoothing=0.1),
        math.log(4),
    ),
}


@pytest.mark.parametrize("name", HEADS)
def test_a_new_head_begins_where_theory_says(name: str, corpus: Corpus) -> None:
    make, value = HEADS[name]
    found = start_of(make(), corpus)
    assert found.state == "passed", found.text
    assert found.figures["loss"] == pytest.approx(value, rel=0.2)
    assert "near" in found.text


def test_of_a_head_beside_trained_weights_the_formula_is_known(corpus: Corpus) -> None:
    """However large its rewards are."""
    parts = headed(SCORE, "reward")
    parts.config = replace(parts.config, model=replace(parts.config.model, path="somewhere"))
    with torch.no_grad():
        parts.model.score.weight.mul_(50)
    found = start_of(parts, corpus)
    assert found.state == "passed", found.text
    assert "near" not in found.text


def _huge(parts: Parts) -> None:
    with torch.no_grad():
        parts.model.score.weight.mul_(50)


def _wrapped(change: Callable[[Any, Any, Any], Any]) -> Callable[[Parts], None]:
    def inject(parts: Parts) -> None:
        honest = parts.setup_changes["loss"]
        parts.setup_changes["loss"] = lambda model, batch: change(honest, model, batch)

    return inject


def _relabelled(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Parts], None]:
    return _wrapped(lambda honest, model, batch: honest(model, replace(batch, labels=change(batch.labels))))


def _sides_swapped(honest: Any, model: Any, batch: Any) -> Any:
    rewards = sequence_logits(model, batch).squeeze(-1)
    lead = rewards[1::2] - rewards[0::2]
    return {"loss": (nn.functional.softplus(-lead).sum(), "examples")}, {}


def _counted_twice(honest: Any, model: Any, batch: Any) -> Any:
    terms, metrics = honest(model, batch)
    value, unit = terms["loss"]
    return {"loss": (2 * value, unit)}, metrics


HEAD_BUGS: dict[str, tuple[str, Callable[[Parts], None]]] = {
    "a head of a huge spread": ("rewards", _huge),
    "the rejected answer for the chosen": ("rewards", _wrapped(_sides_swapped)),
    "a sum over sequences, divided by pairs": ("rewards", _wrapped(_counted_twice)),
    "margins of the other sign": ("rewards with margins", _relabelled(lambda labels: -labels)),
    "margins left out": ("rewards with margins", _relabelled(torch.zeros_like)),
    "values of a huge spread": ("values", _huge),
    "values of the next text": ("values", _relabelled(lambda labels: labels.roll(1))),
    "values scaled": ("values, Huber", _relabelled(lambda labels: labels / 2)),
    "classes numbered from one": ("classes", _relabelled(lambda labels: (labels + 1) % 4)),
    "classes of a huge spread": ("classes", _huge),
}


@pytest.mark.parametrize("name", HEAD_BUGS)
def test_a_bug_before_a_head_is_caught(name: str, corpus: Corpus) -> None:
    which, inject = HEAD_BUGS[name]
    parts = HEADS[which][0]()
    inject(parts)
    found = start_of(parts, corpus)
    assert found.state == "failed", found.text
    assert found.remedy


# ---------------------------------------------------------------- a student and its teacher


class Knowing(nn.Module):
    """A teacher that knows which token follows which in the rows; `of` changes which token it looks at, or what it says of it."""

    def __init__(self, batches: list[Batch], of: Callable[[torch.Tensor], torch.Tensor] | None = None) -> None:
        super().__init__()
        counts = torch.full((VOCABULARY.size, VOCABULARY.size), 0.01)
        for batch in batches:
            wanted = batch.targets != NO_TARGET
            counts.index_put_((batch.tokens[wanted], batch.targets[wanted]), torch.ones(()), accumulate=True)
        self.table = nn.Parameter(counts.log(), requires_grad=False)
        self.of = of or (lambda tokens: tokens)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.table[self.of(tokens)]


def kept_of(teacher: Knowing, batches: list[Any], k: int, temperature: float, shift: int = 0) -> CachedTeacher:
    """The most probable tokens at every place of the rows; `shift` places off."""
    ids, log_p = [], []
    for batch in batches:
        found = (teacher(batch.tokens) / temperature).log_softmax(-1).flatten(0, 1).topk(k, dim=1)
        ids.append(found.indices.numpy().astype(np.int32))
        log_p.append(found.values.numpy())
    tables = (np.roll(np.concatenate(each), shift, axis=0) for each in (ids, log_p))
    return CachedTeacher(*tables, VOCABULARY.size)


def student(teacher: Any = None, loss: Callable[..., Any] = distill, shift: int = 0, **options: Any) -> Parts:
    """A run that learns from a teacher of its rows; with `top_k`, from what is kept of it."""
    parts = make_parts()
    given = {"teacher": "a teacher", "chunk_tokens": 7, **options}
    bound = check_choice("loss", "distill", given, "train.loss")
    known = Knowing(parts.batches) if teacher is None else teacher(parts)
    if bound.top_k is not None:
        known = kept_of(known, parts.batches, bound.top_k, bound.temperature, shift)
    parts.config = replace(parts.config, train=replace(parts.config.train, loss=LossConfig("distill", given)))
    parts.setup_changes["loss"] = partial(loss, options=bound, teacher=known, n_tokens=None)
    return parts


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize(
    "more",
    [{}, {"temperature": 2.0, "teacher_weight": 0.7}, {"top_k": 5}, {"top_k": 97}, {"top_k": 3, "temperature": 2.0}],
    ids=str,
)
def test_a_student_begins_where_its_teacher_says(divergence: str, more: dict[str, Any], corpus: Corpus) -> None:
    found = start_of(student(divergence=divergence, jsd_teacher_share=0.3, **more), corpus)
    assert found.state == "passed", found.text
    assert "as beside a teacher whose own loss is" in found.text


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
def test_the_divergence_is_that_of_whole_distributions(divergence: str, corpus: Corpus) -> None:
    parts = student(divergence=divergence)
    found = start_of(parts, corpus)
    batch = portion(parts.batches[0])
    wanted = batch.targets != NO_TARGET
    with torch.no_grad():
        models = (Knowing(parts.batches)(batch.tokens), all_logits(parts.model.eval(), batch))
    p, q = (Categorical(logits=each[wanted].double()) for each in models)
    value = kl_divergence(p, q) if divergence == "forward" else kl_divergence(q, p)
    assert found.figures["loss"] == pytest.approx(float(value.mean()), rel=1e-4)
    assert f"{float(value.mean()):.3f}, as beside" in found.text


def _itself(parts: Parts, steps: int = 60) -> Any:
    """The student's own weights, once they know the rows."""
    optimizer = torch.optim.AdamW(parts.model.parameters(), lr=1e-2)
    for _ in range(steps):
        for batch in parts.batches:
            logits = all_logits(parts.model, batch).flatten(0, 1)
            nn.functional.cross_entropy(logits, batch.targets.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    parts.config = replace(parts.config, model=replace(parts.config.model, path="a teacher"))
    return copy.deepcopy(parts.model).eval()


@pytest.mark.parametrize("is_wrong", [False, True])
def test_a_student_that_is_its_teacher_begins_at_nothing(is_wrong: bool, corpus: Corpus) -> None:
    parts = student(_itself)
    if is_wrong:
        # What a load does that leaves a matrix as it was drawn.
        nn.init.normal_(parts.model.model.layers[0].mlp.down_proj.weight, std=0.02)
    found = start_of(parts, corpus)
    assert found.state == ("failed" if is_wrong else "passed"), found.text
    assert "0.000, as beside a student that is its teacher" in found.text


def test_a_student_whose_teacher_is_not_at_hand_is_no_pass(corpus: Corpus) -> None:
    parts = student()
    bound = parts.setup_changes["loss"]
    parts.setup_changes["loss"] = lambda model, batch: bound(model, batch)
    found = start_of(parts, corpus)
    assert found.state == "skipped"
    assert "theory says nothing here: the teacher is not at hand" in found.text


def _not_squared(model: Any, batch: Any, options: Any, teacher: Any, n_tokens: int | None) -> Any:
    terms, metrics = distill(model, batch, options, teacher, n_tokens)
    return {name: (value / options.temperature**2, unit) for name, (value, unit) in terms.items()}, metrics


def _the_other_way(model: Any, batch: Any, options: Any, teacher: Any, n_tokens: int | None) -> Any:
    return distill(model, batch, replace(options, divergence="reverse"), teacher, n_tokens)


def _share_left_out(model: Any, batch: Any, options: Any, teacher: Any, n_tokens: int | None) -> Any:
    return distill(model, batch, replace(options, teacher_weight=1.0), teacher, n_tokens)


def _others_left_out(model: Any, batch: Any, options: Any, teacher: CachedTeacher, n_tokens: int | None) -> Any:
    """The kept tokens as though they were all."""
    norm = np.log(np.exp(teacher.log_p).sum(axis=1, keepdims=True))
    alone = replace(teacher, log_p=(teacher.log_p - norm).astype(np.float32))
    return distill(model, batch, options, alone, n_tokens)


_KNOWS = "no better than guessing"
STUDENT_BUGS: dict[str, tuple[Callable[[], Parts], str]] = {
    "temperature not squared": (lambda: student(loss=_not_squared, temperature=2.0), "as beside"),
    "divergence the other way": (lambda: student(loss=_the_other_way), "as beside"),
    "the text's own loss left out": (lambda: student(loss=_share_left_out, teacher_weight=0.5), "as beside"),
    "all other tokens left out": (lambda: student(loss=_others_left_out, top_k=3), "as beside"),
    "a teacher one place behind": (
        lambda: student(lambda parts: Knowing(parts.batches, lambda tokens: tokens.roll(1, 1))),
        _KNOWS,
    ),
    "a teacher of another vocabulary": (
        lambda: student(lambda parts: Knowing(parts.batches, lambda tokens: (tokens + 5) % VOCABULARY.size)),
        _KNOWS,
    ),
    "what is kept lies elsewhere": (lambda: student(top_k=5, shift=3), _KNOWS),
}


@pytest.mark.parametrize("name", STUDENT_BUGS)
def test_a_bug_before_a_student_is_caught(name: str, corpus: Corpus) -> None:
    make, words = STUDENT_BUGS[name]
    found = start_of(make(), corpus)
    assert found.state == "failed", found.text
    assert words in found.text
    assert found.remedy
