"""A teacher's most probable tokens on disk: all of them are the teacher itself, some of them the closed form."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.training.conftest import VOCABULARY, make_batch

from kajiya.config.options import DistillLoss
from kajiya.config.schema import ModelConfig
from kajiya.data.batch import NO_TARGET, Batch
from kajiya.errors import ConfigError
from kajiya.models.build import build_model
from kajiya.models.hidden import all_logits
from kajiya.training.losses.distill import distill, open_teacher
from kajiya.training.teacher import CachedTeacher, Keeping, cache_teacher, open_cached_teacher

T = 16


def _model(seed: int, n_tokens: int = VOCABULARY.size) -> Any:
    known = replace(VOCABULARY, size=n_tokens)
    module = build_model(ModelConfig(n_params="30k", max_positions=64, init_std=0.3), known, seed).module
    return module.eval()


def _rows() -> list[Batch]:
    """Three batches of two rows, which lie one behind the other in their split."""
    batches = [make_batch(2, tokens=T, seed=seed) for seed in range(3)]
    places = torch.arange(6 * T).view(3, 2, T)
    return [replace(batch, sources=own) for batch, own in zip(batches, places, strict=True)]


def _cached(
    teacher: Any, folder: Path, top_k: int, temperature: float = 1.0, n_tokens: int | None = None
) -> CachedTeacher:
    rows = _rows()
    # The last batch is of the other split, whose places begin behind the first's.
    splits = ((0, rows[:2]), (100, rows[2:]))
    folder.mkdir(exist_ok=True)
    size = cache_teacher(teacher, splits, 100 + 6 * T, Keeping(top_k, temperature, 7, n_tokens), folder)
    return open_cached_teacher(folder, size)


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_all_tokens_kept_are_the_teacher_itself(divergence: str, temperature: float, tmp_path: Path) -> None:
    teacher, student = _model(1), _model(2)
    kept = _cached(teacher, tmp_path / "kept", VOCABULARY.size, temperature)
    options = DistillLoss(divergence=divergence, temperature=temperature, teacher_weight=0.7, chunk_tokens=5)
    for batch in _rows()[:2]:
        results = []
        for source in (teacher, kept):
            student.zero_grad()
            terms, metrics = distill(student, batch, options, source)
            terms["loss"][0].backward()
            results.append((terms["loss"][0].detach(), metrics["divergence"][0], student.lm_head.weight.grad.clone()))
        for expected, found in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_tokens_that_are_not_kept_are_one_outcome(tmp_path: Path) -> None:
    teacher, student = _model(1), _model(2)
    kept = _cached(teacher, tmp_path / "kept", 4)
    batch = _rows()[1]
    _, metrics = distill(student, batch, DistillLoss(teacher_weight=1.0), kept)
    wanted = batch.targets != NO_TARGET
    with torch.no_grad():
        p, q = (all_logits(model, batch)[wanted].double().softmax(1).numpy() for model in (teacher, student))
    expected = 0.0
    for own_p, own_q in zip(p, q, strict=True):
        best = np.argsort(-own_p)[:4]
        expected += float((own_p[best] * np.log(own_p[best] / own_q[best])).sum())
        rest_p, rest_q = 1 - own_p[best].sum(), 1 - own_q[best].sum()
        expected += float(rest_p * np.log(rest_p / rest_q))
    assert float(metrics["divergence"][0]) == pytest.approx(expected, rel=1e-4)
    # Less is known, so the divergence is less.
    _, whole = distill(student, batch, DistillLoss(), teacher)
    assert 0 < float(metrics["divergence"][0]) < float(whole["divergence"][0])


def test_the_other_split_has_places_of_its_own(tmp_path: Path) -> None:
    teacher, student = _model(1), _model(2)
    kept = _cached(teacher, tmp_path / "kept", VOCABULARY.size)
    batch = _rows()[2]
    assert batch.sources is not None
    _, expected = distill(student, batch, DistillLoss(), teacher)
    _, found = distill(student, replace(batch, sources=100 + batch.sources), DistillLoss(), kept)
    torch.testing.assert_close(found["divergence"][0], expected["divergence"][0], rtol=1e-4, atol=1e-4)


def test_another_vocabulary_is_named(tmp_path: Path) -> None:
    kept = _cached(_model(1), tmp_path / "kept", 4)
    other = CachedTeacher(kept.ids, kept.log_p, 50)
    with pytest.raises(ConfigError, match="vocabulary of 50"):
        distill(_model(2), _rows()[0], DistillLoss(teacher="someone"), other)


@pytest.mark.parametrize("is_kept", [False, True])
def test_heads_that_are_filled_up_otherwise_are_compared_over_the_tokens_that_there_are(
    is_kept: bool, tmp_path: Path
) -> None:
    """Those of one tokenizer, as Qwen2.5's of 0.5B and of 7B."""
    teacher, student = _model(1, VOCABULARY.size + 31), _model(2, VOCABULARY.size + 7)
    batch, n = _rows()[0], VOCABULARY.size
    with pytest.raises(ConfigError, match="vocabulary of 128 tokens, the student of 104"):
        distill(student, batch, DistillLoss(teacher="t"), teacher)
    source = _cached(teacher, tmp_path / "kept", n, n_tokens=n) if is_kept else teacher
    _, metrics = distill(student, batch, DistillLoss(chunk_tokens=5), source, n)
    wanted = batch.targets != NO_TARGET
    with torch.no_grad():
        log_p, log_q = (all_logits(each, batch)[wanted][:, :n].double().log_softmax(1) for each in (teacher, student))
    expected = float((log_p.exp() * (log_p - log_q)).sum())
    assert float(metrics["divergence"][0]) == pytest.approx(expected, rel=1e-4)
    nll = -float(log_q.gather(1, batch.targets[wanted][:, None]).sum())
    assert float(metrics["nll"][0]) == pytest.approx(nll, rel=1e-4)


def test_more_tokens_are_not_kept_than_there_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"options\.top_k: is 1,000, and the teacher knows 97 tokens"):
        _cached(_model(1), tmp_path / "kept", 1000)


def test_a_teacher_is_held_in_the_dtype_that_is_asked_for(tmp_path: Path) -> None:
    _model(1).save_pretrained(tmp_path)
    divergences = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        options = DistillLoss(teacher=str(tmp_path), teacher_dtype=name)
        teacher = open_teacher(options, torch.device("cpu"))
        assert {each.dtype for each in teacher.parameters()} == {dtype}
        assert not any(each.requires_grad for each in teacher.parameters())
        divergences[name] = float(distill(_model(2), _rows()[0], options, teacher)[1]["divergence"][0])
    assert divergences["bf16"] != divergences["fp32"]
    assert divergences["bf16"] == pytest.approx(divergences["fp32"], rel=0.03)
