"""The verbs of `kajiya store`."""

from typing import Annotated

import typer

from kajiya.verbs.options import Json, StoreOption
from kajiya.verbs.speaking import open_console, print_json

store_app = typer.Typer(help="The artifact store: list, verify, gc, pin.", no_args_is_help=True)


@store_app.command("list")
def store_list(store: StoreOption = None, as_json: Json = False) -> None:
    """Every artifact: stage, key, size, age, who uses it."""
    from kajiya.listings import print_table, store_table
    from kajiya.run.holdings import store_rows
    from kajiya.run.store import default_store

    rows = store_rows(default_store(store))
    if as_json:
        print_json(rows)
    else:
        print_table(open_console(), store_table(rows))


@store_app.command("verify")
def store_verify(store: StoreOption = None, as_json: Json = False) -> None:
    """Check every file of every artifact against its hash; exit 1 when one is not what it was."""
    from kajiya.run.holdings import verify_store
    from kajiya.run.store import default_store

    verdicts = verify_store(default_store(store))
    broken = [verdict for verdict in verdicts if verdict.problem]
    if as_json:
        print_json(verdicts)
    else:
        for verdict in broken:
            open_console().print(f"broken: {verdict.name}: {verdict.problem}", highlight=False, soft_wrap=True)
        open_console().print(f"{len(verdicts)} artifacts, {len(broken)} broken", highlight=False)
    if broken:
        raise typer.Exit(1)


@store_app.command("gc")
def store_gc(
    delete: Annotated[bool, typer.Option("--delete", help="Really delete; otherwise only say what would go.")] = False,
    store: StoreOption = None,
    as_json: Json = False,
) -> None:
    """Artifacts that no run and no pin refers to, and what killed processes left."""
    from kajiya.config.quantities import format_bytes
    from kajiya.run.holdings import collect_garbage
    from kajiya.run.store import default_store

    garbage = collect_garbage(default_store(store), dry_run=not delete)
    if as_json:
        print_json(garbage)
        return
    names = [*garbage.artifacts, *garbage.unfinished]
    for name in names:
        open_console().print(name, highlight=False)
    said = "deleted" if garbage.is_deleted else "would go; --delete deletes them"
    left = f" ({format_bytes(garbage.unfinished_bytes)} left by killed processes)" if garbage.unfinished else ""
    open_console().print(f"{len(names)} items, {format_bytes(garbage.bytes)}{left}: {said}", highlight=False)


@store_app.command("pin")
def store_pin(
    artifact: Annotated[str, typer.Argument(help="An artifact, as `kajiya store list` names it.")],
    remove: Annotated[bool, typer.Option("--remove", help="Take the pin away.")] = False,
    store: StoreOption = None,
    as_json: Json = False,
) -> None:
    """Keep an artifact though no run refers to it."""
    from kajiya.run.holdings import pin, unpin
    from kajiya.run.store import default_store

    name = (unpin if remove else pin)(default_store(store), artifact)
    if as_json:
        print_json({"artifact": name, "pinned": not remove})
    else:
        open_console().print(f"{name}: {'no longer pinned' if remove else 'pinned'}", highlight=False)
