"""Tokens per second, peak memory and time to the first step of Kajiya and of its peers, side by side in one run.

Every peer trains the same model from the same weights on the same rows, in a process of its own; the runs alternate
(A B A B …), so that a machine that grows slower or faster meets all of them alike. Figures are medians over the repeats.
"""

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from measure import PeerError, Result, default_python, peers, run_peer
from work_order import WorkOrder
from workload import SIZES, make_workload

_LOSS_TOLERANCE = {"fp32": 2e-3, "bf16": 5e-2}
"""Nats by which two curves may differ at any step; the order of sums is not the same, and training amplifies it."""
_WEIGHTS_TOLERANCE = {"fp32": 1e-5, "bf16": 1e-3}
"""Relative difference of Σ|w| before the first step."""


@dataclass(frozen=True)
class Agreement:
    """Whether two peers did the same work, and by how much they differ."""

    same_tokens: bool
    same_weights: bool
    same_losses: bool
    largest_loss_difference: float
    at_step: int
    tolerance: float

    @property
    def holds(self) -> bool:
        return self.same_tokens and self.same_weights and self.same_losses


@dataclass(frozen=True)
class Comparison:
    """The first peer's medians over another's."""

    peer: str
    tokens_per_second: float
    tokens_per_second_rounds: list[float]
    """The same ratio in each round by itself."""
    peak_memory: float | None
    first_step: float
    agreement: Agreement


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    order = make_workload(
        WorkOrder(
            size=options.model,
            model="",
            rows_file="",
            store=str(_store(options.store)),
            text=options.text and str(Path(options.text).resolve()),
            scratch="",
            rows=options.rows,
            tokens=options.tokens,
            micro_rows=options.micro_rows or options.rows,
            steps=options.steps,
            precision=options.precision,
            compile=options.compile == "on",
            seed=options.seed,
        )
    )
    pythons = dict(pair.split("=", 1) for pair in options.python)
    results: dict[str, list[Result]] = {peer: [] for peer in options.peers}
    for number in range(options.repeats):
        for peer in options.peers:
            python = pythons.get(peer) or default_python()
            try:
                result = run_peer(peer, order, python=python, warmup_steps=options.warmup_steps)
            except PeerError as error:
                print(error, file=sys.stderr)
                return 1
            results[peer].append(result)
            print(f"round {number + 1} of {options.repeats}: {_words(result)}", file=sys.stderr, flush=True)
    first, *others = options.peers
    comparisons = [compare(results[first], results[other], order.precision) for other in others]
    if options.json:
        print(
            json.dumps(
                {
                    "order": asdict(order),
                    "warmup_steps": options.warmup_steps,
                    "machine": machine(),
                    "runs": {peer: [asdict(result) for result in runs] for peer, runs in results.items()},
                    "comparisons": [asdict(comparison) for comparison in comparisons],
                },
                indent=1,
            )
        )
    else:
        print_table(order, results, comparisons)
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", choices=SIZES, default="S", help="size: XS (smoke test), S (6M parameters), M (52M)")
    add("--rows", type=int, default=16, help="rows of a step")
    add("--tokens", type=int, default=512, help="tokens of a row")
    add("--micro-rows", type=int, help="rows that pass through the model at once (default: all of a step)")
    add("--steps", type=int, default=12, help="steps of a run")
    add("--warmup-steps", type=int, default=2, help="first steps that the speed leaves out")
    add("--repeats", type=int, default=3, help="runs of each peer")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: what this hardware is fastest in")
    add("--compile", choices=("off", "on"), default="off", help="torch.compile, in every peer's own way")
    add("--seed", type=int, default=0)
    add("--peers", nargs="+", choices=peers(), default=["kajiya_train", "hf_trainer"], help="the first over each other")
    add("--python", action="append", default=[], metavar="PEER=PATH", help="interpreter of a peer")
    add("--store", help="Kajiya's store (default: $KAJIYA_STORE or ./kajiya-store)")
    add("--text", help="folder of .py files to train on (default: the standard library)")
    add("--json", action="store_true", help="print every figure of every run as JSON instead of the table")
    options = parser.parse_args(arguments)
    if options.rows % (options.micro_rows or options.rows):
        parser.error("--micro-rows must divide --rows")
    if not 1 <= options.warmup_steps < options.steps:
        parser.error("--warmup-steps must be at least 1 and less than --steps")
    return options


def compare(ours: Sequence[Result], theirs: Sequence[Result], precision: str) -> Comparison:
    """Ratios of the medians, and whether all runs of both did the same work."""
    memory: float | None = None
    our_peaks = [result.peak_bytes for result in ours if result.peak_bytes is not None]
    their_peaks = [result.peak_bytes for result in theirs if result.peak_bytes is not None]
    if our_peaks and their_peaks:
        memory = median(our_peaks) / median(their_peaks)
    return Comparison(
        peer=theirs[0].peer,
        tokens_per_second=median(r.tokens_per_second for r in ours) / median(r.tokens_per_second for r in theirs),
        tokens_per_second_rounds=[a.tokens_per_second / b.tokens_per_second for a, b in zip(ours, theirs, strict=True)],
        peak_memory=memory,
        first_step=median(r.first_step_s for r in ours) / median(r.first_step_s for r in theirs),
        agreement=agreement(ours[0], [*ours, *theirs], precision),
    )


def agreement(reference: Result, results: Sequence[Result], precision: str) -> Agreement:
    """How far the runs are from the reference; a loss that is not a number agrees with nothing."""
    differences = [
        (abs(a - b) if a == a and b == b else float("inf"), step)
        for result in results
        for step, (a, b) in enumerate(zip(reference.losses, result.losses, strict=True), start=1)
    ]
    largest, at_step = max(differences)
    tolerance = _LOSS_TOLERANCE[precision]
    allowed = _WEIGHTS_TOLERANCE[precision] * reference.initial_weights
    return Agreement(
        same_tokens=all(result.tokens_digest == reference.tokens_digest for result in results),
        same_weights=all(abs(result.initial_weights - reference.initial_weights) <= allowed for result in results),
        same_losses=largest <= tolerance,
        largest_loss_difference=largest,
        at_step=at_step,
        tolerance=tolerance,
    )


def print_table(order: WorkOrder, results: dict[str, list[Result]], comparisons: Sequence[Comparison]) -> None:
    """Medians, ratios, and whether the work was the same."""
    n_runs = len(next(iter(results.values())))
    facts = machine()
    print(
        f"\nmodel {order.size}, {order.rows} x {order.tokens} tokens a step, {order.micro_rows} rows at once, "
        f"{order.steps} steps, {order.precision}, compile {'on' if order.compile else 'off'}; "
        f"medians of {n_runs} interleaved runs\n{facts['cpu']}, {facts['cores']} cores, {facts['accelerator']}\n"
    )
    print(f"{'':<22}{'tokens/s':>16}{'peak memory':>16}{'first step':>14}{'last loss':>12}")
    for peer, runs in results.items():
        speeds = sorted(result.tokens_per_second for result in runs)
        peaks = [result.peak_bytes for result in runs if result.peak_bytes is not None]
        memory = f"{median(peaks) / 2**30:.2f} GiB" if peaks else "not measured"
        first = median(result.first_step_s for result in runs)
        print(f"{peer:<22}{median(speeds):>16,.0f}{memory:>16}{first:>12.1f} s{runs[0].losses[-1]:>12.4f}")
    for each in comparisons:
        memory = f"{each.peak_memory:.2f} x" if each.peak_memory is not None else "not measured"
        label = f"{next(iter(results))} / {each.peer}" if len(comparisons) > 1 else "ratio"
        print(f"{label:<22}{each.tokens_per_second:>14.2f} x{memory:>16}{each.first_step:>12.2f} x")
    print()
    for each in comparisons:
        low, high = min(each.tokens_per_second_rounds), max(each.tokens_per_second_rounds)
        print(f"tokens/s against {each.peer}, round by round: {low:.2f} to {high:.2f}")
        print(_agreement_words(each))
    for peer, runs in results.items():
        print(f"{peer}: {_settings_words(runs[0])}")


def _agreement_words(comparison: Comparison) -> str:
    each = comparison.agreement
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


def _settings_words(result: Result) -> str:
    said = result.versions | {name: value for name, value in result.settings.items() if value is not None}
    return ", ".join(f"{name} {value}" for name, value in said.items())


def _words(result: Result) -> str:
    memory = f"{result.peak_bytes / 2**30:.2f} GiB" if result.peak_bytes is not None else "memory not measured"
    return (
        f"{result.peer} {result.tokens_per_second:,.0f} tokens/s, {memory}, first step after {result.first_step_s:.1f} s "
        f"(load before {result.load_before:.1f})"
    )


def machine() -> dict[str, str | int]:
    """The machine in words."""
    import torch

    from kajiya.run.provenance import usable_cores

    names = [line.split(":", 1)[1].strip() for line in _cpu_lines() if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "amx": "yes" if torch.cpu._is_amx_tile_supported() else "no",
        "cores": usable_cores(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU",
        "system": f"{platform.system()} {platform.machine()}",
    }


def _cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []


def _store(given: str | None) -> Path:
    from kajiya.run.store import default_store

    return default_store(given).root


if __name__ == "__main__":
    sys.exit(main())
