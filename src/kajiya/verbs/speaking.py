"""How verbs speak: a console of the width that a terminal or a pipe has, JSON, and the command as it was typed."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

_PIPE_COLUMNS = 100_000
"""Width of a line that nothing folds."""


def typed_command() -> list[str]:
    """This command as it can be typed once more: by the path of its program where `kajiya` is not found without."""
    if shutil.which("kajiya"):
        program = ["kajiya"]
    elif Path(sys.argv[0]).name == "__main__.py":
        program = [sys.executable, "-m", "kajiya"]
    else:
        program = sys.argv[:1]
    return [*program, *sys.argv[1:]]


def is_first_rank() -> bool:
    """Whether this is the only process, or the first of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def open_console(to_stderr: bool = False) -> "Console":
    """A console on stdout or stderr that folds no line of a pipe; of torchrun's processes all but the first are silent."""
    from rich.console import Console

    console = Console(stderr=to_stderr, highlight=False)
    if not is_first_rank():
        return Console(quiet=True)  # of the processes that torchrun starts, one speaks
    # A pipe has no width of its own.
    return console if console.is_terminal else Console(stderr=to_stderr, highlight=False, width=_PIPE_COLUMNS)


def print_json(value: Any) -> None:
    """Write facts to stdout as JSON."""
    from kajiya.config.digest import to_plain

    plain = to_plain(value)
    sys.stdout.write(json.dumps(plain, indent=1, ensure_ascii=False, default=str) + "\n")
