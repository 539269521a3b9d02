"""Writes docs/reference.md from the config's dataclasses, the tables of names, the recipes and the command line.

Run `python docs/make_reference.py` after a change to any of them; a test fails while the page is not current.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kajiya.config.compose import list_groups, list_recipes
from kajiya.config.describe import json_schema, tables_schema
from kajiya.config.tables import packaged_tasks

PAGE = Path(__file__).with_name("reference.md")
_WORDS = {"string": "text", "integer": "whole number", "number": "number", "boolean": "true or false", "array": "list"}
_BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
_TABLES = {
    "source": "data.source.name",
    "loss": "train.loss.name",
    "reward": "train.loss.options.rewards",
    "adapter": "adapter.name",
    "optimizer": "optim.name",
    "schedule": "schedule.name",
    "tracker": "track.trackers",
    "sampler": "tune.sampler.name",
    "pruner": "tune.pruner.name",
    "launcher": "tune.launcher.name",
    "metric": "metrics",
    "engine": "serve.engine",
}


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")


def page() -> str:
    """The page's Markdown."""
    return "\n".join([*_opening(), *_recipes(), *_sections(), *_choices(), *_commands()]).rstrip() + "\n"


def _opening() -> Iterator[str]:
    yield "<!-- Written by docs/make_reference.py; do not edit. -->"
    yield "# Reference\n"
    yield "Every setting, every name that a setting can choose, every command. Settings are given in a recipe or typed as"
    yield "`key=value` behind it; `null` means off, or that the value is derived. `kajiya config schema` prints the same as a"
    yield "JSON schema.\n"


def _recipes() -> Iterator[str]:
    yield "## Recipes and groups\n"
    yield "| Recipe | What it is |\n|---|---|"
    for name, path in sorted(list_recipes().items()):
        first = path.read_text(encoding="utf-8").splitlines()[0]
        if not first.startswith("#"):
            raise ValueError(f"{path}: a recipe begins with a comment that says what it is")
        yield f"| `{name}` | {_cell(first.lstrip('# '))} |"
    yield "\nA group is a piece of a config, chosen by its name: `optim=muon`.\n"
    yield "| Group | Names |\n|---|---|"
    for group, names in list_groups().items():
        yield f"| `{group}` | {', '.join(f'`{name}`' for name in names)} |"
    yield f"\nTasks for `--tasks` and `train.tasks`: {', '.join(f'`{name}`' for name in packaged_tasks())}.\n"


def _sections() -> Iterator[str]:
    yield "## Settings\n"
    schema = json_schema()
    top = {name: entry for name, entry in schema["properties"].items() if "properties" not in entry}
    yield from _settings("The run", "", top)
    for name, entry in schema["properties"].items():
        if "properties" in entry:
            yield from _settings(f"`{name}`", f"{name}.", entry["properties"])


def _settings(title: str, prefix: str, properties: dict[str, Any]) -> Iterator[str]:
    yield f"### {title}\n"
    yield "| Setting | Default | Values | Meaning |\n|---|---|---|---|"
    yield from _rows(prefix, properties)
    yield ""


def _rows(prefix: str, properties: dict[str, Any]) -> Iterator[str]:
    for name, entry in properties.items():
        if "properties" in entry:
            yield from _rows(f"{prefix}{name}.", entry["properties"])
        else:
            default = _plain(entry["default"]) if "default" in entry else "{}"
            yield f"| `{prefix}{name}` | `{default}` | {_values(entry)} | {_cell(entry['description'])} |"


def _values(entry: dict[str, Any]) -> str:
    if "enum" in entry:
        return ", ".join(f"`{choice}`" for choice in entry["enum"])
    kinds = [entry["type"]] if isinstance(entry["type"], str) else entry["type"]
    words = " or ".join("`null`" if kind == "null" else _WORDS.get(kind, "mapping") for kind in kinds)
    bounds = [f"{sign} {entry[name]}" for name, sign in _BOUNDS.items() if name in entry]
    return ", ".join([words, *bounds])


def _choices() -> Iterator[str]:
    yield "## Names and their options\n"
    yield "`package.module:name` stands for [something of your own](own-data-and-model.md) in each of these.\n"
    for table, rows in tables_schema().items():
        yield f"### `{_TABLES[table]}`\n"
        for name, schema in rows.items():
            yield f"**`{name}`**: {schema['description']}\n"
            if schema["properties"]:
                yield "| Option | Default | Values | Meaning |\n|---|---|---|---|"
                yield from _rows("", schema["properties"])
                yield ""


def _commands() -> Iterator[str]:
    import typer

    from kajiya.cli import app

    yield "## Commands\n"
    yield "Any of them takes `--help`, and `--debug` for tracebacks. They end with 0, with 1 where something was found wrong or"
    yield "broke, and with 2 after a mistake in what was typed, or where the store or another place cannot be written to. Ctrl-C"
    yield "and SIGTERM end any of them in order, with 0; the last words on stderr are the command that goes on.\n"
    yield from _command("kajiya", typer.main.get_command(app))


def _command(path: str, command: Any) -> Iterator[str]:
    below = vars(command).get("commands")
    if below is not None:
        for name, each in below.items():
            yield from _command(f"{path} {name}", each)
        return
    arguments = [each for each in command.params if each.param_type_name == "argument"]
    options = [each for each in command.params if each.param_type_name == "option" and each.name != "help"]
    typed = " ".join([path, *(_argument(each) for each in arguments)])
    yield f"### `{path}`\n"
    yield f"```text\n{typed}{' [OPTIONS]' if options else ''}\n```\n"
    yield f"{' '.join((command.help or '').split())}\n"
    if options:
        yield "| Option | Meaning |\n|---|---|"
        for option in options:
            names = ", ".join(f"`{name}`" for name in [*option.opts, *option.secondary_opts])
            yield f"| {names} | {_cell(option.help or '')} |"
        yield ""


def _argument(argument: Any) -> str:
    name = (argument.metavar or argument.name.upper()).strip("[].")
    name = "KEY=VALUE" if "KEY=VALUE" in name else name
    return (name if argument.required else f"[{name}]") + ("..." if argument.nargs == -1 else "")


def _plain(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(str, value))}]"
    return '""' if value == "" else str(value).replace("\n", "\\n")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("`None`", "`null`")


if __name__ == "__main__":
    main()
