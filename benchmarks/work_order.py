"""What every peer is given and what it answers: one JSON work order, one JSON line of results.

Standard library only, so that a peer in an environment of its own can read it too.
"""

import hashlib
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class WorkOrder:
    """One training to be measured: AdamW without weight decay at a constant rate, one line of log a step, nothing saved."""

    size: str
    """Row of `workload.SIZES`."""
    model: str
    """Folder with config.json, the initial weights (model.safetensors, float32) and the tokenizer."""
    rows_file: str
    """Token ids, int32 `.npy` [steps · rows, tokens + 1], in the order of training; each row brings its last target."""
    store: str
    """Kajiya's store, which holds the same text as artifacts."""
    text: str | None
    """Folder of the text; `None`: the interpreter's standard library."""
    scratch: str
    """Folder that a peer may write to."""
    rows: int
    """Rows of one optimizer step."""
    tokens: int
    """Tokens of one row."""
    micro_rows: int
    """Rows that pass through the model at once."""
    steps: int
    precision: str
    """fp32; or bf16, with float32 master weights where the peer has them."""
    compile: bool
    seed: int
    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip_norm: float = 1.0

    @property
    def accumulate(self) -> int:
        """Micro-batches of one optimizer step."""
        return self.rows // self.micro_rows

    def write(self, path: Path) -> None:
        """Write the order as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")


def read_order() -> WorkOrder:
    """The work order whose path is this process's first argument."""
    return WorkOrder(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))


class Record:
    """What a peer notes while it trains."""

    def __init__(self) -> None:
        self._finished_at: list[float] = []
        self._losses: list[float] = []
        self._ids = hashlib.sha256()

    def tokens(self, ids: Any) -> None:
        """Token ids of a micro-batch as they go into the model, an integer array [rows, tokens]."""
        self._ids.update(ids.astype("<i4").tobytes())

    def step(self, loss: float) -> None:
        """A step is finished; `loss` is its mean over the targets, nats."""
        # The monotonic clock is one for all processes, so that the parent can subtract the time of the start.
        self._finished_at.append(time.monotonic())
        self._losses.append(loss)

    def answer(self, *, initial_weights: float, versions: dict[str, str], settings: dict[str, Any]) -> None:
        """Print the result: the last line of standard output. `initial_weights` is Σ|w|, each shared weight once."""
        result = {
            "finished_at": self._finished_at,
            "losses": self._losses,
            "tokens_digest": self._ids.hexdigest(),
            "initial_weights": initial_weights,
            "versions": versions | {"python": ".".join(map(str, sys.version_info[:3]))},
            "settings": settings,
        }
        print("\n" + json.dumps(result), flush=True)
