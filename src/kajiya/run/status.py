"""How a run stands: what its manifest says, and whether whoever works on it is still there."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kajiya.run.alive import BEAT, is_alive, silent_since

STATUSES = ("running", "silent", "finished", "interrupted", "failed")


@dataclass(frozen=True)
class RunStatus:
    """One of `STATUSES`, and since when."""

    word: str
    """`interrupted`: so ended, or its process on this machine is gone; `silent`: the one on another gives no sign of life."""
    since: float | None = None
    """Of a silent run, when it was last heard of, Unix seconds."""

    @property
    def words(self) -> str:
        """The status as it is shown."""
        if self.since is None:
            return self.word
        return f"{self.word} since {time.strftime('%Y-%m-%d %H:%M %Z', time.localtime(self.since))}"


def run_status(manifest: dict[str, Any], folder: Path) -> RunStatus:
    """The status of the run or study in `folder`; whatever has its manifest, whoever worked on it and on whatever machine."""
    word = str(manifest["status"])
    if word != "running":
        return RunStatus(word)
    owner = manifest["owner"]
    since = silent_since(owner, folder / BEAT)
    if since is not None:
        return RunStatus("silent", since)
    return RunStatus(word if is_alive(owner) else "interrupted")
