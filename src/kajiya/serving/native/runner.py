"""The engine's runner over the C++ decoder.

Shape letters: O outputs, V vocabulary, T tokens, D width.
"""

import ctypes
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from kajiya.errors import ConfigError
from kajiya.serving.adapters import LoraAdapter
from kajiya.serving.native import layout
from kajiya.serving.native.build import load_library
from kajiya.serving.native.model import PARTS, NativeModel
from kajiya.serving.rows import Rows
from kajiya.serving.scheduler import Chunk, Plan


class NativeRunner:
    """Reads planned chunks with the C++ decoder, all of a step in one call."""

    name = "native"
    block_tokens = layout.BLOCK_TOKENS

    def __init__(self, model: NativeModel, n_blocks: int) -> None:
        self.n_blocks = n_blocks
        self.native = model
        self.device = torch.device("cpu")
        self._library = load_library()
        self._adapters: dict[str, tuple[layout.Adapter, Any]] = {}

    @torch.inference_mode()
    def run(self, plan: Plan) -> dict[str, Rows]:
        """Copy blocks, read the chunks, and return the logits behind the places that each asks for."""
        for copy in plan.copies:
            self.native.copy_block(copy.source, copy.target)
        chunks = [chunk for chunk in plan.chunks if chunk.count]
        outputs = [len(chunk.outputs) for chunk in chunks]
        logits_OV = torch.empty(sum(outputs), self.native.config.vocab_size)
        self._step(chunks, [list(chunk.outputs) for chunk in chunks], logits_OV, None)
        best, log_sums = self._choose(logits_OV)
        rows, first = {}, 0
        for chunk, n in zip(chunks, outputs, strict=True):
            part = slice(first, first + n)
            rows[chunk.sequence.request.id] = Rows(logits_OV[part], best[part], log_sums[part])
            first += n
        return rows

    @torch.inference_mode()
    def hidden(self, chunk: Chunk) -> torch.Tensor:
        """The last hidden state of each token of a chunk, fp32 [T, D]; its keys and values go to its blocks."""
        hidden_TD = torch.empty(chunk.count, self.native.config.hidden_size)
        self._step([chunk], [[]], torch.empty(0, 0), hidden_TD)
        return hidden_TD

    def clear(self, blocks: list[int]) -> None:
        """Nothing to do: what lies behind a sequence's end is never read."""

    def set_weights(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Pack new weights in place of the present ones."""
        self.native.load(tensors)

    # ---------------------------------------------------------------- adapters

    def load_adapter(self, name: str, adapter: LoraAdapter) -> None:
        """Make an adapter known under a name."""
        patches, kept, used = [], [], set()
        for number in range(self.native.config.num_hidden_layers):
            for target, field in enumerate(layout.TARGETS):
                offset = 0
                for module in PARTS[field]:
                    name_of_module = f"model.layers.{number}.{module}"
                    pair = adapter.parts.get(name_of_module)
                    n_out = self._n_outputs(number, field, module)
                    if pair is not None:
                        used.add(name_of_module)
                        a_RK, b_RN = pair.a.float().contiguous(), (pair.b * pair.scale).T.float().contiguous()
                        kept += [a_RK, b_RN]
                        patches.append(
                            layout.Patch(
                                layer=number,
                                target=target,
                                rank=a_RK.shape[0],
                                n_in=a_RK.shape[1],
                                offset=offset,
                                n_out=n_out,
                                a=a_RK.data_ptr(),
                                b=b_RN.data_ptr(),
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
        self._adapters[name] = (layout.Adapter(n_patches=len(patches), patches=array), (array, kept))

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter."""
        del self._adapters[name]

    def _n_outputs(self, number: int, field: str, module: str) -> int:
        model = self.native.model
        heads = {"self_attn.q_proj": model.n_query, "self_attn.k_proj": model.n_key, "self_attn.v_proj": model.n_key}
        if module in heads:
            return int(heads[module] * model.head_width)
        return int(getattr(self.native.layers[number], field).n_out) // len(PARTS[field])

    # ---------------------------------------------------------------- a call

    def _step(
        self, chunks: list[Chunk], wanted: list[list[int]], logits_OV: torch.Tensor, hidden_TD: torch.Tensor | None
    ) -> None:
        n_tokens = sum(chunk.count for chunk in chunks)
        if not n_tokens:
            return
        tokens: list[int] = []
        positions: list[int] = []
        outputs: list[int] = []
        starts = [0]
        for chunk, places in zip(chunks, wanted, strict=True):
            outputs += [len(tokens) + place for place in places]
            tokens += chunk.tokens
            positions += range(chunk.start, chunk.start + chunk.count)
            starts.append(len(tokens))
        self.native.reach(max(positions) + 1)
        stride = max(len(chunk.sequence.blocks) for chunk in chunks)
        tables = np.zeros((len(chunks), stride), np.int32)
        for row, chunk in zip(tables, chunks, strict=True):
            row[: len(chunk.sequence.blocks)] = chunk.sequence.blocks
        hidden_rows = list(range(n_tokens)) if hidden_TD is not None else []
        arrays = [np.array(one, np.int32) for one in (tokens, positions, starts, outputs, hidden_rows)]
        names = [chunk.sequence.request.adapter for chunk in chunks]
        adapters = (ctypes.c_void_p * len(chunks))(
            *(ctypes.addressof(self._adapters[name][0]) if name else None for name in names)
        )
        at = [one.ctypes.data for one in arrays]
        self.native.step(
            layout.Step(
                n_tokens=n_tokens,
                n_sequences=len(chunks),
                table_stride=stride,
                n_outputs=len(outputs),
                n_threads=torch.get_num_threads(),
                n_hidden=len(hidden_rows),
                tokens=at[0],
                positions=at[1],
                starts=at[2],
                tables=tables.ctypes.data,
                adapters=ctypes.addressof(adapters),
                outputs=at[3],
                hidden_rows=at[4],
                logits=logits_OV.data_ptr(),
                hidden=hidden_TD.data_ptr() if hidden_TD is not None else None,
            )
        )

    def _choose(self, logits_OV: torch.Tensor) -> tuple[list[int], list[float]]:
        n, vocab = logits_OV.shape
        best, log_sums = np.empty(n, np.int32), np.empty(n, np.float32)
        if n:
            self._library.kajiya_choose(
                logits_OV.data_ptr(), n, vocab, best.ctypes.data, log_sums.ctypes.data, torch.get_num_threads()
            )
        return best.tolist(), log_sums.tolist()
