"""The tables that a config chooses from: `name -> ("module:function", Options)`; strings, so that nothing heavy loads."""

import difflib
import importlib
import inspect
import os
import sys
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from kajiya.config import options as o
from kajiya.config.setting import check_bounds
from kajiya.errors import ConfigError


@dataclass(frozen=True)
class Row:
    """One choice: where its function lives and the dataclass of its options."""

    target: str
    options: type
    takes: str = "tokens"
    """Of a loss: the batch it is a function of: tokens, masked, preference, feedback, labelled, seq2seq or prompts."""
    task: str = "causal"
    """Of a loss: the model's head: causal, masked, seq2seq, classes, or one number (score)."""
    measure: str | None = None
    """Of a loss: `module:function` that measures what it must know of the whole group before its micro-batches."""
    needs: str | None = None
    """Of a loss or a reward: `module:function` that loads, from its options, what else it reads."""
    has_reference: bool = False
    """Of a loss: it compares with log-probabilities under the model as it was before training."""


TABLES: Mapping[str, Mapping[str, Row]] = {
    "source": {
        "stdlib": Row("kajiya.data.sources:stdlib", o.StdlibSource),
        "stdlib_pairs": Row("kajiya.data.function_rows:stdlib_pairs", o.StdlibPairsSource),
        "stdlib_brackets": Row("kajiya.data.bracket_rows:stdlib_brackets", o.StdlibBracketsSource),
        "text": Row("kajiya.data.sources:text", o.TextSource),
        "jsonl": Row("kajiya.data.sources:jsonl", o.LinesSource),
        "csv": Row("kajiya.data.sources:csv_rows", o.TableSource),
        "parquet": Row("kajiya.data.columnar:parquet", o.TableSource),
        "arrow": Row("kajiya.data.columnar:arrow", o.TableSource),
        "hub": Row("kajiya.data.columnar:hub", o.HubSource),
        "mixture": Row("kajiya.data.mixture:mix", o.MixtureSource),
    },
    "loss": {
        "next_token": Row("kajiya.training.losses.next_token:next_token", o.NextTokenLoss),
        "distill": Row(
            "kajiya.training.losses.distill:distill",
            o.DistillLoss,
            needs="kajiya.training.losses.distill:load_teacher",
        ),
        "masked_lm": Row("kajiya.training.losses.infill:masked_lm", o.MaskedLoss, takes="masked", task="masked"),
        "seq2seq": Row("kajiya.training.losses.infill:seq2seq", o.Seq2SeqLoss, takes="seq2seq", task="seq2seq"),
        "dpo": Row("kajiya.training.losses.preference:dpo", o.DPOLoss, takes="preference", has_reference=True),
        "orpo": Row("kajiya.training.losses.preference:orpo", o.ORPOLoss, takes="preference"),
        "simpo": Row("kajiya.training.losses.preference:simpo", o.SimPOLoss, takes="preference"),
        "reward": Row("kajiya.training.losses.preference:reward", o.RewardLoss, takes="preference", task="score"),
        "kto": Row(
            "kajiya.training.losses.feedback:kto",
            o.KTOLoss,
            takes="feedback",
            measure="kajiya.training.losses.feedback:kto_reference_point",
            has_reference=True,
        ),
        "classify": Row("kajiya.training.losses.labelled:classify", o.ClassifyLoss, takes="labelled", task="classes"),
        "regress": Row("kajiya.training.losses.labelled:regress", o.RegressLoss, takes="labelled", task="score"),
        "grpo": Row("kajiya.training.losses.policy:grpo", o.GRPOLoss, takes="prompts"),
    },
    "reward": {
        "exact_match": Row("kajiya.training.rewards:exact_match", o.ExactMatchReward),
        "regex": Row("kajiya.training.rewards:regex", o.RegexReward),
        "unit_test": Row("kajiya.training.rewards:unit_test", o.UnitTestReward),
        "model": Row(
            "kajiya.training.rewards:by_model", o.ModelReward, needs="kajiya.training.rewards:load_reward_model"
        ),
    },
    "adapter": {
        "none": Row("kajiya.models.adapt:everything", o.NoOptions),
        "lora": Row("kajiya.models.adapt:lora", o.LoraOptions),
        "dora": Row("kajiya.models.adapt:dora", o.LoraOptions),
        "ia3": Row("kajiya.models.adapt:ia3", o.IA3Options),
        "prefix": Row("kajiya.models.adapt:prefix", o.PrefixOptions),
        "prompt": Row("kajiya.models.adapt:prompt", o.PromptOptions),
        "freeze": Row("kajiya.models.adapt:freeze", o.FreezeOptions),
        "load": Row("kajiya.models.adapt:load", o.LoadOptions),
    },
    "optimizer": {
        "adafactor": Row("kajiya.training.optimizers:adafactor", o.AdafactorOptions),
        "adamw": Row("kajiya.training.optimizers:adamw", o.AdamWOptions),
        "adamw_8bit": Row("kajiya.training.optimizers:adamw_8bit", o.AdamW8bitOptions),
        "lion": Row("kajiya.training.optimizers:lion", o.LionOptions),
        "muon": Row("kajiya.training.optimizers:muon", o.MuonOptions),
        "schedule_free": Row("kajiya.training.optimizers:schedule_free", o.ScheduleFreeOptions),
        "sgd": Row("kajiya.training.optimizers:sgd", o.SGDOptions),
    },
    "schedule": {
        "constant": Row("kajiya.training.schedules:constant", o.NoOptions),
        "cosine": Row("kajiya.training.schedules:cosine", o.CosineOptions),
        "inverse_sqrt": Row("kajiya.training.schedules:inverse_sqrt", o.InverseSqrtOptions),
        "linear": Row("kajiya.training.schedules:linear", o.LinearOptions),
        "wsd": Row("kajiya.training.schedules:wsd", o.WSDOptions),
    },
    "tracker": {
        "mlflow": Row("kajiya.run.trackers.mlflow:MLflowTracker", o.MLflowOptions),
        "tensorboard": Row("kajiya.run.trackers.tensorboard:TensorBoardTracker", o.TensorBoardOptions),
        "wandb": Row("kajiya.run.trackers.wandb:WandbTracker", o.WandbOptions),
    },
    "sampler": {
        "grid": Row("kajiya.flows.tune_search:random", o.NoOptions),
        "random": Row("kajiya.flows.tune_search:random", o.NoOptions),
        "tpe": Row("kajiya.flows.tune_search:tpe", o.TPEOptions),
        "cmaes": Row("kajiya.flows.tune_search:cmaes", o.CMAESOptions),
        "gp": Row("kajiya.flows.tune_search:gp", o.GPOptions),
        "nsga2": Row("kajiya.flows.tune_search:nsga2", o.NSGA2Options),
    },
    "pruner": {
        "none": Row("kajiya.flows.tune_search:no_pruner", o.NoOptions),
        "median": Row("kajiya.flows.tune_search:median", o.MedianPruner),
        "asha": Row("kajiya.flows.tune_search:asha", o.ASHAPruner),
        "hyperband": Row("kajiya.flows.tune_search:hyperband", o.HyperbandPruner),
        "wilcoxon": Row("kajiya.flows.tune_search:wilcoxon", o.WilcoxonPruner),
    },
    "launcher": {
        "process": Row("kajiya.flows.launch:by_process", o.NoOptions),
        "joblib": Row("kajiya.flows.launch:by_joblib", o.NoOptions),
        "ray": Row("kajiya.flows.launch:by_ray", o.RayLauncher),
    },
    "metric": {
        "exact_match": Row("kajiya.evals.metrics:exact_match", o.NoOptions),
        "f1": Row("kajiya.evals.metrics:token_f1", o.NoOptions),
        "bleu": Row("kajiya.evals.metrics:bleu", o.NoOptions),
        "chrf": Row("kajiya.evals.metrics:chrf", o.NoOptions),
        "rouge_1": Row("kajiya.evals.metrics:rouge_1", o.NoOptions),
        "rouge_2": Row("kajiya.evals.metrics:rouge_2", o.NoOptions),
        "rouge_l": Row("kajiya.evals.metrics:rouge_l", o.NoOptions),
        "pass_at_k": Row("kajiya.evals.metrics:pass_at_k", o.NoOptions),
        "judge": Row("kajiya.evals.metrics:judge", o.NoOptions),
        "accuracy": Row("kajiya.evals.metrics_labels:accuracy", o.NoOptions),
        "accuracy_by_byte": Row("kajiya.evals.metrics_labels:accuracy_by_byte", o.NoOptions),
        "macro_f1": Row("kajiya.evals.metrics_labels:macro_f1", o.NoOptions),
        "auroc": Row("kajiya.evals.metrics_labels:auroc", o.NoOptions),
        "ece": Row("kajiya.evals.metrics_labels:calibration_error", o.NoOptions),
        "rmse": Row("kajiya.evals.metrics_labels:rmse", o.NoOptions),
        "mae": Row("kajiya.evals.metrics_labels:mae", o.NoOptions),
        "r2": Row("kajiya.evals.metrics_labels:r2", o.NoOptions),
        "recall_at_k": Row("kajiya.evals.metrics_labels:recall_at_k", o.NoOptions),
        "clustering": Row("kajiya.evals.metrics_labels:clustering", o.NoOptions),
    },
    "engine": {
        "torch": Row("kajiya.serving.loading:load_engine", o.NoOptions),
        "vllm": Row("kajiya.serving.vllm:serve_vllm", o.NoOptions),
    },
}
"""Every table of names. A name with a colon, `my_pkg.mod:fn`, stands for the user's own function in any of them."""


def loss_row(name: str) -> Row:
    """The row of a loss; a user's own takes packed tokens of a causal model."""
    return Row(name, o.NoOptions) if ":" in name else TABLES["loss"][name]


def nearest(word: str, known: typing.Iterable[str]) -> str:
    """A sentence that suggests the known word nearest to `word`, or an empty string."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"did you mean {matches[0]!r}?" if matches else ""


def not_one_of(value: object, known: typing.Iterable[str]) -> str:
    """`'muno' is not one of adamw, muon; did you mean 'muon'?`"""
    names = sorted(known)
    hint = nearest(value, names) if isinstance(value, str) else ""
    said = "null" if value is None else repr(value)
    return f"{said} is not one of {', '.join(names)}" + (f"; {hint}" if hint else "")


def packaged_tasks() -> dict[str, Path]:
    """YAML files of the packaged tasks by name."""
    folder = Path(str(resources.files("kajiya").joinpath("conf", "tasks")))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def check_task(name: str, field: str) -> None:
    """Raise `ConfigError` naming `field` unless `name` is a packaged task, lm-eval's, or the path of a YAML file."""
    known = packaged_tasks()
    if name not in known and not name.startswith("lm-eval:") and not name.endswith((".yaml", ".yml")):
        remedy = "A task of your own is the path of its YAML; one of lm-eval is lm-eval:NAME."
        raise ConfigError(field, not_one_of(name, known), remedy)


def resolve(table: str, name: str, given: Mapping[str, Any], field: str) -> tuple[Callable[..., Any], Any]:
    """The function that `name` stands for in `table`, and its options.

    Options are an instance of the row's dataclass, or, for a user's own function, a dict that fits its signature.
    Raises `ConfigError` naming `field` for an unknown name, an unknown option, a wrong type or a value out of range.
    """
    checked = check_choice(table, name, given, field)
    if ":" in name:
        return import_target(name, field), checked
    return import_target(TABLES[table][name].target, field), checked


def check_choice(table: str, name: str, given: Mapping[str, Any], field: str) -> Any:
    """The options of a choice, checked without loading the function unless it is the user's own."""
    if ":" in name:
        return _check_signature(import_target(name, field), given, f"{field}.options")
    rows = TABLES[table]
    if name not in rows:
        raise ConfigError(
            f"{field}.name",
            not_one_of(name, rows),
            "A function of your own is named `package.module:function`.",
        )
    return check_options(rows[name].options, given, f"{field}.options")


def import_target(target: str, field: str) -> Callable[..., Any]:
    """Import `package.module:attribute`; modules in the working directory are found too."""
    module_name, _, attribute = target.partition(":")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and module_name.split(".")[0] == error.name.split(".")[0]:
            raise ConfigError(
                field, f"no module {module_name!r}", f"It is looked for on the Python path and in {here}."
            ) from error
        raise
    found = vars(module).get(attribute)
    if not callable(found):
        hint = nearest(attribute, vars(module))
        raise ConfigError(field, f"{module_name!r} has no function {attribute!r}" + (f"; {hint}" if hint else ""))
    return typing.cast(Callable[..., Any], found)


def check_options(options: type, given: Mapping[str, Any], path: str) -> Any:
    """An instance of a dataclass of options from a mapping: names, types, bounds and choices checked."""
    if not isinstance(given, Mapping):
        raise ConfigError(path, f"{given!r} is no mapping of settings")
    known = {item.name: item for item in fields(options)}
    hints = typing.get_type_hints(options)
    values = {}
    for key, value in given.items():
        if key not in known:
            hint = nearest(key, known)
            allowed = ", ".join(known) or "none"
            if hint:
                raise ConfigError(f"{path}.{key}", f"unknown option; {hint}")
            remedy = f"Where a recipe sets it and another choice was made, ~{path}.{key} takes it away."
            raise ConfigError(f"{path}.{key}", f"unknown option (known: {allowed})", remedy)
        values[key] = _as_type(value, hints[key], f"{path}.{key}")
    for key, item in known.items():
        if key not in values and item.default is MISSING and item.default_factory is MISSING:
            raise ConfigError(f"{path}.{key}", "is required and has no default")
    built = options(**values)
    check_bounds(built, path)
    return built


def _as_type(value: Any, hint: Any, path: str) -> Any:
    """`value` as the annotated type: an int is taken for a float, a list for a tuple; nothing else is converted."""
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    plain = tuple(typing.get_origin(kind) or kind for kind in allowed)
    if isinstance(value, bool) and bool not in plain:
        raise ConfigError(path, f"{value!r} is not of type {_type_name(allowed)}")
    if isinstance(value, list) and tuple in plain and list not in plain:
        # YAML and JSON know lists alone.
        element = typing.get_args(allowed[plain.index(tuple)])[0]
        return tuple(_as_type(each, element, path) for each in value)
    if isinstance(value, int) and float in plain and int not in plain:
        return float(value)
    if isinstance(value, str) and float in plain and str not in plain:
        try:
            return float(value)
        except ValueError:
            pass
    if not isinstance(value, plain):
        raise ConfigError(path, f"{value!r} is not of type {_type_name(allowed)}")
    return value


def _type_name(allowed: tuple[Any, ...]) -> str:
    return " or ".join("none" if kind is type(None) else getattr(kind, "__name__", str(kind)) for kind in allowed)


def _check_signature(function: Callable[..., Any], given: Mapping[str, Any], path: str) -> dict[str, Any]:
    try:
        parameters = inspect.signature(function).parameters
    except ValueError as error:
        raise ConfigError(
            path, f"{function.__module__}:{function.__qualname__} does not say which arguments it takes"
        ) from error
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    known = [n for n, p in parameters.items() if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    for key in given:
        if key not in known and not takes_any:
            hint = nearest(key, known)
            raise ConfigError(
                f"{path}.{key}",
                f"{function.__module__}:{function.__qualname__} takes no such argument" + (f"; {hint}" if hint else ""),
                f"It takes: {', '.join(known) or 'nothing'}.",
            )
    return dict(given)


def is_options(value: Any) -> bool:
    """Whether `value` is the options dataclass of one of the project's own rows (a user's own are a dict)."""
    return is_dataclass(value) and not isinstance(value, type)
