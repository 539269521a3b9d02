"""A W&B sweep file as overrides in Hydra's grammar, so that both are searched by the same code."""

import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from kajiya.errors import ConfigError

_SAMPLERS = {"grid": "grid", "random": "random", "bayes": "tpe"}
_GOALS = {"minimize": "min", "maximize": "max"}
_KNOWN = {"method", "parameters", "metric", "early_terminate", "run_cap"}
_IGNORED = {
    **dict.fromkeys(("program", "command", "controller"), "says how W&B starts its agents"),
    **dict.fromkeys(("project", "entity"), "says where W&B keeps a sweep"),
    **dict.fromkeys(("name", "description"), "is W&B's title of a sweep; a study is named after its recipe"),
}
"""What has no bearing on the search, and why."""
_REFUSED = {
    "metric.target": "the search does not end at a figure; use run_cap, or tune.minutes",
    "probabilities": "the values of a choice are equally likely here; leave it out",
}
_ENDS = ("min", "max")
_DISTRIBUTIONS: Mapping[str, tuple[str, ...]] = {
    "constant": ("value",),
    "categorical": ("values",),
    "uniform": _ENDS,
    "int_uniform": _ENDS,
    "q_uniform": (*_ENDS, "q"),
    "log_uniform": _ENDS,
    "log_uniform_values": _ENDS,
    "q_log_uniform_values": (*_ENDS, "q"),
    "inv_log_uniform": _ENDS,
    "inv_log_uniform_values": _ENDS,
}
"""Distributions that Optuna has too, and the fields of each."""
_NORMAL = "statistics.NormalDist({mu!r}, {sigma!r}).inv_cdf(u)"
_BETA = "float(scipy.stats.beta({a!r}, {b!r}).ppf(u))"
_QUANTILES: Mapping[str, str] = {
    "normal": _NORMAL,
    "q_normal": f"round({_NORMAL} / {{q!r}}) * {{q!r}}",
    "log_normal": f"math.exp({_NORMAL})",
    "q_log_normal": f"round(math.exp({_NORMAL}) / {{q!r}}) * {{q!r}}",
    "beta": _BETA,
    "q_beta": f"round({_BETA} / {{q!r}}) * {{q!r}}",
}
"""W&B's distributions that Optuna has not: the value at the quantile `u`, in Python, which a space of one's own draws by."""
_SHAPE: Mapping[str, float] = {"mu": 0.0, "sigma": 1.0, "a": 1.0, "b": 1.0, "q": 1}
"""What W&B takes where their fields are not given."""
_INSTEAD: Mapping[str, str] = {
    "q_log_uniform": "Take q_log_uniform_values, whose min and max are the values themselves, with q: 1."
}


def read_wandb_sweep(path: Path) -> tuple[list[str], list[str]]:
    """Overrides that say the same as the sweep file, and a line on each of its entries that is not taken as W&B takes it.

    Documented at docs.wandb.ai/guides/sweeps/define-sweep-configuration. Raises `ConfigError` for what has no counterpart.
    """
    import yaml

    try:
        sweep = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(str(path), f"is not a readable YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(sweep, dict) or not isinstance(sweep.get("parameters"), dict):
        raise ConfigError(str(path), "a W&B sweep has a mapping `parameters`")
    _check_fields(sweep, _KNOWN | _IGNORED.keys(), f"{path}: ")
    method = sweep.get("method", "random")
    if method not in _SAMPLERS:
        raise ConfigError(f"{path}: method", f"{method!r} is not one of {', '.join(_SAMPLERS)}")
    overrides = [f"tune.sampler.name={_SAMPLERS[method]}"]
    if "metric" in sweep:
        overrides.append(f"tune.objectives=['{_objective(sweep['metric'], path)}']")
    if "run_cap" in sweep:
        overrides.append(f"tune.trials={sweep['run_cap']}")
    rule = sweep.get("early_terminate")
    overrides += _early_terminate(rule, path)
    overrides += _parameters(sweep["parameters"], "", path)
    notes = [f"{name!r} {why}, and is not used" for name, why in _IGNORED.items() if name in sweep]
    if rule is not None and rule.get("strict") is not True:
        notes.append(
            "early_terminate.strict is not true; Optuna's hyperband ends trials as if it were, more of them than W&B's"
        )
    return overrides, notes


def _check_fields(entry: Mapping[str, Any], known: Collection[str], where: str, prefix: str = "") -> None:
    for key in entry:
        refused = _REFUSED.get(f"{prefix}{key}")
        if refused is not None:
            raise ConfigError(f"{where}{key}", f"has no counterpart: {refused}")
        if key not in known:
            raise ConfigError(f"{where}{key}", "is not understood", f"Understood: {', '.join(sorted(known))}.")


def _objective(metric: Any, path: Path) -> str:
    if not isinstance(metric, dict) or not isinstance(metric.get("name"), str):
        raise ConfigError(f"{path}: metric.name", "is missing", "Name a metric that a run logs, for example eval/nll.")
    _check_fields(metric, ("name", "goal"), f"{path}: metric.", "metric.")
    goal = metric.get("goal", "minimize")
    if goal not in _GOALS:
        raise ConfigError(f"{path}: metric.goal", f"{goal!r} is not one of {', '.join(_GOALS)}")
    return f"{_GOALS[goal]}:{metric['name']}"


def _early_terminate(rule: Any, path: Path) -> Iterator[str]:
    """W&B's hyperband as Optuna's, which always ends a trial as `strict` does."""
    if rule is None:
        return
    where = f"{path}: early_terminate"
    if not isinstance(rule, dict) or rule.get("type") != "hyperband":
        raise ConfigError(where, "W&B knows the type hyperband alone")
    _check_fields(rule, ("type", "min_iter", "max_iter", "eta", "s", "strict"), f"{where}.")
    if not isinstance(rule.get("strict", False), bool):
        raise ConfigError(f"{where}.strict", f"{rule['strict']!r} is neither true nor false")
    counts = {key: _count(rule[key], f"{where}.{key}") for key in ("min_iter", "max_iter", "eta", "s") if key in rule}
    if "s" in counts:
        if "max_iter" not in counts or "min_iter" in counts:
            raise ConfigError(f"{where}.s", "counts brackets down from max_iter, and goes with it alone")
        # The last of the brackets max_iter / eta, max_iter / eta², …
        counts["min_iter"] = max(1, counts["max_iter"] // counts.get("eta", 3) ** counts["s"])
    yield "tune.pruner.name=hyperband"
    if "max_iter" not in counts:  # W&B's brackets then go on as long as a run does
        yield "tune.pruner.options.max_evals=null"
    for theirs, ours in (("min_iter", "min_evals"), ("max_iter", "max_evals"), ("eta", "reduction")):
        if theirs in counts:
            yield f"tune.pruner.options.{ours}={counts[theirs]}"


def _count(value: Any, where: str) -> int:
    if not isinstance(value, int) or value < 1:
        raise ConfigError(where, f"{value!r} is no count")
    return value


def _parameters(parameters: Mapping[str, Any], prefix: str, path: Path) -> Iterator[str]:
    for name, entry in parameters.items():
        key = f"{prefix}{name}"
        where = f"{path}: parameters.{key}"
        if not isinstance(entry, dict):
            raise ConfigError(where, "is a mapping: value, values, or min and max")
        if isinstance(entry.get("parameters"), dict):
            _check_fields(entry, ("parameters",), f"{where}.")
            yield from _parameters(entry["parameters"], f"{key}.", path)
        else:
            yield f"{key}={_varied(entry, where, key)}"


def _varied(entry: Mapping[str, Any], where: str, key: str) -> str:
    """The value of one parameter's override."""
    kind = entry["distribution"] if "distribution" in entry else _implied(entry, where)
    if kind in _QUANTILES or kind in _INSTEAD:
        remedy = _own_space(entry, where, key) if kind in _QUANTILES else _INSTEAD[kind]
        raise ConfigError(f"{where}.distribution", f"{kind!r} has no counterpart in Optuna", remedy)
    if kind not in _DISTRIBUTIONS:
        known = ", ".join(_DISTRIBUTIONS)
        raise ConfigError(f"{where}.distribution", f"{kind!r} has no counterpart in Optuna; there are {known}")
    names = _DISTRIBUTIONS[kind]
    _check_fields(entry, ("distribution", *names), f"{where}.")
    for name in names:
        if name not in entry and name != "q":
            raise ConfigError(f"{where}.{name}", f"is missing, which the distribution {kind} needs")
    if kind == "constant":
        return _text(entry["value"])
    if kind == "categorical":
        if not isinstance(entry["values"], list) or not entry["values"]:
            raise ConfigError(f"{where}.values", "is a list of alternatives")
        alternatives = ",".join(_text(value) for value in entry["values"])
        return alternatives if None in entry["values"] else f"choice({alternatives})"  # which takes no null
    return _between(kind, entry, where)


def _own_space(entry: Mapping[str, Any], where: str, key: str) -> str:
    """How to draw a parameter in a function of one's own: a quantile by Optuna, and its value there."""
    given: dict[str, Any] = dict(_SHAPE) | {name: entry[name] for name in _SHAPE if name in entry}
    try:  # YAML reads 1e-4 as text
        shape = {name: float(number) if isinstance(number, str) else number for name, number in given.items()}
        value = _QUANTILES[entry["distribution"]].format(**shape)
    except ValueError as error:
        raise ConfigError(where, f"{', '.join(_SHAPE)} are numbers") from error
    needs = [name for name in ("math", "scipy.stats", "statistics") if f"{name}." in value]
    return (
        "Take the parameter out of the sweep, write this as own_space.py beside it, and add tune.space=own_space:space\n"
        f"import {', '.join(needs)}\n\n"
        "def space(trial, values):\n"
        f"    u = trial.suggest_float({f'{key}: quantile'!r}, 1e-9, 1 - 1e-9)\n"
        f"    return {{{key!r}: {value}}}"
    )


def _implied(entry: Mapping[str, Any], where: str) -> str:
    """The distribution that W&B takes where none is named."""
    if "value" in entry:
        return "constant"
    if "values" in entry:
        return "categorical"
    if "min" in entry and "max" in entry:
        is_whole = isinstance(entry["min"], int) and isinstance(entry["max"], int)
        return "int_uniform" if is_whole else "uniform"
    raise ConfigError(where, "needs value, values, or min and max")


def _between(kind: str, entry: Mapping[str, Any], where: str) -> str:
    try:  # YAML reads 1e-4 as text
        low, high, step = (float(entry[name]) if name in entry else 1.0 for name in ("min", "max", "q"))
    except (TypeError, ValueError) as error:
        raise ConfigError(where, "min, max and q are numbers") from error
    is_whole = all(number.is_integer() for number in (low, high, step))
    written = [str(round(number)) if is_whole else repr(number) for number in (low, high, step)]
    between = f"interval({written[0]},{written[1]})"
    if kind == "uniform":
        return between
    if kind == "int_uniform":
        return f"int({between})"
    if kind in ("log_uniform_values", "inv_log_uniform_values"):  # 1 / X is log-uniform where X is
        return f"tag(log,{between})"
    if kind == "log_uniform":  # its ends are exponents of e
        return f"tag(log,interval({math.exp(low)!r},{math.exp(high)!r}))"
    if kind == "inv_log_uniform":  # so are these, of 1 / X
        return f"tag(log,interval({math.exp(-high)!r},{math.exp(-low)!r}))"
    if kind == "q_log_uniform_values":
        if not is_whole or step != 1:
            raise ConfigError(
                f"{where}.q", "whole numbers in steps of 1 are all that Optuna has on a logarithmic scale"
            )
        return f"tag(log,int({between}))"
    end = str(round(high + step)) if is_whole and (high - low) % step == 0 else repr(high + step / 2)
    return f"range({written[0]},{end},{written[2]})"


def _text(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, list):
        return f"[{','.join(_text(each) for each in value)}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{_text(each)}' for key, each in value.items())}}}"
    return repr(value) if isinstance(value, (int, float, str)) else str(value)
