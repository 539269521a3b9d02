"""The Triton kernel of the loss's softmax against the formula; `test_entropy_kernel.py` runs this file under the interpreter."""

import pytest
import torch
from triton import knobs

from kajiya.data.batch import NO_TARGET
from kajiya.training import cross_entropy
from kajiya.training.cross_entropy import chunked_cross_entropy
from kajiya.training.entropy_kernel import _WIDEST, entropy


def make(n_words: int, dtype: torch.dtype, n_tokens: int = 7) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(n_words)
    logits, targets = (torch.randn(n_tokens, n_words) * 4).to(dtype), torch.randint(0, n_words, (n_tokens,))
    targets[::3] = NO_TARGET
    return logits, targets, torch.rand(n_tokens) * (targets != NO_TARGET)


def test_this_is_the_interpreter() -> None:
    assert knobs.runtime.interpret


BOTH = (0.1, 0.2)
CASES = [
    *((n, torch.float32, terms) for n in (29, 64) for terms in ((0.0, 0.0), (0.1, 0.0), (0.0, 0.2), BOTH)),
    *(
        (n, dtype, terms)
        for n in (2, 1001)
        for dtype in (torch.bfloat16, torch.float16)
        for terms in ((0.0, 0.0), BOTH)
    ),
    *((_WIDEST + 3, dtype, BOTH) for dtype in (torch.float32, torch.bfloat16)),
]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.mark.parametrize(("n_words", "dtype", "terms"), CASES)
def test_it_is_the_formula(n_words: int, dtype: torch.dtype, terms: tuple[float, float]) -> None:
    z_loss, smoothing = terms
    logits, targets, weights = make(n_words, dtype)
    wanted, wanted_nll, more = cross_entropy._torch_entropy(
        logits.double(), targets, weights.double(), z_loss, smoothing, needs_grad=True
    )
    kept = logits.clone()
    total, nll, grad = entropy(logits, targets, weights, z_loss, smoothing, True)
    assert torch.equal(logits, kept)
    assert float(nll.sum()) == pytest.approx(float(wanted_nll), rel=1e-5)
    assert float(total.sum()) == pytest.approx(float(wanted_nll + more), rel=1e-5)
    assert grad.dtype == dtype
    torch.testing.assert_close(grad.double(), wanted, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    *alone, none = entropy(logits, targets, weights, z_loss, smoothing, False)
    assert none.shape == (0, n_words)
    assert torch.equal(alone[0], total)
    assert torch.equal(alone[1], nll)


def test_a_token_without_weight_adds_nothing_whatever_its_logits() -> None:
    logits, targets, weights = make(29, torch.float32)
    logits[0] = torch.nan
    total, nll, grad = entropy(logits, targets, weights, 0.1, 0.2, True)
    assert all(bool(each.isfinite().all()) for each in (total, nll, grad))
    assert not total[0]
    assert not grad[0].any()


@pytest.mark.filterwarnings(
    "ignore:invalid value encountered:RuntimeWarning"
)  # NumPy's, in which the interpreter reckons
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_logit_that_is_not_finite_is_seen_in_the_loss(value: float) -> None:
    logits, targets, weights = make(29, torch.float32)
    logits[1, 5] = value
    total, _, grad = entropy(logits, targets, weights, 0.0, 0.0, True)
    assert not bool(total.sum().isfinite())
    assert not bool(grad[1].isfinite().all())


def test_logits_that_rule_a_word_out_give_it_nothing() -> None:
    """Minus infinity, in a whole block of words too."""
    logits, targets, weights = make(_WIDEST + 3, torch.float32)
    logits[:, :_WIDEST] = -torch.inf
    targets = torch.where(targets == NO_TARGET, targets, _WIDEST + 1)
    total, _, grad = entropy(logits, targets, weights, 0.0, 0.0, True)
    logits.requires_grad_()
    wanted = (torch.nn.functional.cross_entropy(logits, targets, reduction="none") * weights).sum()
    wanted.backward()
    torch.testing.assert_close(total.sum(), wanted)
    torch.testing.assert_close(grad, logits.grad)


def test_rows_with_gaps_and_no_rows() -> None:
    logits, targets, weights = make(48, torch.float32)
    wide = torch.cat([logits, torch.full_like(logits, 9.0)], dim=1)[:, :48]
    for mine, whole in zip(
        entropy(wide, targets, weights, 0.1, 0.1, True), entropy(logits, targets, weights, 0.1, 0.1, True), strict=True
    ):
        assert torch.equal(mine, whole)
    total, nll, grad = entropy(logits[:0], targets[:0], weights[:0], 0.0, 0.0, True)
    assert total.shape == nll.shape == (0,)
    assert grad.shape == (0, 48)


def test_it_is_registered_rightly() -> None:
    logits, targets, weights = make(29, torch.float32)
    torch.library.opcheck(entropy, (logits.requires_grad_(), targets, weights, 0.1, 0.2, True))
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(entropy, (logits.detach(), targets, weights, 0.0, 0.0, False), test_utils=checks)


def test_its_gradient_is_autograds() -> None:
    logits, targets, weights = make(29, torch.float32)
    factors, (mine, theirs) = torch.rand(7), (logits.clone().requires_grad_() for _ in range(2))
    total, nll, grad = entropy(mine, targets, weights, 0.1, 0.2, True)
    assert not nll.requires_grad
    assert not grad.requires_grad
    (total * factors).sum().backward()
    smoothed = torch.nn.functional.cross_entropy(theirs, targets, reduction="none", label_smoothing=0.2)
    ((smoothed + 0.1 * theirs.logsumexp(1).square()) * weights * factors).sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad)


@pytest.mark.parametrize("chunk", [5, 1000])
def test_the_chunked_loss_with_it_is_that_of_whole_logits(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "_way", lambda hidden, head: "triton")
    torch.manual_seed(0)
    hidden, head = torch.randn(37, 12, requires_grad=True), torch.randn(29, 12, requires_grad=True)
    targets, weights = torch.randint(0, 29, (37,)), torch.rand(37)
    targets[::3] = NO_TARGET
    total, nll = chunked_cross_entropy(hidden, head, targets, chunk, 0.1, label_smoothing=0.2, weights_N=weights)
    (total / 7).backward()
    got = (hidden.grad, head.grad)
    hidden.grad = head.grad = None
    logits = hidden @ head.T
    smoothed = torch.nn.functional.cross_entropy(logits, targets, reduction="none", label_smoothing=0.2)
    penalty = 0.1 * logits.logsumexp(1).square() * (targets != NO_TARGET)
    wanted = ((smoothed + penalty) * weights).sum()
    (wanted / 7).backward()
    torch.testing.assert_close(total, wanted)
    plain = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(nll, (plain * weights).sum())
    torch.testing.assert_close(got, (hidden.grad, head.grad))
