"""The torch side of a step: Transformers' own forward over a paged cache, and one without any cache.

Shape letters: R sequences, T tokens of the step, L cached positions, V vocabulary, D width, O outputs; for static shapes
those of `static`, and B blocks.
"""

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch

from kajiya.serving.adapters import LoraAdapter, LowRank
from kajiya.serving.cache import PagedCache, Place, Span
from kajiya.serving.rows import Rows, rows_of
from kajiya.serving.scheduler import Chunk, Plan
from kajiya.serving.static import StaticDecoder

BLOCK_TOKENS = 16


class Runner(Protocol):
    """What computes a step."""

    name: str
    block_tokens: int
    n_blocks: int
    device: torch.device

    def run(self, plan: Plan) -> dict[str, Rows]:
        """Copy blocks, read the chunks; by request id, the logits behind the places that each chunk asks for."""

    def hidden(self, chunk: Chunk) -> torch.Tensor:
        """The last hidden state of each token of a chunk, fp32 [T, D]."""

    def clear(self, blocks: list[int]) -> None:
        """Take what is not finite out of these blocks."""

    def set_weights(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Use new weights, named as in the Transformers model's `state_dict`."""

    def load_adapter(self, name: str, adapter: LoraAdapter) -> None:
        """Make an adapter known under a name."""

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter."""


class TransformersRunner:
    """Drives a causal language model through Transformers: one flat forward pass a step, whatever it mixes.

    With `is_static`, steps of single tokens have static shapes, which are replayed as CUDA graphs on a GPU.
    """

    name = "transformers"
    block_tokens = BLOCK_TOKENS

    def __init__(self, model: Any, n_blocks: int, is_static: bool = False) -> None:
        self.model = model
        self.n_blocks = n_blocks
        self.device: torch.device = model.device
        # One block more, for the padding of static shapes.
        self.cache = PagedCache(n_blocks + 1, BLOCK_TOKENS, model.config.get_text_config().num_hidden_layers)
        self.decoder = StaticDecoder(self._decode, self.device, BLOCK_TOKENS, n_blocks) if is_static else None
        self._patches = _Patches(model)
        # Newer versions of Transformers call it `cache` and warn of the other name.
        names = inspect.signature(model.forward).parameters
        self._cache_name = "cache" if "cache" in names else "past_key_values"
        model.set_attn_implementation(self.cache.attention)

    @torch.inference_mode()
    def run(self, plan: Plan) -> dict[str, Rows]:
        for copy in plan.copies:
            self.cache.copy_block(copy.source, copy.target)
        chunks = plan.chunks
        read: list[range] = []
        if self.decoder is not None and self.decoder.takes(chunks):
            found = rows_of(self.decoder.step(chunks))
            read += [range(i, i + len(chunk.outputs)) for i, chunk in enumerate(chunks)]
        else:
            wanted: list[int] = []
            first = 0
            for chunk in chunks:
                read.append(range(len(wanted), len(wanted) + len(chunk.outputs)))
                wanted += [first + place for place in chunk.outputs]
                first += chunk.count
            if not first:
                return {}
            # Logits of one token are computed even where none are wanted: Transformers has no word for none.
            keep_O = torch.tensor(wanted or [0], device=self.device)
            found = rows_of(self._forward(self.model, chunks, logits_to_keep=keep_O).logits[0])
        return {chunk.sequence.request.id: found.part(rows) for chunk, rows in zip(chunks, read, strict=True)}

    @torch.inference_mode()
    def hidden(self, chunk: Chunk) -> torch.Tensor:
        output = self._forward(self.model.base_model, (chunk,))
        hidden_TD: torch.Tensor = output.last_hidden_state[0].float()
        return hidden_TD

    def clear(self, blocks: list[int]) -> None:
        self.cache.clear(blocks)

    def set_weights(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.model.load_state_dict(tensors)

    def load_adapter(self, name: str, adapter: LoraAdapter) -> None:
        self._patches.load(name, adapter)

    def unload_adapter(self, name: str) -> None:
        self._patches.unload(name)

    def _forward(self, module: Any, chunks: tuple[Chunk, ...], **extra: Any) -> Any:
        tokens = [token for chunk in chunks for token in chunk.tokens]
        positions = [place for chunk in chunks for place in range(chunk.start, chunk.start + chunk.count)]
        self._aim(chunks)
        with self._patches.aimed(chunks):
            ids, places = (torch.tensor([each], device=self.device) for each in (tokens, positions))
            return self._call(module, ids, places, **extra)

    def _call(self, module: Any, ids: torch.Tensor, positions: torch.Tensor, **extra: Any) -> Any:
        return module(
            input_ids=ids,
            position_ids=positions,
            # Any four-dimensional mask is taken as it is; the attention makes its own.
            attention_mask=torch.zeros((1, 1, 1, 1), dtype=self.model.dtype, device=self.device),
            use_cache=True,
            **{self._cache_name: self.cache},
            **extra,
        )

    def _decode(self, numbers_RC: torch.Tensor) -> torch.Tensor:
        """Logits of a step of single tokens; nothing in it depends on what the numbers are."""
        ids_R, positions_R, blocks_RB = numbers_RC[:, 0], numbers_RC[:, 1], numbers_RC[:, 2:]
        within = torch.arange(BLOCK_TOKENS, device=self.device)
        tables_RL = (blocks_RB.unsqueeze(-1) * BLOCK_TOKENS + within).flatten(1)
        place = self.cache.place
        place.slots = tables_RL.gather(1, positions_R.unsqueeze(1)).squeeze(1)
        place.singles = torch.arange(len(numbers_RC), device=self.device)
        place.tables = tables_RL
        seen_L = torch.arange(tables_RL.shape[1], device=self.device)
        place.mask = (seen_L <= positions_R.unsqueeze(1))[:, None, None]
        place.spans = ()
        logits_RV: torch.Tensor = self._call(self.model, ids_R.unsqueeze(0), positions_R.unsqueeze(0)).logits[0].float()
        return logits_RV

    def _aim(self, chunks: tuple[Chunk, ...]) -> None:
        slots: list[int] = []
        singles: list[tuple[int, list[int]]] = []
        spans = []
        for chunk in chunks:
            end = chunk.start + chunk.count
            blocks = chunk.sequence.blocks[: -(-end // BLOCK_TOKENS)]
            seen = [block * BLOCK_TOKENS + i for block in blocks for i in range(BLOCK_TOKENS)][:end]
            if chunk.count == 1:
                singles.append((len(slots), seen))
            else:
                spans.append(Span(len(slots), chunk.count, chunk.start, torch.tensor(seen, device=self.device)))
            slots += seen[chunk.start :]
        longest = max((len(seen) for _, seen in singles), default=0)
        tables = [seen + [seen[0]] * (longest - len(seen)) for _, seen in singles]
        mask = [[i < len(seen) for i in range(longest)] for _, seen in singles]
        place: Place = self.cache.place
        place.slots = torch.tensor(slots, device=self.device)
        place.singles = torch.tensor([column for column, _ in singles], dtype=torch.long, device=self.device)
        place.tables = torch.tensor(tables, dtype=torch.long, device=self.device)
        place.mask = torch.tensor(mask, dtype=torch.bool, device=self.device)[:, None, None]
        place.spans = tuple(spans)


class PlainRunner:
    """Reads every sequence anew at every step, without a cache: slow, and right for any causal model of Transformers."""

    name = "plain"
    block_tokens = BLOCK_TOKENS

    def __init__(self, model: Any, n_blocks: int) -> None:
        self.model = model
        self.n_blocks = n_blocks
        self.device: torch.device = model.device
        self._patches = _Patches(model)

    @torch.inference_mode()
    def run(self, plan: Plan) -> dict[str, Rows]:
        rows = {}
        for chunk in plan.chunks:
            if chunk.outputs:
                logits_TV = self._read(self.model, chunk).logits[0, chunk.start :]
                rows[chunk.sequence.request.id] = rows_of(logits_TV[list(chunk.outputs)])
        return rows

    @torch.inference_mode()
    def hidden(self, chunk: Chunk) -> torch.Tensor:
        hidden_TD: torch.Tensor = self._read(self.model.base_model, chunk).last_hidden_state[0, chunk.start :].float()
        return hidden_TD

    def clear(self, blocks: list[int]) -> None:
        """Nothing to do: nothing is cached."""

    def set_weights(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.model.load_state_dict(tensors)

    def load_adapter(self, name: str, adapter: LoraAdapter) -> None:
        self._patches.load(name, adapter)

    def unload_adapter(self, name: str) -> None:
        self._patches.unload(name)

    def _read(self, module: Any, chunk: Chunk) -> Any:
        ids = [*chunk.sequence.tokens[: chunk.start], *chunk.tokens]
        whole = Chunk(chunk.sequence, 0, tuple(ids))
        with self._patches.aimed((whole,)):
            return module(input_ids=torch.tensor([ids], device=self.device), use_cache=False)


class _Patches:
    """Adapters over a Transformers model: each changed module adds B (A x) to the tokens of the sequences that ask for it."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._parts: dict[str, dict[str, LowRank]] = {}
        self._columns: dict[str, torch.Tensor] = {}
        self._hooked: set[str] = set()

    def load(self, name: str, adapter: LoraAdapter) -> None:
        to = {"dtype": self._model.dtype, "device": self._model.device}
        self._parts[name] = {
            module: LowRank(part.a.to(**to), part.b.to(**to), part.scale) for module, part in adapter.parts.items()
        }
        for module in adapter.parts:
            if module not in self._hooked:
                self._hooked.add(module)
                self._model.get_submodule(module).register_forward_hook(self._hook(module))

    def unload(self, name: str) -> None:
        del self._parts[name]

    @contextlib.contextmanager
    def aimed(self, chunks: tuple[Chunk, ...]) -> Iterator[None]:
        """Within, the tokens of these chunks are where the adapters find them."""
        columns: dict[str, list[int]] = {}
        first = 0
        for chunk in chunks:
            name = chunk.sequence.request.adapter
            if name is not None:
                columns.setdefault(name, []).extend(range(first, first + chunk.count))
            first += chunk.count
        self._columns = {name: torch.tensor(found, device=self._model.device) for name, found in columns.items()}
        try:
            yield
        finally:
            self._columns = {}

    def _hook(self, module: str) -> Any:
        def add(_: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            # Some modules see [1, T, K], some flattened [T, K].
            given, changed = inputs[0].reshape(-1, inputs[0].shape[-1]), output.reshape(-1, output.shape[-1])
            for name, columns in self._columns.items():
                part = self._parts[name].get(module)
                if part is not None:
                    change = (given[columns] @ part.a.T) @ part.b.T
                    changed = changed.index_add(0, columns, change, alpha=part.scale)
            return changed.reshape(output.shape)

        return add
