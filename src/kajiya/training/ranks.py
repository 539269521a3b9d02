"""Which of several processes this one is, as `torchrun` says it in the environment, and the group that they form."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch

from kajiya.errors import ConfigError

_PATIENCE = timedelta(hours=12)
"""Longest wait for another rank: one may prepare data, compile or evaluate while the others have nothing to do."""


@dataclass(frozen=True)
class Ranks:
    """This process's place among the `n` of a run; `local` is its place on its own machine."""

    rank: int = 0
    n: int = 1
    local: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this is the one process that writes."""
        return self.rank == 0


def find_ranks(strategy: str) -> Ranks:
    """The place of this process under `train.strategy`: auto is ddp where torchrun started several processes, else single.

    Reads RANK, WORLD_SIZE and LOCAL_RANK. Raises `ConfigError` where the strategy and the environment disagree.
    """
    n = int(os.environ.get("WORLD_SIZE", "1"))
    if strategy == "single" and n > 1:
        raise ConfigError(
            "train.strategy", f"is single, but torchrun started {n} processes", "Set train.strategy=ddp or auto."
        )
    if strategy == "ddp" and "RANK" not in os.environ:
        raise ConfigError(
            "train.strategy",
            "is ddp, but this process was not started as one of several",
            "Start it with: torchrun --nproc-per-node 2 -m kajiya train …",
        )
    if n == 1:
        return Ranks()
    return Ranks(int(os.environ.get("RANK", "0")), n, int(os.environ.get("LOCAL_RANK", "0")))


def join(ranks: Ranks, device: torch.device) -> None:
    """Form the group of all ranks, over NCCL for GPUs and gloo for CPUs; does nothing for one process or a second time."""
    if ranks.n > 1 and not torch.distributed.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, timeout=_PATIENCE)


def leave() -> None:
    """Leave the group, if there is one."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def wait_for_all(ranks: Ranks) -> None:
    """Go on when every rank is here."""
    if ranks.n > 1:
        torch.distributed.barrier()


def agreed(ranks: Ranks, own: str, names: Sequence[str]) -> str:
    """The first rank's pick among `names`, on every rank: what each measures for itself may differ."""
    if ranks.n == 1:
        return own
    index = torch.tensor(names.index(own))
    torch.distributed.broadcast(index, 0)
    return names[int(index)]


def gather_bytes(own: bytes) -> list[bytes]:
    """What each rank gives, in the order of the ranks; every rank must call it, and the group must have been joined."""
    n = torch.distributed.get_world_size()
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(n)]
    torch.distributed.all_gather(sizes, torch.tensor([len(own)]))
    longest = max(int(size) for size in sizes)
    padded = torch.frombuffer(bytearray(own.ljust(longest, b"\0")), dtype=torch.uint8)
    gathered = [torch.empty(longest, dtype=torch.uint8) for _ in range(n)]
    torch.distributed.all_gather(gathered, padded)
    return [bytes(each.numpy()[: int(size)]) for each, size in zip(gathered, sizes, strict=True)]
