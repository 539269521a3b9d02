"""Cross-entropy and log-probabilities of a linear head without ever holding all logits.

Of the summed cross-entropy the gradient is made in the forward pass, chunk by chunk, while the chunk's logits are at hand; the
backward pass only scales it. Of log-probabilities that something else follows, the backward pass makes each chunk's logits again.
Shape letters: N tokens, D hidden width, V vocabulary, C tokens of a chunk.
"""

import functools
from typing import Any

import torch

from kajiya.data.batch import NO_TARGET, is_on_host, target_places
from kajiya.models.hidden import has_split_head
from kajiya.training.ranks import Ranks, agreed
from kajiya.training.softmax_choice import TORCH, TRITON, Choice, begun_with, choose, triton_problem


def chunked_cross_entropy(
    hidden_ND: torch.Tensor,
    head_VD: torch.Tensor,
    targets_N: torch.Tensor,
    chunk_tokens: int,
    z_loss: float = 0.0,
    *,
    label_smoothing: float = 0.0,
    weights_N: torch.Tensor | None = None,
    all_wanted: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Σ weight · (smoothed −log p(target) + z_loss · log²Z) over the targets, and Σ weight · −log p alone (without gradient).

    `hidden_ND` [N, D] and `head_VD` [V, D] are in the compute dtype, `targets_N` int64 with `NO_TARGET` where nothing is
    predicted, `weights_N` float32 [N] (`None`: all 1). Both sums are scalars in nats, float32 (float64 for float64 inputs).
    Smoothing puts that share of the target evenly on the whole vocabulary (Szegedy et al., arXiv:1512.00567, section 7);
    Z is the softmax's denominator (PaLM, arXiv:2204.02311, section 5). On a CPU, no logits are made where nothing is predicted;
    `all_wanted` says that something is predicted everywhere.
    """
    # On a GPU, to know how many there are would make the host wait.
    if not all_wanted and is_on_host(hidden_ND):
        wanted = target_places(targets_N)
        if len(wanted) < len(targets_N):
            hidden_ND, targets_N = hidden_ND.index_select(0, wanted), targets_N[wanted]
            weights_N = None if weights_N is None else weights_N[wanted]
    weights = (targets_N != NO_TARGET).to(_wide(hidden_ND.dtype))
    if weights_N is not None:
        weights = weights * weights_N
    total, nll = _ChunkedCrossEntropy.apply(
        hidden_ND, head_VD, targets_N, weights, chunk_tokens, z_loss, label_smoothing
    )
    return total, nll


def chunked_log_probs(
    hidden_ND: torch.Tensor,
    head_VD: torch.Tensor,
    targets_N: torch.Tensor,
    chunk_tokens: int,
    *,
    all_wanted: bool = False,
) -> torch.Tensor:
    """log p of each target [N], nats, float32 (float64 for float64 inputs), 0 where there is none; differentiable.

    At most `chunk_tokens` rows of logits (fewer of a large vocabulary: `rows_at_once`) are held at once, in both passes, and none
    for positions without a target; `all_wanted` says that there is no such.
    """
    if all_wanted:
        return _ChunkedLogProbs.apply(hidden_ND, head_VD, targets_N, chunk_tokens)  # type: ignore[no-any-return]
    wanted = target_places(targets_N)
    values: torch.Tensor = _ChunkedLogProbs.apply(
        hidden_ND.index_select(0, wanted), head_VD, targets_N[wanted], chunk_tokens
    )
    return values.new_zeros(targets_N.shape).index_copy(0, wanted, values)


_MOST_LOGITS = 2**24
_FEWEST_ROWS = 32


def rows_at_once(chunk_tokens: int, vocabulary: int) -> int:
    """Tokens of a chunk: fewer than asked where the vocabulary is large, so that the logits at hand stay within 2^24 numbers."""
    return min(chunk_tokens, max(_FEWEST_ROWS, _MOST_LOGITS // vocabulary))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        head: torch.Tensor,
        targets: torch.Tensor,
        weights: torch.Tensor,
        chunk_tokens: int,
        z_loss: float,
        smoothing: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        needs_hidden, needs_head = ctx.needs_input_grad[:2]
        wide = _wide(hidden.dtype)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_head: torch.Tensor | None = None
        nll_sum = torch.zeros((), dtype=wide, device=hidden.device)
        more_sum = torch.zeros((), dtype=wide, device=hidden.device)
        chunk_tokens = rows_at_once(chunk_tokens, head.shape[0])
        chunk = _ENTROPY[_way(hidden, head)]
        # One chunk has it all, and there is nothing to add up.
        sum_dtype = wide if hidden.shape[0] > chunk_tokens else head.dtype
        for start in range(0, hidden.shape[0], chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            logits = hidden[rows] @ head.T
            grad, nll, more = chunk(
                logits, targets[rows], weights[rows], z_loss, smoothing, needs_grad=needs_hidden or needs_head
            )
            nll_sum += nll
            more_sum += more
            if grad is None:
                continue
            if grad_hidden is not None:
                torch.mm(grad, head, out=grad_hidden[rows])
            if needs_head:
                grad_head = _add_product(grad_head, grad, hidden[rows], sum_dtype)
        if needs_head and grad_head is None:
            grad_head = torch.zeros_like(head)
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.head_dtype = head.dtype
        ctx.mark_non_differentiable(nll_sum)
        return nll_sum + more_sum, nll_sum

    @staticmethod
    def backward(ctx: Any, grad_total: torch.Tensor, _grad_nll: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_hidden, grad_head = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = _scaled(grad_hidden, grad_total)
        if grad_head is not None:
            grad_head = _scaled(grad_head, grad_total).to(ctx.head_dtype)
        return grad_hidden, grad_head, None, None, None, None, None


def _scaled(grad: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """grad · factor, float32 scalar, multiplied before it is rounded: a factor in bf16 would be off by up to 0.4 % everywhere."""
    if is_on_host(grad):
        return grad * factor  # a CPU takes a scalar as it is, a GPU in the other's dtype
    return torch.mul(grad, factor.reshape(1), out=torch.empty_like(grad))


def _way(hidden: torch.Tensor, head: torch.Tensor) -> str:
    """What makes the softmax of these logits: the C++ operator on a CPU, the faster way on a GPU, else torch's operators."""
    from kajiya.models.native.library import LANES, fits, native_problem

    if fits(hidden, head) and head.shape[0] % LANES == 0 and native_problem() is None:
        return "native"
    if hidden.device.type != "cuda" or hidden.dtype != head.dtype or hidden.dtype == torch.float64:
        return TORCH
    return softmax_choice(hidden.device, hidden.dtype, head.shape[0]).way


def softmax_choice(device: torch.device, dtype: torch.dtype, n_words: int) -> Choice:
    """What makes the softmax over `n_words` logits on this GPU: what a run has settled, else what was timed once in the process."""
    if torch.are_deterministic_algorithms_enabled():
        return Choice(TORCH, "torch: a deterministic run chooses nothing by the clock")
    return _settled.get((device, dtype, n_words)) or _timed_choice(device, dtype, n_words)


_settled: dict[tuple[torch.device, torch.dtype, int], Choice] = {}


def settle_softmax(
    model: Any, device: torch.device, dtype: torch.dtype, ranks: Ranks, kept: str | None = None
) -> Choice | None:
    """What makes the loss's softmax of this model from now on; `None` where that is no question of time: not on a GPU.

    `kept` is the way that the run began with; without one, every rank takes the first one's.
    """
    if device.type != "cuda" or not has_split_head(model):
        return None
    head = model.get_output_embeddings().weight
    key = (head.device, dtype, head.shape[0])
    _settled.pop(key, None)
    if kept is not None:
        _settled[key] = begun_with(kept)
    else:
        own = softmax_choice(*key)
        first = agreed(ranks, own.way, (TRITON, TORCH))
        _settled[key] = own if first == own.way else begun_with(first)
    return softmax_choice(*key)


_TIMED_TOKENS = 2048


@functools.cache
def _timed_choice(device: torch.device, dtype: torch.dtype, n_words: int) -> Choice:
    if (problem := triton_problem()) is not None:
        return choose({}, problem)
    n_tokens = rows_at_once(_TIMED_TOKENS, n_words)

    @functools.cache
    def chunk() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        # Constants: the random generators of the run are left alone.
        targets = torch.zeros(n_tokens, dtype=torch.int64, device=device)
        logits = torch.zeros(n_tokens, n_words, dtype=dtype, device=device)
        return logits, targets, torch.ones(n_tokens, device=device)

    def call(way: str) -> object:
        return _ENTROPY[way](*chunk(), 0.0, 0.0, needs_grad=True)

    with torch.no_grad():
        return choose({way: functools.partial(call, way) for way in (TRITON, TORCH)}, None)


Chunk = tuple[torch.Tensor | None, torch.Tensor | float, torch.Tensor | float]
"""The logits' gradient, where it is wanted; Σ weight · −log p; what z-loss and smoothing add."""


def _native_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor,
    z_loss: float,
    smoothing: float,
    *,
    needs_grad: bool,
) -> Chunk:
    from kajiya.models.native.operators import entropy_

    targets, weights = targets.contiguous(), weights.contiguous()
    nll, more = entropy_(logits, targets, weights, z_loss, smoothing, needs_grad=needs_grad)
    return logits if needs_grad else None, nll, more


def _triton_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor,
    z_loss: float,
    smoothing: float,
    *,
    needs_grad: bool,
) -> Chunk:
    total, nll, grad = torch.ops.kajiya.entropy(logits, targets, weights, z_loss, smoothing, needs_grad)
    return grad if needs_grad else None, nll.sum(), (total - nll).sum()


def _torch_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor,
    z_loss: float,
    smoothing: float,
    *,
    needs_grad: bool,
) -> Chunk:
    index = targets.clamp_min(0).unsqueeze(1)
    # 0 where there is no target: a column that multiplies what each position adds.
    weight = weights.unsqueeze(1)
    dtype, logits = logits.dtype, logits.to(_wide(logits.dtype))
    log_z = torch.logsumexp(logits, dim=1, keepdim=True) if z_loss else None
    log_p = torch.log_softmax(logits, dim=1)
    del logits
    chosen = log_p.gather(1, index)
    nll = -(chosen * weight).sum()
    more = torch.zeros_like(nll)
    if smoothing:
        more += smoothing * ((chosen - log_p.mean(dim=1, keepdim=True)) * weight).sum()
    if log_z is not None:
        more += z_loss * (log_z.square() * weight).sum()
    if not needs_grad:
        return None, nll, more
    grad = log_p.exp_()
    if log_z is not None:
        grad *= 1 + 2 * z_loss * log_z
    if smoothing:
        grad -= smoothing / grad.shape[1]
    grad.scatter_add_(1, index, torch.full_like(weight, smoothing - 1))
    grad *= weight  # to ask first whether all are 1 would make the host wait for a GPU
    return grad.to(dtype), nll, more


_ENTROPY = {"native": _native_entropy, TRITON: _triton_entropy, TORCH: _torch_entropy}


class _ChunkedLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, chunk_tokens: int
    ) -> torch.Tensor:
        wide = _wide(hidden.dtype)
        chunk_tokens = rows_at_once(chunk_tokens, head.shape[0])
        result = torch.empty(hidden.shape[0], dtype=wide, device=hidden.device)
        for start in range(0, hidden.shape[0], chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            logits = (hidden[rows] @ head.T).to(wide)
            result[rows] = logits.gather(1, targets[rows].unsqueeze(1)).squeeze(1) - torch.logsumexp(logits, dim=1)
        ctx.save_for_backward(hidden, head, targets)
        ctx.chunk_tokens = chunk_tokens
        return result

    @staticmethod
    def backward(ctx: Any, grad_result: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, head, targets = ctx.saved_tensors
        wide = _wide(hidden.dtype)
        needs_hidden, needs_head = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_head: torch.Tensor | None = None
        sum_dtype = wide if hidden.shape[0] > ctx.chunk_tokens else head.dtype
        for start in range(0, hidden.shape[0], ctx.chunk_tokens):
            rows = slice(start, start + ctx.chunk_tokens)
            grad = torch.softmax((hidden[rows] @ head.T).to(wide), dim=1).neg_()
            grad.scatter_add_(1, targets[rows].unsqueeze(1), torch.ones_like(grad[:, :1]))
            grad = (grad * grad_result[rows].unsqueeze(1)).to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad, head, out=grad_hidden[rows])
            if needs_head:
                grad_head = _add_product(grad_head, grad, hidden[rows], sum_dtype)
        if needs_head:
            grad_head = torch.zeros_like(head) if grad_head is None else grad_head.to(head.dtype)
        return grad_hidden, grad_head, None, None


def _add_product(
    total_VD: torch.Tensor | None, grad_CV: torch.Tensor, hidden_CD: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """The total, in place, plus gradᵀ · hidden, in `dtype`."""
    if total_VD is None:
        return (grad_CV.T @ hidden_CD).to(dtype)
    return total_VD.addmm_(grad_CV.T, hidden_CD) if grad_CV.dtype == dtype else total_VD.add_(grad_CV.T @ hidden_CD)
