"""Decoding in static shapes: a step in which every sequence reads one token, padded to a bucket, so that a GPU can replay it.

At small batches a GPU waits for the launches of a model's kernels. A CUDA graph launches all kernels of a step at once, but
holds the shapes and addresses that it was captured with: so sequences and blocks are padded up to the next power of two, and
the numbers of each such bucket lie in one tensor that stays. On a CPU the same function is computed as it is.

Shape letters: R rows of a bucket, C its columns (a token, its position, the blocks that it sees), V vocabulary.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from kajiya.serving.scheduler import Chunk

_MIN_BLOCKS = 16
_log = logging.getLogger(__name__)


@dataclass
class _Bucket:
    numbers: torch.Tensor
    """[R, C], where a replay reads them."""
    graph: torch.cuda.CUDAGraph | None = None
    logits: torch.Tensor | None = None
    """[R, V], where a replay leaves them."""


class StaticDecoder:
    """Runs `decode(numbers [R, C]) -> logits [R, V]`, on CUDA as a graph for each bucket.

    Rows of padding read a token into the `spare_block`, which is no sequence's. A model that cannot be captured is computed
    without graphs from then on; `problem` says why.
    """

    def __init__(
        self, decode: Callable[[torch.Tensor], torch.Tensor], device: torch.device, block_tokens: int, spare_block: int
    ) -> None:
        self.problem: str | None = None
        self._decode = decode
        self._device = device
        self._block_tokens = block_tokens
        self._spare_block = spare_block
        self._buckets: dict[tuple[int, int], _Bucket] = {}

    @property
    def shapes(self) -> set[tuple[int, int]]:
        """Rows and columns of the buckets so far."""
        return set(self._buckets)

    @property
    def n_graphs(self) -> int:
        """Buckets that are replayed."""
        return sum(bucket.graph is not None for bucket in self._buckets.values())

    @staticmethod
    def takes(chunks: Sequence[Chunk]) -> bool:
        """Whether a step is of single tokens of the model alone; adapters change which kernels run."""
        return bool(chunks) and all(chunk.count == 1 and chunk.sequence.request.adapter is None for chunk in chunks)

    def step(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        """Logits [chunks, V], which hold until the next step."""
        n_rows = _padded(len(chunks))
        n_blocks = _padded(max(chunk.start // self._block_tokens + 1 for chunk in chunks), _MIN_BLOCKS)
        rows = []
        for chunk in chunks:
            blocks = chunk.sequence.blocks[:n_blocks]
            # What is masked is still read: the sequence's own numbers, so that what is not finite stays with it.
            rows.append([chunk.tokens[0], chunk.start, *blocks, *[blocks[0]] * (n_blocks - len(blocks))])
        rows += [[0, 0] + [self._spare_block] * n_blocks] * (n_rows - len(chunks))
        shape = n_rows, n_blocks + 2
        if shape not in self._buckets:
            self._buckets[shape] = _Bucket(torch.zeros(shape, dtype=torch.long, device=self._device))
        bucket = self._buckets[shape]
        bucket.numbers.copy_(torch.tensor(rows))
        return self._compute(bucket)[: len(chunks)]

    def _compute(self, bucket: _Bucket) -> torch.Tensor:
        if self._device.type == "cuda" and bucket.graph is None and self.problem is None:
            try:
                self._capture(bucket)
            except RuntimeError as error:
                self.problem = f"no CUDA graph can be captured: {error}"
                _log.warning("the model is decoded without CUDA graphs: %s", error)
        if bucket.graph is None or bucket.logits is None:
            return self._decode(bucket.numbers)
        bucket.graph.replay()
        return bucket.logits

    def _capture(self, bucket: _Bucket) -> None:
        # Once before, on another stream: libraries set themselves up, and memory is taken that no graph owns.
        current, aside = torch.cuda.current_stream(self._device), torch.cuda.Stream(self._device)
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            self._decode(bucket.numbers)
        current.wait_stream(aside)
        pool = next((other.graph.pool() for other in self._buckets.values() if other.graph is not None), None)
        graph = torch.cuda.CUDAGraph()
        # Other threads, with models of their own, may go on meanwhile.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            logits_RV = self._decode(bucket.numbers)
        bucket.graph, bucket.logits = graph, logits_RV


def _padded(n: int, least: int = 1) -> int:
    """The next power of two."""
    return int(max(least, 1 << (n - 1).bit_length()))
