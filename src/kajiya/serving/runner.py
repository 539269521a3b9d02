"""The torch side of a step: reads the planned tokens with a Transformers model and its slot cache.

Shape letters: R rows in the batch, T tokens of a row, L cached positions, V vocabulary, D width.
"""

from collections.abc import Iterator
from typing import Any

import torch

from kajiya.serving.cache import SlotCache
from kajiya.serving.scheduler import Chunk, Plan


class Runner:
    """Drives one causal language model; rows of the batch are sequences of different lengths."""

    def __init__(self, model: Any, max_batch: int) -> None:
        self.model = model
        self.device: torch.device = model.device
        self.dtype: torch.dtype = model.dtype
        self.cache = SlotCache(max_batch, model.config.get_text_config().num_hidden_layers)

    @torch.inference_mode()
    def run(self, plan: Plan) -> dict[str, torch.Tensor]:
        """Read the planned chunks; logits by request id.

        [1, V] behind the last token of a chunk, or [count, V] where the request asks for prompt log-probabilities and
        the chunk belongs to the prompt. Sequences in the middle of a long prompt are left out unless they ask.
        """
        for move in plan.moves:
            self.cache.move(move)
        logits: dict[str, torch.Tensor] = {}
        for group in _groups(plan.chunks):
            logits.update(self._read(group))
        return logits

    def _read(self, group: list[Chunk]) -> dict[str, torch.Tensor]:
        rows = [_row(chunk) for chunk in group]
        first_row, n_rows = min(rows), max(rows) - min(rows) + 1
        width = max(chunk.count for chunk in group)
        visible = max(chunk.start + chunk.count for chunk in group)
        # Padding is on the left, so that the last token of every row is in the last column. A row between two of the
        # group that is not of it is all padding.
        ids = [[0] * width for _ in range(n_rows)]
        positions = [[-1] * width for _ in range(n_rows)]
        for chunk, row in zip(group, rows, strict=True):
            end = chunk.start + chunk.count
            ids[row - first_row][width - chunk.count :] = chunk.sequence.tokens[chunk.start : end]
            positions[row - first_row][width - chunk.count :] = range(chunk.start, end)
        ids_RT = torch.tensor(ids, device=self.device)
        positions_RT = torch.tensor(positions, device=self.device)
        wants_all = any(_wants_all(chunk) for chunk in group)
        self.cache.aim(first_row, positions_RT, visible)
        logits_RTV = self.model(
            input_ids=ids_RT,
            position_ids=positions_RT.clamp(min=0),
            attention_mask=self._mask(positions_RT, visible),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=0 if wants_all else 1,
        ).logits
        kept = {}
        for chunk, row in zip(group, rows, strict=True):
            if _wants_all(chunk):
                kept[chunk.sequence.request.id] = logits_RTV[row - first_row, -chunk.count :]
            elif chunk.is_last:
                kept[chunk.sequence.request.id] = logits_RTV[row - first_row, -1:]
        return kept

    def _mask(self, positions_RT: torch.Tensor, visible: int) -> torch.Tensor | None:
        """Added to the attention scores, [R, 1, T, L]: 0 where a token may look, the lowest number elsewhere."""
        if positions_RT.shape == (1, 1):
            return torch.zeros((1, 1, 1, visible), dtype=self.dtype, device=self.device)
        seen_RTL = torch.arange(visible, device=self.device) <= positions_RT.clamp(min=0)[:, :, None]
        mask_RTL = torch.zeros(seen_RTL.shape, dtype=self.dtype, device=self.device)
        return mask_RTL.masked_fill_(~seen_RTL, torch.finfo(self.dtype).min).unsqueeze(1)

    @torch.inference_mode()
    def hidden(self, ids: list[int]) -> torch.Tensor:
        """The last hidden state of each token, fp32 [T, D], without the cache."""
        ids_1T = torch.tensor([ids], device=self.device)
        positions_1T = torch.arange(len(ids), device=self.device).unsqueeze(0)
        output = self.model.base_model(
            input_ids=ids_1T,
            position_ids=positions_1T,
            attention_mask=self._mask(positions_1T, len(ids)),
            use_cache=False,
        )
        hidden_TD: torch.Tensor = output.last_hidden_state[0].float()
        return hidden_TD

    @torch.inference_mode()
    def all_logits(self, ids: list[int]) -> torch.Tensor:
        """Logits behind each token, [T, V], without the cache."""
        ids_1T = torch.tensor([ids], device=self.device)
        positions_1T = torch.arange(len(ids), device=self.device).unsqueeze(0)
        mask = self._mask(positions_1T, len(ids))
        output = self.model(input_ids=ids_1T, position_ids=positions_1T, attention_mask=mask, use_cache=False)
        logits_TV: torch.Tensor = output.logits[0]
        return logits_TV


def _row(chunk: Chunk) -> int:
    assert chunk.sequence.row is not None
    return chunk.sequence.row


def _wants_all(chunk: Chunk) -> bool:
    return chunk.sequence.request.params.prompt_logprobs and chunk.start < chunk.sequence.n_prompt


def _groups(chunks: tuple[Chunk, ...]) -> Iterator[list[Chunk]]:
    """Chunks that are read by one forward pass: all that decode, then prompts of like length in rows side by side."""
    decoding = [chunk for chunk in chunks if chunk.count == 1]
    if decoding:
        yield decoding
    group: list[Chunk] = []
    for chunk in sorted((chunk for chunk in chunks if chunk.count > 1), key=_row):
        grown = [*group, chunk]
        n_rows = _row(chunk) - _row(grown[0]) + 1
        padded = n_rows * max(member.count for member in grown)
        # Past a third of padding, a forward pass of its own is cheaper.
        if group and padded > 1.5 * sum(member.count for member in grown):
            yield group
            group = []
        group.append(chunk)
    if group:
        yield group
