"""From last hidden states to log p of the targets, without ever holding the logits of many tokens.

Shape letters: N tokens, D hidden width, V vocabulary, n tokens of a portion, v words of a block.
"""

from typing import Any

import torch
from torch import nn

from kajiya.data.batch import Batch, target_places
from kajiya.models.hidden import all_logits, has_split_head, hidden_at
from kajiya.models.native.library import LANES, fits, native_problem

_TOKENS = 512
"""Tokens whose scores are computed together, where the vocabulary is cut into blocks."""
_WORDS = 4096
"""Words of the vocabulary in a block: with 512 tokens 8 MiB of float32, which a cache holds."""
_MOST_LOGITS = 2**24
_FEWEST_TOKENS = 32
"""Where the vocabulary is whole: logits held at once, at least those of so many tokens."""


def target_scores(model: Any, batch: Batch, *, is_greedy_asked: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """log p of each target, nats, float32 [B, T], and whether it is the likeliest word there, bool [B, T]; 0 where there is none.

    Only the states that predict a target pass through the head. Without `is_greedy_asked` the second may be left at false.
    """
    targets = batch.targets.reshape(-1)
    wanted = target_places(targets)
    logprobs = torch.zeros(targets.shape, dtype=torch.float32, device=targets.device)
    greedy = torch.zeros(targets.shape, dtype=torch.bool, device=targets.device)
    split = has_split_head(model)
    if split:
        states, rows = hidden_at(model, batch, wanted), torch.arange(len(wanted), device=wanted.device)
    else:
        states, rows = all_logits(model, batch).flatten(0, 1), wanted
    head: Any = model.get_output_embeddings() if split else nn.Identity()
    is_plain = type(head) is nn.Linear and head.bias is None
    if is_plain and fits(states, head.weight) and native_problem() is None:
        room = states.new_empty(min(_WORDS, len(head.weight)) * _padded(min(_TOKENS, len(wanted))))
        for part, own in zip(wanted.split(_TOKENS), rows.split(_TOKENS), strict=True):
            logprobs[part], greedy[part] = _by_blocks(states[own], head.weight, targets[part], room)
    else:
        n_words = head.out_features if isinstance(head, nn.Linear) else states.shape[1]
        n_together = max(_FEWEST_TOKENS, _MOST_LOGITS // n_words)
        for part, own in zip(wanted.split(n_together), rows.split(n_together), strict=True):
            logprobs[part], greedy[part] = _of_logits(head(states[own]).float(), targets[part], is_greedy_asked)
    return logprobs.view_as(batch.targets), greedy.view_as(batch.targets)


def _padded(n_tokens: int) -> int:
    return -(-n_tokens // LANES) * LANES


def _of_logits(
    logits_nV: torch.Tensor, targets_n: torch.Tensor, is_greedy_asked: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    logprobs = -nn.functional.cross_entropy(logits_nV, targets_n, reduction="none")
    greedy = logits_nV.argmax(dim=-1) == targets_n if is_greedy_asked else torch.zeros_like(targets_n, dtype=torch.bool)
    return logprobs, greedy


@torch.no_grad()
def _by_blocks(
    states_nD: torch.Tensor, weight_VD: torch.Tensor, targets_n: torch.Tensor, room: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same, in `room` (words × tokens numbers), the vocabulary block by block, its maximum and its sum carried along.

    A block's logits stand with the words first: a CPU multiplies in this order up to a fifth faster.
    """
    from kajiya.models.native.operators import softmax_sums_

    n, padded = len(states_nD), _padded(len(states_nD))
    states_Dn = nn.functional.pad(states_nD, (0, 0, 0, padded - n)).t()
    largest, total = torch.full((padded,), -torch.inf), torch.zeros(padded, dtype=torch.float64)
    own = torch.empty(n)
    for begin in range(0, len(weight_VD), _WORDS):
        words_vD = weight_VD[begin : begin + _WORDS]
        into = room[: len(words_vD) * padded].view(-1, padded)
        logits_vn = torch.mm(words_vD, states_Dn, out=into)
        here = ((targets_n >= begin) & (targets_n < begin + len(words_vD))).nonzero().squeeze(1)
        own[here] = logits_vn[targets_n[here] - begin, here].float()
        softmax_sums_(logits_vn, largest, total)
    return own - largest[:n] - total[:n].log().float(), own == largest[:n]
