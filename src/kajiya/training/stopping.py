"""The best evaluation so far, and when to stop for want of a better one."""

import math
from collections.abc import Iterable, Mapping

from kajiya.config.schema import TrainConfig
from kajiya.config.tables import nearest
from kajiya.errors import ConfigError
from kajiya.training.state import TrainState


def best_metric(train: TrainConfig) -> str | None:
    """The metric that `train.best_metric` names, without `min:` or `max:`."""
    return None if train.best_metric is None else train.best_metric.removeprefix("max:").removeprefix("min:")


def require_metric(metric: str, known: Iterable[str]) -> None:
    """Raise `ConfigError` for a `train.best_metric` that the evaluations of this training do not give."""
    names = list(known)
    if metric not in names:
        hint = nearest(metric, names)
        said = f"the evaluation gives {', '.join(names)}"
        raise ConfigError("train.best_metric", f"{metric!r}: {said}" + (f"; {hint}" if hint else ""))


def is_new_best(train: TrainConfig, state: TrainState, values: Mapping[str, float]) -> bool:
    """Whether this evaluation is the best so far, by `train.best_metric`; `state` remembers it and counts the stale ones.

    One that is better by no more than `train.early_stop_delta`, or not finite, is stale. One that lacks the metric, because a
    task could not be asked, is neither.
    """
    name = train.best_metric or next(iter(values))
    metric = best_metric(train) or name
    if metric not in values:
        return False
    value, sign = values[metric], -1 if name.startswith("max:") else 1
    is_better = math.isfinite(value) and (
        state.best_loss is None or sign * value < sign * state.best_loss - train.early_stop_delta
    )
    if is_better:
        state.best_loss, state.best_step, state.n_stale = value, state.step, 0
    else:
        state.n_stale += 1
    return is_better


def is_stale(train: TrainConfig, state: TrainState) -> bool:
    """Whether so many evaluations brought nothing better that the training ends."""
    return train.early_stop_evals is not None and state.n_stale >= train.early_stop_evals
