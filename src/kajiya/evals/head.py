"""From last hidden states to log p of the targets, without ever holding the logits of many tokens.

Shape letters: N tokens, D hidden width, V vocabulary, n tokens of a portion, v words of a block.
"""

from typing import Any

import torch
from torch import nn

from kajiya.data.batch import NO_TARGET, Batch
from kajiya.models.hidden import all_logits, has_split_head, last_hidden

_TOKENS = 512
"""Tokens whose scores are computed together."""
_WORDS, _WORDS_OF_ONE_THREAD = 32_768, 2048
"""Words of the vocabulary in a block: with 512 tokens 64 MiB of float32, or 4 MiB, which a cache holds. The small blocks are
a fifth faster; but with several threads their many small steps wait for each other wherever another program has a core."""


def target_scores(model: Any, batch: Batch, *, is_greedy_asked: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """log p of each target, nats, float32 [B, T], and whether it is the likeliest word there, bool [B, T]; 0 where there is none.

    Only the states that predict a target pass through the head. Without `is_greedy_asked` the second may be left at false.
    """
    targets = batch.targets.reshape(-1)
    wanted = (targets != NO_TARGET).nonzero().squeeze(1)
    logprobs = torch.zeros(targets.shape, dtype=torch.float32, device=targets.device)
    greedy = torch.zeros(targets.shape, dtype=torch.bool, device=targets.device)
    split = has_split_head(model)
    states = last_hidden(model, batch) if split else all_logits(model, batch)
    states = states.reshape(-1, states.shape[-1])
    head: Any = model.get_output_embeddings() if split else nn.Identity()
    is_blocked = type(head) is nn.Linear and states.device.type == "cpu" and states.dtype == torch.float32
    words = _WORDS_OF_ONE_THREAD if torch.get_num_threads() == 1 else _WORDS
    room = states.new_empty(min(words, len(head.weight)), min(_TOKENS, len(wanted))) if is_blocked else states
    for part in wanted.split(_TOKENS):
        if is_blocked:
            found = _by_blocks(states[part], head.weight, targets[part], room)
        else:
            found = _of_logits(head(states[part]).float(), targets[part], is_greedy_asked)
        logprobs[part], greedy[part] = found
    return logprobs.view_as(batch.targets), greedy.view_as(batch.targets)


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
    """The same, in `room` [words, tokens], the vocabulary block by block, its maximum and its sum carried along.

    (Milakov & Gimelshein, arXiv:1805.02867, algorithm 3.)
    A block's logits stand with the words first: a CPU multiplies in this order up to twice as fast.
    """
    n = len(states_nD)
    largest, total = states_nD.new_full((n,), -torch.inf), states_nD.new_zeros(n)
    own = torch.empty_like(total)
    for begin in range(0, len(weight_VD), len(room)):
        words_vD = weight_VD[begin : begin + len(room)]
        # A slice of whole rows is written in place; one of fewer tokens needs memory of its own.
        into = room[: len(words_vD)] if n == room.shape[1] else room.new_empty(len(words_vD), n)
        logits_vn = torch.mm(words_vD, states_nD.t(), out=into)
        here = ((targets_n >= begin) & (targets_n < begin + len(words_vD))).nonzero().squeeze(1)
        own[here] = logits_vn[targets_n[here] - begin, here]
        peak = torch.maximum(largest, logits_vn.amax(dim=0))
        total = total * (largest - peak).exp_() + logits_vn.sub_(peak).exp_().sum(dim=0)
        largest = peak
    return own - largest - total.log(), own == largest
