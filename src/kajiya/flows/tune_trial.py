"""Trials, each in a process of its own: `python -m kajiya.flows.tune_trial`, ordered and answered as `kajiya.run.forks` says.

An order holds `config`, `store`, `objectives`, `command`, `threads`, `memory_bytes`, `facts`, `is_whole`.
What a trial says: `{"run": id}`, `{"history": [[step, value], …]}`, `{"step": n, "value": x}`, and at last
`{"status": …, "values": {…}, "problem": …}`. Each `step` line waits for an answer: `go`, or `prune`, which stops the run
with a checkpoint; so does the end of whoever gave the order.
"""

import contextlib
import errno
import json
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from kajiya.config.compose import from_plain
from kajiya.errors import KajiyaError, ProofError, RunBusyError, TrainingError
from kajiya.flows.run_history import read_history
from kajiya.run.forks import serve
from kajiya.run.process import collect_as_usual, import_faster
from kajiya.run.store import Store

_POLL_S = 0.5
UNKNOWN_METRIC = "unknown metric"
"""How a trial ended that does not log what the search is for."""


class UnknownMetricError(KajiyaError):
    """A metric that a run does not log."""


class Channel:
    """The two pipes to the process that gave the order."""

    def __init__(self, to_parent: TextIO, from_parent: TextIO) -> None:
        self._to = to_parent
        self._from = from_parent
        self.is_pruned = False

    def say(self, **fields: Any) -> None:
        """One line; a parent that is gone does not hear it, and the watch ends the run."""
        with contextlib.suppress(BrokenPipeError):
            self._to.write(json.dumps(fields) + "\n")
            self._to.flush()

    def ask(self, step: int, value: float) -> bool:
        """Tell an evaluation; whether the run goes on."""
        self.say(step=step, value=str(value))
        answer = self._from.readline().strip()
        self.is_pruned = answer == "prune"
        return answer == "go"


def main() -> int:
    """Entry of the process that has the imports done before the first order comes."""
    import_faster()
    import_all()
    collect_as_usual()  # the forks share what is imported: their collections leave it alone
    return serve(work)


def import_all() -> None:
    """What a training needs and imports late."""
    from transformers import LlamaForCausalLM  # noqa: F401

    from kajiya.flows.train import train  # noqa: F401


def work(order: dict[str, Any], to_parent: TextIO, from_parent: TextIO) -> int:
    """One trial; its exit status is 0 whenever its last line was said."""
    channel = Channel(to_parent, from_parent)
    threading.Thread(target=_stop_without_parent, args=(os.getppid(),), daemon=True).start()
    if order["memory_bytes"] is not None:
        resource.setrlimit(resource.RLIMIT_AS, (order["memory_bytes"], order["memory_bytes"]))
    try:
        channel.say(**_run(order, channel))
    except BaseException as problem:
        channel.say(status=_failure(problem), values={}, problem=f"{type(problem).__name__}: {problem}")
        if not isinstance(problem, (KajiyaError, MemoryError)):
            raise
    return 0


def _run(order: dict[str, Any], channel: Channel) -> dict[str, Any]:
    from kajiya.flows.train import Scope, train

    config, store, objectives = from_plain(order["config"]), Store(Path(order["store"])), order["objectives"]

    def hear(kind: str, **fields: Any) -> None:
        if kind == "run":
            current["run"] = fields["id"]
            channel.say(run=fields["id"])
        elif kind == "started":
            channel.say(started=time.time())
            if fields["resumed_from"] is not None and is_judged:
                curve = read_history(store.runs / current["run"]).curves.get(objectives[0], [])
                channel.say(history=[[step, str(value)] for step, value in curve])
        elif kind == "metrics":
            _require_logged(objectives, fields["values"])
        if kind == "metrics" and is_judged and objectives[0] in fields["values"]:
            goes_on = channel.ask(fields["step"], float(fields["values"][objectives[0]]))
            if not goes_on:
                os.kill(os.getpid(), signal.SIGTERM)

    current: dict[str, str] = {}
    is_judged = bool(objectives) and not objectives[0].startswith("test/")  # those come when the training is over
    scope = Scope(
        is_evaluated=order["is_whole"] or any(name.startswith("test/") for name in objectives),
        is_reported=order["is_whole"],
        threads=order["threads"],
        facts=order["facts"],
    )
    while True:
        try:
            trained = train(config, store, command=order["command"], on_event=hear, scope=scope)
            break
        except RunBusyError:  # the same settings twice, or a last attempt that is still saving its state
            time.sleep(_POLL_S)
    if trained.model is None:
        return {"status": "pruned" if channel.is_pruned else "interrupted", "values": {}, "problem": None}
    curves = read_history(trained.run.folder).curves
    missing = [name for name in objectives if not curves.get(name)]
    if missing:
        known = ", ".join(sorted(curves))
        return {"status": "failed", "values": {}, "problem": f"the run logged no finite {missing[0]}; it has {known}"}
    values = {name: [value for _, value in curves[name]] for name in objectives}
    return {"status": "finished", "values": values, "problem": None}


def _require_logged(objectives: Sequence[str], values: Mapping[str, Any]) -> None:
    """Raise `UnknownMetricError` where an evaluation during training lacks an objective that only it could have.

    A figure of a task may be missing for once, where its rows make none; all of a task's are only where it is not asked.
    """
    if not any(name.startswith("eval/") for name in values):
        return
    asked = {name.split("/")[1] for name in values if name.startswith("task/")}
    missing = [name for name in objectives if name.startswith("eval/") and name not in values]
    missing += [name for name in objectives if name.startswith("task/") and name.split("/")[1] not in asked]
    if missing:
        known = ", ".join(sorted(values))
        raise UnknownMetricError(
            f"tune.objectives: an evaluation of this recipe logs no {missing[0]}; it logs {known}."
        )


def _failure(problem: BaseException) -> str:
    if isinstance(problem, UnknownMetricError):
        return UNKNOWN_METRIC
    if isinstance(problem, KeyboardInterrupt):
        return "interrupted"
    words = str(problem).lower()
    is_refused = isinstance(problem, MemoryError) or (isinstance(problem, OSError) and problem.errno == errno.ENOMEM)
    if is_refused or "out of memory" in words or "can't allocate memory" in words:
        return "out of memory"
    if isinstance(problem, (TrainingError, ProofError)) and "not finite" in words:
        return "not finite"
    return "failed"


def _stop_without_parent(parent: int) -> None:
    """A trial whose study is gone saves its state and ends."""
    while os.getppid() == parent:
        time.sleep(_POLL_S)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
