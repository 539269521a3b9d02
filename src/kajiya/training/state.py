"""Where a run stands: all that the loop itself must remember, as plain numbers."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class TrainState:
    """Counters of the loop; the one mutable thing that it passes around."""

    step: int = 0
    """Optimizer steps done (skipped ones included: the clock and the data go on)."""
    tokens: int = 0
    """Tokens that went through the model."""
    targets: int = 0
    """Targets that were learnt from."""
    skipped: int = 0
    """Steps whose gradient was not finite."""
    seconds: float = 0.0
    """Time in the loop over all attempts, seconds."""
    best_loss: float | None = None
    """Best figure of `train.best_metric` so far; by default the lowest held-out loss, nats per token."""
    n_stale: int = 0
    """Evaluations since it was last bettered."""
    best_step: int | None = None
    """Step of it."""
    spikes: int = 0
    """Steps whose update was left out because the loss leapt."""
    overflows: int = 0
    """Steps that were too large for fp16 at the loss scale of the time, which was lowered."""
    halvings: int = 0
    """Times that the micro-batch was made smaller because memory ran out."""
    trend: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    """Running mean and variance of the loss, and the steps behind them."""
    high: int = 0
    """Losses in a row that were too far above the trend to become part of it."""
    spent: dict[str, float] = field(default_factory=dict)
    """Where the time went over all attempts, seconds by name: data, forward, backward, optimizer, and each hook."""
    strategy: dict[str, Any] = field(default_factory=dict)
    """What the strategy remembers: the loss scale of fp16."""
    window: dict[str, list[float]] = field(default_factory=dict)
    """Sums and counts of each metric since the last logged line."""
    derived: dict[str, Any] = field(default_factory=dict)
    """Values of settings that were `auto` or `None`; a resume takes them from here."""
