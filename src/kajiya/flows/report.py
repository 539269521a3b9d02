"""The report: one self-contained HTML file, the same as Markdown, all from manifests and the files that they list."""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from kajiya.errors import StoreError
from kajiya.flows.figure_files import (
    DARK,
    LIGHT,
    Draw,
    css_of,
    css_variables,
    draw_png,
    fill_in,
    require_figures,
    standalone_svg,
)
from kajiya.flows.figures import BarsData, CurvesData, draw_bars, draw_curves
from kajiya.flows.report_certificates import certificates_section
from kajiya.flows.report_comparison import comparison_section, cost_section
from kajiya.flows.report_course import asked_section, data_section, plan_section, time_section
from kajiya.flows.report_evidence import curves_data, curves_section, documents_section, samples_section
from kajiya.flows.report_facts import RunFacts, gather, label_of
from kajiya.flows.report_page import (
    Block,
    Details,
    Heading,
    Notice,
    Page,
    Plot,
    Section,
    Text,
    render_html,
    render_markdown,
)
from kajiya.flows.report_results import bars_data, key_figures, result_section, run_title, verdict
from kajiya.flows.report_settings import (
    attempts_section,
    checks_section,
    config_section,
    derived_section,
    environment_section,
    lineage_section,
    moment,
    problems_section,
    recipe_text,
    skipped_checks,
)
from kajiya.flows.report_tasks import Scored, find_scored, scored_runs, tasks_section
from kajiya.flows.targets import find_model, is_endpoint
from kajiya.run.folder import Run, find_run
from kajiya.run.store import Artifact, Store

_LIGHT_EXTRA = "--well: #f5f6f8; --bad: #c4302b; --warn: #b26a00;"
_DARK_EXTRA = "--well: #1d2127; --bad: #ff8078; --warn: #f0b455;"


def report_targets(targets: Sequence[str], store: Store, folder: Path | None = None) -> Path:
    """Report on runs, and on any other models that the store holds evaluations of (folders, artifacts, hub names, endpoints).

    The folder is that of the run, of one alone, else `report`. Raises `StoreError` for a target that is neither.
    """
    runs: list[Run] = []
    others: list[tuple[str, Artifact | None]] = []
    for target in targets:
        run, model = _run_or_model(target, store)
        if run is None:
            others.append((target, model))
        else:
            runs.append(run)
    letters = [label_of(len(runs) + number, len(targets)) for number in range(len(others))]
    scored = [find_scored(*each, store, label) for each, label in zip(others, letters, strict=True)]
    is_one_run = len(runs) == 1 and not others
    return write_report(runs, folder or (runs[0].folder / "report" if is_one_run else Path("report")), scored)


def _run_or_model(target: str, store: Store) -> tuple[Run | None, Artifact | None]:
    """The run of that name, or the model that is no run's; neither for an endpoint."""
    try:
        return find_run(store, target), None
    except StoreError:
        if is_endpoint(target):
            return None, None
        found = find_model(target, store)
        return found.run, found.model


def write_report(runs: Sequence[Run], folder: Path, others: Sequence[Scored] = ()) -> Path:
    """Write `report.html`, `report.md`, the figures of the latter and a recipe for each run into `folder`.

    `others` are models that are no run's; what they were evaluated on is compared with what the runs were.
    Each file is written beside and renamed, the HTML last; other files of the folder are left alone. Returns the HTML's path.
    What a run lacks (an evaluation, samples, a plan) is said in the report. Raises `StoreError` for a run whose manifest
    cannot be read, `MissingExtraError` without matplotlib and seaborn.
    """
    require_figures()
    if not runs and not others:
        raise StoreError("A report needs at least one run, or a model that was evaluated.")
    facts = gather(runs, len(others))
    recipes = {run.label: "recipe.yaml" if len(facts) == 1 else f"recipe-{run.label}.yaml" for run in facts}
    page = build_page(facts, recipes, others) if facts else _page_of_results(others)
    folder.mkdir(parents=True, exist_ok=True)
    for run in facts:
        _write(folder / recipes[run.label], recipe_text(run).encode())
    return write_page(page, folder)


def write_page(page: Page, folder: Path) -> Path:
    """Write a page as `report.html`, the HTML last, as `report.md`, and the figures of the latter; returns the HTML's path."""
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    files: dict[str, tuple[str, str]] = {}
    for plot in _plots(page):
        files[plot.name] = (f"figures/{plot.name}.svg", f"figures/{plot.name}-dark.svg")
        for name, palette in zip(files[plot.name], (LIGHT, DARK), strict=True):
            _write(folder / name, standalone_svg(plot.wide, palette).encode())
    _write(folder / "report.md", render_markdown(page, files).encode())
    html = fill_in(render_html(page, _variables()), css_variables())
    _write(folder / "report.html", html.encode())
    return folder / "report.html"


def save_figure_files(run: Run, folder: Path) -> list[Path]:
    """Write the loss curves and the bars of bits per byte as PNG, for light and for dark pages, into `folder`.

    Returns the files; what a run has no data for has none.
    """
    facts = gather([run])
    drawn: list[tuple[str, Draw, CurvesData | BarsData]] = []
    if facts[0].history.curves:
        drawn.append(("curves", draw_curves, curves_data(facts)))
    if facts[0].evaluation is not None or facts[0].baselines:
        drawn.append(("bits-per-byte", draw_bars, bars_data(facts, facts)))
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, draw, data in drawn:
        for suffix, palette in (("", LIGHT), ("-dark", DARK)):
            _write(folder / f"{name}{suffix}.png", draw_png(draw, data, palette))
            written.append(folder / f"{name}{suffix}.png")
    return written


def _page_of_results(scored: Sequence[Scored]) -> Page:
    """What is to be said of models that are no run's: their tasks."""
    section = tasks_section(scored)
    assert section is not None, "a model without results is refused where it is looked for"
    names = [each.title for each in scored]
    words = [block.text for block in section.blocks if isinstance(block, Text) and not block.is_aside]
    return Page(
        title="Evaluations",
        status="finished",
        status_words=f"{len(scored)} model{'s' * (len(scored) > 1)}",
        subtitle=", ".join(names),
        verdict=words,
        blocks=[],
        sections=[section],
        footer=_footer(),
    )


def _footer() -> str:
    now = moment(time.time())
    return f"Written by Kajiya on {now}, from the manifests of the store and the files that they list."


def build_page(runs: Sequence[RunFacts], recipes: dict[str, str], others: Sequence[Scored] = ()) -> Page:
    """The report as blocks, in their order."""
    # Documents and samples are those of models that write text.
    writing = [run for run in runs if not run.figures]
    wanted: list[tuple[str, str, Callable[[], Section | None]]] = [
        ("problems", "Problems", lambda: problems_section(runs)),
        ("asked", "What was asked", lambda: asked_section(runs, recipes)),
        ("result", "Result", lambda: result_section(runs)),
        ("comparison", "Paired comparison", lambda: comparison_section(runs)),
        ("tasks", "Tasks", lambda: tasks_section([*scored_runs(runs, with_text=bool(others)), *others])),
        ("certificates", "Certificates of merges", lambda: certificates_section(runs)),
        ("curves", "Loss", lambda: curves_section(runs)),
        ("documents", "Held-out documents", lambda: documents_section(writing) if writing else None),
        ("data", "Data ledger", lambda: data_section(runs)),
        ("plan", "The plan and what happened", lambda: plan_section(runs)),
        ("samples", "Samples", lambda: samples_section(writing) if writing else None),
        ("time", "Time", lambda: time_section(runs)),
        ("cost", "Cost", lambda: cost_section(runs)),
        ("derived", "Derived values", lambda: derived_section(runs)),
        ("config", "Config", lambda: config_section(runs)),
        ("lineage", "Artifacts", lambda: lineage_section(runs)),
        ("environment", "Environment", lambda: environment_section(runs)),
        ("attempts", "Attempts", lambda: attempts_section(runs)),
        ("checks", "Checks and warnings", lambda: checks_section(runs)),
    ]
    sections = [_unless_older(*each) for each in wanted]
    top: list[Block] = [notice for run in runs for notice in skipped_checks(run, runs)]
    for run in runs:
        if len(runs) > 1:
            top.append(Heading(run_title(run, runs)))
        top.append(key_figures(run))
    statuses = Counter(run.status for run in runs)
    created = sorted(run.manifest["created"] for run in runs)
    when = moment(created[0]) if len(runs) == 1 else f"{moment(created[0])} to {moment(created[-1])}"
    names = list(dict.fromkeys(str(run.manifest["config"]["name"]) for run in runs))
    return Page(
        title=", ".join(names),
        status=runs[0].status if len(statuses) == 1 else "mixed",
        status_words=", ".join(f"{n} {each}" for each, n in statuses.items())
        if len(runs) > 1
        else runs[0].status_words,
        subtitle=f"{', '.join(run.id for run in runs)} · begun {when}",
        verdict=[*_paired_verdicts(sections), *(verdict(run, runs) for run in runs)],
        blocks=top,
        sections=[section for section in sections if section is not None],
        footer=_footer(),
    )


def _paired_verdicts(sections: Sequence[Section | None]) -> list[str]:
    """What the paired comparison says, to stand above all."""
    found = [section for section in sections if section is not None and section.id == "comparison"]
    return [
        block.text for section in found for block in section.blocks if isinstance(block, Text) and not block.is_aside
    ]


def _unless_older(name: str, title: str, make: Callable[[], Section | None]) -> Section | None:
    """The section; for manifests of an older Kajiya, which lack a field that it reads, a notice that says so in its place."""
    try:
        return make()
    except KeyError as problem:
        words = (
            f"Not written: a manifest has no field {problem}; it was made by another version of Kajiya. "
            "Run the same command again to have it made anew."
        )
        return Section(name, title, [Notice(words, "warn")])


def _plots(page: Page) -> Iterator[Plot]:
    def within(blocks: Sequence[Block]) -> Iterator[Plot]:
        for block in blocks:
            if isinstance(block, Plot):
                yield block
            elif isinstance(block, Details):
                yield from within(block.blocks)

    for section in page.sections:
        yield from within(section.blocks)


def _variables() -> str:
    light, dark = css_of(LIGHT) + " " + _LIGHT_EXTRA, css_of(DARK) + " " + _DARK_EXTRA
    return (
        f":root {{ {light} }}\n"
        f"@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n"
        f"@media print {{ :root {{ {light} }} html {{ color-scheme: light; }} }}"
    )


def _write(path: Path, content: bytes) -> None:
    """All of the file or what was there before. The folder is the user's: it is never replaced as a whole."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_bytes(content)
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
