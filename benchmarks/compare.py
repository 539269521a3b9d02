"""Two peers of one benchmark beside each other: ratios of medians, and whether they did the same work."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import mean, median

from measure import Result

_LOSS_TOLERANCE = {"fp32": 2e-3, "bf16": 5e-2, "fp8": 1e-1}
"""Nats by which two curves may differ at any step; the order of sums is not the same, and training amplifies it."""
_WEIGHTS_TOLERANCE = {"fp32": 1e-5, "bf16": 1e-3, "fp8": 1e-3}
"""Relative difference of Σ|w| before the first step."""
_OWN_ORDER_TOLERANCE = 0.5
"""Nats by which the mean losses of two runs over the same samples may differ whose steps hold other ones of them."""


@dataclass(frozen=True)
class Agreement:
    """Whether two peers did the same work, and by how much they differ."""

    same_tokens: bool
    same_weights: bool
    same_losses: bool
    largest_loss_difference: float
    at_step: int
    tolerance: float
    own_order: str | None = None
    """Why the rows are not the same; the losses are then compared by their means over the run."""

    @property
    def holds(self) -> bool:
        return (self.same_tokens or self.own_order is not None) and self.same_weights and self.same_losses


@dataclass(frozen=True)
class Comparison:
    """The first peer's medians over another's."""

    peer: str
    tokens_per_second: float
    tokens_per_second_rounds: list[float]
    """The same ratio in each round by itself."""
    tokens_per_cpu_second: float
    peak_memory: float | None
    peak_gpu_memory: float | None
    first_step: float
    agreement: Agreement


def compare(ours: Sequence[Result], theirs: Sequence[Result], precision: str) -> Comparison:
    """Ratios of the medians, and whether all runs of both did the same work."""
    return Comparison(
        peer=theirs[0].peer,
        tokens_per_second=median(r.tokens_per_second for r in ours) / median(r.tokens_per_second for r in theirs),
        tokens_per_second_rounds=[a.tokens_per_second / b.tokens_per_second for a, b in zip(ours, theirs, strict=True)],
        tokens_per_cpu_second=median(r.tokens_per_cpu_second for r in ours)
        / median(r.tokens_per_cpu_second for r in theirs),
        peak_memory=_ratio([each.peak_bytes for each in ours], [each.peak_bytes for each in theirs]),
        peak_gpu_memory=_ratio([each.peak_gpu_bytes for each in ours], [each.peak_gpu_bytes for each in theirs]),
        first_step=median(r.first_step_s for r in ours) / median(r.first_step_s for r in theirs),
        agreement=agreement(ours[0], [*ours, *theirs], precision),
    )


def _ratio(ours: Sequence[int | None], theirs: Sequence[int | None]) -> float | None:
    """Of the medians of what is known; `None` where nothing is."""
    known = [[each for each in side if each is not None] for side in (ours, theirs)]
    return median(known[0]) / median(known[1]) if all(known) else None


def agreement(reference: Result, results: Sequence[Result], precision: str) -> Agreement:
    """How far the runs are from the reference; a loss that is not a number agrees with nothing."""
    own_order = next((result.own_order for result in results if result.own_order), None)
    if own_order:
        results = [replace_losses(result) for result in results]
        reference = replace_losses(reference)
    differences = [
        (abs(a - b) if a == a and b == b else float("inf"), step)
        for result in results
        for step, (a, b) in enumerate(zip(reference.losses, result.losses, strict=True), start=1)
    ]
    largest, at_step = max(differences)
    tolerance = _OWN_ORDER_TOLERANCE if own_order else _LOSS_TOLERANCE[precision]
    allowed = _WEIGHTS_TOLERANCE[precision] * reference.initial_weights
    return Agreement(
        same_tokens=all(result.tokens_digest == reference.tokens_digest for result in results),
        same_weights=all(abs(result.initial_weights - reference.initial_weights) <= allowed for result in results),
        same_losses=largest <= tolerance,
        largest_loss_difference=largest,
        at_step=at_step,
        tolerance=tolerance,
        own_order=own_order,
    )


def replace_losses(result: Result) -> Result:
    """The result with the mean of its losses in place of each."""
    return replace(result, losses=[mean(result.losses)] * len(result.losses))


def agreement_words(comparison: Comparison) -> str:
    each = comparison.agreement
    if each.holds and each.own_order:
        return (
            f"{comparison.peer}: {each.own_order}; same initial weights; mean losses of the run "
            f"{each.largest_loss_difference:.1e} nats apart"
        )
    if each.holds:
        return (
            f"same tokens, same initial weights; losses agree to {each.largest_loss_difference:.1e} nats "
            f"(tolerance {each.tolerance:g})"
        )
    wrong = [
        words
        for holds, words in (
            (each.same_tokens, "other tokens"),
            (each.same_weights, "other initial weights"),
            (
                each.same_losses,
                f"losses {each.largest_loss_difference:.2e} nats apart at step {each.at_step} "
                f"(tolerance {each.tolerance:g})",
            ),
        )
        if not holds
    ]
    return f"DISAGREEMENT with {comparison.peer}: {'; '.join(wrong)}. The ratios compare different work."
