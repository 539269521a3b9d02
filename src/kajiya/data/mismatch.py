"""Prompts with the answers to others: what KTO's reference point is measured on.

Shape letters: E examples, T tokens of the longest sequence.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from kajiya.data.batch import NO_TARGET, Batch, ExampleBatch
from kajiya.data.pack import Packing
from kajiya.data.shards import Split


def add_mismatched(split: Split, packing: Packing, row_tokens: int) -> Callable[[ExampleBatch], ExampleBatch]:
    """What adds to a batch each of its prompts with the answer of an example behind it in the split; always the same one.

    It is the first of the next, the second, the fourth … behind it whose prompt is another, since rows made of pairs have the same
    one twice; of a split with one prompt alone, the next. A prompt ends before the first target. Prompt and answer together
    are cut to `row_tokens`.
    """
    by_number = np.argsort(packing.examples, kind="stable")
    numbers = np.asarray(packing.examples)[by_number]

    def sequence(place: int) -> tuple[np.ndarray, int]:
        """Ids of the example at this place of the split's order, and how many of them are the prompt."""
        index = int(by_number[place])
        start = int(packing.starts[index, 0])
        stop = start + int(packing.lengths[index, 0])
        is_target = split.read_weights(start, stop) > 0
        is_target[:1] = False
        n_prompt = int(is_target.argmax()) if is_target.any() else stop - start
        return split.read(start, stop).astype(np.int64), n_prompt

    def other(place: int, prompt: np.ndarray) -> np.ndarray:
        """The answer to another prompt."""
        n = len(numbers)
        for step in (2**k for k in range(n.bit_length())):
            ids, n_prompt = sequence((place + step) % n)
            if not np.array_equal(ids[:n_prompt], prompt):
                return ids[n_prompt:]
        ids, n_prompt = sequence((place + 1) % n)
        return ids[n_prompt:]

    def add(batch: ExampleBatch) -> ExampleBatch:
        pairs = []
        for place in np.searchsorted(numbers, batch.examples.numpy()).tolist():
            ids, n_prompt = sequence(place)
            answer = other(place, ids[:n_prompt])
            n_prompt = min(n_prompt, row_tokens - 1)
            pairs.append((np.concatenate([ids[:n_prompt], answer])[:row_tokens], n_prompt))
        return replace(batch, mismatched=_one_a_row(pairs, batch.examples, split.pad_id))

    return add


def _one_a_row(pairs: list[tuple[np.ndarray, int]], examples: torch.Tensor, pad_id: int) -> ExampleBatch:
    """The sequences, each in a row of its own; what stands behind the prompt is a target."""
    width = max(len(ids) for ids, _ in pairs)
    tokens = np.full((len(pairs), width), pad_id, dtype=np.int64)
    targets = np.full_like(tokens, NO_TARGET)
    is_token = np.zeros(tokens.shape, dtype=np.bool_)
    for row, (ids, n_prompt) in enumerate(pairs):
        tokens[row, : len(ids)] = ids
        is_token[row, : len(ids)] = True
        targets[row, n_prompt - 1 : len(ids) - 1] = ids[n_prompt:]
    row_E1, place_1T = np.arange(len(pairs))[:, None], np.arange(width)[None, :]
    lengths = is_token.sum(axis=1)
    rows = Batch(
        tokens=torch.from_numpy(tokens),
        targets=torch.from_numpy(targets),
        positions=torch.from_numpy(np.broadcast_to(place_1T, tokens.shape).copy()),
        segments=torch.from_numpy((~is_token).astype(np.int64)),
        n_targets=int((targets != NO_TARGET).sum()),
    )
    return ExampleBatch(
        rows=rows,
        owner=torch.from_numpy(np.where(is_token, row_E1, -1)),
        last=torch.from_numpy(np.arange(len(pairs)) * width + lengths - 1),
        examples=examples,
    )
