"""Arguments and options that several verbs take."""

from pathlib import Path
from typing import Annotated

import typer

Recipe = Annotated[str, typer.Argument(help="A packaged recipe's name, or the path of a YAML file.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Settings, as key=value.", metavar="[KEY=VALUE]...")]
StoreOption = Annotated[
    str | None, typer.Option("--store", help="Folder of artifacts and runs; else $KAJIYA_STORE, else ./kajiya-store.")
]
ConfigDir = Annotated[Path | None, typer.Option("--config-dir", help="Folder with recipes and groups of your own.")]
Json = Annotated[bool, typer.Option("--json", help="Print facts as JSON.")]
