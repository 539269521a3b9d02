"""Verbs on runs that are there: list, show, compare, repeat, and tell their events to a tracker."""

from typing import Annotated

import typer

from kajiya.verbs.options import Json, StoreOption
from kajiya.verbs.speaking import open_console, print_json


def runs(store: StoreOption = None, as_json: Json = False) -> None:
    """All runs, oldest first."""
    from kajiya.listings import print_table, runs_table
    from kajiya.run.inspect import run_rows
    from kajiya.run.store import default_store

    rows = run_rows(default_store(store))
    if as_json:
        print_json(rows)
    elif not rows:
        open_console().print("No runs yet. Begin one with: kajiya demo", highlight=False)
    else:
        print_table(open_console(), runs_table(rows))


def show(
    run: Annotated[str, typer.Argument(help="A run: its id, a beginning of it, its folder, or latest.")] = "latest",
    store: StoreOption = None,
    as_json: Json = False,
) -> None:
    """All facts of one run."""
    from kajiya.listings import show_run
    from kajiya.run.folder import find_run
    from kajiya.run.inspect import run_facts
    from kajiya.run.store import default_store

    facts = run_facts(find_run(default_store(store), run))
    if as_json:
        print_json(facts)
    else:
        show_run(open_console(), facts)


def diff(
    first: Annotated[str, typer.Argument(help="A run: its id, a beginning of it, its folder, or latest.")],
    second: Annotated[str, typer.Argument(help="The run that it is compared with.")],
    store: StoreOption = None,
    as_json: Json = False,
) -> None:
    """What differs between two runs: config, data, code, environment, metrics."""
    from kajiya.listings import diff_table, print_table
    from kajiya.run.folder import find_run
    from kajiya.run.inspect import run_diff
    from kajiya.run.store import default_store

    found = run_diff(find_run(default_store(store), first), find_run(default_store(store), second))
    if as_json:
        print_json(found)
    else:
        print_table(open_console(), diff_table(found))


def replay(
    run: Annotated[str, typer.Argument(help="A run: its id, a beginning of it, its folder, or latest.")],
    store: StoreOption = None,
    as_json: Json = False,
) -> None:
    """Run again from the manifest; says whether the result is bit-identical, within tolerance or different, and why."""
    from kajiya.flows.replay import replay as replay_flow
    from kajiya.run.folder import find_run
    from kajiya.run.store import default_store
    from kajiya.screen import Screen

    console = open_console(to_stderr=as_json)
    with Screen(console) as screen:
        found = replay_flow(find_run(default_store(store), run), screen.on_event)
    if as_json:
        print_json(found)
        return
    console.print(f"[bold]{found.verdict}[/bold]: {found.weights}", highlight=False)
    for name, (first, again) in found.metrics.items():
        console.print(f"  {name}: {first} then, {again} now", highlight=False)
    for kind, pairs in found.differs.items():
        for name, (first, again) in pairs.items():
            console.print(f"  {kind}: {name}: {first} then, {again} now", highlight=False, soft_wrap=True)
    console.print(f"The replay lies in {found.folder}", highlight=False, soft_wrap=True)


def sync(
    run: Annotated[str, typer.Argument(help="A run or study: its id, a beginning of it, its folder, or latest.")],
    trackers: Annotated[list[str], typer.Argument(help="mlflow, tensorboard, wandb, or my_pkg.mod:Class.")],
    option: Annotated[
        list[str] | None, typer.Option(help="A setting of the tracker, as name=value; else those of the run.")
    ] = None,
    store: StoreOption = None,
    as_json: Json = False,
) -> None:
    """Replay a run's event log, or those of a study and its runs, into trackers, exactly; nothing is sent twice."""
    import yaml

    from kajiya.run.folder import find_run_or_study, is_study, runs_of
    from kajiya.run.status import run_status
    from kajiya.run.store import default_store
    from kajiya.run.trackers.dispatch import replay_all
    from kajiya.run.trackers.position import load_position, position_file

    found = find_run_or_study(default_store(store), run)
    members = runs_of(found) if is_study(found) else []
    given = dict(word.partition("=")[::2] for word in option or [])
    facts = []
    for name in trackers:
        recorded = found.manifest()["config"]["track"]["options"].get(name) or {}
        options = recorded | {k: yaml.safe_load(v) for k, v in given.items()}
        replay_all([each.folder for each in (found, *members)], name, options)
        for each in (found, *members):
            position = load_position(position_file(each.folder, name))
            status = run_status(each.manifest(), each.folder)
            facts.append({"tracker": name, "run": each.id, "events": position.n_events, "status": status.word})
            if not as_json:
                words = f"{name}: {position.n_events:,} events of {each.id}, {status.words}"
                open_console().print(words, highlight=False)
    if as_json:
        print_json(facts)
