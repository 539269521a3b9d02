"""Processes that begin with everything imported: one that has done the imports forks itself for each order.

To import torch and Transformers takes a processor seconds; a search of forty trials pays for it once. Where system libraries do
not survive a fork (all but Linux) the process is the work itself, and another one is started for the next order.

Lines pass on its two pipes. An order goes in, a JSON object. Out come `{"pid": n}`, whatever lines the work says (JSON objects),
and `{"exit": status}`; the work reads the answers to its lines from the same pipe in which its order came.
"""

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

END_S = 60.0
"""Longest wait for work that was asked to save its state and stop, seconds."""
_POLL_S = 0.05
_PARENT_POLL_S = 0.5
_FORKS = sys.platform == "linux"

# ---------------------------------------------------------------- whoever gives the orders


@dataclass
class _Forker:
    process: "subprocess.Popen[str]"
    program: tuple[str, ...]
    surroundings: tuple[str, dict[str, str]]
    """Working directory and environment that it was started with."""

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # gone, or (on macOS) ended and not waited for
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


_kept: list[_Forker] = []
"""At most one: the next order is taken by whoever took the last one."""


@dataclass
class Fork:
    """Work that has begun, in a process and a process group of its own."""

    _forker: _Forker
    pid: int | None = None
    """`None` until it has begun, and when nothing could begin."""
    exit_code: int | None = None
    """Its exit status once it has ended; a signal's number, negative, when one ended it."""

    def lines(self) -> Iterator[dict[str, Any]]:
        """What the work says, until it has ended."""
        assert self._forker.process.stdout is not None
        for line in self._forker.process.stdout:
            try:
                said = json.loads(line)
            except json.JSONDecodeError:
                continue  # it was ended within a line; its exit status says how
            if "exit" in said:
                self.exit_code = said["exit"]
                return
            if "pid" in said:
                self.pid = said["pid"]
            else:
                yield said
        self.exit_code = self._forker.process.wait()

    def say(self, line: str) -> None:
        """A line for the work to read; when it is gone, for nobody."""
        assert self._forker.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._forker.process.stdin.write(line + "\n")
            self._forker.process.stdin.flush()

    def kill(self) -> None:
        """End the work and what it has started, at once."""
        if self.exit_code is None and self.pid is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)

    def stop(self) -> None:
        """Ask the work to save its state and end; kill it when it takes longer than `END_S`."""
        if self.exit_code is not None or self.pid is None:
            return
        deadline = time.monotonic() + END_S
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGTERM)
            while time.monotonic() < deadline and self._forker.process.poll() is None:
                os.kill(self.pid, 0)
                time.sleep(_POLL_S)
        self.kill()


@contextmanager
def forked(program: Sequence[str], order: Mapping[str, Any], log: Path) -> Iterator[Fork]:
    """Give `order` to a process that runs `serve`, started by the interpreter's arguments `program` unless one is there.

    What the work prints goes to the end of `log`. Left early, the block waits for the work to save its state and stop; what the
    work has started never outlives it.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    fork = Fork(_take(tuple(program), log))
    fork.say(json.dumps({**order, "log": str(log)}))
    try:
        yield fork
    finally:
        if fork.exit_code is None:
            fork.stop()
            release()
        elif fork._forker.process.poll() is not None:
            release()


def release() -> None:
    """End the process that waits for orders, if there is one."""
    while _kept:
        _kept.pop().close()


def _take(program: tuple[str, ...], log: Path) -> _Forker:
    surroundings = os.getcwd(), dict(os.environ)
    if _kept and (
        (_kept[0].program, _kept[0].surroundings) != (program, surroundings) or _kept[0].process.poll() is not None
    ):
        release()
    if not _kept:
        with log.open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, *program],
                # Asked in this way, a GPU's presence does not start its driver, which no fork could use afterwards.
                env=os.environ | {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
                start_new_session=True,  # Ctrl-C is for whoever gives orders, who passes it on
            )
        _kept.append(_Forker(process, program, surroundings))
    return _kept[0]


atexit.register(release)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_kept.clear)  # another process's pipes are not this one's


# ---------------------------------------------------------------- the process that takes them


def serve(work: Callable[[dict[str, Any], TextIO, TextIO], int]) -> int:
    """Take orders until no more can come; `work(order, to_parent, from_parent)` does one, in a process of its own.

    Returns the exit status of this process: that of the work where this is the work's process.
    """
    # Whatever a library prints goes to the log: the pipe carries the protocol alone.
    pipe, parent = os.fdopen(os.dup(1), "w", encoding="utf-8"), os.getppid()
    os.dup2(2, 1)
    if _FORKS:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    for line in iter(sys.stdin.readline, ""):
        if not line.startswith("{"):
            continue  # an answer to work that had ended
        order = json.loads(line)
        if (pid := os.fork() if _FORKS else 0) == 0:
            return _be_the_work(work, order, pipe)
        _write(pipe, pid=pid)
        if (status := _await(pid, parent)) is None:
            return 1  # the work sees that this process is gone
        _write(pipe, exit=status)
    return 0


def _be_the_work(work: Callable[[dict[str, Any], TextIO, TextIO], int], order: dict[str, Any], pipe: TextIO) -> int:
    if _FORKS:
        os.setsid()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
    else:
        _write(pipe, pid=os.getpid())
    with Path(order["log"]).open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    return work(order, pipe, sys.stdin)


def _await(pid: int, parent: int) -> int | None:
    """The exit status of the work, or `None` when whoever gave the order is gone."""
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        signal.sigtimedwait({signal.SIGCHLD}, _PARENT_POLL_S)
        if os.getppid() != parent:
            return None
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)  # what it has started; its number is taken as long as it is not waited for
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _write(pipe: TextIO, **said: int) -> None:
    with contextlib.suppress(BrokenPipeError):
        pipe.write("\n" + json.dumps(said) + "\n")
        pipe.flush()
