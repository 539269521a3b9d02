"""The random generators of a process: Python's, NumPy's, torch's on each device; read, gathered from all ranks, set again."""

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kajiya.training.ranks import Ranks, gather_bytes


@dataclass(frozen=True)
class Generators:
    """The states of one process's generators."""

    tensors: dict[str, torch.Tensor]
    """torch's, by device: `cpu`, `cuda0` …; uint8 on the CPU."""
    numbers: dict[str, Any]
    """Python's and NumPy's, as JSON has them."""


def read_generators() -> Generators:
    """Every generator as it is now."""
    tensors = {"cpu": torch.get_rng_state()}
    for index in range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0):
        tensors[f"cuda{index}"] = torch.cuda.get_rng_state(index)
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    numbers = {
        "python": [version, list(words), gauss],
        "numpy": [str(name), np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
    }
    return Generators(tensors, numbers)


def restore_generators(read: Generators) -> None:
    """Set every generator to what was read."""
    torch.set_rng_state(read.tensors["cpu"])
    for name, tensor in read.tensors.items():
        if name.startswith("cuda"):
            torch.cuda.set_rng_state(tensor, int(name.removeprefix("cuda")))
    version, words, gauss = read.numbers["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = read.numbers["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))


@contextmanager
def undisturbed() -> Iterator[None]:
    """Whatever is drawn or seeded inside, every generator is afterwards as it was before."""
    read = read_generators()
    try:
        yield
    finally:
        restore_generators(read)


def gather_generators(ranks: Ranks) -> list[Generators]:
    """Those of all ranks, in their order; every rank must call it."""
    own = read_generators()
    if ranks.n == 1:
        return [own]
    words = {"tensors": {name: tensor.tolist() for name, tensor in own.tensors.items()}, "numbers": own.numbers}
    gathered = [json.loads(each) for each in gather_bytes(json.dumps(words).encode())]
    return [
        Generators(
            {name: torch.tensor(values, dtype=torch.uint8) for name, values in each["tensors"].items()}, each["numbers"]
        )
        for each in gathered
    ]
