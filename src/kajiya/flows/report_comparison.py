"""Several models beside each other: paired verdicts on the same rows, tasks with intervals, what each cost."""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from kajiya.config.digest import digest
from kajiya.config.quantities import format_bytes, format_seconds
from kajiya.errors import StoreError
from kajiya.evals.run_task import TaskResult, compare_results
from kajiya.evals.statistics import (
    Comparison,
    compare,
    compare_seeds,
    comparison_words,
    noise_floor,
    ratio_scores,
)
from kajiya.flows.report_facts import RunFacts
from kajiya.flows.report_page import Block, Column, Heading, Notice, Section, Table, Text
from kajiya.flows.report_results import of_run, run_title, why_missing

_WATTS = 10.0
"""Of one busy processor core with its share of memory and power supply: an assumption, said wherever it is used."""
_TASK = "task "


# ---------------------------------------------------------------- held-out text


def comparison_section(runs: Sequence[RunFacts]) -> Section | None:
    """Every later run against the first on the same held-out documents; `None` for one run."""
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
        found = _compare_documents(first, other)
        blocks.append(Text(f"On bits per byte, {comparison_words(found, first.label, other.label)}."))
        rows.append([f"{other.label} − {first.label}", *_comparison_cells(found)])
    if rows:
        blocks.append(Table(_COMPARISON_COLUMNS, rows))
        blocks.append(
            Text(
                "Paired by document: both models on the same bytes. The interval resamples documents, the test swaps the two "
                "models' scores of whole documents; the effect size is the mean difference in standard deviations (d_z).",
                is_aside=True,
            )
        )
    blocks.extend(_noise_of_seeds(runs))
    return Section("comparison", "Paired comparison", blocks)


def _noise_of_seeds(runs: Sequence[RunFacts]) -> Iterator[Block]:
    """What seeds do, where runs differ by nothing else; and whether two such groups differ by more than that."""
    groups: dict[str, list[RunFacts]] = {}
    for run in runs:
        if run.evaluation is not None:
            config = {part: run.manifest["config"][part] for part in _TRAINED_BY if part in run.manifest["config"]}
            groups.setdefault(digest([config, run.digest("corpus")]), []).append(run)
    repeated = [group for group in groups.values() if len({run.manifest["config"]["seed"] for run in group}) > 1]
    values = [[(run.evaluation or {})["bits_per_byte"] for run in group] for group in repeated]
    for group, figures in zip(repeated, values, strict=True):
        found = noise_floor(figures)
        yield Text(
            f"{', '.join(run.label for run in group)} differ by their seed alone: {found.mean:.4f} bits per byte, standard "
            f"deviation {found.spread:.2g}. A difference below {found.detectable:.2g} between two settings, each over as many "
            "seeds, is within that noise."
        )
    for (group, figures), (other, others) in pairwise(zip(repeated, values, strict=True)):
        verdict = compare_seeds(figures, others)
        names = [", ".join(run.label for run in each) for each in (group, other)]
        words = "differ by more than seeds do" if verdict.is_beyond_noise else "do not differ by more than seeds do"
        size = f"{verdict.difference:+.3g} ± {verdict.half_width:.2g}"
        yield Text(f"The settings of {names[0]} and of {names[1]} {words} ({size}, p = {verdict.p_value:.2g}, Welch).")


_TRAINED_BY = ("data", "tokenizer", "model", "adapter", "optim", "schedule", "train", "eval")
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
        if run.evaluation is None or not run.documents:
            return f"{run.label}: {why_missing(run, 'evaluation')}"
    if first.digest("corpus") != other.digest("corpus"):
        return "their held-out texts differ"
    a, b = (run.evaluation or {} for run in (first, other))
    apart = [name for name in ("context_tokens", "dtype") if a[name] != b[name]]
    strides = {run.manifest["config"]["eval"]["stride_fraction"] for run in (first, other)}
    apart += ["eval.stride_fraction"] if len(strides) > 1 else []
    return f"they were scored differently ({', '.join(apart)})" if apart else None


def _compare_documents(first: RunFacts, other: RunFacts) -> Comparison:
    n_bytes = np.array([each.n_bytes for each in first.documents], dtype=np.float64)
    a, b = (
        ratio_scores(np.array([each.bits for each in run.documents]), n_bytes, is_lower_better=True)
        for run in (first, other)
    )
    return compare(a, b)


# ---------------------------------------------------------------- tasks


def tasks_section(runs: Sequence[RunFacts]) -> Section | None:
    """The tasks that the runs were evaluated on; a table for each way of evaluating, never two ways in one."""
    found: dict[tuple[str, ...], list[tuple[RunFacts, TaskResult]]] = {}
    for run in runs:
        for name, part in run.parts.items():
            if name.startswith(_TASK):
                result = TaskResult(part.folder, part.facts)
                print_ = result.fingerprint
                key = (part.facts["task"], print_.data, print_.template, print_.engine, print_.dtype, print_.sampling)
                found.setdefault(key, []).append((run, result))
    if not found:
        return None
    blocks: list[Block] = []
    names = [key[0] for key in found]
    for name in dict.fromkeys(names):
        blocks.append(Heading(name))
        groups = [group for key, group in found.items() if key[0] == name]
        if len(groups) > 1:
            words = (
                "These evaluations differ in their rows, prompts, engine, precision or sampling: figures of different "
            )
            blocks.append(Notice(words + "tables cannot be compared.", "warn"))
        for group in groups:
            blocks.extend(_task_blocks(group, runs))
    return Section("tasks", "Tasks", blocks)


def _task_blocks(group: list[tuple[RunFacts, TaskResult]], runs: Sequence[RunFacts]) -> Iterator[Block]:
    columns = [Column(""), Column("metric"), Column("figure", "number"), Column("95 % interval", "number"),
               Column("rows", "number"), Column("computed as")]  # fmt: skip
    rows = []
    for run, result in group:
        for metric, figure in result.facts["figures"].items():
            value, bounds = figure["value"], figure["interval"]
            rows.append([
                run_title(run, runs), metric, "—" if value is None else f"{value:.4g}",
                "—" if bounds is None else f"{bounds[0]:.4g} – {bounds[1]:.4g}", f"{result.facts['n_rows']:,}",
                figure["signature"],
            ])  # fmt: skip
    yield Table(columns, rows)
    first, *others = group
    for run, result in others:
        for metric in result.facts["figures"]:
            try:
                verdict = compare_results(first[1], result, metric)
            except (StoreError, OSError, KeyError) as problem:
                yield Notice(f"{metric}: {first[0].label} and {run.label} are not compared: {problem}", "warn")
                continue
            yield Text(f"{metric}: {comparison_words(verdict, first[0].label, run.label)}.")


# ---------------------------------------------------------------- cost


def cost_section(runs: Sequence[RunFacts]) -> Section:
    """Time, processor time, memory and an estimate of the energy."""
    columns = [Column(""), *(Column(title, "number") for title in _COSTS)]
    rows, blocks = [], list[Block]()
    for run in runs:
        usage = run.manifest.get("usage")
        if usage is None:
            blocks.append(Notice(f"{of_run(run, runs)}No cost: the manifest does not say what the process used."))
            continue
        timings = run.manifest.get("timings") or {}
        device = (run.manifest.get("derived") or {}).get("train.device", "cpu")
        energy = f"{usage['cpu_seconds'] * _WATTS / 3600:.2f} Wh" if device == "cpu" else f"not known of {device}"
        rows.append([
            run_title(run, runs), format_seconds(timings.get("train", 0.0)), format_seconds(sum(timings.values())),
            format_seconds(usage["cpu_seconds"]), energy, format_bytes(usage["peak_bytes"]),
        ])  # fmt: skip
    if rows:
        blocks.append(Table(columns, rows))
        words = (
            f"The energy is an estimate: processor time at {_WATTS:g} W a busy core; nothing was measured at the socket. "
            "Times and processor time are of all attempts, memory is the most that one process held."
        )
        blocks.append(Text(words, is_aside=True))
    return Section("cost", "Cost", blocks)


_COSTS = ("training", "all stages", "processor time", "energy, estimated", "peak memory")
