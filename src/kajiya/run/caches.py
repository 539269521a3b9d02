"""The folder of a user on this machine for what can be made again."""

import os
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """`~/.cache/kajiya`, or where there is no home that can be written, a folder among the temporary files."""
    home = Path.home() / ".cache" / "kajiya"
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError:
        return Path(tempfile.gettempdir()) / f"kajiya-{os.getuid()}"
    return home
