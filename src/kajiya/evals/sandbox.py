"""Programs that a model wrote, run where they can do little harm: a process of its own with limits, in an empty folder."""

import contextlib
import os
import resource
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from kajiya.evals.confine import adopt_orphans, confinement

_MOST_OUTPUT = 2000
_FILE_BYTES = 1 << 20
_MOST_PROCESSES = 64
_WATCHED = Path(__file__).with_name("watched_program.py")
_SWEEP_S = 5.0
"""Longest time in which all that a program has started is killed."""


@dataclass(frozen=True)
class ProgramEnd:
    """How a program ended."""

    is_passed: bool
    reason: str
    """passed, failed, timed out, killed; with the end of what it said."""


def run_program(source: str, *, seconds: float, memory_mb: int) -> ProgramEnd:
    """Run Python source in isolated mode without site packages; passed when it comes to the end of its last line, with status 0.

    A program that exits before, with whatever status, has not run all of its tests and does not pass. That it came to its end is
    said with a word that none of its frames, objects and files holds, and `sys.settrace`, which can skip lines, takes no function.
    An answer that changes what its tests call (a class whose objects equal everything, another `len`) does deceive them, as would
    one that reads the memory of its process itself (`ctypes`, `/proc/self/mem`): tests beside the answer can tell no more.

    Limits: wall time, processor time, address space (of each process), files of 1 MiB, 64 processes more than the machine has
    (which root is not held to), no core dumps; an empty environment and working folder. All that it has started is killed behind
    it, what has left its session too. Where the kernel has Landlock it changes files in that folder alone;
    `kajiya.evals.confine.why_unconfined` says where not. It shares the network and the readable files of this machine: run what
    you do not trust at all within a container.
    """
    most_processes = _processes()

    def limit() -> None:
        memory = memory_mb * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, int(seconds) + 1))
        resource.setrlimit(resource.RLIMIT_FSIZE, (_FILE_BYTES, _FILE_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if most_processes is not None:
            resource.setrlimit(resource.RLIMIT_NPROC, (most_processes, most_processes))
        adopt_orphans()
        confine()

    with (
        tempfile.TemporaryDirectory(prefix="kajiya-program-") as folder,
        tempfile.TemporaryFile() as output,
        confinement(Path(folder)) as confine,
        _Ending() as ending,
    ):
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-X", "utf8", str(_WATCHED), str(ending.child.fileno())],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            cwd=folder,
            env={"HOME": folder, "TMPDIR": folder, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
            preexec_fn=limit,
            pass_fds=(ending.child.fileno(),),
        )
        try:
            process.communicate(source.encode("utf-8", "replace"), timeout=seconds)
        except subprocess.TimeoutExpired:
            return ProgramEnd(False, f"timed out after {seconds:g} s")
        finally:
            if process.poll() is None:
                process.terminate()  # which has it kill whatever it has started
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_SWEEP_S)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        is_at_end = ending.is_reached()
        output.seek(0)
        said = output.read(_FILE_BYTES).decode("utf-8", "replace").strip()[-_MOST_OUTPUT:]
    if process.returncode < 0:
        return ProgramEnd(False, f"killed by {signal.Signals(-process.returncode).name}")
    if process.returncode > 0:
        return ProgramEnd(False, f"failed: {said}")
    if not is_at_end:
        return ProgramEnd(False, f"exited before its last line, so not all of its tests have run: {said}")
    return ProgramEnd(True, "passed")


def whole_lines(answer: str) -> str:
    """The answer as it may stand before a program's tests: a backslash at its end would take their first line into its own last."""
    return f"{answer}\n" if answer.endswith("\\") else answer


class _Ending:
    """A word of its own for each program: the child takes it out of a socket and gives it back once the last line is done."""

    def __init__(self) -> None:
        self._word = secrets.token_bytes(16)
        self._own, self.child = socket.socketpair()
        self._own.setblocking(False)  # something that the program has left behind may hold the other end
        self._own.send(self._word)

    def __enter__(self) -> "_Ending":
        return self

    def __exit__(self, *_: object) -> None:
        self._own.close()
        self.child.close()

    def is_reached(self) -> bool:
        """Whether the word has come back, and nothing before it; a fork of the program may say it once more."""
        with contextlib.suppress(BlockingIOError, ConnectionResetError):
            return self._own.recv(len(self._word)) == self._word
        return False


def _processes() -> int | None:
    """The machine's threads and 64 more, which is what the system counts of one user at most; `None` where it does not say."""
    try:
        running = Path("/proc/loadavg").read_text(encoding="ascii").split()[3]
    except OSError:
        return None
    return int(running.partition("/")[2]) + _MOST_PROCESSES
