"""A config run in a process of its own, and how that ended: a trial, its repeat with another seed, a member of a multirun."""

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kajiya.config.digest import to_plain
from kajiya.config.schema import Config, TuneConfig
from kajiya.config.tables import resolve
from kajiya.run.forks import Fork, forked
from kajiya.run.process import default_threads
from kajiya.run.provenance import usable_cores
from kajiya.run.usage import oom_kills

_PROGRAM = ("-P", "-m", "kajiya.flows.tune_trial")


@dataclass(frozen=True)
class TrialEnd:
    """How a trial's process ended."""

    status: str
    """finished, pruned, interrupted, failed, out of memory, not finite, timed out."""
    run: str | None
    values: dict[str, list[float]]
    """Every value of each objective, in order of steps."""
    problem: str | None
    seconds: float
    to_first_step: float | None
    """From the start of the process to the start of its training loop, seconds."""

    def figures(self, names: Sequence[str], which: str, signs: Sequence[int]) -> list[float]:
        """The figure of each objective: the last value, or the best."""
        pick = {"last": lambda values, _: values[-1], "best": lambda values, s: s * min(s * v for v in values)}[which]
        return [pick(self.values[name], sign) for name, sign in zip(names, signs, strict=True)]


@dataclass(frozen=True)
class Job:
    """A config to be run in a process of its own."""

    config: Config
    store: Path
    tune: TuneConfig
    """How many share the machine, and how much time and memory each may take."""
    log: Path
    """File for what the process prints."""
    objectives: tuple[str, ...] = ()
    """Metrics whose values are wanted; the judge hears the first one's as they come."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What the run's manifest says of where it belongs."""
    is_whole: bool = False
    """Evaluate and report, as a run that a person asked for."""


def everything_goes_on(_step: int, _value: float, _is_past: bool) -> bool:
    """A judge that ends no run."""
    return True


def execute(job: Job, judge: Callable[[int, float, bool], bool]) -> TrialEnd:
    """Run a job; however it ends is the result."""
    tune, log = job.tune, job.log
    order = {
        "config": to_plain(job.config),
        "store": str(job.store),
        "objectives": list(job.objectives),
        "command": [],
        "threads": _threads(tune),
        "memory_bytes": None if tune.trial_memory_gb is None else int(tune.trial_memory_gb * 2**30),
        "facts": dict(job.facts),
        "is_whole": job.is_whole,
    }
    began, n_oom = time.time(), oom_kills()
    told: dict[str, Any] = {}
    with forked(_PROGRAM, order, log) as trial, _limit(trial, tune.trial_minutes) as expired:
        for said in trial.lines():
            told |= said
            for step, value in said.get("history", []):
                judge(step, float(value), True)
            if "step" in said:
                trial.say("go" if judge(said["step"], float(said["value"]), False) else "prune")
    seconds = time.time() - began
    status, problem = told.get("status"), told.get("problem")
    if status is None and expired.is_set():
        status, problem = "timed out", f"not done after {tune.trial_minutes:g} min"
    elif status is None:
        status, problem = _unsaid(trial.exit_code or 0, log, n_oom)
    started = told.get("started")
    return TrialEnd(
        str(status), told.get("run"), told.get("values") or {}, problem, seconds, started and started - began
    )


def _threads(tune: TuneConfig) -> int:
    """Threads of a trial: the cores that Ray has reserved for it, or its share of this machine's."""
    if tune.launcher.name == "ray":
        _, options = resolve("launcher", "ray", tune.launcher.options, "tune.launcher")
        return max(1, int(options.cpus))
    return max(1, min(default_threads(), usable_cores() // tune.parallel))


@contextmanager
def _limit(trial: Fork, minutes: float | None) -> Iterator[threading.Event]:
    """An event that is set when the trial was killed because its time was up."""
    expired = threading.Event()

    def end() -> None:
        expired.set()
        trial.kill()

    timer = threading.Timer(minutes * 60, end) if minutes is not None else None
    if timer is not None:
        timer.daemon = True
        timer.start()
    try:
        yield expired
    finally:
        if timer is not None:
            timer.cancel()


def _unsaid(code: int, log: Path, n_oom_before: int | None) -> tuple[str, str]:
    """Of a process that ended without a last word: what it seems to have died of.

    `n_oom_before`: what `oom_kills` said when it began.
    """
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    last = lines[-1] if lines else "it said nothing"
    if code == -signal.SIGTERM:
        return "interrupted", "ended by SIGTERM"
    if code == -signal.SIGKILL:
        return _killed(n_oom_before, oom_kills())
    if code < 0:
        return "failed", f"killed by {signal.Signals(-code).name}: {last}"
    return "failed", f"exit status {code}: {last}"


def _killed(n_oom_before: int | None, n_oom: int | None) -> tuple[str, str]:
    """SIGKILL comes from a person, a scheduler, or the kernel when memory runs out; the kernel counts its own."""
    if n_oom_before is None or n_oom is None:
        return "failed", "killed by SIGKILL; this machine does not say whether for lack of memory"
    if n_oom > n_oom_before:
        return "out of memory", "killed by the kernel, whose memory ran out"
    return "failed", "killed by SIGKILL, not for lack of memory"
