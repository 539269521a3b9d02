"""The best evaluation, by any metric, and the end for want of a better one."""

from dataclasses import replace

import pytest

from kajiya.config.schema import TrainConfig
from kajiya.errors import ConfigError
from kajiya.training.state import TrainState
from kajiya.training.stopping import is_new_best, is_stale, require_metric


def _run(train: TrainConfig, values: list[float], name: str = "eval/nll") -> tuple[list[bool], TrainState]:
    state, found = TrainState(), []
    for step, value in enumerate(values, start=1):
        state.step = step
        found.append(is_new_best(train, state, {"eval/nll": 9.0 - step, name: value}))
        if is_stale(train, state):
            break
    return found, state


def test_the_lowest_loss_is_the_best_and_nan_never_is() -> None:
    found, state = _run(TrainConfig(), [3.0, 2.0, float("nan"), 2.5, 1.0])
    assert found == [True, True, False, False, True]
    assert (state.best_loss, state.best_step, state.n_stale) == (1.0, 5, 0)


def test_any_metric_either_way() -> None:
    train = TrainConfig(best_metric="max:eval/accuracy", early_stop_evals=2)
    found, state = _run(train, [0.1, 0.4, 0.3, 0.4, 0.9], "eval/accuracy")
    assert found == [True, True, False, False]  # stopped before the last
    assert state.best_step == 2
    with pytest.raises(ConfigError, match="did you mean 'eval/nll'"):
        require_metric("eval/nl", ["eval/nll"])


def test_an_evaluation_without_the_metric_is_neither_better_nor_stale() -> None:
    train, state = TrainConfig(best_metric="max:task/a/acc", early_stop_evals=1), TrainState(step=1)
    assert is_new_best(train, state, {"eval/nll": 1.0, "task/a/acc": 0.5})
    for state.step in (2, 3):
        assert not is_new_best(train, state, {"eval/nll": 1.0})
    assert (state.best_step, state.n_stale, is_stale(train, state)) == (1, 0, False)


def test_a_small_gain_is_none() -> None:
    train = replace(TrainConfig(), early_stop_evals=2, early_stop_delta=0.1)
    found, _ = _run(train, [1.0, 0.95, 0.92, 0.5])
    assert found == [True, False, False]
