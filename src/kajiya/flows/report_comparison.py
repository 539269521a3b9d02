"""Several models beside each other: paired verdicts on the same rows, tasks with intervals, what each cost."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import numpy as np

from kajiya.config.digest import digest
from kajiya.config.quantities import format_bytes, format_seconds
from kajiya.config.schema import TRAINING_SECTIONS
from kajiya.errors import StoreError
from kajiya.evals.fingerprint import read_fingerprint
from kajiya.evals.results import TaskResult, compare_results, compared_words
from kajiya.evals.seeds import compare_seeds, noise_floor
from kajiya.evals.statistics import Comparison, compare, comparison_words, ratio_scores
from kajiya.flows.report_facts import RunFacts
from kajiya.flows.report_page import Block, Column, Notice, Section, Table, Text
from kajiya.flows.report_results import of_run, run_title, why_missing

_Name = tuple[str, tuple[str, ...]]
"""Of a figure: its words, and how it was asked for, which another figure of the same words may not share."""
_SAID = 3
"""Metrics of a loss that are compared in words; the table has all."""
_WATTS = 10.0
"""Of one busy processor core with its share of memory and power supply: an assumption, said wherever it is used."""


# ---------------------------------------------------------------- held-out text


def comparison_section(runs: Sequence[RunFacts]) -> Section | None:
    """Every later run against the first on the same held-out documents or rows; `None` for one run."""
    if len(runs) < 2:
        return None
    blocks: list[Block] = []
    first, *others = runs
    rows = []
    for other in others:
        problem = _why_not_paired(first, other)
        if problem is not None:
            blocks.append(Notice(f"{first.label} and {other.label} are not compared: {problem}.", "warn"))
            continue
        pair = f"{other.label} − {first.label}"
        if first.figures:
            found = list(_compare_figures(first, other))
            blocks += [Text(words) for words, _ in found[:_SAID]]
            rows += [[f"{pair}: {cells[0]}", *cells[1:]] for _, cells in found]
        else:
            bits = _compare_documents(first, other)
            blocks.append(Text(f"On bits per byte, {comparison_words(bits, first.label, other.label)}."))
            rows.append([pair, *_comparison_cells(bits)])
    if rows:
        blocks.append(Table(_COMPARISON_COLUMNS, rows))
        unit = "row" if first.figures else "document"
        blocks.append(
            Text(
                f"Paired by {unit}: both models on the same held-out {unit}s. The interval resamples sources, the test swaps the "
                "two models' scores of whole sources (a document is one; so are the rows of one file of code); the effect size "
                "is the mean difference in standard deviations (d_z).",
                is_aside=True,
            )
        )
    blocks.extend(_noise_of_seeds(runs))
    return Section("comparison", "Paired comparison", blocks)


def _noise_of_seeds(runs: Sequence[RunFacts]) -> Iterator[Block]:
    """What seeds do, where runs differ by nothing else; and whether two such groups differ by more than that."""
    groups: dict[str, list[RunFacts]] = {}
    for run in runs:
        if _judged(run):
            config = {part: run.manifest["config"][part] for part in _TRAINED_BY if part in run.manifest["config"]}
            groups.setdefault(digest([config, run.digest("corpus")]), []).append(run)
    repeated = [group for group in groups.values() if len({run.manifest["config"]["seed"] for run in group}) > 1]
    found = [(", ".join(run.label for run in group), _of_all(group)) for group in repeated]
    for labels, figures in found:
        if figures:
            yield from _noise_blocks(labels, figures)
    for (labels, figures), (other, others) in pairwise(found):
        for name in [each for each in figures if each in others][:_SAID]:
            verdict = compare_seeds(figures[name], others[name])
            words = "differ by more than seeds do" if verdict.is_beyond_noise else "do not differ by more than seeds do"
            size = f"{verdict.difference:+.3g} ± {verdict.half_width:.2g}"
            yield Text(
                f"On {name[0]}, the settings of {labels} and of {other} {words} ({size}, p = {verdict.p_value:.2g}, Welch)."
            )


def _noise_blocks(labels: str, figures: Mapping[_Name, Sequence[float]]) -> Iterator[Block]:
    floors = {name[0]: noise_floor(values) for name, values in figures.items()}
    name, first = next(iter(floors.items()))
    yield Text(
        f"{labels} differ by their seed alone: {first.mean:.4f} {name}, standard deviation {first.spread:.2g}. "
        f"A difference below {first.detectable:.2g} between two settings, each over as many seeds, is within that noise."
    )
    if len(floors) > 1:
        titles = ("mean over seeds", "standard deviation", "within the noise below")
        rows = [
            [name, f"{each.mean:.4g}", f"{each.spread:.2g}", f"{each.detectable:.2g}"] for name, each in floors.items()
        ]
        yield Table([Column(labels), *(Column(title, "number") for title in titles)], rows)


def _of_all(group: Sequence[RunFacts]) -> dict[_Name, list[float]]:
    """The figures that every run of the group has, run by run."""
    judged = [_judged(run) for run in group]
    return {name: [each[name] for each in judged] for name in judged[0] if all(name in each for each in judged)}


def _judged(run: RunFacts) -> dict[_Name, float]:
    """Every figure that says which model is better: on held-out text or rows, and of tasks."""
    found: dict[_Name, float] = {}
    if run.evaluation is not None:
        found["bits per byte", ()] = run.evaluation["bits_per_byte"]
    results = [TaskResult(part.folder, part.facts) for name, part in run.parts.items() if name.startswith("task ")]
    named = [("", (), run.figures), *((f"{each.task}: ", each.fingerprint.manner, each.figures) for each in results)]
    for words, manner, figures in named:
        for metric, figure in figures.items():
            if figure["is_judged"] and figure["value"] is not None:
                found[words + metric, manner] = figure["value"]
    return found


_TRAINED_BY = (*TRAINING_SECTIONS, "eval")
"""Sections of the config that a figure depends on, beside the seed."""

_COMPARISON_COLUMNS = [
    Column(""),
    *(Column(title, "number") for title in ("difference", "95 % interval", "p", "effect size", "rows", "sources")),
    Column("test"),
]


def _comparison_cells(found: Comparison) -> list[str]:
    low, high = found.interval
    return [
        f"{found.difference:+.4g}", f"{low:+.4g} – {high:+.4g}", "< 0.001" if found.p_value < 0.001 else f"{found.p_value:.3f}",
        f"{found.effect_size:.2f}" if np.isfinite(found.effect_size) else "—", f"{found.n_rows:,}", f"{found.n_groups:,}",
        found.test,
    ]  # fmt: skip


def _why_not_paired(first: RunFacts, other: RunFacts) -> str | None:
    for run in (first, other):
        if not run.figures and (run.evaluation is None or not run.documents):
            return f"{run.label}: {why_missing(run, 'evaluation')}"
    if bool(first.figures) != bool(other.figures):
        return "one is judged by the bits of a text, the other by the metrics of its loss"
    if not first.figures and first.digest("corpus") != other.digest("corpus"):
        return "their held-out texts differ"
    a, b = (read_fingerprint(run.parts["evaluation"].facts) for run in (first, other))
    apart = a.differences(b)
    if "data" in apart:
        return f"their held-out {'rows' if first.figures else 'texts'} differ"
    return f"they were scored differently ({', '.join(apart)})" if apart else None


def _compare_figures(first: RunFacts, other: RunFacts) -> Iterator[tuple[str, list[str]]]:
    """Words and table cells of every metric that says which model is better, the first ones first."""
    a, b = (TaskResult(run.parts["evaluation"].folder, run.parts["evaluation"].facts) for run in (first, other))
    for metric, figure in a.figures.items():
        if not figure["is_judged"] or metric not in b.figures or None in (figure["value"], b.figures[metric]["value"]):
            continue
        try:
            found = compare_results(a, b, metric)
        except StoreError as problem:
            yield f"On {metric}, {first.label} and {other.label} are not compared: {problem}", [metric, *["—"] * 7]
            continue
        words = compared_words(a, found, metric, (first.label, other.label))
        yield f"On {metric}, {words}.", [metric, *_comparison_cells(found)]


def _compare_documents(first: RunFacts, other: RunFacts) -> Comparison:
    n_bytes = np.array([each.n_bytes for each in first.documents], dtype=np.float64)
    a, b = (
        ratio_scores(np.array([each.bits for each in run.documents]), n_bytes, is_lower_better=True)
        for run in (first, other)
    )
    return compare(a, b)


# ---------------------------------------------------------------- cost


def cost_section(runs: Sequence[RunFacts]) -> Section:
    """Time, processor time, memory and an estimate of the energy."""
    has_gpu = any("gpu_joules" in (run.manifest.get("usage") or {}) for run in runs)
    columns = [
        Column(""),
        *(Column(title, "number") for title in (*_COSTS, *(("peak GPU memory",) if has_gpu else ()))),
    ]
    rows, blocks = [], list[Block]()
    for run in runs:
        usage = run.manifest.get("usage")
        if usage is None:
            blocks.append(Notice(f"{of_run(run, runs)}No cost: the manifest does not say what the process used."))
            continue
        timings = run.manifest.get("timings") or {}
        device = (run.manifest.get("derived") or {}).get("train.device", "cpu")
        energy = f"{usage['cpu_seconds'] * _WATTS / 3600:.2f} Wh"
        gpu_joules = usage.get("gpu_joules")
        if gpu_joules is not None:
            energy += f" + {gpu_joules / 3600:.2f} Wh of GPUs"
        elif device != "cpu":
            energy += f", {device} not known"
        n_uncounted = usage.get("n_uncounted_ranks", 0)
        if n_uncounted:
            words = f"{n_uncounted} of its processes left no note of what they used, which is not counted."
            blocks.append(Notice(f"{of_run(run, runs)}{words}", "warn"))
        rows.append([
            run_title(run, runs), format_seconds(timings.get("train", 0.0)), format_seconds(sum(timings.values())),
            format_seconds(usage["cpu_seconds"]), energy, format_bytes(usage["peak_bytes"]),
            *([format_bytes(usage["gpu_peak_bytes"]) if "gpu_peak_bytes" in usage else "—"] if has_gpu else ()),
        ])  # fmt: skip
    if rows:
        blocks.append(Table(columns, rows))
        words = (
            f"The energy is an estimate: processor time at {_WATTS:g} W a busy core; nothing was measured at the socket. "
            + (
                "That of GPUs is what their drivers counted while the run worked, others' work on them included. "
                * has_gpu
            )
            + "Times and processor time are of all attempts, their ranks and the processes that they began; memory is the most "
            "that one process held."
        )
        blocks.append(Text(words, is_aside=True))
    return Section("cost", "Cost", blocks)


_COSTS = ("training", "all stages", "processor time", "energy, estimated", "peak memory")
