"""What happens along a training: progress, lines of the log, evaluation, checkpoints, the look whether everything moves."""

from collections.abc import Callable
from functools import partial

import torch

from kajiya.config.schema import Config
from kajiya.data.progress import OnEvent
from kajiya.errors import ConfigError
from kajiya.flows.feeding import Evaluation, Feeds
from kajiya.flows.keeping import Keeper
from kajiya.flows.task_watch import TaskWatch
from kajiya.run.meter import Meter
from kajiya.training.fit import Hook, Setup, StepReport
from kajiya.training.generators import undisturbed
from kajiya.training.movement import Movement
from kajiya.training.profile import Profile
from kajiya.training.state import TrainState
from kajiya.training.stopping import best_metric, is_new_best, require_metric
from kajiya.training.terms import drain_window


def make_hooks(
    config: Config,
    feeding: Feeds,
    keeper: Keeper,
    state: TrainState,
    hear: OnEvent,
    *,
    compiled: bool,
    watch: TaskWatch | None = None,
    samples: Callable[[], list[tuple[str, str]]] | None = None,
) -> list[Hook]:
    """The hooks of the one process that writes.

    `watch` asks the tasks of `train.tasks`; `samples` has the model go on with a few prompts.
    """
    setup = keeper.setup
    heldout = feeding.evaluator(setup, config.train.eval_rows)
    movement = Movement(setup.model, setup.optimizer, state)
    speed = _Speed(state)
    meter = Meter(keeper.run.folder, partial(_gpu_memory, setup.strategy.device))
    profile = Profile(setup.model, setup.strategy.device, keeper.run.folder / "profile", compiled)

    wanted = best_metric(config.train)
    if wanted is not None and state.step == 0:
        _require(wanted, heldout, watch)

    def warn(text: str) -> None:
        hear("warning", text=text)

    def progress(report: StepReport) -> None:
        hear("progress", stage="train", done=report.state.step, total=setup.steps, unit="steps")
        movement.check(report.state, setup.guard.tell)
        keeper.tell()
        written = profile.after_step(report.state) if config.train.profile else None
        if written is not None:
            hear("note", text=f"profile of two steps: {written}")
        if config.train.profile and report.state.step == setup.steps and (missing := profile.close()):
            hear("note", text=missing)

    def log(report: StepReport) -> None:
        values = drain_window(report.state) | {
            "train/lr": report.lr,
            "train/grad_norm": report.grad_norm,
            "train/tokens": report.state.tokens,
            "train/skipped": report.state.skipped,
            "train/tokens_per_second": speed(report.state),
            "train/data_wait_s": setup.loader.waited_s,
        }
        if "factor" in report.state.strategy:  # of fp16 alone
            values |= {"train/loss_scale": report.state.strategy["factor"], "train/overflows": report.state.overflows}
        hear("metrics", step=report.state.step, values=values)
        taken = meter()
        if taken:
            hear("system", step=report.state.step, values=taken)

    def evaluate(report: StepReport) -> None:
        with setup.optimizer.averaged():
            found = heldout()
            values = dict(found.values) | ({} if watch is None else watch(warn))
        hear("metrics", step=report.state.step, values=values)
        if wanted is not None and wanted not in values:
            warn(f"train.best_metric: an evaluation has no {wanted}, and counts neither as better nor as stale")
        for sample in found.samples:
            hear("sample", step=report.state.step, **sample)
        keeper.save(report.state, wanted=is_new_best(config.train, report.state, values))

    def save(report: StepReport) -> None:
        keeper.save(report.state)

    hooks = [
        Hook("progress", 1, progress),
        Hook("logging", config.train.log_every, log),
        Hook("evaluation", state.derived["train.eval_every"], evaluate),
        Hook("saving", state.derived["train.save_every"], save),
    ]
    if samples is not None and config.train.samples_every is not None:
        hooks.append(Hook("sampling", config.train.samples_every, sampling(setup, samples, hear)))
    return hooks


def _require(metric: str, heldout: Callable[[], Evaluation], watch: TaskWatch | None) -> None:
    """Raise `ConfigError` for a metric that no evaluation will give, as far as is known before the first step."""
    if not metric.startswith("task/"):
        with undisturbed():
            require_metric(metric, heldout().values)
        return
    tasks = [] if watch is None else watch.names
    if not any(metric.startswith(f"task/{name}/") for name in tasks):
        said = f"train.tasks asks {', '.join(tasks)}" if tasks else "train.tasks asks none"
        raise ConfigError("train.best_metric", f"{metric!r}: {said}", "The figures of a task are task/NAME/METRIC.")


def sampling(setup: Setup, samples: Callable[[], list[tuple[str, str]]], hear: OnEvent) -> Callable[[StepReport], None]:
    """Tells what the averaged weights write, where there is an average."""

    def look(report: StepReport) -> None:
        with setup.optimizer.averaged():
            written = samples()
        for prompt, text in written:
            hear("sample", step=report.state.step, prompt=prompt, text=text)

    return look


def follower_hooks(keeper: Keeper, state: TrainState) -> list[Hook]:
    """The hooks of the other processes: what they bring to a checkpoint that the first writes."""

    def save(report: StepReport) -> None:
        keeper.save(report.state)

    return [
        Hook("evaluation", state.derived["train.eval_every"], save),
        Hook("saving", state.derived["train.save_every"], save),
    ]


def _gpu_memory(device: torch.device) -> dict[str, float]:
    """What the process holds of a GPU's memory; nothing where there is none."""
    if device.type != "cuda":
        return {}
    return {f"system/gpu_{device.index or 0}_memory_usage_megabytes": torch.cuda.memory_reserved(device) / 1e6}


class _Speed:
    """Tokens per second since the last call."""

    def __init__(self, state: TrainState) -> None:
        self._tokens = state.tokens
        self._seconds = state.seconds

    def __call__(self, state: TrainState) -> float:
        tokens = state.tokens - self._tokens
        seconds = state.seconds - self._seconds
        self._tokens, self._seconds = state.tokens, state.seconds
        return tokens / seconds
