"""What lies behind the result: loss curves, the held-out documents one by one, samples."""

import math
from collections.abc import Iterator, Sequence

from kajiya.flows.figures import (
    CurvesData,
    MetricsData,
    RunCurves,
    SpreadData,
    draw_curves,
    draw_metrics,
    draw_spread,
)
from kajiya.flows.report_facts import DocumentScore, RunFacts
from kajiya.flows.report_page import Block, Column, Heading, Notice, Plot, Sample, Section, Table, Text
from kajiya.flows.report_results import of_run, plot, run_title, why_missing

_FEWEST_FOR_A_SPREAD = 8
"""Documents below which a table says more than a histogram."""
_N_EXTREMES = 5
_MOST_METRICS = 8
_KNOWN_METRICS = ("train/lr", "train/grad_norm", "train/tokens", "train/skipped", "train/tokens_per_second")


# ---------------------------------------------------------------- curves


def curves_section(runs: Sequence[RunFacts]) -> Section:
    """Training and held-out loss of all runs on common axes."""
    blocks: list[Block] = []
    drawn = [run for run in runs if _train_metric(run) or _heldout_metric(run)]
    for run in runs:
        if run not in drawn:
            blocks.append(Notice(f"{of_run(run, runs)}No curve: the event log holds no loss; {_why_no_curve(run)}."))
    if drawn:
        data = curves_data(drawn)
        words = "Loss over training" + ("" if len(drawn) == 1 else " of runs " + ", ".join(run.label for run in drawn))
        blocks.append(plot("curves", draw_curves, data, words, _curves_caption(drawn)))
        blocks.append(_losses_table(drawn, runs))
        blocks.extend(_further(drawn))
    for run in runs:
        blocks.extend(_curve_notes(run, runs))
    return Section("curves", "Loss", blocks)


def _further(runs: Sequence[RunFacts]) -> Iterator[Block]:
    """What else was evaluated along the training: tasks, and what the loss tells beside itself."""
    losses = {"eval/loss", "eval/nll", *(_heldout_metric(run) for run in runs)}
    names = [
        name
        for name in dict.fromkeys(name for run in runs for name in run.history.curves)
        if name.startswith(("eval/", "task/")) and name not in losses
    ]
    chosen = sorted(names, key=lambda name: not name.startswith("task/"))[:_MOST_METRICS]
    curves = {run.label: run.history.curves for run in runs}
    metrics = {name: {label: found[name] for label, found in curves.items() if found.get(name)} for name in chosen}
    if not metrics:
        return
    data = MetricsData("optimizer steps", metrics, {run.label: number for number, run in enumerate(runs)})
    words = "Evaluated along the training, on held-out rows and on the tasks of train.tasks."
    if len(chosen) < len(names):
        words += f" Drawn are {len(chosen)} of {len(names)}; the event log holds the others."
    yield plot("metrics", draw_metrics, data, "Further metrics over training", words)


def _why_no_curve(run: RunFacts) -> str:
    if run.history.stages.get("train") is not None and run.history.stages["train"].state == "reused":
        return "the model was found in the store, its training is another run's"
    return why_missing(run, "training metrics")


def _train_metric(run: RunFacts) -> str | None:
    """The name of the training loss: `train/nll`, else the first that the user's own loss tells."""
    names = [name for name in run.history.curves if name.startswith("train/") and name not in _KNOWN_METRICS]
    return "train/nll" if "train/nll" in names else next(iter(names), None)


def _heldout_metric(run: RunFacts) -> str | None:
    """The name of the held-out loss: what the loss itself is on held-out rows, or nats per token."""
    names = [name for name in ("eval/loss", "eval/nll") if run.history.curves.get(name)]
    train = (_train_metric(run) or "").removeprefix("train/")
    return f"eval/{train}" if f"eval/{train}" in names else next(iter(names), None)


def curves_data(runs: Sequence[RunFacts]) -> CurvesData:
    """Over tokens where every run's plan says how many a step takes, else over steps."""
    scales = [None if run.plan is None else run.plan["tokens_per_step"] for run in runs]
    has_tokens = all(scale is not None for scale in scales)
    curves = []
    for run, scale in zip(runs, scales, strict=True):
        factor = scale if has_tokens and scale is not None else 1

        def scaled(points: Sequence[Sequence[float]], factor: int = factor) -> list[tuple[float, float]]:
            return [(step * factor, value) for step, value in points]

        metric, heldout = _train_metric(run), _heldout_metric(run)
        logged = run.history.curves
        curves.append(
            RunCurves(
                run.label,
                train=scaled(logged[metric]) if metric else [],
                heldout=scaled(logged[heldout]) if heldout else [],
                lr=scaled(logged.get("train/lr", [])),
                lr_planned=scaled(run.plan["lr_curve"]) if run.plan else [],
            )
        )
    return CurvesData("training tokens" if has_tokens else "optimizer steps", curves)


def _curves_caption(runs: Sequence[RunFacts]) -> str:
    every = {run.manifest["config"]["train"]["log_every"] for run in runs}
    mean = f"the mean since the point before ({', '.join(str(n) for n in sorted(every))} steps)"
    lines = "Above: loss on training rows, " + mean + ", and on held-out rows (points)."
    return lines + " Beneath: the learning rate as planned (dashes) and as used."


def _losses_table(drawn: Sequence[RunFacts], runs: Sequence[RunFacts]) -> Table:
    title = "loss" if any(run.figures for run in drawn) else "loss, nats per token"
    columns = [Column(title)] if len(runs) == 1 else [Column("run"), Column(title)]
    columns += [Column(title, "number") for title in ("first", "at step", "last", "at step ", "lowest", "at step  ")]
    rows = []
    for run in drawn:
        for name in filter(None, (_train_metric(run), _heldout_metric(run))):
            curve = run.history.curves.get(name)
            if not curve:
                continue
            words = (
                "held-out rows"
                if name.startswith("eval/")
                else "training rows" + ("" if name == "train/nll" else f" ({name})")
            )
            lowest = min(curve, key=lambda point: point[1])
            cells = [cell for step, value in (curve[0], curve[-1], lowest) for cell in (f"{value:.3f}", f"{step:,}")]
            rows.append([*([] if len(runs) == 1 else [run.label]), words, *cells])
    return Table(columns, rows)


def _curve_notes(run: RunFacts, runs: Sequence[RunFacts]) -> Iterator[Block]:
    history = run.history
    if history.superseded:
        words = f"{history.superseded:,} points that a resumed attempt did again are left out."
        yield Text(of_run(run, runs) + words, is_aside=True)
    for name, count in history.non_finite.items():
        yield Notice(f"{of_run(run, runs)}{count:,} points of {name} were NaN or infinite and are not drawn.", "bad")
    model = run.parts.get("model")
    if model and model.facts["skipped_steps"]:
        words = f"{model.facts['skipped_steps']:,} steps were skipped because their gradient was not finite."
        yield Notice(of_run(run, runs) + words, "bad")


# ---------------------------------------------------------------- documents


def documents_section(runs: Sequence[RunFacts]) -> Section:
    """How the held-out documents differ, and the hardest and easiest of them."""
    blocks: list[Block] = []
    usable = {run.label: [each for each in run.documents if each.n_bytes > 0] for run in runs}
    for run in runs:
        n_empty = len(run.documents) - len(usable[run.label])
        if not run.documents:
            blocks.append(Notice(f"{of_run(run, runs)}No scores by document: {why_missing(run, 'evaluation')}."))
        if n_empty:
            blocks.append(
                Text(f"{of_run(run, runs)}{n_empty:,} held-out documents are empty and have no rate.", is_aside=True)
            )
    spread = {label: [each.bits_per_byte for each in found] for label, found in usable.items() if found}
    if any(len(values) >= _FEWEST_FOR_A_SPREAD for values in spread.values()):
        blocks.append(_spread(runs, spread))
    elif spread:
        words = f"Fewer than {_FEWEST_FOR_A_SPREAD} held-out documents: the table shows more than a histogram would."
        blocks.append(Text(words, is_aside=True))
    for run in runs:
        if usable[run.label]:
            if len(runs) > 1:
                blocks.append(Heading(run_title(run, runs)))
            blocks.extend(_extremes(usable[run.label]))
    return Section("documents", "Held-out documents", blocks)


def _spread(runs: Sequence[RunFacts], spread: dict[str, list[float]]) -> Plot:
    lines = [
        (f"{run.label}, all bytes together: {run.evaluation['bits_per_byte']:.3f}", run.evaluation["bits_per_byte"])
        for run in runs
        if run.evaluation is not None
    ]
    caption = (
        "How many held-out documents take how many bits per byte; a mark below is one document. "
        "The dashed line is the figure over all bytes, in which long documents count for more."
    )
    return plot("documents", draw_spread, SpreadData(spread, lines), "Histogram of bits per byte by document", caption)


def _extremes(documents: Sequence[DocumentScore]) -> Iterator[Block]:
    ranked = sorted(documents, key=lambda each: each.bits_per_byte, reverse=True)
    total = math.fsum(each.bits for each in documents)
    columns = [Column("document", "code"), Column("bytes", "number"), Column("bits per byte", "number"),
               Column("share of all bits", "number")]  # fmt: skip

    def rows(chosen: Sequence[DocumentScore]) -> list[list[str]]:
        return [
            [each.name, f"{each.n_bytes:,}", f"{each.bits_per_byte:.3f}", f"{each.bits / total:.1%}" if total else "—"]
            for each in chosen
        ]

    if len(ranked) <= 2 * _N_EXTREMES:
        yield Table(columns, rows(ranked))
        return
    yield Text(f"The {_N_EXTREMES} hardest and the {_N_EXTREMES} easiest of {len(ranked):,} documents:")
    gap = [f"… {len(ranked) - 2 * _N_EXTREMES:,} documents between …", "", "", ""]
    yield Table(columns, [*rows(ranked[:_N_EXTREMES]), gap, *rows(ranked[-_N_EXTREMES:])])


# ---------------------------------------------------------------- samples


def samples_section(runs: Sequence[RunFacts]) -> Section:
    """What each model wrote behind the prompts, beside what really follows."""
    blocks: list[Block] = []
    for run in runs:
        if not run.samples:
            blocks.append(Notice(f"{of_run(run, runs)}No samples: {_why_no_samples(run)}."))
    sampled = [run for run in runs if run.samples]
    if sampled:
        settings = sampled[0].scored_by
        blocks.append(
            Text(
                "Functions of held-out documents, cut behind their docstring. The model also read the text of the document "
                f"above each one, as far as its window reaches. At most {settings['sample_tokens']:,} tokens at temperature "
                f"{settings['temperature']:g}, the first draw, none chosen."
            )
        )
    found: dict[tuple[str, str], list[tuple[RunFacts, dict[str, str]]]] = {}
    for run in sampled:
        for sample in run.samples:
            found.setdefault((sample["document"], sample["name"]), []).append((run, sample))
    for (document, name), takes in found.items():
        answers = [(_writer(run, runs), sample["completion"]) for run, sample in takes]
        first = takes[0][1]
        blocks.append(
            Sample(f"{document} · {name}", first["prompt"], [*answers, ("what really follows", first["body"])])
        )
    return Section("samples", "Samples", blocks)


def _writer(run: RunFacts, runs: Sequence[RunFacts]) -> str:
    return "the model wrote" if len(runs) == 1 else f"{run.label} wrote"


def _why_no_samples(run: RunFacts) -> str:
    evaluation = run.parts.get("evaluation")
    if evaluation is None or run.evaluation is None:
        return why_missing(run, "evaluation")
    if evaluation.facts["note"]:
        return str(evaluation.facts["note"]).removeprefix("no samples: ").rstrip(".")
    if run.scored_by["samples"] == 0:
        return "eval.samples is 0"
    if evaluation.facts["n_samples"]:
        return "samples.json cannot be read (see Problems)"
    return "no held-out document has a Python function with a docstring and a short body"
