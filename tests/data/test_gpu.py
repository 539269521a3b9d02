"""Batches in page-locked memory; counted as skipped where there is no GPU."""

import pytest
import torch

from kajiya.data.batch import Batch, ExampleBatch, pinned

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


def test_a_pinned_batch_is_locked_and_comes_over_whole() -> None:
    part = torch.arange(6).reshape(2, 3)
    rows = Batch(part, part + 1, part + 2, part + 3, 4, weights=part / 7)
    batch = pinned(ExampleBatch(rows, part + 5, part[0], part[0] + 7), torch.device("cuda"))
    assert batch.rows.tokens.is_pinned()
    assert batch.owner.is_pinned()
    assert batch.last.is_pinned()
    there = batch.to("cuda")
    torch.cuda.synchronize()
    assert torch.equal(there.rows.weights.cpu(), part / 7)
    assert torch.equal(there.owner.cpu(), part + 5)
