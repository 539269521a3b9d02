"""What a search's objectives and pruner must satisfy together."""

from kajiya.config.schema import Config
from kajiya.config.tables import loss_row, nearest
from kajiya.errors import ConfigError

_LOGGED = ("eval", "train", "test", "task", "gradient_norm", "weight_norm")
"""What the names of logged metrics begin with."""


def check_search(config: Config) -> None:
    """Raise `ConfigError` for objectives that no run logs, and for a pruner that nothing would be told."""
    names = [name.removeprefix("min:").removeprefix("max:") for name in config.tune.objectives]
    if not names or len(set(names)) < len(names) or not all(names):
        raise ConfigError(
            "tune.objectives", f"{list(config.tune.objectives)} are not one metric or several different ones"
        )
    for name in names:
        _check_objective(config, name)
    if names[0].startswith("test/") and config.tune.pruner.name != "none":
        raise ConfigError(
            "tune.pruner.name",
            f"{config.tune.pruner.name} is asked after every evaluation during training, and {names[0]} comes when that is over",
            "Set tune.pruner.name=none, or tune.objectives to a metric of the training, for example eval/nll.",
        )
    if len(names) > 1 and config.tune.pruner.name != "none":
        raise ConfigError(
            "tune.pruner.name",
            f"{config.tune.pruner.name} compares one figure, and there are {len(names)} objectives",
            "Set tune.pruner.name=none, or tune.objectives to one metric.",
        )


def _check_objective(config: Config, name: str) -> None:
    """Refuse what no run logs, as far as that is known before one."""
    kind, _, rest = name.partition("/")
    if kind not in _LOGGED or not rest:
        begins = ", ".join(f"{each}/" for each in _LOGGED)
        hint = nearest(name, ("eval/nll", "eval/loss", "test/bits_per_byte"))
        raise ConfigError(
            "tune.objectives",
            f"{name!r} is no metric that a run logs; their names begin with {begins}" + (f"; {hint}" if hint else ""),
        )
    if kind == "eval" and loss_row(config.train.loss.name).takes == "tokens" and rest != "nll":
        raise ConfigError("tune.objectives", f"a run with the loss {config.train.loss.name} logs eval/nll, not {name}")
    if kind == "task" and not config.train.tasks:
        raise ConfigError(
            "tune.objectives",
            f"{name} is logged by a run that asks a task during training, and train.tasks is empty",
            f"Set train.tasks=[{rest.partition('/')[0]}].",
        )
