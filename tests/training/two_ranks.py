"""Two processes that form a group over gloo, each running one function of a test; the test has the end of it in hand."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kajiya.models.attention import register_packed_sdpa
from kajiya.training.ranks import Ranks, find_ranks, join, leave

Work = Callable[..., Any]


def as_two(work: Work, folder: Path, *arguments: Any, within_s: float = 240.0) -> list[Any]:
    """What `work(ranks, folder, *arguments)` gives on each of two ranks, as JSON holds it. Fails when they take too long."""
    # They meet at a store that this process holds, as under torchrun: no port can be taken by another in the meantime.
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    given = (str(folder), store.port, work, arguments)
    both = torch.multiprocessing.spawn(_one, given, nprocs=2, join=False)
    ends = time.monotonic() + within_s
    try:
        while not both.join(timeout=1.0):
            if time.monotonic() > ends:
                done = sorted(path.name for path in folder.glob("*.json"))
                pytest.fail(f"two processes were not done within {within_s:.0f} s; results there are: {done}")
    finally:
        for process in both.processes:
            process.kill()
            process.join()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def _one(rank: int, folder: str, port: int, work: Work, arguments: tuple[Any, ...]) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    torch.set_num_threads(1)
    register_packed_sdpa()
    ranks: Ranks = find_ranks("ddp")
    join(ranks, torch.device("cpu"))
    found = work(ranks, Path(folder), *arguments)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    leave()
