"""The engine's runner over the C++ decoder.

Shape letters: O outputs, V vocabulary, T tokens, D width.
"""

import ctypes
from array import array
from collections.abc import Mapping
from typing import Any

import torch

from kajiya.errors import ConfigError
from kajiya.serving.adapters import LoraAdapter
from kajiya.serving.native import layout
from kajiya.serving.native.memory import Arena
from kajiya.serving.native.model import NativeModel
from kajiya.serving.rows import Rows
from kajiya.serving.scheduler import Chunk, Plan

_KEPT_ROWS = 64


class NativeRunner:
    """Reads planned chunks with the C++ decoder, all of a step in one call."""

    name = "native"
    block_tokens = layout.BLOCK_TOKENS

    def __init__(self, model: NativeModel, n_blocks: int) -> None:
        self.n_blocks = n_blocks
        self.native = model
        self.device = torch.device("cpu")
        self._vocab = int(model.model.vocab)
        self._kept_logits = torch.empty(_KEPT_ROWS, self._vocab)
        self._adapters: dict[str, tuple[layout.Adapter, Any]] = {}

    def run(self, plan: Plan) -> dict[str, Rows]:
        """Copy blocks, read the chunks, and return the logits behind the places that each asks for."""
        for copy in plan.copies:
            self.native.copy_block(copy.source, copy.target)
        chunks = [chunk for chunk in plan.chunks if chunk.count]
        wanted = [chunk.outputs for chunk in chunks]
        n_outputs = sum(map(len, wanted))
        logits_OV = self._logits(n_outputs)
        choice = _Choice(n_outputs)
        self._step(chunks, wanted, logits_OV, choice, None)
        best, logprobs, log_sums = choice.lists()
        rows, first = {}, 0
        for chunk, places in zip(chunks, wanted, strict=True):
            part = slice(first, first + len(places))
            rows[chunk.sequence.request.id] = Rows(logits_OV, best[part], log_sums[part], logprobs[part], first)
            first = part.stop
        return rows

    def _logits(self, n: int) -> torch.Tensor:
        """Room for at least `n` rows of logits; that of few is kept, for new pages cost more than what is written to them."""
        return torch.empty(n, self._vocab) if n > _KEPT_ROWS else self._kept_logits

    @torch.inference_mode()
    def hidden(self, chunk: Chunk) -> torch.Tensor:
        """The last hidden state of each token of a chunk, fp32 [T, D]; its keys and values go to its blocks."""
        hidden_TD = torch.empty(chunk.count, self.native.config.hidden_size)
        self._step([chunk], [range(0)], torch.empty(0, 0), _Choice(0), hidden_TD)
        return hidden_TD

    def clear(self, blocks: list[int]) -> None:
        """Nothing to do: what lies behind a sequence's end is never read."""

    def set_weights(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Pack new weights in place of the present ones."""
        self.native.load(tensors)

    # ---------------------------------------------------------------- adapters

    def load_adapter(self, name: str, adapter: LoraAdapter) -> None:
        """Make an adapter known under a name, in bf16 beside weights of 16 bits and fewer."""
        patches, arena, used = [], Arena(), set()
        dtype = torch.float32 if self.native.weights == "fp32" else torch.bfloat16
        for number in range(self.native.config.num_hidden_layers):
            for target, field in enumerate(layout.TARGETS):
                offset = 0
                for module in self.native.family.parts[field]:
                    name_of_module = f"model.layers.{number}.{module}"
                    pair = adapter.parts.get(name_of_module)
                    n_out = self._n_outputs(number, field, module)
                    if pair is not None:
                        used.add(name_of_module)
                        rank, n_in = pair.a.shape
                        rows = _packed(pair.a.to(dtype), (pair.b.float() * pair.scale).T.to(dtype), arena)
                        patches.append(
                            layout.Patch(
                                layer=number, target=target, rank=rank, n_in=n_in, offset=offset, n_out=n_out, rows=rows
                            )
                        )
                    offset += n_out
        unknown = sorted(adapter.parts.keys() - used)
        if unknown:
            raise ConfigError(
                "adapter",
                f"{adapter.folder}: it changes {unknown[0]}, which the native decoder keeps as it is",
                "serve.runner=transformers serves it.",
            )
        array = (layout.Patch * len(patches))(*patches)
        found = layout.Adapter(n_patches=len(patches), is_bf16=dtype == torch.bfloat16, patches=array)
        self._adapters[name] = (found, (array, arena))

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter."""
        del self._adapters[name]

    def _n_outputs(self, number: int, field: str, module: str) -> int:
        model = self.native.model
        heads = {"self_attn.q_proj": model.n_query, "self_attn.k_proj": model.n_key, "self_attn.v_proj": model.n_key}
        if module in heads:
            return int(heads[module] * model.head_width)
        return int(getattr(self.native.layers[number], field).n_out) // len(self.native.family.parts[field])

    # ---------------------------------------------------------------- a call

    def _step(
        self,
        chunks: list[Chunk],
        wanted: list[range],
        logits_OV: torch.Tensor,
        choice: "_Choice",
        hidden_TD: torch.Tensor | None,
    ) -> None:
        tokens, positions, outputs, starts = array("i"), array("i"), array("i"), array("i", [0])
        for chunk, places in zip(chunks, wanted, strict=True):
            first, count = len(tokens), len(chunk.tokens)
            outputs.extend(range(first + places.start, first + places.stop))
            tokens.extend(chunk.tokens)
            positions.extend(range(chunk.start, chunk.start + count))
            starts.append(first + count)
        if not tokens:
            return
        self.native.reach(max(positions) + 1)
        stride = max(len(chunk.sequence.blocks) for chunk in chunks)
        tables = array("i")
        for chunk in chunks:
            blocks = chunk.sequence.blocks
            tables.extend(blocks)
            tables.extend(range(stride - len(blocks)))  # any number: they are not looked at
        adapters = (ctypes.c_void_p * len(chunks))()
        for i, chunk in enumerate(chunks):
            name = chunk.sequence.request.adapter
            if name is not None:
                adapters[i] = ctypes.addressof(self._adapters[name][0])
        hidden_rows = array("i", range(len(tokens) if hidden_TD is not None else 0))
        self.native.step(
            layout.Step(
                n_tokens=len(tokens),
                n_sequences=len(chunks),
                table_stride=stride,
                n_outputs=len(outputs),
                n_threads=torch.get_num_threads(),
                n_hidden=len(hidden_rows),
                tokens=_address(tokens),
                positions=_address(positions),
                starts=_address(starts),
                tables=_address(tables),
                adapters=ctypes.addressof(adapters),
                outputs=_address(outputs),
                hidden_rows=_address(hidden_rows),
                logits=logits_OV.data_ptr(),
                hidden=hidden_TD.data_ptr() if hidden_TD is not None else None,
                best=_address(choice.best),
                best_logprobs=_address(choice.logprobs),
                log_sums=_address(choice.log_sums),
            )
        )


def _packed(a_RK: torch.Tensor, b_RN: torch.Tensor, arena: Arena) -> int:
    """Address of a low-rank part's rows in the order in which the decoder reads them, filled up with zeros."""
    packed = torch.cat([_by_ranks(a_RK), _by_ranks(b_RN)], dim=1)
    address = arena.take(packed.nbytes)
    ctypes.memmove(address, packed.data_ptr(), packed.nbytes)
    return address


def _by_ranks(rows_RN: torch.Tensor) -> torch.Tensor:
    """A row for a few ranks together, the numbers in which they take turns."""
    n_ranks, n = rows_RN.shape
    whole_RN = torch.nn.functional.pad(rows_RN, (0, -n % layout.LANES, 0, -n_ranks % layout.RANKS))
    turns = whole_RN.reshape(-1, layout.RANKS, whole_RN.shape[1] // layout.LANES, layout.LANES).transpose(1, 2)
    return turns.flatten(1)


class _Choice:
    """What the decoder finds in each row of logits: the largest, its log-probability, the logarithm of the normalizer."""

    def __init__(self, n: int) -> None:
        self.best = array("i", bytes(4 * n))
        self.logprobs = array("f", bytes(4 * n))
        self.log_sums = array("f", bytes(4 * n))

    def lists(self) -> tuple[list[int], list[float], list[float]]:
        return self.best.tolist(), self.logprobs.tolist(), self.log_sums.tolist()


def _address(values: "array[Any]") -> int:
    return values.buffer_info()[0]
