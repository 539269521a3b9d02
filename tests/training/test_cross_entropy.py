"""The chunked loss against torch's own on whole logits: values, gradients, chunks of any size."""

import pytest
import torch

from kajiya.data.batch import NO_TARGET
from kajiya.models.native.library import native_problem
from kajiya.training import cross_entropy
from kajiya.training.cross_entropy import chunked_cross_entropy, chunked_log_probs, rows_at_once


def _inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(37, 12, dtype=dtype, requires_grad=True)
    head = torch.randn(29, 12, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, 29, (37,))
    targets[::3] = NO_TARGET
    return hidden, head, targets


@pytest.mark.parametrize("chunk", [1, 5, 37, 1000])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_equals_whole_logits(chunk: int, z_loss: float) -> None:
    hidden, head, targets = _inputs(torch.float32)
    total, nll = chunked_cross_entropy(hidden, head, targets, chunk, z_loss)
    (total / 7).backward()
    got = (hidden.grad, head.grad)
    hidden.grad = head.grad = None

    logits = hidden @ head.T
    expected_nll = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    expected = expected_nll + z_loss * (logits.logsumexp(1).square() * (targets != NO_TARGET)).sum()
    (expected / 7).backward()
    torch.testing.assert_close(nll, expected_nll)
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(got, (hidden.grad, head.grad))


def test_gradient_by_finite_differences() -> None:
    hidden, head, targets = (each[:6] if each.ndim < 3 else each for each in _inputs(torch.float64))
    hidden, head = hidden.detach().requires_grad_(), head.detach().requires_grad_()
    targets = targets.clamp(max=5)
    direction = torch.randn_like(hidden)
    total, _ = chunked_cross_entropy(hidden, head, targets, 4, 0.05)
    total.backward()
    assert hidden.grad is not None
    step = 1e-3
    above = chunked_cross_entropy(hidden.detach() + step * direction, head.detach(), targets, 4, 0.05)[0]
    below = chunked_cross_entropy(hidden.detach() - step * direction, head.detach(), targets, 4, 0.05)[0]
    numeric = float(above - below) / (2 * step)
    assert numeric == pytest.approx(float((hidden.grad * direction).sum()), rel=1e-2)


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, head, targets = _inputs(torch.float32)
    total, _ = chunked_cross_entropy(hidden, head.detach(), targets, 8)
    total.backward()
    assert hidden.grad is not None
    assert head.grad is None


def test_bf16_is_near_fp32() -> None:
    hidden, head, targets = (each.detach() for each in _inputs(torch.float32))
    exact, _ = chunked_cross_entropy(hidden, head, targets, 8)
    rounded, _ = chunked_cross_entropy(hidden.bfloat16(), head.bfloat16(), targets, 8)
    assert rounded.dtype == torch.float32
    assert float(rounded) == pytest.approx(float(exact), rel=2e-2)


@pytest.mark.parametrize("is_on_host", [True, False])
@pytest.mark.parametrize("n_targets", [6011, 5000])
def test_a_gradient_in_bf16_is_not_scaled_by_a_rounded_denominator(
    n_targets: int, is_on_host: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1 / 6011 in bf16 is 0.26 % too small. Rounding each entry averages out over 40,000, a wrong scale does not."""
    monkeypatch.setattr(cross_entropy, "is_on_host", lambda _tensor: is_on_host)
    torch.manual_seed(3)
    hidden, head = torch.randn(640, 64).bfloat16(), torch.randn(48, 64).bfloat16()
    targets = torch.randint(0, 48, (640,))
    grads = []
    for denominator in (1, n_targets):
        given = hidden.clone().requires_grad_()
        total, _ = chunked_cross_entropy(given, head, targets, 64, 1e-3)
        (total / denominator).backward()
        assert given.grad is not None
        assert given.grad.dtype == torch.bfloat16
        grads.append(given.grad.double())
    whole, found = grads
    assert float((found * whole).sum() / whole.square().sum()) * n_targets == pytest.approx(1, abs=2e-4)


def test_smoothing_and_weights_equal_torch() -> None:
    hidden, head, targets = _inputs(torch.float32)
    weights = torch.rand(37)
    total, nll = chunked_cross_entropy(hidden, head, targets, 5, label_smoothing=0.1, weights_N=weights)
    (total / 7).backward()
    got = (hidden.grad, head.grad)
    hidden.grad = head.grad = None
    logits = hidden @ head.T
    each = torch.nn.functional.cross_entropy(logits, targets, reduction="none", label_smoothing=0.1)
    ((each * weights).sum() / 7).backward()
    torch.testing.assert_close(total, (each * weights).sum())
    plain = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(nll, (plain * weights).sum())
    torch.testing.assert_close(got, (hidden.grad, head.grad))


@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_log_probs_equal_whole_logits(chunk: int) -> None:
    hidden, head, targets = _inputs(torch.float32)
    direction = torch.randn(37)
    values = chunked_log_probs(hidden, head, targets, chunk)
    (values * direction).sum().backward()
    got = (hidden.grad, head.grad)
    hidden.grad = head.grad = None
    expected = -torch.nn.functional.cross_entropy(hidden @ head.T, targets, reduction="none")
    (expected * direction).sum().backward()
    torch.testing.assert_close(values, expected)
    torch.testing.assert_close(got, (hidden.grad, head.grad))
    assert not values[targets == NO_TARGET].any()


def test_gradients_by_finite_differences_in_double_precision() -> None:
    """`gradcheck` perturbs every entry of both inputs."""
    torch.manual_seed(1)
    hidden = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    head = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 4, NO_TARGET, 2, 2, NO_TARGET, 1])
    weights = torch.rand(7, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda h, w: chunked_log_probs(h, w, targets, 3), (hidden, head))
    assert torch.autograd.gradcheck(
        lambda h, w: chunked_cross_entropy(h, w, targets, 3, 0.05, label_smoothing=0.1, weights_N=weights)[0],
        (hidden, head),
    )


@pytest.mark.skipif(native_problem() is not None, reason="no C++ compiler")
@pytest.mark.parametrize(("z_loss", "smoothing"), [(0.0, 0.0), (0.1, 0.0), (0.0, 0.2), (0.1, 0.2)])
def test_the_operator_is_the_formula_of_torch(z_loss: float, smoothing: float) -> None:
    torch.manual_seed(2)
    logits, targets = torch.randn(37, 48) * 4, torch.randint(0, 48, (37,))
    targets[::5] = NO_TARGET
    weights = torch.rand(37) * (targets != NO_TARGET)
    wanted, *sums = cross_entropy._torch_entropy(
        logits.double(), targets, weights.double(), z_loss, smoothing, needs_grad=True
    )
    assert wanted is not None
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        given = logits.to(dtype, copy=True)
        kept = given.clone()
        none, *alone = cross_entropy._native_entropy(given, targets, weights, z_loss, smoothing, needs_grad=False)
        assert none is None
        assert torch.equal(given, kept)
        grad, *found = cross_entropy._native_entropy(given, targets, weights, z_loss, smoothing, needs_grad=True)
        assert found == alone
        assert found == pytest.approx([float(each) for each in sums], rel=tolerance)
        assert grad is not None
        torch.testing.assert_close(grad.double(), wanted, atol=tolerance, rtol=tolerance)


def test_the_logits_at_hand_are_bounded_whatever_the_vocabulary() -> None:
    assert rows_at_once(2048, 8192) == 2048
    assert rows_at_once(2048, 131_072) == 128
    assert rows_at_once(64, 131_072) == 64
    assert rows_at_once(2048, 10**9) == 32
