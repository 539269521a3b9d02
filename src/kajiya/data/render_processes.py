"""Rows rendered by several processes: a template runs in Python, which takes one core of each process.

A process is told what to render through its standard input and answers through its standard output. It is begun as a command,
not forked: the process at hand has threads, and where it is a script without a guard, that is not run once more.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Self

import numpy as np

from kajiya.data.documents import Documents, open_documents
from kajiya.data.encoding import RenderMany, RowsEncoder
from kajiya.data.memory import PLAIN, room_bytes
from kajiya.data.parts import Encoded
from kajiya.errors import DataError
from kajiya.run.provenance import usable_cores
from kajiya.run.usage import peak_memory

CHUNK_BYTES = 2**20
"""Text of rows that one process is given at a time."""
_WORTH_BYTES = 32 * 2**20
"""Text that takes one core some ten seconds; of less, starting processes would take the most time."""
_PROCESS_BYTES = 300 * 2**20
"""What a process takes before it has rendered anything."""
_COMMAND = "from kajiya.data.render_processes import serve; serve()"


@dataclass(frozen=True)
class RowsTask:
    """What a process renders."""

    folder: Path
    """The corpus."""
    split: str
    open: Callable[[], RenderMany]
    """Opens the function that renders rows; it can be pickled."""
    dtype: np.dtype
    segments: int
    drops: bool

    def encoder(self) -> RowsEncoder:
        """What renders them in the process at hand."""
        documents = open_documents(self.folder, self.split)
        return RowsEncoder(documents, self.open(), self.dtype, self.segments, self.drops)


def processes_for(documents: Documents, memory_mib: int) -> int:
    """How many processes render these rows under the cap of memory; 1: the process at hand does it alone."""
    if documents.n_bytes < _WORTH_BYTES:
        return 1
    largest = int(np.diff(documents.offsets).max())
    each = _PROCESS_BYTES + max(CHUNK_BYTES, largest) * PLAIN.bytes_per_byte
    return max(1, min(usable_cores(), room_bytes(memory_mib) // each))


class _Process:
    """One that renders: what it is asked, and what it answers."""

    def __init__(self, env: Mapping[str, str]) -> None:
        inner, asked = os.pipe()
        answers, outer = os.pipe()
        self.asked, self.answers = Connection(asked, readable=False), Connection(answers, writable=False)
        try:
            self.running = subprocess.Popen(
                [sys.executable, "-c", _COMMAND],
                stdin=inner,
                stdout=outer,
                env=env,
                start_new_session=True,  # an interrupt is for the process at hand, which then ends them
            )
        finally:
            os.close(inner)
            os.close(outer)


class RenderProcesses:
    """Encodes runs of rows as `RowsEncoder` does, each in a free one of `n` processes, which live while it is a context."""

    def __init__(self, task: RowsTask, n: int) -> None:
        self.task = task
        self.n = n
        self.peak_bytes = 0
        """Highest resident memory of the processes together; known when they have ended."""
        self._processes: list[_Process] = []
        self._free: SimpleQueue[_Process] = SimpleQueue()

    def __enter__(self) -> Self:
        # Each has one core: the encoder's own threads would be in the others' way.
        path = os.pathsep.join(each for each in sys.path if each)
        env = os.environ | {"RAYON_NUM_THREADS": "1", "PYTHONPATH": path}
        for _ in range(self.n):
            process = _Process(env)
            self._processes.append(process)
            process.asked.send(self.task)
            self._free.put(process)
        return self

    def __call__(self, start: int, stop: int) -> Encoded:
        """The rows from `start` to before `stop`; called from several threads. Raises `DataError` as `RowsEncoder` does."""
        process = self._free.get()
        try:
            process.asked.send((start, stop))
            answer = process.answers.recv()
        except (EOFError, BrokenPipeError) as error:
            raise DataError(
                f"a process that renders rows has ended by itself (exit status {process.running.wait()}).\n"
                "Where memory is short, lower data.memory_mib: fewer processes then render."
            ) from error
        finally:
            self._free.put(process)
        if isinstance(answer, Encoded):
            return answer
        raise DataError(answer)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            if error is not None:
                process.running.kill()
            process.asked.close()
        for process in self._processes:
            if error is None:
                self.peak_bytes += process.answers.recv()
            process.running.wait()
            process.answers.close()


def serve() -> None:
    """Render what standard input asks for until it ends; then tell the highest resident memory, bytes."""
    asked, answers = Connection(os.dup(0), writable=False), Connection(os.dup(1), readable=False)
    # Whatever a library prints goes where errors go.
    os.dup2(2, 1)
    encode = asked.recv().encoder()
    while True:
        try:
            start, stop = asked.recv()
        except EOFError:
            break
        try:
            answers.send(encode(start, stop))
        except DataError as error:
            answers.send(str(error))
    answers.send(peak_memory())
