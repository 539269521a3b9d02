"""What every peer is given and what it answers: one JSON work order, one JSON line of results.

Standard library only, so that a peer in an environment of its own can read it too.
"""

import hashlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

METHODS = ("pretrain", "sft", "lora", "qlora", "dpo")
LORA_RANK = 16
LORA_ALPHA = 32
"""Of every peer's adapter, which stands beside q, k, v and o."""
DPO_BETA = 0.1


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
    """fp32; bf16, with float32 master weights where the peer has them; or fp8, of some peers on a GPU, for most products."""
    compile: bool
    seed: int
    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip_norm: float = 1.0
    method: str = "pretrain"
    """One of `METHODS`."""
    samples_file: str = ""
    """What is tuned on (`samples.read_samples`); empty for pretraining."""
    flops_per_token: float = 0.0
    """Operations of a training step a token that is no padding."""
    options: Mapping[str, str] = field(default_factory=dict)
    """What one peer is told besides, each in its own words."""

    @property
    def accumulate(self) -> int:
        """Micro-batches of one optimizer step."""
        return self.rows // self.micro_rows

    def with_options(self, options: Mapping[str, str]) -> "WorkOrder":
        """The order of one peer: `precision`, `compile` and `micro_rows` take the place of the common ones."""
        own = dict(options)
        changed: dict[str, Any] = {}
        if "precision" in own:
            changed["precision"] = own.pop("precision")
        if "compile" in own:
            changed["compile"] = own.pop("compile") == "on"
        if "micro_rows" in own:
            changed["micro_rows"] = int(own.pop("micro_rows"))
        return replace(self, options=own, **changed)

    def write(self, path: Path) -> None:
        """Write the order as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")


def read_order() -> WorkOrder:
    """The work order whose path is this process's first argument."""
    return WorkOrder(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))


def require_method(order: WorkOrder, *methods: str) -> None:
    """Leave with a message where this peer does not do the order's method."""
    if order.method not in methods:
        sys.exit(f"this peer does {' and '.join(methods)}, and the order is {order.method}: leave it out with --peers")


class Record:
    """What a peer notes while it trains."""

    def __init__(self) -> None:
        self._finished_at: list[float] = []
        self._cpu_at: list[float] = []
        self._losses: list[float] = []
        self._ids = hashlib.sha256()

    def tokens(self, ids: Any) -> None:
        """Token ids in the order in which they go into the model, an integer array without padding."""
        self._ids.update(ids.astype("<i4").tobytes())

    def step(self, loss: float) -> None:
        """A step is finished; `loss` is its mean over the targets (over the pairs, of DPO), nats."""
        # The monotonic clock is one for all processes, so that the parent can subtract the time of the start.
        self._finished_at.append(time.monotonic())
        self._cpu_at.append(time.process_time())
        self._losses.append(loss)

    def answer(
        self,
        *,
        initial_weights: float,
        versions: dict[str, str],
        settings: dict[str, Any],
        step_tokens: Sequence[int] | None = None,
        before_s: float = 0.0,
        before_cpu_s: float = 0.0,
        own_order: str | None = None,
    ) -> None:
        """Print the result: the last line of standard output.

        `initial_weights` is Σ|w| before any adapter, each shared weight once. `step_tokens`: tokens of each step that are no
        padding (`None`: all that were ordered). `before_s`: seconds of work done once for all steps, which are charged to
        them, and `before_cpu_s` those of the processor. `own_order`: why this peer's rows are others than were ordered, in words.
        """
        result = {
            "finished_at": self._finished_at,
            "cpu_at": self._cpu_at,
            "losses": self._losses,
            "tokens_digest": self._ids.hexdigest(),
            "initial_weights": initial_weights,
            "versions": versions | {"python": ".".join(map(str, sys.version_info[:3]))},
            "settings": settings,
            "step_tokens": None if step_tokens is None else list(map(int, step_tokens)),
            "before_s": before_s,
            "before_cpu_s": before_cpu_s,
            "own_order": own_order,
        }
        print("\n" + json.dumps(result), flush=True)
