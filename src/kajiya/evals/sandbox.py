"""Programs that a model wrote, run where they can do little harm: a process of its own with limits, in an empty folder."""

import contextlib
import os
import resource
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass

_MOST_OUTPUT = 2000
_FILE_BYTES = 1 << 20


@dataclass(frozen=True)
class ProgramEnd:
    """How a program ended."""

    is_passed: bool
    reason: str
    """passed, failed, timed out, killed; with the end of what it said."""


def run_program(source: str, *, seconds: float, memory_mb: int) -> ProgramEnd:
    """Run Python source in isolated mode without site packages; passed when it ends with status 0.

    Limits: wall time, processor time, address space, files of 1 MiB, no core dumps; an empty environment and working
    folder, its own session, killed whole. It shares the network and the readable files of this machine: run what you do not
    trust at all within a container.
    """

    def limit() -> None:
        memory = memory_mb * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, int(seconds) + 1))
        resource.setrlimit(resource.RLIMIT_FSIZE, (_FILE_BYTES, _FILE_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    with tempfile.TemporaryDirectory(prefix="kajiya-program-") as folder, tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-X", "utf8", "-"],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            cwd=folder,
            env={"HOME": folder, "TMPDIR": folder, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
            preexec_fn=limit,
        )
        try:
            process.communicate(source.encode("utf-8", "replace"), timeout=seconds)
        except subprocess.TimeoutExpired:
            return ProgramEnd(False, f"timed out after {seconds:g} s")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and whatever it has started
            process.wait()
        output.seek(0)
        said = output.read(_FILE_BYTES).decode("utf-8", "replace").strip()[-_MOST_OUTPUT:]
    if process.returncode == 0:
        return ProgramEnd(True, "passed")
    if process.returncode < 0:
        return ProgramEnd(False, f"killed by {signal.Signals(-process.returncode).name}")
    return ProgramEnd(False, f"failed: {said}")
