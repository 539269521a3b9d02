"""Losses: `loss(model, batch, options) -> {term: (sum, count)}, metrics`.

A term is a sum over what it counts, never a mean: the loop divides each once by its count over the whole group of micro-batches
and all ranks, so the result depends on neither. The count is the name of a unit that the batch counts (`targets`, `examples`),
or its number. Metrics are `{name: (sum, count)}` too, without gradient.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from kajiya.config.schema import LossConfig
from kajiya.config.tables import TABLES, import_target, is_options, resolve

Terms = dict[str, tuple[torch.Tensor, int | float | str | torch.Tensor]]
"""Sums with what they are sums over: a unit of the batch's `counts` by name, or its number.

The number of a metric may be a scalar tensor beside the sum: the host then need not wait to know it."""
Loss = Callable[[Any, Any], tuple[Terms, Terms]]
Measure = Callable[[Any, Any], Terms]
"""What a loss must know of the whole group before its first micro-batch: sums with what they count, without gradient."""


def load_loss(config: LossConfig, device: torch.device | str = "cpu", **kept: Any) -> Loss:
    """The loss that the config names, its options bound; what else it reads (a teacher) is loaded onto `device`.

    `kept` goes to what loads that: results that were computed once and stored.
    """
    function, options = resolve("loss", config.name, config.options, "train.loss")
    if not is_options(options):
        return partial(function, **options)
    row = TABLES["loss"][config.name]
    needs = import_target(row.needs, "train.loss")(options, torch.device(device), **kept) if row.needs else {}
    return partial(function, options=options, **needs)


def load_measure(config: LossConfig) -> Measure | None:
    """What the loss measures over the whole group before the micro-batches; `None` for most."""
    _, options = resolve("loss", config.name, config.options, "train.loss")
    target = TABLES["loss"][config.name].measure if is_options(options) else None
    return partial(import_target(target, "train.loss"), options=options) if target else None


def read_beside(loss: Loss) -> dict[str, Any]:
    """What the loss reads beside its batches and its options (a teacher), as `load_loss` bound it; else nothing."""
    if not isinstance(loss, partial):
        return {}
    return {name: value for name, value in loss.keywords.items() if name != "options"}
