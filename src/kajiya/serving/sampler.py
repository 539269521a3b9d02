"""Draws the next token of each row from its logits.

Shape letters: R rows, O rows of one request, V vocabulary, S sorted candidates, N alternatives.
"""

import random
from collections import deque
from collections.abc import Sequence as Rows
from itertools import islice

import torch

from kajiya.serving.rows import Rows as Logits
from kajiya.serving.sequence import SamplingParams, TokenLogprob


class Sampler:
    """The random streams of the running requests, one for each, so that a request's draws do not depend on its company."""

    def __init__(self) -> None:
        self._streams: dict[str, _Stream] = {}

    def begin(self, request_id: str, seed: int | None) -> None:
        """Start the stream of a request."""
        self._streams[request_id] = _Stream(seed)

    def end(self, request_id: str) -> None:
        """Forget the stream of a request."""
        self._streams.pop(request_id, None)

    def used(self, request_id: str, n_tokens: int) -> None:
        """That many of the tokens that were last drawn for a request are its answer; the others were never drawn."""
        self._streams[request_id].use(n_tokens)

    def draw(
        self,
        request_ids: Rows[str],
        rows: Rows[Logits],
        params: Rows[SamplingParams],
        unmodified: Rows[Logits] | None = None,
    ) -> list[list[TokenLogprob]]:
        """A token for each row of each request, with its log-probability in the model's own distribution, `unmodified`.

        The i-th row of a request draws with the i-th number of its stream; `used` says how many of them count.
        """
        chosen = [each.best for each in rows]
        n_top = [one.n_logprobs for one in params]
        wants = [i for i, one in enumerate(params) if one.temperature > 0]
        if wants:
            logits_RV = torch.cat([rows[i].logits for i in wants])
            repeated = [params[i] for i in wants for _ in rows[i].best]
            uniforms = [u for i in wants for u in self._streams[request_ids[i]].ahead(len(rows[i].best))]
            tokens = iter(choose(logits_RV, repeated, uniforms).tolist())
            for i in wants:
                chosen[i] = [next(tokens) for _ in rows[i].best]
        return [
            with_logprobs(each, tokens, n) for each, tokens, n in zip(unmodified or rows, chosen, n_top, strict=True)
        ]


class _Stream:
    """Numbers in [0, 1) that can be looked at before they are used."""

    def __init__(self, seed: int | None) -> None:
        self._random = random.Random(seed)
        self._ahead: deque[float] = deque()

    def ahead(self, n: int) -> list[float]:
        while len(self._ahead) < n:
            self._ahead.append(self._random.random())
        return list(islice(self._ahead, n))

    def use(self, n: int) -> None:
        for _ in range(min(n, len(self._ahead))):
            self._ahead.popleft()


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


def with_logprobs(rows: Logits, tokens: Rows[int], n_top: int) -> list[TokenLogprob]:
    """Each row's token with its log-probability and its `n_top` most probable alternatives."""
    if not tokens:
        return []
    if rows.best_logprobs is not None and (tokens is rows.best or list(tokens) == rows.best):
        logprobs = rows.best_logprobs
    else:
        if len(tokens) == 1:
            # One number: read without a kernel.
            values = [rows.logits[0, tokens[0]].item()]
        else:
            index_O1 = torch.tensor(tokens, dtype=torch.long, device=rows.logits.device).unsqueeze(1)
            values = rows.logits.gather(1, index_O1).squeeze(1).tolist()
        logprobs = [value - log_sum for value, log_sum in zip(values, rows.log_sums, strict=True)]
        if rows.best_logprobs is not None:
            # The same number as above to the last bit, whatever was drawn in the rows beside.
            known = zip(tokens, rows.best, rows.best_logprobs, logprobs, strict=True)
            logprobs = [sure if token == best else found for token, best, sure, found in known]
    if not n_top:
        return [TokenLogprob(token, logprob) for token, logprob in zip(tokens, logprobs, strict=True)]
    best_ON, ids_ON = rows.logits.topk(n_top, dim=-1)
    found = []
    for token, logprob, ids, best, log_sum in zip(
        tokens, logprobs, ids_ON.tolist(), best_ON.tolist(), rows.log_sums, strict=True
    ):
        # The token is as probable among its alternatives as by itself.
        top = tuple((one, logprob if one == token else value - log_sum) for one, value in zip(ids, best, strict=True))
        found.append(TokenLogprob(token, logprob, top))
    return found
