"""A W&B sweep file as overrides in Hydra's grammar, so that both are searched by the same code."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kajiya.errors import ConfigError

_SAMPLERS = {"grid": "grid", "random": "random", "bayes": "tpe"}
_KNOWN = {"method", "parameters", "metric", "early_terminate", "run_cap", "name", "description"}
_IGNORED = {"program", "command", "project", "entity", "controller"}
"""What says how W&B is to start its agents; here Kajiya starts the trials."""
_INTERVALS = {"uniform": "interval({min},{max})", "int_uniform": "int(interval({min},{max}))",
              "log_uniform_values": "tag(log,interval({min},{max}))"}  # fmt: skip


def read_wandb_sweep(path: Path) -> tuple[list[str], list[str]]:
    """Overrides that say the same as the sweep file, and the names of its entries that mean nothing here.

    Documented at docs.wandb.ai/guides/sweeps/define-sweep-configuration. Raises `ConfigError` for what has no counterpart.
    """
    import yaml

    try:
        sweep = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(str(path), f"is not a readable YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(sweep, dict) or not isinstance(sweep.get("parameters"), dict):
        raise ConfigError(str(path), "a W&B sweep has a mapping `parameters`")
    for key in sweep:
        if key not in _KNOWN | _IGNORED:
            raise ConfigError(f"{path}: {key}", "is not understood", f"Understood: {', '.join(sorted(_KNOWN))}.")
    method = sweep.get("method", "random")
    if method not in _SAMPLERS:
        raise ConfigError(f"{path}: method", f"{method!r} is not one of {', '.join(_SAMPLERS)}")
    overrides = [f"tune.sampler.name={_SAMPLERS[method]}"]
    if "metric" in sweep:
        goal = {"minimize": "min", "maximize": "max"}[sweep["metric"].get("goal", "minimize")]
        overrides.append(f"tune.objectives=['{goal}:{sweep['metric']['name']}']")
    if "run_cap" in sweep:
        overrides.append(f"tune.trials={sweep['run_cap']}")
    overrides += _early_terminate(sweep.get("early_terminate"), path)
    overrides += _parameters(sweep["parameters"], "", path)
    return overrides, sorted(_IGNORED & sweep.keys())


def _early_terminate(rule: Any, path: Path) -> Iterator[str]:
    if rule is None:
        return
    if not isinstance(rule, dict) or rule.get("type") != "hyperband":
        raise ConfigError(f"{path}: early_terminate", "W&B knows the type hyperband alone")
    yield "tune.pruner.name=hyperband"
    for theirs, ours in (("min_iter", "min_evals"), ("max_iter", "max_evals"), ("eta", "reduction")):
        if theirs in rule:
            yield f"tune.pruner.options.{ours}={int(rule[theirs])}"


def _parameters(parameters: Mapping[str, Any], prefix: str, path: Path) -> Iterator[str]:
    for name, entry in parameters.items():
        key = f"{prefix}{name}"
        where = f"{path}: parameters.{key}"
        if not isinstance(entry, dict):
            raise ConfigError(where, "is a mapping: value, values, or min and max")
        if "parameters" in entry:
            yield from _parameters(entry["parameters"], f"{key}.", path)
        elif "value" in entry:
            yield f"{key}={_text(entry['value'])}"
        elif "values" in entry:
            yield f"{key}=choice({','.join(_text(value) for value in entry['values'])})"
        elif "min" in entry and "max" in entry:
            yield f"{key}={_between(entry, where)}"
        else:
            raise ConfigError(where, "needs value, values, or min and max")


def _between(entry: Mapping[str, Any], where: str) -> str:
    low, high = entry["min"], entry["max"]
    is_whole = isinstance(low, int) and isinstance(high, int)
    kind = entry.get("distribution", "int_uniform" if is_whole else "uniform")
    if kind in ("q_uniform", "q_log_uniform_values"):
        if kind == "q_log_uniform_values":
            raise ConfigError(where, f"{kind!r} has no counterpart", "Use log_uniform_values.")
        step = entry.get("q", 1)
        return f"range({low},{high + step / 2},{step})"
    if kind not in _INTERVALS:
        raise ConfigError(where, f"the distribution {kind!r} has no counterpart; there are {', '.join(_INTERVALS)}")
    return _INTERVALS[kind].format(min=low, max=high)


def _text(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, list):
        return f"[{','.join(_text(each) for each in value)}]"
    return repr(value) if isinstance(value, (int, float, str)) else str(value)
