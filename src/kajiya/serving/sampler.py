"""Draws the next token of each row from its logits.

Shape letters: R rows, V vocabulary, S sorted candidates.
"""

import random
from collections.abc import Sequence as Rows

import torch

from kajiya.serving.sequence import SamplingParams, TokenLogprob


class Sampler:
    """The random streams of the running requests, one for each, so that a request's draws do not depend on its company."""

    def __init__(self) -> None:
        self._streams: dict[str, random.Random] = {}

    def begin(self, request_id: str, seed: int | None) -> None:
        """Start the stream of a request."""
        self._streams[request_id] = random.Random(seed)

    def end(self, request_id: str) -> None:
        """Forget the stream of a request."""
        self._streams.pop(request_id, None)

    def draw(self, request_ids: Rows[str], logits_RV: torch.Tensor, params: Rows[SamplingParams]) -> list[TokenLogprob]:
        """One token for each row, with its log-probability in the unmodified distribution."""
        uniforms = [
            self._streams[request_id].random() if one.temperature > 0 else 0.0
            for request_id, one in zip(request_ids, params, strict=True)
        ]
        tokens_R = choose(logits_RV, params, uniforms)
        return with_logprobs(logits_RV, tokens_R, [one.n_logprobs for one in params])


def choose(logits_RV: torch.Tensor, params: Rows[SamplingParams], uniforms: Rows[float]) -> torch.Tensor:
    """Token ids [R]: the most probable where the temperature is 0, else the inverse of the distribution function at u in [0, 1).

    Temperature first, then `top_k`, then `top_p` on what is left, renormalized, as in Transformers' `generate`.
    """
    logits_RV = logits_RV.float()
    tokens_R = logits_RV.argmax(dim=-1)
    filtered = [i for i, one in enumerate(params) if one.temperature > 0 and (one.top_k or one.top_p < 1)]
    plain = [i for i, one in enumerate(params) if one.temperature > 0 and not one.top_k and one.top_p == 1]
    for rows, is_filtered in ((plain, False), (filtered, True)):
        if not rows:
            continue
        index_R = torch.tensor(rows, device=logits_RV.device)
        chosen = [params[i] for i in rows]
        scaled_RV = _scaled(logits_RV[index_R], chosen)
        u_R1 = torch.tensor([[uniforms[i]] for i in rows], device=logits_RV.device)
        tokens_R[index_R] = _invert_filtered(scaled_RV, chosen, u_R1) if is_filtered else _invert(scaled_RV, u_R1)
    return tokens_R


def _scaled(logits_RV: torch.Tensor, params: Rows[SamplingParams]) -> torch.Tensor:
    temperature_R1 = torch.tensor([[one.temperature] for one in params], device=logits_RV.device)
    # The maximum is subtracted first, so that a tiny temperature gives 0 and −∞ and never ∞ − ∞.
    return (logits_RV - logits_RV.amax(dim=-1, keepdim=True)) / temperature_R1.clamp(min=1e-30)


def _invert(scaled_RV: torch.Tensor, u_R1: torch.Tensor) -> torch.Tensor:
    return _first_above(scaled_RV.softmax(dim=-1), u_R1)


def _invert_filtered(scaled_RV: torch.Tensor, params: Rows[SamplingParams], u_R1: torch.Tensor) -> torch.Tensor:
    vocab_size = scaled_RV.shape[-1]
    k = [min(one.top_k or vocab_size, vocab_size) for one in params]
    sorted_RS, ids_RS = scaled_RV.topk(max(k), dim=-1, sorted=True)
    rank_S = torch.arange(max(k), device=scaled_RV.device)
    k_R1 = torch.tensor(k, device=scaled_RV.device).unsqueeze(1)
    p_R1 = torch.tensor([[one.top_p] for one in params], device=scaled_RV.device)
    probs_RS = sorted_RS.masked_fill(rank_S >= k_R1, -torch.inf).softmax(dim=-1)
    # A token stays while the mass before it is below top_p; the first always does.
    before_RS = probs_RS.cumsum(dim=-1) - probs_RS
    kept_RS = probs_RS.masked_fill((before_RS >= p_R1) & (rank_S > 0) & (p_R1 < 1), 0.0)
    return ids_RS.gather(1, _first_above(kept_RS, u_R1).unsqueeze(1)).squeeze(1)


def _first_above(mass_RS: torch.Tensor, u_R1: torch.Tensor) -> torch.Tensor:
    """Index [R] of the first entry at which the running sum exceeds u times the whole; never an entry without mass."""
    total_RS = mass_RS.cumsum(dim=-1)
    # u < 1, but its product in fp32 may round up to the whole sum: then it is the last entry with mass.
    goal_R1 = (u_R1 * total_RS[:, -1:]).minimum(torch.nextafter(total_RS[:, -1:], torch.zeros_like(u_R1)))
    # The clamp is for a row that is not finite, which the engine fails by its log-probability.
    return torch.searchsorted(total_RS, goal_R1, right=True).squeeze(1).clamp(max=mass_RS.shape[1] - 1)


def with_logprobs(logits_RV: torch.Tensor, tokens_R: torch.Tensor, n_top: Rows[int]) -> list[TokenLogprob]:
    """Each row's token with its log-probability and its `n_top` most probable alternatives."""
    logprobs_RV = logits_RV.float().log_softmax(dim=-1)
    chosen = logprobs_RV.gather(1, tokens_R.unsqueeze(1)).squeeze(1).tolist()
    tokens = tokens_R.tolist()
    if not any(n_top):
        return [TokenLogprob(token, logprob) for token, logprob in zip(tokens, chosen, strict=True)]
    values, ids = logprobs_RV.topk(max(n_top), dim=-1)
    top = [list(zip(row_ids, row, strict=True)) for row_ids, row in zip(ids.tolist(), values.tolist(), strict=True)]
    return [
        TokenLogprob(token, logprob, tuple(best[:n]))
        for token, logprob, best, n in zip(tokens, chosen, top, n_top, strict=True)
    ]
