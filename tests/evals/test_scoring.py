"""Scores against closed forms: every token once, uniform and known models, strides, documents of any length."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kajiya.config.schema import ModelConfig
from kajiya.data.batch import Batch
from kajiya.evals import head, scoring
from kajiya.evals.results import bits_per_byte
from kajiya.evals.scoring import cut_windows, heldout_loss, score_documents
from kajiya.models.build import Vocabulary, build_model

CPU = torch.device("cpu")


class Uniform(torch.nn.Module):
    """Every token equally probable."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(torch.zeros(vocab_size))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.logits.expand(*tokens.shape, -1)


class Unigram(Uniform):
    """Token i with probability proportional to i + 1."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__(vocab_size)
        self.logits = torch.nn.Parameter(torch.arange(1.0, vocab_size + 1).log())


def _documents(*lengths: int, top: int = 256) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, top, size=length) for length in lengths]


@given(
    lengths=st.lists(st.integers(1, 70), max_size=5),
    context=st.integers(1, 20),
    stride=st.integers(1, 20),
)
@settings(max_examples=200, deadline=None)
def test_every_target_is_scored_exactly_once(lengths: list[int], context: int, stride: int) -> None:
    seen = [np.zeros(length, dtype=int) for length in lengths]
    for window in cut_windows(lengths, context, min(stride, context)):
        assert window.end - window.start - 1 <= context
        seen[window.document][window.start + 1 + window.first_scored : window.end] += 1
    for counts in seen:
        assert counts[0] == 0
        assert (counts[1:] == 1).all()


def test_bits_per_byte_of_a_uniform_model_are_known() -> None:
    """256 equally probable tokens of one byte each: 8 bits per byte."""
    documents = _documents(100, 3, 57)
    nats = score_documents(Uniform(256), documents, context_tokens=16, stride=8, batch=4, device=CPU)
    n_bytes = np.array([len(each) - 1 for each in documents], dtype=float)
    assert bits_per_byte(nats, n_bytes) == pytest.approx(8.0, abs=1e-5)
    np.testing.assert_allclose(nats, n_bytes * np.log(256), rtol=1e-6)


def test_a_unigram_model_gives_its_closed_form() -> None:
    documents = _documents(40, 9, top=50)
    nats = score_documents(Unigram(50), documents, context_tokens=7, stride=3, batch=3, device=CPU)
    for document, got in zip(documents, nats, strict=True):
        assert got == pytest.approx(float(-np.log((document[1:] + 1) / (50 * 51 / 2)).sum()), rel=1e-5)


def test_a_document_within_the_context_is_scored_as_a_whole() -> None:
    model: Any = build_model(ModelConfig(n_params="120k"), Vocabulary(200, 0, 1, 2), 0).module.eval()
    documents = _documents(30, 12, top=200)
    nats = score_documents(model, documents, context_tokens=64, stride=32, batch=2, device=CPU)
    for document, got in zip(documents, nats, strict=True):
        ids = torch.from_numpy(document)[None]
        with torch.no_grad():
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        expected = torch.nn.functional.cross_entropy(logits[0], ids[0, 1:], reduction="sum")
        assert got == pytest.approx(float(expected), rel=1e-4)


def test_a_longer_context_does_not_change_what_a_stride_of_one_sees() -> None:
    """At stride 1 every target is predicted from a full window: equal to windows cut by hand."""
    model: Any = build_model(ModelConfig(n_params="120k"), Vocabulary(200, 0, 1, 2), 0).module.eval()
    (document,) = _documents(20, top=200)
    got = score_documents(model, [document], context_tokens=6, stride=1, batch=5, device=CPU)[0]
    expected = 0.0
    for place in range(1, 20):
        ids = torch.from_numpy(document[max(0, place - 6) : place])[None]
        # The first window is scored as a whole, so its targets have the shorter contexts they really had.
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0, -1]
        expected -= float(logits.log_softmax(0)[document[place]])
    assert got == pytest.approx(expected, rel=1e-4)


def test_heldout_loss_is_the_mean_over_targets() -> None:
    tokens = torch.randint(0, 40, (3, 8))
    targets = tokens.clone()
    targets[0] = -100
    batch = Batch(tokens, targets, torch.arange(8).expand(3, 8), torch.zeros_like(tokens), 16)
    assert heldout_loss(Uniform(40), [batch, batch], CPU) == pytest.approx(np.log(40), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_native", [True, False])
def test_a_vocabulary_in_blocks_scores_as_whole_logits_do(
    dtype: torch.dtype, is_native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two blocks and a part of one, several portions of tokens: log p and the likeliest word are Transformers' own."""
    monkeypatch.setattr(head, "_WORDS", 512)
    if is_native:
        assert head.native_problem() is None
    else:
        monkeypatch.setattr(head, "native_problem", lambda: "no compiler")
        monkeypatch.setattr(head, "_MOST_LOGITS", 100 * 1101)
    size, n = 2 * head._WORDS + 77, head._TOKENS + 40
    model: Any = build_model(
        ModelConfig(n_params=None, hidden_size=16, n_layers=1, n_heads=2), Vocabulary(size, 0, 1, 2), 0
    ).module.eval()
    model.to(dtype)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(8)  # far from uniform
    tokens = torch.from_numpy(np.random.default_rng(1).integers(0, size, size=(2, n)))
    with torch.no_grad():
        logits = model(input_ids=tokens, use_cache=False).logits.float()
    targets = torch.roll(tokens, -1, dims=1)
    likeliest = logits.argmax(dim=-1)
    targets[:, ::3] = likeliest[:, ::3]
    targets[0, 5] = -100
    batch = Batch(tokens, targets, torch.arange(n).expand(2, n), torch.zeros_like(tokens), int((targets >= 0).sum()))
    with torch.no_grad():
        logprobs, greedy = head.target_scores(model, batch)
    kept = targets >= 0
    expected = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    torch.testing.assert_close(logprobs[kept], expected[kept], rtol=1e-5, atol=2e-5)
    assert torch.equal(greedy[kept], (likeliest == targets)[kept])
    assert logprobs[0, 5] == 0


def test_documents_are_read_as_they_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "_PORTION_TOKENS", 60)
    documents = _documents(*([25] * 9), top=50)
    model, scored, ahead = Unigram(50), 0, []
    plain = model.forward

    def counting(tokens: torch.Tensor) -> torch.Tensor:
        nonlocal scored
        scored += int(tokens.numel())
        return plain(tokens)

    monkeypatch.setattr(model, "forward", counting)

    def stream() -> Iterator[np.ndarray]:
        for number, ids in enumerate(documents):
            ahead.append(number - scored // 24)
            yield ids

    got = score_documents(model, stream(), context_tokens=24, stride=24, batch=2, device=CPU)
    assert max(ahead) <= 2, "more than a portion was read ahead"
    whole = score_documents(Unigram(50), documents, context_tokens=24, stride=24, batch=2, device=CPU)
    np.testing.assert_allclose(got, whole, rtol=1e-6)
    assert len(score_documents(model, [], context_tokens=4, stride=2, batch=1, device=CPU)) == 0
