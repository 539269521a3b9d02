"""The command line: one thin verb per stage; everything heavy is imported inside the verb that needs it."""

import contextlib
import errno
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core

from kajiya.errors import ConfigError, KajiyaError
from kajiya.run.process import import_faster, load_torch_ahead, quiet_torchao
from kajiya.verbs.options import ConfigDir, Json, Overrides, Recipe, StoreOption
from kajiya.verbs.runs import diff, replay, runs, show, sync
from kajiya.verbs.speaking import is_first_rank, open_console, print_json, typed_command
from kajiya.verbs.store import store_app

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from rich.console import Console

    from kajiya.config.schema import Config, ServeConfig
    from kajiya.evals.results import TaskResult
    from kajiya.flows.targets import Target
    from kajiya.flows.task_evaluation import Asked
    from kajiya.flows.train import Trained
    from kajiya.run.store import Artifact

_UNUSABLE_PLACE = frozenset(
    {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOSPC, errno.EDQUOT}
)
"""What the system says of a file or folder that the user, not we, can mend."""
_WITH_TORCH = frozenset({"demo", "train", "tune", "plan", "prove", "eval", "serve", "generate", "chat", "merge"})
"""Verbs that will want torch."""


class _Verbs(typer.core.TyperGroup):
    """Every verb: SIGTERM, like Ctrl-C, ends it in order, with exit status 0 and the words how to go on."""

    def invoke(self, ctx: Any) -> Any:
        from kajiya.flows.stopping import sigterm_as_interrupt

        try:
            with sigterm_as_interrupt():
                return super().invoke(ctx)
        except KeyboardInterrupt:
            from kajiya.screen import say_interrupted

            say_interrupted(open_console(to_stderr=True), typed_command())
            raise typer.Exit(0) from None


app = typer.Typer(
    name="kajiya",
    cls=_Verbs,
    help="A model's whole life with one typed config and one command line.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    epilog="Any verb takes --debug for tracebacks. Settings are written key=value: kajiya train stdlib-pretrain optim.lr=1e-3",
)
config_app = typer.Typer(help="The composed config, its schema, the recipes.", no_args_is_help=True)
app.add_typer(config_app, name="config")
app.add_typer(store_app, name="store")

DEFAULT_RECIPE = "stdlib-pretrain"


@app.command()
def demo(
    overrides: Overrides = None,
    minutes: Annotated[float, typer.Option(help="Time for the whole demo but the serving, minutes.", min=1.0)] = 4.0,
    serve: Annotated[bool, typer.Option("--serve/--no-serve", help="Serve the model at the end.")] = True,
    store: StoreOption = None,
    as_json: Json = False,
) -> None:
    """The whole life of a small model, on the Python standard library, in minutes."""
    from kajiya.flows.demo import demo_config

    config = demo_config(minutes, overrides or [])
    if serve:
        from kajiya.serving.listen import require_address

        require_address(config.serve.host, config.serve.port)  # said now, not after the minutes of training
    console = open_console(to_stderr=as_json)
    console.print(
        f"[bold]Kajiya demo[/bold]: a language model of Python code, from scratch, in about {minutes:g} minutes."
    )
    trained = _train(config, store, console)
    if as_json:
        _print_run(trained)
    if trained.model is not None and serve:
        _serve(config, trained.model, config.name, store, console)


@app.command()
def train(
    recipe: Recipe,
    overrides: Overrides = None,
    multirun: Annotated[
        bool, typer.Option("--multirun", "-m", help="Every combination of a=1,2 b=x,y, each a run of its own.")
    ] = False,
    find_lr: Annotated[
        bool, typer.Option("--find-lr", help="Only look for a learning rate: rising rates, a plot, a suggestion.")
    ] = False,
    config_dir: ConfigDir = None,
    store: StoreOption = None,
    as_json: Json = False,
) -> None:
    """Train a recipe, evaluate the model, write the report. The same command goes on where it was interrupted."""
    from kajiya.config.compose import compose

    if multirun:
        _multirun(recipe, overrides or [], config_dir, store, as_json)
        return
    if find_lr:
        _find_lr(compose(recipe, overrides or [], config_dir), store, as_json)
        return
    trained = _train(compose(recipe, overrides or [], config_dir), store, open_console(to_stderr=as_json))
    if as_json:
        _print_run(trained)


@app.command()
def tune(
    recipe: Recipe,
    overrides: Overrides = None,
    wandb_sweep: Annotated[Path | None, typer.Option(help="A W&B sweep file, read as it is.")] = None,
    config_dir: ConfigDir = None,
    store: StoreOption = None,
    as_json: Json = False,
) -> None:
    """Search over settings: 'optim.lr=tag(log,interval(1e-4,1e-2))' 'model.n_layers=choice(4,6,8)' tune.trials=40."""
    from kajiya.config.wandb_sweep import read_wandb_sweep
    from kajiya.flows.tune import tune as tune_flow
    from kajiya.run.store import default_store
    from kajiya.screen import Screen

    console = open_console(to_stderr=as_json)
    swept, notes = read_wandb_sweep(wandb_sweep) if wandb_sweep else ([], [])
    for note in notes:
        console.print(f"{wandb_sweep}: {note}", highlight=False, soft_wrap=True)
    command = ["kajiya", *sys.argv[1:]]
    with Screen(console) as screen:
        asked = [*swept, *(overrides or [])]
        tuned = tune_flow(
            recipe, asked, default_store(store), config_dir=config_dir, command=command, on_event=screen.on_event
        )
    if as_json:
        print_json({"study": tuned.run.id, "best": tuned.best, "report": tuned.report, "trials": tuned.counts})
        return
    for words, path in (("Study:  ", tuned.run.folder), ("Best:   ", tuned.best), ("Report: ", tuned.report)):
        console.print(f"{words}{path}", highlight=False, soft_wrap=True, markup=False)


@app.command()
def plan(
    recipe: Recipe,
    overrides: Overrides = None,
    config_dir: ConfigDir = None,
    store: StoreOption = None,
    as_json: Json = False,
) -> None:
    """Parameters, tokens, time and memory of a recipe, measured by a few steps, without training it."""
    from kajiya.config.compose import compose
    from kajiya.flows.plan import plan_recipe

    _show_facts(plan_recipe, compose(recipe, overrides or [], config_dir), store, as_json)


@app.command()
def prove(
    recipe: Recipe,
    overrides: Overrides = None,
    config_dir: ConfigDir = None,
    store: StoreOption = None,
    as_json: Json = False,
) -> None:
    """Check before a step is spent: targets, isolation, accumulation, what trains and is saved, learning, memory."""
    from kajiya.config.compose import compose
    from kajiya.flows.plan import prove_recipe

    _show_facts(prove_recipe, compose(recipe, overrides or [], config_dir), store, as_json)


@app.command()
def preview(
    recipe: Recipe,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(help="Rows to show.", min=1)] = 2,
    split: Annotated[str, typer.Option(help="train, in the order of the training; or heldout.")] = "train",
    row: Annotated[int, typer.Option(help="Number of the first row shown, from 0.", min=0)] = 0,
    seed: Annotated[int | None, typer.Option(help="Another order of the rows than the recipe's.", min=0)] = None,
    ids: Annotated[bool, typer.Option("--ids", help="Each token's id behind it.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write a self-contained page to this file, too.")] = None,
    config_dir: ConfigDir = None,
    store: StoreOption = None,
    as_json: Json = False,
) -> None:
    """Rows as they are trained on: targets coloured, special tokens and boundaries visible; and the ledger of all rows."""
    from kajiya.config.compose import compose
    from kajiya.flows.preview import Wanted, preview_recipe, write_preview_page
    from kajiya.flows.preview_text import preview_text, print_preview
    from kajiya.run.store import default_store
    from kajiya.screen import Screen

    wanted = Wanted(rows=rows, split=split, first=row, seed=seed)
    with Screen(open_console(to_stderr=True)) as screen:
        config = compose(recipe, overrides or [], config_dir)
        shown = preview_recipe(config, default_store(store), wanted, screen.on_event)
    if html is not None:
        write_preview_page(shown, html)
    console = open_console()
    if as_json:
        print_json(shown.facts())
    elif console.is_terminal:
        print_preview(console, shown, ids)
    else:
        sys.stdout.write(preview_text(shown, ids))


@app.command("eval")
def evaluate(
    target: Annotated[
        str,
        typer.Argument(
            help="A run (id, beginning of it, latest), an artifact, a folder, a hub name, or an API's address (http://host/v1)."
        ),
    ],
    overrides: Overrides = None,
    data: Annotated[
        str | None, typer.Option(help="Recipe whose held-out text is scored; else the run's own, or stdlib-pretrain's.")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks, joined by commas: packaged names, paths of YAML files, lm-eval:NAME.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Most rows of each task.", min=1)] = None,
    show_errors: Annotated[
        bool, typer.Option("--show-errors", help="Show rows without full marks (of text, documents), worst first.")
    ] = False,
    n_errors: Annotated[int, typer.Option(help="Most of these rows that are shown.", min=1)] = 10,
    metric: Annotated[str | None, typer.Option(help="Metric by which these rows are the worst.")] = None,
    model_name: Annotated[str | None, typer.Option(help="Model behind an endpoint; else the first it serves.")] = None,
    api_key: Annotated[str | None, typer.Option(help="Key that an endpoint wants.")] = None,
    config_dir: ConfigDir = None,
    store: StoreOption = None,
    as_json: Json = False,
) -> None:
    """Bits per byte and perplexity on held-out text, beside compressors on the same bytes; or --tasks, each with intervals.

    The model of a run that writes no text (a classifier, say), or has rows of another kind (chats, say), is judged on its run's
    held-out rows."""
    from kajiya.flows.evaluate import heldout_config
    from kajiya.flows.task_evaluation import Asked
    from kajiya.run.store import default_store

    shown = Shown(show_errors or metric is not None, metric, as_json, n_errors)
    _refuse_unread(target, tasks, {"--limit": limit, "--model-name": model_name, "--api-key": api_key})
    if tasks is not None:
        asked = Asked(target, [name.strip() for name in tasks.split(",")], limit, model_name, api_key)
        config = heldout_config(target, data, overrides or [], default_store(store), config_dir, for_tasks=True)
        _evaluate_tasks(asked, config, store, shown)
        return
    from kajiya.flows.evaluate import evaluate as evaluate_flow
    from kajiya.listings import evaluation_table, print_table
    from kajiya.screen import Screen

    console = open_console(to_stderr=as_json)
    with Screen(console) as screen:
        config = heldout_config(target, data, overrides or [], default_store(store), config_dir)
        evaluation, baselines = evaluate_flow(
            target,
            config,
            default_store(store),
            model_name=model_name,
            api_key=api_key,
            on_event=screen.on_event,
        )
    from kajiya.evals.results import TaskResult, text_result

    result = (TaskResult if baselines is None else text_result)(evaluation.path, evaluation.facts)
    if as_json:
        print_json({**evaluation.facts, **(baselines.facts if baselines else {})})
    elif baselines is None:
        _show_results([result], shown)
    else:
        print_table(console, evaluation_table(evaluation.facts, baselines.facts))
    _show_errors([result], shown)


@app.command()
def report(
    runs: Annotated[
        list[str],
        typer.Argument(
            help="Runs (ids, beginnings of them, folders, latest), and any models or endpoints that were evaluated; or one study."
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="Folder for report.html and report.md.")] = None,
    store: StoreOption = None,
    as_json: Json = False,
) -> None:
    """Write one self-contained HTML page, and Markdown, about one run or several, and other models' results beside them."""
    from kajiya.flows.report import report_targets
    from kajiya.flows.tune_report import report_study
    from kajiya.run.folder import find_study
    from kajiya.run.store import default_store

    studies = [study for name in runs if (study := find_study(default_store(store), name)) is not None]
    if studies and len(runs) > 1:
        raise ConfigError(studies[0].id, "is a study, whose report is its own", "Report it alone.")
    page = report_study(studies[0], out) if studies else report_targets(runs, default_store(store), out)
    if as_json:
        print_json({"report": page})
    else:
        open_console().print(str(page), soft_wrap=True, highlight=False)


@app.command()
def shift(
    first: Annotated[
        str, typer.Argument(help="A file or glob (jsonl, csv, parquet, txt), RUN, RUN:heldout, RUN:task/NAME.")
    ],
    second: Annotated[str, typer.Argument(help="The same of the other side.")],
    key: Annotated[list[str] | None, typer.Option(help="Column whose text counts; else all texts of a row.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Model whose embeddings are mapped: a run, artifact, folder.")
    ] = None,
    map_: Annotated[str, typer.Option("--map", help="Kind of the map: pca, umap.")] = "pca",
    limit: Annotated[int, typer.Option(help="Most rows of each side, spread evenly.", min=5)] = 2000,
    out: Annotated[Path, typer.Option(help="Folder for report.html and report.md.")] = Path("shift"),
    store: StoreOption = None,
    as_json: Json = False,
) -> None:
    """How far two data sets, or two models' outputs, lie apart: Wasserstein, KS, PSI, maps of embeddings."""
    from kajiya.flows.shift import ShiftAsked, compare_samples
    from kajiya.listings import print_table, shift_table
    from kajiya.run.store import default_store
    from kajiya.screen import Screen

    asked = ShiftAsked(first, second, tuple(key or ()), model, map_, limit)
    console = open_console(to_stderr=as_json)
    with Screen(console) as screen:
        facts = compare_samples(asked, default_store(store), out, screen.on_event)
    if as_json:
        print_json(facts)
        return
    print_table(console, shift_table(facts))
    console.print(f"Report: {facts['report']}", highlight=False, soft_wrap=True, markup=False)


@app.command()
def serve(
    target: Annotated[
        str, typer.Argument(help="A run (id, beginning of it, latest), an artifact, a folder, or a hub name.")
    ],
    overrides: Overrides = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on (serve.host).")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 takes a free one (serve.port).")] = None,
    api_key: Annotated[
        str | None, typer.Option(help="Key that requests must carry, or @FILE with one a line (serve.api_key).")
    ] = None,
    engine: Annotated[str | None, typer.Option(help="torch or vllm (serve.engine).")] = None,
    store: StoreOption = None,
) -> None:
    """Serve a model behind the OpenAI API, with a playground page."""
    from dataclasses import replace

    from kajiya.config.compose import compose
    from kajiya.config.validate import validate
    from kajiya.flows.targets import find_model, with_folders
    from kajiya.run.store import default_store

    if api_key == "":
        raise ConfigError("serve.api_key", "is empty", "Give a key, or leave --api-key out to serve without one.")
    flags: dict[str, Any] = {"host": host, "port": port, "api_key": api_key, "engine": engine}
    config = compose(DEFAULT_RECIPE, overrides or [])
    given = {name: value for name, value in flags.items() if value is not None}
    config = replace(config, serve=replace(config.serve, **given))
    validate(config)
    found = find_model(target, default_store(store))
    config = replace(config, serve=with_folders(config.serve, default_store(store)))
    _serve(config, found.model, found.name, store, open_console())


@app.command()
def generate(
    requests: Annotated[Path, typer.Argument(help="JSON lines: each what the API takes, with prompt or messages.")],
    target: Annotated[str, typer.Option("--model", help="A run, an artifact, a folder, or a hub name.")] = "latest",
    output: Annotated[
        Path | None, typer.Option(help="Where answers go; what is there already is not asked again.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="A setting, for example serve.quantize=int8.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer where a line does not say, tokens.", min=0)] = 256,
    temperature: Annotated[float, typer.Option(help="Where a line does not say; 0 is greedy.", min=0.0, max=2.0)] = 0.0,
    store: StoreOption = None,
) -> None:
    """Answer a file of requests offline, batched; run it again to go on where it was."""
    from dataclasses import replace

    from kajiya.serving.batch import Answerer, answer_all, read_tasks

    engine, tokenizer, found, cfg = _engine(target, overrides, store)
    tasks = read_tasks(requests, found.name, set(engine.adapters), temperature)
    answerer = Answerer(found.name, engine, tokenizer, replace(cfg, default_max_tokens=max_tokens), found.model.digest)
    to = output or requests.with_suffix(".answers.jsonl")
    console = open_console(to_stderr=True)
    console.print(f"Engine: {engine.facts.note}", soft_wrap=True, markup=False)
    with console.status("") as status:
        n_new = answer_all(answerer, tasks, to, lambda done, of: status.update(f"{done} of {of}"))
    console.print(f"{n_new} answered now, {len(tasks)} in all: {to}", soft_wrap=True, highlight=False)


@app.command()
def chat(
    target: Annotated[str, typer.Argument(help="A run, an artifact, a folder, or a hub name.")],
    overrides: Overrides = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer, tokens.", min=1)] = 512,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0.0)] = 0.7,
    top_p: Annotated[
        float, typer.Option(help="Smallest mass of most probable tokens to draw from; 0: the first.", min=0.0, max=1.0)
    ] = 1.0,
    store: StoreOption = None,
) -> None:
    """Talk to a model in the terminal. /reset begins anew, /exit ends, Ctrl-C ends an answer."""
    from kajiya.serving.conversation import Conversation, converse
    from kajiya.serving.sequence import SamplingParams

    engine, tokenizer, found, _ = _engine(target, overrides, store)
    # No mass at all: the most probable token is the smallest set that reaches it.
    params = SamplingParams(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p or 1.0, top_k=None if top_p else 1
    )

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    with contextlib.suppress(ImportError):  # not on every platform
        import readline  # noqa: F401  the line can be edited, and the questions before come back with ↑

    write(f"{found.name}: {engine.facts.note}. /reset begins anew, /exit ends.\n")
    converse(Conversation(engine, tokenizer, params, system), lambda: input("> "), write)


@app.command()
def merge(
    targets: Annotated[
        list[str], typer.Argument(help="A run or folder with an adapter; or several models to make into one.")
    ],
    into: Annotated[
        str | None, typer.Option(help="fp32, bf16 or fp16; else as the base, or the first model, is stored.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="The base, where it is not found or not named.")] = None,
    method: Annotated[str, typer.Option(help="Of several models: linear, slerp, ties, dare.")] = "linear",
    weights: Annotated[str | None, typer.Option(help="Of several models: 0.7,0.3; else equal.")] = None,
    density: Annotated[
        float, typer.Option(help="ties, dare: share of each difference that is kept.", min=0.001, max=1)
    ] = 0.2,
    scale: Annotated[float, typer.Option(help="ties, dare: factor of the joint difference.")] = 1.0,
    seed: Annotated[int, typer.Option(help="dare: of what is kept.")] = 0,
    data: Annotated[
        str | None, typer.Option(help="Recipe whose held-out text is compared on; else the run's own.")
    ] = None,
    config_dir: ConfigDir = None,
    store: StoreOption = None,
    as_json: Json = False,
) -> None:
    """Add an adapter to its base, or make one model of several; certified beside what it came from."""
    from kajiya.flows.merge import Joining, merge_targets
    from kajiya.listings import merge_lines
    from kajiya.run.store import default_store

    joining = Joining(method, weights, density, scale, seed)
    model, certificate = merge_targets(
        targets, default_store(store), into=into, base=base, joining=joining, recipe=data, config_dir=config_dir
    )
    if as_json:
        print_json({"path": str(model.path), "digest": model.digest, "certificate": certificate.facts})
        return
    for line in merge_lines(certificate.facts):
        open_console().print(line, highlight=False)
    open_console().print(str(model.path), soft_wrap=True, highlight=False)


for verb in (runs, show, diff, replay, sync):
    app.command()(verb)


@app.command()
def ui(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 5000,
    store: StoreOption = None,
) -> None:
    """MLflow's own UI over the local store."""
    from kajiya.run.store import default_store
    from kajiya.run.ui import open_ui

    open_ui(default_store(store), host, port, lambda url: open_console().print(f"MLflow UI: {url}  (Ctrl-C ends it)"))


@app.command()
def doctor(store: StoreOption = None, as_json: Json = False) -> None:
    """This machine, what is missing, and the command that mends it."""
    from kajiya.listings import show_findings
    from kajiya.preflight.doctor import diagnose
    from kajiya.run.store import default_store

    findings = diagnose(default_store(store).root)
    if as_json:
        print_json(findings)
    else:
        show_findings(open_console(), findings)


@config_app.command("show")
def config_show(
    recipe: Recipe = DEFAULT_RECIPE, overrides: Overrides = None, config_dir: ConfigDir = None, as_json: Json = False
) -> None:
    """The composed config of a recipe, every default resolved."""
    from kajiya.config.compose import compose
    from kajiya.config.digest import to_plain

    plain = to_plain(compose(recipe, overrides or [], config_dir))
    if as_json:
        print_json(plain)
    else:
        import yaml

        sys.stdout.write(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))


@config_app.command("schema")
def config_schema() -> None:
    """JSON schema of the config, and of the options of every name in every table."""
    from kajiya.config.describe import whole_schema

    print_json(whole_schema())


@config_app.command("list")
def config_list(config_dir: ConfigDir = None, as_json: Json = False) -> None:
    """Recipes and config groups."""
    from kajiya.config.compose import list_groups, list_recipes

    facts = {"recipes": sorted(list_recipes(config_dir)), "groups": list_groups(config_dir)}
    if as_json:
        print_json(facts)
        return
    console = open_console()
    console.print("recipes: " + ", ".join(facts["recipes"]), highlight=False, soft_wrap=True)
    for group, names in list_groups(config_dir).items():
        console.print(f"{group}: " + ", ".join(names), highlight=False, soft_wrap=True)


def main() -> None:
    """Entry point: errors of the user's in one or two lines and exit 2, our own in one line and exit 1."""
    arguments = [word for word in sys.argv[1:] if word != "--debug"]
    is_debug = len(arguments) != len(sys.argv[1:])
    quiet_torchao()
    import_faster()
    if arguments[:1] and arguments[0] in _WITH_TORCH:
        load_torch_ahead()
    try:
        app(args=arguments)
    except Exception as problem:
        said = _mistake(problem)
        if is_debug:
            traceback.print_exc()
        elif said is not None:
            sys.stderr.write(f"error: {said}\n")
        else:
            sys.stderr.write(
                f"internal error: {type(problem).__name__}: {problem}\nRun it again with --debug to see where.\n"
            )
        sys.exit(1 if said is None else 2)


def _mistake(problem: Exception) -> str | None:
    """What a person is told of an error that they can mend; `None` of one of our own."""
    if isinstance(problem, KajiyaError):
        return str(problem)
    if isinstance(problem, OSError) and problem.errno in _UNUSABLE_PLACE and problem.filename is not None:
        return (
            f"{problem.filename}: {problem.strerror}\n"
            "Mend the place, or name another one with --store, or with --out, --output or --html."
        )
    return None


def _train(config: "Config", store: str | None, console: "Console") -> "Trained":
    from kajiya.flows.train import train as train_flow
    from kajiya.run.store import default_store
    from kajiya.screen import Screen, say_outcome

    with Screen(console) as screen:
        command = ["kajiya", *sys.argv[1:]]
        trained = train_flow(config, default_store(store), command=command, on_event=screen.on_event)
    say_outcome(console, trained, typed_command())
    return trained


@dataclass(frozen=True)
class Shown:
    """How evaluations are told."""

    errors: bool
    """With the rows that have no full marks."""
    metric: str | None
    as_json: bool
    n_errors: int


def _refuse_unread(target: str, tasks: str | None, given: "Mapping[str, object]") -> None:
    """Raise `ConfigError` for an option that this evaluation would not read."""
    from kajiya.flows.targets import is_endpoint

    if given["--limit"] is not None and tasks is None:
        raise ConfigError("--limit", "is the most rows of a task, and none is asked", "Add --tasks, or leave it out.")
    for name in ("--model-name", "--api-key"):
        if given[name] is not None and not is_endpoint(target):
            raise ConfigError(name, f"is for an endpoint, and {target!r} is no address of one", "Leave it out.")


def _evaluate_tasks(asked: "Asked", config: "Config", store: str | None, shown: Shown) -> None:
    from kajiya.flows.task_evaluation import evaluate_tasks
    from kajiya.run.store import default_store
    from kajiya.screen import Screen

    with Screen(open_console(to_stderr=shown.as_json)) as screen:
        results = evaluate_tasks(asked, config, default_store(store), screen.on_event)
    _show_results(results, shown)
    _show_errors(results, shown)


def _show_results(results: "Sequence[TaskResult]", shown: Shown) -> None:
    from kajiya.listings import confusion_table, print_table, task_table

    console = open_console(to_stderr=shown.as_json)
    if shown.as_json:
        print_json([dict(result.facts) for result in results])
    else:
        print_table(console, task_table([result.facts for result in results]))
        for result in results:
            for figure in result.figures.values():
                if "confusion" in figure["details"]:
                    print_table(console, confusion_table(figure["details"]))


def _show_errors(results: "Sequence[TaskResult]", shown: Shown) -> None:
    from kajiya.listings import show_misses

    for result in results if shown.errors else ():
        by = result.row_metric(shown.metric)
        show_misses(open_console(to_stderr=shown.as_json), result.task, result.misses(by), by, shown.n_errors)


def _multirun(recipe: str, overrides: list[str], config_dir: Path | None, store: str | None, as_json: bool) -> None:
    from kajiya.flows.multirun import multirun
    from kajiya.run.store import default_store
    from kajiya.screen import Screen

    console = open_console(to_stderr=as_json)
    with Screen(console) as screen:
        found = multirun(recipe, overrides, default_store(store), config_dir=config_dir, on_event=screen.on_event)
    if as_json:
        print_json(found)
    runs = [member.run for member in found if member.run and member.status == "finished"]
    console.print(f"Compare them: kajiya report {' '.join(runs)}", highlight=False, soft_wrap=True)
    if len(runs) < len(found):
        raise typer.Exit(1)


def _serve(config: "Config", model: "Artifact", name: str, store: str | None, console: "Console") -> None:
    from kajiya.run.store import default_store
    from kajiya.serving.proven import Proofs
    from kajiya.serving.server import serve as serve_model

    engines: list[str] = []

    def ready(url: str) -> None:
        console.print(
            f"[bold]Serving {name}[/bold] at {url}  (playground: {url}/, API: {url}/v1, Ctrl-C ends it)", soft_wrap=True
        )
        for note in engines:
            console.print(f"Engine: {note}", soft_wrap=True, markup=False)

    proofs = Proofs(default_store(store), model.digest)
    serve_model(config.serve, model.path, name, ready, engines.append, proofs)


def _engine(target: str, overrides: list[str] | None, store: str | None) -> tuple[Any, Any, "Target", "ServeConfig"]:
    """The engine of a model with its adapters, its tokenizer, where they are from, and the settings of `serve`."""
    from kajiya.config.compose import compose
    from kajiya.config.validate import validate
    from kajiya.data.tokenizer import load_tokenizer
    from kajiya.flows.targets import find_model, with_folders
    from kajiya.run.store import default_store
    from kajiya.serving.proven import Proofs
    from kajiya.serving.server import open_engine

    config = compose(DEFAULT_RECIPE, overrides or [])
    validate(config)
    found = find_model(target, default_store(store))
    cfg = with_folders(config.serve, default_store(store))
    engine = open_engine(cfg, found.model.path, Proofs(default_store(store), found.model.digest))
    return engine, load_tokenizer(found.model.path), found, cfg


def _show_facts(flow: "Callable[..., dict[str, Any]]", config: "Config", store: str | None, as_json: bool) -> None:
    """Run a flow that tells its facts as it goes; with `as_json`, print them too."""
    from kajiya.run.store import default_store
    from kajiya.screen import Screen

    with Screen(open_console(to_stderr=as_json)) as screen:
        facts = flow(config, default_store(store), screen.on_event)
    if as_json:
        print_json(facts)


def _find_lr(config: "Config", store: str | None, as_json: bool) -> None:
    from kajiya.flows.find_lr import find_lr
    from kajiya.run.store import default_store
    from kajiya.screen import Screen

    console = open_console(to_stderr=as_json)
    with Screen(console) as screen:
        found = find_lr(config, default_store(store), screen.on_event)
    if as_json:
        print_json(found)
        return
    console.print(f"Suggested: optim.lr={found.test.suggestion:.2g}", highlight=False)
    console.print(f"Plot:      {found.plot}", highlight=False, soft_wrap=True, markup=False)


def _print_run(trained: "Trained") -> None:
    from kajiya.run.inspect import run_facts

    if is_first_rank():
        print_json(run_facts(trained.run))
