"""Options of losses that change nothing beside other settings: said where they are set nevertheless."""

from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from typing import Any

from kajiya.config.schema import Config
from kajiya.errors import ConfigError


@dataclass(frozen=True)
class _Rule:
    """When an option of a loss is read."""

    loss: str
    option: str
    is_read: Callable[[Any, Config], bool]
    without: str
    """What it changes nothing with; `{o.kind}` stands for an option of the loss."""


_RULES = (
    _Rule("dpo", "label_smoothing", lambda o, _: o.kind not in ("hinge", "ipo"), "train.loss.options.kind={o.kind}"),
    _Rule(
        "distill",
        "jsd_teacher_share",
        lambda o, _: o.divergence == "jsd",
        "train.loss.options.divergence={o.divergence}",
    ),
    *(
        _Rule(
            "grpo",
            option,
            lambda o, _: o.inner_epochs > 1,
            "train.loss.options.inner_epochs=1, where no ratio leaves 1",
        )
        for option in ("clip_low", "clip_high")
    ),
    _Rule("next_token", "future_weight", lambda _, config: config.model.future_heads > 0, "model.future_heads=0"),
)


def require_loss_effect(config: Config, options: Any) -> None:
    """Raise `ConfigError` for an option of the config's loss that is not its default and changes nothing."""
    for rule in _RULES:
        if rule.loss != config.train.loss.name or rule.is_read(options, config):
            continue
        (default,) = (each.default for each in fields(options) if each.name == rule.option)
        assert default is not MISSING, "an option that has no default is always read"
        value = getattr(options, rule.option)
        if value != default:
            raise ConfigError(
                f"train.loss.options.{rule.option}",
                f"{value} changes nothing with {rule.without.format(o=options)}",
                f"Leave it at {default}.",
            )
