"""Cross-entropy of a linear head without ever holding all logits.

The gradient is made in the forward pass, chunk by chunk, while the chunk's logits are at hand; the backward pass only scales it.
Shape letters: N tokens, D hidden width, V vocabulary, C tokens of a chunk.
"""

from typing import Any

import torch

from kajiya.data.batch import NO_TARGET


def chunked_cross_entropy(
    hidden_ND: torch.Tensor, head_VD: torch.Tensor, targets_N: torch.Tensor, chunk_tokens: int, z_loss: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum over the targets of −log p(target) + z_loss · log²Z, and the first part alone (without gradient).

    `hidden_ND` [N, D] and `head_VD` [V, D] are in the compute dtype, `targets_N` int64 with `NO_TARGET` where nothing is
    predicted. Both sums are float32 scalars, in nats. Z is the softmax's denominator (PaLM, arXiv:2204.02311, section 5).
    """
    total, nll = _ChunkedCrossEntropy.apply(hidden_ND, head_VD, targets_N, chunk_tokens, z_loss)
    return total, nll


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, chunk_tokens: int, z_loss: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        needs_hidden, needs_head = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_head = torch.zeros(head.shape, dtype=torch.float32, device=head.device) if needs_head else None
        nll_sum = torch.zeros((), dtype=torch.float32, device=hidden.device)
        z_sum = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, hidden.shape[0], chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            index = targets[rows].clamp_min(0).unsqueeze(1)
            # 1 where there is a target: a column that multiplies what a position without one would add.
            wanted = (targets[rows] != NO_TARGET).unsqueeze(1).float()
            logits = (hidden[rows] @ head.T).float()
            log_z = torch.logsumexp(logits, dim=1, keepdim=True) if z_loss else None
            log_p = torch.log_softmax(logits, dim=1)
            del logits
            nll_sum -= (log_p.gather(1, index) * wanted).sum()
            if log_z is not None:
                z_sum += (log_z.square() * wanted).sum()
            if not (needs_hidden or needs_head):
                continue
            grad = log_p.exp_()
            if log_z is not None:
                grad *= 1 + 2 * z_loss * log_z
            grad.scatter_add_(1, index, -torch.ones_like(wanted))
            if not bool(wanted.all()):
                grad *= wanted
            grad = grad.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad, head, out=grad_hidden[rows])
            if grad_head is not None and grad.dtype == grad_head.dtype:
                grad_head.addmm_(grad.T, hidden[rows])
            elif grad_head is not None:
                grad_head += grad.T @ hidden[rows]
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.head_dtype = head.dtype
        ctx.mark_non_differentiable(nll_sum)
        return nll_sum + z_loss * z_sum, nll_sum

    @staticmethod
    def backward(ctx: Any, grad_total: torch.Tensor, _grad_nll: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_hidden, grad_head = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_total.to(grad_hidden.dtype)
        if grad_head is not None:
            grad_head = (grad_head * grad_total).to(ctx.head_dtype)
        return grad_hidden, grad_head, None, None, None
