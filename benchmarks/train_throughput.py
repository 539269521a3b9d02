"""Tokens per second, peak memory and time to the first step of Kajiya and of its peers, side by side in one run.

Every peer trains the same model from the same weights on the same rows, in a process of its own; the runs alternate
(A B A B …), so that a machine that grows slower or faster meets all of them alike. Figures are medians over the repeats.
"""

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median

from compare import Comparison, agreement_words, compare
from measure import Peer, PeerError, Result, default_python, parse_peer, peers, run_peer
from work_order import METHODS, WorkOrder
from workload import SIZES, make_workload


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
            method=options.method,
        )
    )
    peaks = measured_peaks()
    pythons = dict(pair.split("=", 1) for pair in options.python)
    results: dict[str, list[Result]] = {peer.name: [] for peer in options.peers}
    failed: set[str] = set()
    for number in range(options.repeats):
        for peer in (each for each in options.peers if each.name not in failed):
            python = pythons.get(peer.script) or default_python()
            try:
                result = run_peer(peer, order, python=python, warmup_steps=options.warmup_steps)
            except PeerError as error:
                # The others are still worth their figures; the exit code says that one is missing.
                print(error, file=sys.stderr, flush=True)
                failed.add(peer.name)
                continue
            results[peer.name].append(result)
            print(f"round {number + 1} of {options.repeats}: {_words(result)}", file=sys.stderr, flush=True)
    chosen = [peer for peer in options.peers if peer.name not in failed]
    results = {peer.name: results[peer.name] for peer in chosen}
    if not results:
        return 1
    # Before and after the runs: what else the machine did at one of them makes no peak.
    peaks = {name: max(peak, measured_peaks()[name]) for name, peak in peaks.items()}
    first, *others = results
    told = {peer.name: order.with_options(peer.options).precision for peer in chosen}
    comparisons = [compare(results[first], results[other], coarser(told[first], told[other])) for other in others]
    if options.json:
        print(
            json.dumps(
                {
                    "order": asdict(order),
                    "warmup_steps": options.warmup_steps,
                    "machine": machine() | {"matmul_peaks": peaks},
                    "runs": {peer: [asdict(result) for result in runs] for peer, runs in results.items()},
                    "comparisons": [asdict(comparison) for comparison in comparisons],
                },
                indent=1,
            )
        )
    else:
        print_table(order, chosen, results, comparisons, peaks)
    return 1 if failed else 0


DEFAULT_PEERS = {
    "pretrain": ["kajiya_train", "hf_trainer"],
    "sft": ["kajiya_train", "trl_sft", "trl_sft:packing=on", "bare_samples"],
    "lora": ["kajiya_train", "trl_sft", "trl_sft:packing=on", "bare_samples:rows=full"],
    "qlora": ["kajiya_train"],
    "dpo": ["kajiya_train", "trl_dpo"],
}
"""Those that the test environment can run."""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--model",
        choices=SIZES,
        default="S",
        help="size: S (6M parameters), M (52M); for a GPU 1B, 8B; of smoke tests XS, XR",
    )
    add("--method", choices=METHODS, default="pretrain", help="what is trained (default: text from scratch)")
    add("--rows", type=int, help="rows of a step (default: 16; of tuning 4, which hold about 17 samples)")
    add("--tokens", type=int, help="tokens of a row (default: 512; of dpo 1,024)")
    add("--micro-rows", type=int, help="rows that pass through the model at once (default: all of a step)")
    add("--steps", type=int, default=12, help="steps of a run")
    add("--warmup-steps", type=int, default=2, help="first steps that the speed leaves out")
    add("--repeats", type=int, default=3, help="runs of each peer")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: what this hardware is fastest in")
    add("--compile", choices=("off", "on"), default="off", help="torch.compile, in every peer's own way")
    add("--seed", type=int, default=0)
    add(
        "--peers",
        nargs="+",
        help=f"the first over each other, each with options of its own: peer:precision=bf16,compile=on; {', '.join(peers())}",
    )
    add("--python", action="append", default=[], metavar="PEER=PATH", help="interpreter of a peer")
    add("--store", help="Kajiya's store (default: $KAJIYA_STORE or ./kajiya-store)")
    add("--text", help="folder of .py files to train on (default: the standard library)")
    add("--json", action="store_true", help="print every figure of every run as JSON instead of the table")
    options = parser.parse_args(arguments)
    options.rows = options.rows or (16 if options.method == "pretrain" else 4)
    options.tokens = options.tokens or (1024 if options.method == "dpo" else 512)
    try:
        options.peers = [parse_peer(name) for name in options.peers or DEFAULT_PEERS[options.method]]
    except ValueError as error:
        parser.error(str(error))
    if options.rows % (options.micro_rows or options.rows):
        parser.error("--micro-rows must divide --rows")
    if not 1 <= options.warmup_steps < options.steps:
        parser.error("--warmup-steps must be at least 1 and less than --steps")
    return options


def coarser(*precisions: str) -> str:
    """The one of the precisions with the fewest digits, whose tolerance a comparison takes; a mixed one is as its products."""
    kinds = [precision.removesuffix("-mixed").replace("fp16", "bf16") for precision in precisions]
    return max(kinds, key=("fp32", "bf16", "fp8").index)


def measured_peaks() -> dict[str, float]:
    """Operations a second of a square matrix product, by precision; what the utilization is a share of.

    A step in fp8 is measured by the products in bf16, of which it still has some.
    """
    import torch

    from kajiya.training.flops import matmul_peak
    from kajiya.training.precision import resolve_device, resolve_precision

    device = resolve_device("auto", "train.device")
    peaks = {name: matmul_peak(device, resolve_precision(name, device)) for name in ("fp32", "bf16")}
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the peers' memory
    return peaks | {"fp8": peaks["bf16"]}


def print_table(
    order: WorkOrder,
    chosen: Sequence[Peer],
    results: dict[str, list[Result]],
    comparisons: Sequence[Comparison],
    peaks: dict[str, float],
) -> None:
    """Medians, ratios, and whether the work was the same."""
    n_runs = len(next(iter(results.values())))
    facts = machine()
    print(
        f"\n{order.method}, model {order.size}, {order.rows} x {order.tokens} tokens a step, {order.micro_rows} rows at once, "
        f"{order.steps} steps, {order.precision}, compile {'on' if order.compile else 'off'}; "
        f"medians of {n_runs} interleaved runs\n{facts['cpu']}, {facts['cores']} cores, {facts['accelerator']}\n"
    )
    print(
        "matrix products: "
        + ", ".join(f"{peak / 1e9:,.0f} GFLOP/s in {name}" for name, peak in peaks.items() if name != "fp8")
        + "\n"
    )
    wide = max(22, *(len(label) + 2 for label in _labels(results, comparisons)))
    print(
        f"{'':<{wide}}{'tokens/s':>12}{'a CPU second':>14}{'of the peak':>13}{'peak memory':>16}{'first step':>14}{'last loss':>12}"
    )
    for peer, runs in zip(chosen, results.values(), strict=True):
        speeds = sorted(result.tokens_per_second for result in runs)
        held = [result.peak_bytes for result in runs if result.peak_bytes is not None]
        memory = f"{median(held) / 2**30:.2f} GiB" if held else "not measured"
        first = median(result.first_step_s for result in runs)
        cpu = median(result.tokens_per_cpu_second for result in runs)
        used = median(speeds) * order.flops_per_token / peaks[order.with_options(peer.options).precision]
        figures = f"{median(speeds):>12,.0f}{cpu:>14,.0f}{used:>13.0%}{memory:>16}{first:>12.1f} s"
        print(f"{peer.name:<{wide}}{figures}{runs[0].losses[-1]:>12.4f}")
    for label, each in zip(_labels(results, comparisons)[len(results) :], comparisons, strict=True):
        memory = f"{each.peak_memory:.2f} x" if each.peak_memory is not None else "not measured"
        ratios = f"{each.tokens_per_second:>10.2f} x{each.tokens_per_cpu_second:>12.2f} x{'':>13}{memory:>16}"
        print(f"{label:<{wide}}{ratios}{each.first_step:>12.2f} x")
    print()
    for each in comparisons:
        low, high = min(each.tokens_per_second_rounds), max(each.tokens_per_second_rounds)
        print(f"tokens/s against {each.peer}, round by round: {low:.2f} to {high:.2f}")
        if each.peak_gpu_memory is not None:
            print(f"peak memory of tensors on the GPU against {each.peer}: {each.peak_gpu_memory:.2f} x")
        print(agreement_words(each))
    for name, runs in results.items():
        print(f"{name}: {_settings_words(runs[0])}")
        print(f"  losses {' '.join(f'{loss:.4f}' for loss in runs[0].losses)}")


def _labels(results: dict[str, list[Result]], comparisons: Sequence[Comparison]) -> list[str]:
    """What stands in front of the table's lines: the peers, then the ratios."""
    first = next(iter(results))
    return [*results, *(f"{first} / {each.peer}" if len(comparisons) > 1 else "ratio" for each in comparisons)]


def _settings_words(result: Result) -> str:
    said = result.versions | {name: value for name, value in result.settings.items() if value is not None}
    return ", ".join(f"{name} {value}" for name, value in said.items())


def _words(result: Result) -> str:
    memory = f"{result.peak_bytes / 2**30:.2f} GiB" if result.peak_bytes is not None else "memory not measured"
    return (
        f"{result.peer} {result.tokens_per_second:,.0f} tokens/s, {result.tokens_per_cpu_second:,.0f} a CPU second, "
        f"{memory}, first step after {result.first_step_s:.1f} s (load before {result.load_before:.1f})"
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
