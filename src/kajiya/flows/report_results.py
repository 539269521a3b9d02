"""The result of a report: the verdict, the few figures to remember, the models beside the baselines."""

from collections.abc import Iterator, Sequence
from typing import Any

from kajiya.config.quantities import format_count, format_seconds
from kajiya.flows.figure_files import Draw, draw_svg
from kajiya.flows.figures import Bar, BarsData, draw_bars
from kajiya.flows.report_confusion import confusion_blocks
from kajiya.flows.report_facts import RunFacts
from kajiya.flows.report_page import Block, Column, Heading, Notice, Plot, Section, Table, Text, Tiles

_BASELINES = {"xz": "xz -9 alone", "xz-primed": "xz -9 primed with the training text"}


def baseline_name(name: str) -> str:
    """A baseline in plain words."""
    return _BASELINES.get(name, name)


def run_title(run: RunFacts, runs: Sequence[RunFacts]) -> str:
    """A run in a table: its letter and id beside others, `this model` alone."""
    return "this model" if len(runs) == 1 else f"{run.label} · {run.id}"


# ---------------------------------------------------------------- verdict


def verdict(run: RunFacts, runs: Sequence[RunFacts]) -> str:
    """One sentence: what the model needs for a held-out byte, and how that compares with each baseline."""
    subject = "The model" if len(runs) == 1 else f"Model {run.label}"
    if run.figures:
        loss = run.manifest["config"]["train"]["loss"]["name"]
        figures = ", ".join(f"{name} {figure_words(row)}" for name, row in list(run.figures.items())[:3])
        return f"{subject}, trained with the loss {loss}, on held-out rows: {figures}."
    if run.evaluation is None:
        return f"{subject}: no verdict, {why_missing(run, 'evaluation')}."
    value = run.evaluation["bits_per_byte"]
    interval = interval_of(run.evaluation)
    words = f"{subject} needs {value:.3f} bits for a byte of held-out text"
    if interval is not None:
        words += f" (95\u00a0% interval {interval[0]:.3f} to {interval[1]:.3f})"
    comparisons = [_comparison(value, interval, name, row) for name, row in run.baselines.items()]
    if not comparisons:
        return f"{words}; no baseline was measured beside it."
    return f"{words}: {' and '.join(comparisons)}."


def figure_words(row: dict[str, Any]) -> str:
    """A figure with its 95 % interval, where there is one."""
    if row["value"] is None:
        return "not to be had"
    if row["interval"] is None:
        return f"{row['value']:.3f}"
    low, high = row["interval"]
    return f"{row['value']:.3f} ({low:.3f} to {high:.3f})"


def _comparison(value: float, interval: tuple[float, float] | None, name: str, row: dict[str, Any]) -> str:
    other = row["bits_per_byte"]
    if interval is not None and interval[0] <= other <= interval[1]:
        return f"no difference shown from {baseline_name(name)} ({other:.3f}, within the interval)"
    share = abs(1 - value / other)
    size = f"{share:.0%}" if share >= 0.01 else f"{share:.1%}"
    return f"{size} {'fewer' if value < other else 'more'} than {baseline_name(name)} ({other:.3f})"


def interval_of(evaluation: dict[str, Any]) -> tuple[float, float] | None:
    """The interval of bits per byte; `None` from a single document, whose resampling cannot vary."""
    found = evaluation["bits_per_byte_interval"]
    return None if found is None or evaluation["n_documents"] < 2 else (found[0], found[1])


def why_missing(run: RunFacts, name: str) -> str:
    """Why a run has no artifact of that name, in words that end a sentence."""
    if name in run.manifest["artifacts"]:
        return f"its {name} cannot be read (see Problems)"
    planned = None if run.plan is None else run.plan["steps"]
    where = "" if run.steps is None or planned is None else f" at step {run.steps:,} of {planned:,}"
    error = run.history.attempts[-1].error if run.history.attempts else None
    return {
        "finished": f"the run lists no {name}",
        "running": f"the run is still going on{where}",
        "silent": f"the run is {run.status_words}{where}; the same command goes on from there",
        "interrupted": f"the run was interrupted{where}; the same command goes on from there",
        "failed": f"the run failed{where}" + (f" ({error})" if error else ""),
    }.get(run.status, f"the run is {run.status}")


def key_figures(run: RunFacts) -> Tiles:
    """The few figures to remember."""
    tiles: list[tuple[str, str]] = []
    if run.evaluation is not None:
        value = run.evaluation["bits_per_byte"]
        tiles.append((f"{value:.3f}", "bits per byte, held out"))
        for name, row in run.baselines.items():
            tiles.append((f"{value / row['bits_per_byte']:.2f} ×", f"the bits of {baseline_name(name)}"))
    known = [(name, row["value"]) for name, row in run.figures.items() if row["value"] is not None]
    tiles += [(f"{value:.3f}", f"{name}, held out") for name, value in known[:3]]
    model = run.parts.get("model")
    n_params = model.facts["n_params"] if model else (run.plan or {}).get("n_params")
    if n_params:
        tiles.append((format_count(n_params), "parameters"))
    if model:
        tiles.append((format_count(model.facts["tokens"]), "training tokens"))
        cores = run.manifest["provenance"]["machine"]["cores"]
        device = model.facts["derived"].get("train.device", "cpu")
        where = f"on {cores} CPU core{'s' * (cores != 1)}" if device == "cpu" else f"on {device}"
        tiles.append((format_seconds(model.facts["train_seconds"]), f"in the training loop, {where}"))
    elif run.steps is not None:
        tiles.append((f"{run.steps:,}", "steps done"))
    return Tiles(tiles)


# ---------------------------------------------------------------- result


def result_section(runs: Sequence[RunFacts]) -> Section:
    """The models beside the baselines, one table for each held-out text."""
    blocks: list[Block] = []
    groups: dict[str | None, list[RunFacts]] = {}
    for run in runs:
        if run.figures:
            blocks.extend(_figures(run, runs))
            continue
        if run.evaluation is None:
            blocks.append(Notice(f"{of_run(run, runs)}No evaluation: {why_missing(run, 'evaluation')}."))
        if run.evaluation is not None or run.baselines:
            groups.setdefault(run.digest("corpus"), []).append(run)
        if not run.baselines:
            blocks.append(Notice(f"{of_run(run, runs)}No baselines: {_why_no_baselines(run)}."))
    if len(groups) > 1:
        words = "These runs were evaluated on different held-out texts. Figures of different tables cannot be compared."
        blocks.append(Notice(words, "warn"))
    for number, group in enumerate(groups.values()):
        if len(groups) > 1:
            blocks.append(Heading("Held-out text of " + ", ".join(run.label for run in group)))
        blocks.append(_result_table(group, runs))
        blocks.append(_bars(group, runs, number))
        blocks.extend(_result_notes(group, runs))
    return Section("result", "Result", blocks)


def _figures(run: RunFacts, runs: Sequence[RunFacts]) -> Iterator[Block]:
    """Each metric of the run's loss on all held-out rows."""
    columns = [Column(run_title(run, runs)), Column("held out", "number"), Column("95\u00a0% interval", "number")]
    rows = []
    for name, row in run.figures.items():
        low, high = row["interval"] or (None, None)
        rows.append(
            [
                name,
                "—" if row["value"] is None else f"{row['value']:.4f}",
                "none: it cannot vary" if low is None else f"{low:.4f} – {high:.4f}",
                f"{row['n']:,g}",
            ]
        )
    yield Table([*columns, Column("over", "number")], rows)
    yield Text(
        "All held-out rows, dropout off. The interval resamples whole sources (percentile bootstrap; Wilson's where all rows are "
        "right, or none): the rows of one file of code are a source, any other row is one. "
        "The last column counts what a figure is over: targets, or examples.",
        is_aside=True,
    )
    for row in run.figures.values():
        yield from confusion_blocks(row["details"], run_title(run, runs))


def _why_no_baselines(run: RunFacts) -> str:
    if not run.manifest["config"]["eval"]["baselines"]:
        return "eval.baselines is empty"
    return why_missing(run, "baselines")


def of_run(run: RunFacts, runs: Sequence[RunFacts]) -> str:
    """Whose a sentence is, where there are several runs."""
    return "" if len(runs) == 1 else f"{run.label}: "


def _baselines_of(group: Sequence[RunFacts]) -> dict[str, dict[str, Any]]:
    """The baselines of runs on the same held-out bytes: the same figures, whoever measured them."""
    return {name: row for run in reversed(group) for name, row in run.baselines.items()}


def _result_table(group: Sequence[RunFacts], runs: Sequence[RunFacts]) -> Table:
    scored = [run for run in group if run.evaluation is not None]
    columns = [Column(""), Column("bits per byte", "number"), Column("95 % interval", "number")]
    columns += [Column(f"{run.label} ÷ this", "number") for run in scored]
    columns += [
        Column("perplexity per token", "number"),
        Column("held-out bytes", "number"),
        Column("documents", "number"),
    ]
    rows = []
    for run in scored:
        figures = run.evaluation or {}
        interval = interval_of(figures)
        rows.append(
            [
                run_title(run, runs),
                f"{figures['bits_per_byte']:.3f}",
                "none: one document" if interval is None else f"{interval[0]:.3f} – {interval[1]:.3f}",
                *_ratios(scored, figures["bits_per_byte"]),
                f"{figures['perplexity']:,.2f}",
                f"{figures['n_bytes']:,}",
                f"{figures['n_documents']:,}",
            ]
        )
    for name, row in _baselines_of(group).items():
        value = row["bits_per_byte"]
        ratios = _ratios(scored, value)
        rows.append([baseline_name(name), f"{value:.3f}", "—", *ratios, "—", f"{row['n_bytes']:,}", "—"])
    return Table(columns, rows, strong=frozenset(range(len(scored))))


def _ratios(scored: Sequence[RunFacts], value: float) -> list[str]:
    return [f"{(run.evaluation or {})['bits_per_byte'] / value:.3f}" for run in scored]


def _result_notes(group: Sequence[RunFacts], runs: Sequence[RunFacts]) -> Iterator[Block]:
    scored = [run for run in group if run.evaluation is not None]
    if not scored:
        return
    yield Text(
        "Bits per byte are over the raw bytes of the held-out documents, all of them. "
        "The interval resamples whole documents (percentile bootstrap); a compressor's figure on these bytes is exact. "
        "Perplexity depends on the tokenizer and has no like among compressors.",
        is_aside=True,
    )
    perplexities = [f"{of_run(run, runs)}{_perplexity(run)}" for run in scored if interval_of(run.evaluation or {})]
    if perplexities:
        yield Text(f"Perplexity with its 95\u00a0% interval: {'; '.join(perplexities)}.", is_aside=True)
    settings = {run.label: _scoring(run) for run in scored}
    if len(set(settings.values())) == 1:
        yield Text(next(iter(settings.values())), is_aside=True)
    else:
        words = "These models were not scored in the same way. " + " ".join(f"{k}: {v}" for k, v in settings.items())
        yield Notice(words, "warn")
    if len({run.digest("tokenizer") for run in scored}) > 1:
        yield Notice("These models have different tokenizers: their perplexities cannot be compared.", "warn")


def _perplexity(run: RunFacts) -> str:
    figures = run.evaluation or {}
    low, high = figures["perplexity_interval"]
    return f"{figures['perplexity']:,.2f} ({low:,.2f} to {high:,.2f})"


def _scoring(run: RunFacts) -> str:
    figures = run.evaluation or {}
    stride = run.scored_by["stride_fraction"]
    return (
        f"Every token scored once, in windows of {figures['context_tokens']:,} tokens of which the last {stride:.0%} count; "
        f"weights in {figures['dtype']}."
    )


def _bars(group: Sequence[RunFacts], runs: Sequence[RunFacts], number: int) -> Plot:
    name = "bits-per-byte" + (f"-{number + 1}" if number else "")
    data = bars_data(group, runs)
    said = ", ".join(f"{bar.label} {bar.text}" for bar in data.bars)
    caption = "Bits per byte on the held-out text; less is better. The thin mark is the model's 95\u00a0% interval."
    if not any(bar.interval for bar in data.bars):
        caption = "Bits per byte on the held-out text; less is better."
    return plot(name, draw_bars, data, f"Bars of bits per byte: {said}", caption)


def bars_data(group: Sequence[RunFacts], runs: Sequence[RunFacts]) -> BarsData:
    """Bits per byte of each model and each baseline."""
    bars = [
        Bar(run_title(run, runs), run.evaluation["bits_per_byte"], f"{run.evaluation['bits_per_byte']:.3f}",
            list(runs).index(run), interval_of(run.evaluation))
        for run in group
        if run.evaluation is not None
    ]  # fmt: skip
    bars += [
        Bar(baseline_name(name), row["bits_per_byte"], f"{row['bits_per_byte']:.3f}")
        for name, row in _baselines_of(group).items()
    ]
    return BarsData("bits per byte", bars)


def plot(name: str, draw: Draw, data: Any, alt: str, caption: str) -> Plot:
    """A figure in both its widths."""
    wide, narrow = (draw_svg(name, draw, data, is_narrow=is_narrow) for is_narrow in (False, True))
    return Plot(name, wide, narrow, alt, caption)
