"""One run of one peer: a process, its memory watched from outside, its answer read."""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from work_order import WorkOrder

HERE = Path(__file__).resolve().parent
_LOOK_EVERY_S = 0.1
_PROC = Path("/proc")


class PeerError(Exception):
    """A peer ended without an answer."""


@dataclass(frozen=True)
class Result:
    """What one run gave."""

    peer: str
    tokens_per_second: float
    """Tokens that are no padding a second, the first steps left out: over the median time of a step where all steps have the
    same number, else over the time of all; work done before the steps (`before_s`) is charged to them in equal parts."""
    tokens_per_cpu_second: float
    """The same over the processor's seconds of the process, all its threads: what other work on the machine disturbs least."""
    first_step_s: float
    """From the start of the process to the end of its first step, seconds."""
    peak_bytes: int | None
    """Highest resident memory of the process and all its descendants; `None` where there is no /proc."""
    step_s: list[float]
    """Each step from the second on: end to end, seconds, logging and data included."""
    losses: list[float]
    """Each step's mean loss over the targets, nats."""
    tokens_digest: str
    initial_weights: float
    versions: dict[str, str]
    settings: dict[str, Any]
    step_tokens: list[int]
    """Tokens of each step that are no padding."""
    before_s: float
    """Work done once for all steps (a reference pass), seconds."""
    before_cpu_s: float
    """The processor's seconds of it."""
    own_order: str | None
    """Why the peer's rows are others than were ordered; `None` when they are not."""
    load_before: float
    """Load average of the machine over the last minute before the start."""

    @property
    def peak_gpu_bytes(self) -> int | None:
        """Highest memory of the peer's tensors on a GPU, as its torch counted it; `None` where it had none or does not say."""
        return self.settings.get("peak_gpu_bytes")


@dataclass(frozen=True)
class Peer:
    """A script of `peers/` and what it is told besides the order."""

    name: str
    """As it was asked for: `script` or `script:option=value,option=value`."""
    script: str
    options: dict[str, str]


def parse_peer(name: str) -> Peer:
    """The peer that a word of the command line means. Raises `ValueError` for one that does not exist."""
    script, _, rest = name.partition(":")
    if script not in peers():
        raise ValueError(f"{script!r} is no peer; there are: {', '.join(peers())}")
    pairs = [pair.partition("=") for pair in rest.split(",") if pair]
    if any(not value for _, _, value in pairs):
        raise ValueError(f"{name!r}: options are written peer:option=value,option=value")
    return Peer(name, script, {key: value for key, _, value in pairs})


def speed(step_tokens: list[int], step_s: list[float], before_s: float, warmup_steps: int) -> float:
    """Tokens a second of a run whose `step_s` are those of the second step on (`Result.tokens_per_second`)."""
    counted = step_tokens[max(1, warmup_steps) :]
    seconds = step_s[max(0, warmup_steps - 1) :]
    charged = before_s / len(step_tokens)
    if len(set(counted)) == 1:
        return counted[0] / (median(seconds) + charged)
    return sum(counted) / (sum(seconds) + charged * len(seconds))


def run_peer(peer: Peer, common: WorkOrder, *, python: str, warmup_steps: int) -> Result:
    """Run `peers/<script>.py` on the order in a process of its own. Raises `PeerError` when it fails."""
    order = common.with_options(peer.options)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "order.json"
        order.write(path)
        cache = Path(order.store) / "benchmarks" / "compile-cache" / peer.script
        variables = os.environ | {
            "TORCHINDUCTOR_CACHE_DIR": str(cache),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "true",
            "TORCHINDUCTOR_FX_GRAPH_CACHE": "1",
            # Unsloth writes its sources here in place of the current folder, and asks the hub for nothing.
            "UNSLOTH_COMPILE_LOCATION": str(cache / "unsloth"),
            "UNSLOTH_DISABLE_STATISTICS": "1",
        }
        load = os.getloadavg()[0]
        with open(Path(folder) / "errors", "w+b") as errors:
            started = time.monotonic()
            process = subprocess.Popen(
                [python, "-m", f"peers.{peer.script}", str(path)],
                cwd=HERE,
                env=variables,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
            with MemoryWatch(process.pid) as memory:
                try:
                    printed, _ = process.communicate()
                except BaseException:
                    process.kill()
                    process.wait()
                    raise
            if process.returncode != 0:
                errors.seek(0)
                tail = errors.read().decode(errors="replace")[-3000:]
                raise PeerError(f"{peer.name} ended with {process.returncode}:\n{tail}")
    answer = json.loads(printed.rstrip().splitlines()[-1])
    finished_at, cpu_at = answer.pop("finished_at"), answer.pop("cpu_at")
    step_s, step_cpu_s = ([after - before for before, after in pairwise(times)] for times in (finished_at, cpu_at))
    if len(finished_at) != order.steps:
        raise PeerError(f"{peer.name} did {len(finished_at)} steps of {order.steps}")
    step_tokens = answer.pop("step_tokens") or [order.rows * order.tokens] * order.steps
    return Result(
        peer=peer.name,
        tokens_per_second=speed(step_tokens, step_s, answer["before_s"], warmup_steps),
        tokens_per_cpu_second=speed(step_tokens, step_cpu_s, answer["before_cpu_s"], warmup_steps),
        step_tokens=step_tokens,
        first_step_s=finished_at[0] - started,
        peak_bytes=memory.peak_bytes,
        step_s=step_s,
        load_before=load,
        **answer,
    )


class MemoryWatch:
    """Looks at a process and its descendants ten times a second while the block runs.

    `peak_bytes` is the highest sum of their resident sizes, pages that they share counted in each, and never less than the
    kernel's own high-water mark of any one of them.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._peak = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    @property
    def peak_bytes(self) -> int | None:
        """Bytes; `None` when nothing could be read."""
        return self._peak or None

    def __enter__(self) -> "MemoryWatch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(_LOOK_EVERY_S):
            family = _family(self._pid)
            self._peak = max(self._peak, sum(now for now, _ in family), *(highest for _, highest in family), 0)


def _family(root: int) -> list[tuple[int, int]]:
    """(resident now, highest so far) in bytes of the process `root` and its descendants."""
    parents: dict[int, int] = {}
    sizes: dict[int, tuple[int, int]] = {}
    for entry in _PROC.glob("[0-9]*"):
        try:
            text = (entry / "status").read_text()
        except OSError:
            continue  # it ended meanwhile
        fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
        pid = int(entry.name)
        parents[pid] = int(fields["PPid"])
        # A process that has ended and waits to be collected has no memory left.
        sizes[pid] = (_kib(fields["VmRSS"]), _kib(fields["VmHWM"])) if "VmRSS" in fields else (0, 0)
    family = [root] if root in sizes else []
    for pid in family:
        family.extend(child for child, parent in parents.items() if parent == pid)
    return [sizes[pid] for pid in family]


def _kib(field: str) -> int:
    return int(field.split()[0]) * 1024


def peers() -> list[str]:
    """Names of the scripts in `peers/` that train: those that read a work order."""
    scripts = (HERE / "peers").glob("*.py")
    return sorted(path.stem for path in scripts if "read_order" in path.read_text(encoding="utf-8"))


def default_python() -> str:
    """The interpreter of this process."""
    return sys.executable
