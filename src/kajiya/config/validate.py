"""What a config must satisfy beyond its types: bounds, choices, options of each chosen row, combinations."""

import re

from kajiya.config.loss_effects import require_loss_effect
from kajiya.config.quantities import parse_count
from kajiya.config.rewards import require_readable
from kajiya.config.schema import Config, ModelConfig
from kajiya.config.search import check_search
from kajiya.config.setting import check_bounds
from kajiya.config.tables import TABLES, check_choice, check_task, loss_row, nearest
from kajiya.errors import ConfigError

_BEGUN_KINDS = {"bigram": ("llama", "mistral", "qwen2", "qwen3"), "induction": ("llama", "mistral", "qwen2")}
"""Architectures whose first logits are head · norm(embedding) when their blocks begin as the identity; and of these, those
whose attention compares queries and keys as they are projected."""
CHECKS = (
    "targets",
    "isolation",
    "accumulation",
    "trainable",
    "reload",
    "start",
    "learning",
    "schedule",
    "memory",
    "disjoint",
)
"""Checks before the first step, in their order; names that preflight.skip can hold."""
_ROLES = ("matrix", "embedding", "head", "vector")
_FORMATS = {
    "tokens": ("text", "instruction", "chat"),
    "masked": ("text",),
    "preference": ("preference",),
    "feedback": ("feedback",),
    "labelled": ("labelled",),
    "seq2seq": ("seq2seq",),
    "prompts": ("prompt", "instruction"),
}
"""Formats of rows by what a loss takes."""
_DEVICE = r"auto|cpu|cuda(:\d+)?|mps"
_LENGTHS = ("steps", "epochs", "minutes")
_NEEDS_OUTPUTS = ("dora", "ia3", "prefix", "prompt")
"""Adapters that are trained through what the frozen blocks add to the residual stream."""


def validate(config: Config) -> None:
    """Raise `ConfigError` for the first thing that cannot be right."""
    check_bounds(config)
    if not re.fullmatch(r"[\w-][\w.-]*", config.name):
        remedy = "It is the name of a folder: letters, digits, _, - and ., the first no dot."
        raise ConfigError("name", f"{config.name!r} cannot name a run", remedy)
    for field, device in (("train.device", config.train.device), ("serve.device", config.serve.device)):
        if not re.fullmatch(_DEVICE, device):
            raise ConfigError(field, f"{device!r} is not one of auto, cpu, cuda, cuda:0, mps")
    for task in config.train.tasks:
        check_task(task, "train.tasks")
    check_choice("source", config.data.source.name, config.data.source.options, "data.source")
    _check_rows(config)
    check_choice("adapter", config.adapter.name, config.adapter.options, "adapter")
    check_choice("optimizer", config.optim.name, config.optim.options, "optim")
    check_choice("schedule", config.schedule.name, config.schedule.options, "schedule")
    require_loss_effect(config, check_choice("loss", config.train.loss.name, config.train.loss.options, "train.loss"))
    check_choice("engine", config.serve.engine, {}, "serve.engine")
    interval = config.serve.stream_interval
    is_number = isinstance(interval, int) and not isinstance(interval, bool)
    if interval < 1 if is_number else interval != "auto":  # type: ignore[operator]
        raise ConfigError("serve.stream_interval", f"{interval!r} is neither a number of steps, 1 or more, nor auto")
    check_choice("sampler", config.tune.sampler.name, config.tune.sampler.options, "tune.sampler")
    check_choice("pruner", config.tune.pruner.name, config.tune.pruner.options, "tune.pruner")
    check_choice("launcher", config.tune.launcher.name, config.tune.launcher.options, "tune.launcher")
    for name, options in config.track.options.items():
        check_choice("tracker", name, options, "track")
    for name in config.track.trackers:
        check_choice("tracker", name, config.track.options.get(name) or {}, "track")
    for name in config.preflight.skip:
        if name not in CHECKS:
            hint = nearest(name, CHECKS)
            raise ConfigError(
                "preflight.skip", f"{name!r} is no check; there is: {', '.join(CHECKS)}" + (f"; {hint}" if hint else "")
            )
    _check_spikes(config)
    _check_optimizer(config)
    _check_portions(config)
    _check_length(config)
    _check_growth(config)
    _check_kind(config)
    _check_policy(config)
    _check_model(config)
    check_search(config)
    _check_adapter(config)
    for name in config.eval.baselines:
        if name not in ("xz", "xz-primed"):
            raise ConfigError("eval.baselines", f"{name!r} is not one of xz, xz-primed")


_FALLING = ("cosine", "inverse_sqrt", "linear", "wsd")
"""Schedules of the table whose rate falls."""


def _check_spikes(config: Config) -> None:
    if config.train.on_spike != "tell" and config.train.spike_sigmas is None:
        raise ConfigError(
            "train.on_spike",
            f"{config.train.on_spike} changes nothing with train.spike_sigmas=null, which looks for no leap of the loss",
            "Set train.spike_sigmas=8, or leave train.on_spike at tell.",
        )


def _check_optimizer(config: Config) -> None:
    for name in config.optim.decayed:
        if name not in _ROLES:
            raise ConfigError("optim.decayed", f"{name!r} is not one of {', '.join(_ROLES)}")
    if config.optim.name == "schedule_free" and config.train.ema_decay is not None:
        raise ConfigError(
            "train.ema_decay", "schedule_free averages the weights by itself", "Set train.ema_decay=null."
        )
    if config.optim.name == "schedule_free" and config.schedule.name in _FALLING:
        raise ConfigError(
            "schedule.name",
            f"{config.schedule.name} lowers the rate, in whose place optim.name=schedule_free averages the weights",
            "Set schedule=constant.",
        )


def _check_rows(config: Config) -> None:
    longest, row = config.data.max_tokens, config.data.row_tokens
    if longest is not None and longest > row:
        raise ConfigError(
            "data.max_tokens",
            f"{longest} is more than a row holds (data.row_tokens={row})",
            "Raise data.row_tokens, or set data.max_tokens=null.",
        )
    if config.data.keep and loss_row(config.train.loss.name).takes != "prompts":
        raise ConfigError(
            "data.keep",
            f"keeps columns for rewards, and the loss {config.train.loss.name} has none",
            "Set data.keep=[].",
        )
    heldout = config.data.heldout_source
    if heldout.name is not None:
        check_choice("source", heldout.name, heldout.options, "data.heldout_source")
        if config.data.heldout_by != "name":
            raise ConfigError(
                "data.heldout_by",
                f"{config.data.heldout_by} changes nothing where the held-out rows have a source of their own",
                "Leave it at name.",
            )
    elif heldout.options or heldout.columns:
        raise ConfigError("data.heldout_source.name", "is not set, but data.heldout_source.options or columns are")


def _check_portions(config: Config) -> None:
    train = config.train
    micro = train.micro_batch
    if (isinstance(micro, str) and micro != "auto") or (isinstance(micro, int) and micro < 1):
        raise ConfigError("train.micro_batch", f"{micro!r} is neither a number of rows, 1 or more, nor auto")
    if train.batch_rows is None and micro == "auto":
        raise ConfigError(
            "train.batch_rows",
            "is null, and train.micro_batch=auto needs the rows of a step, which it keeps",
            "For example train.batch_rows=64.",
        )
    if train.batch_rows is not None and train.accumulate != 1:
        raise ConfigError(
            "train.batch_rows",
            f"={train.batch_rows} and train.accumulate={train.accumulate} both say how many rows a step has",
            "Set train.accumulate=1.",
        )
    if train.batch_rows is not None and isinstance(micro, int) and train.batch_rows % micro:
        raise ConfigError("train.batch_rows", f"{train.batch_rows} is no multiple of train.micro_batch={micro}")


def _check_length(config: Config) -> None:
    given = [name for name in _LENGTHS if getattr(config.train, name) is not None]
    if len(given) != 1:
        said = " and ".join(f"train.{name}" for name in given) or "none of them"
        raise ConfigError(
            "train",
            f"exactly one of {', '.join(f'train.{name}' for name in _LENGTHS)} says how long; given: {said}",
            "Set the others to null, for example train.steps=200 train.minutes=null.",
        )


def _check_kind(config: Config) -> None:
    takes = loss_row(config.train.loss.name).takes
    if config.data.format != "auto":
        require_format(config.train.loss.name, config.data.format, "data.format")
    if config.train.row_growth and takes != "tokens":
        raise ConfigError(
            "train.row_growth",
            f"cuts rows of text, and the loss {config.train.loss.name} takes whole examples",
            "Set train.row_growth=[].",
        )
    if config.model.init != "normal" and loss_row(config.train.loss.name).task != "causal":
        raise ConfigError(
            "model.init",
            f"{config.model.init} is for a model that says the next token, and the loss {config.train.loss.name} trains another",
            "Set model.init=normal.",
        )


def _check_policy(config: Config) -> None:
    if loss_row(config.train.loss.name).takes != "prompts":
        return
    require_readable(config, config.data.format)
    if ":" in config.model.name:
        raise ConfigError(
            "model.name",
            f"{config.train.loss.name} draws answers with the engine that serves, which drives models of Transformers",
            "Choose an architecture that Transformers knows.",
        )
    if config.adapter.name in ("prefix", "prompt"):
        raise ConfigError(
            "adapter.name",
            f"{config.adapter.name} is no change of weights that could be handed to the engine that draws the answers",
            "Set adapter.name=lora.",
        )
    if config.data.render.train_on == "all":
        raise ConfigError(
            "data.render.train_on",
            f"all leaves no prompt for {config.train.loss.name} to answer",
            "Set it to assistant.",
        )


def require_format(loss: str, form: str, field: str) -> None:
    """Raise `ConfigError` naming `field` where the loss is no function of rows of that format."""
    takes = loss_row(loss).takes
    if form not in _FORMATS[takes]:
        fitting = sorted(name for name, row in TABLES["loss"].items() if form in _FORMATS[row.takes])
        answered = "Say which column answers the prompts (data.columns.completion); or, f" if form == "prompt" else "F"
        raise ConfigError(
            field,
            f"{form} rows are nothing that the loss {loss} can learn from; it takes {' or '.join(_FORMATS[takes])}",
            f"{answered}or {form} rows set train.loss.name to one of {', '.join(fitting)}.",
        )


def _check_growth(config: Config) -> None:
    growth = config.train.row_growth
    if list(growth) != sorted(set(growth)) or not all(0 < share < 1 for share in growth):
        raise ConfigError("train.row_growth", f"{list(growth)} are not rising shares between 0 and 1")
    pieces = 2 ** len(growth)
    if config.data.row_tokens % pieces:
        raise ConfigError(
            "train.row_growth",
            f"data.row_tokens={config.data.row_tokens} cannot be cut into {pieces} rows of one length",
        )


def _check_adapter(config: Config) -> None:
    adapter, quantize = config.adapter, config.model.quantize
    if quantize != "none" and adapter.name in ("none", "freeze"):
        raise ConfigError(
            "model.quantize",
            f"{quantize} weights are frozen, and adapter.name=none trains them"
            if adapter.name == "none"
            else f"what adapter.name=freeze saves is a whole model, and {quantize} weights cannot be saved as one",
            "Set adapter.name=lora, or model.quantize=none.",
        )
    takes_a_part = adapter.options.get("init") in ("pissa", "olora")
    if config.model.zero_outputs and config.model.path is None and (adapter.name in _NEEDS_OUTPUTS or takes_a_part):
        raise ConfigError(
            "model.zero_outputs",
            f"leaves adapter.name={adapter.name} nothing to begin with: what frozen blocks add is zero",
            "Set model.zero_outputs=false model.init=normal, or begin with trained weights (model.path).",
        )
    if adapter.name == "dora" and quantize == "int8":
        raise ConfigError(
            "model.quantize",
            "int8 weights give their values once, and dora asks for them at every pass",
            "Set model.quantize=nf4, or adapter.name=lora.",
        )
    if takes_a_part and quantize != "none":
        raise ConfigError(
            "adapter.options.init",
            f"{adapter.options['init']} takes a part out of the weights, which {quantize} weights do not let go",
            "Set adapter.options.init=default, or model.quantize=none.",
        )
    if adapter.name == "prefix" and config.train.gradient_checkpointing != "off":
        raise ConfigError(
            "train.gradient_checkpointing", "does not go with adapter.name=prefix, whose keys and values are a cache"
        )


def _check_model(config: Config) -> None:
    model = config.model
    if model.future_heads:
        _check_future(config)
    if model.stand_in and (model.path is None or model.hidden_size is None or model.n_layers is None):
        raise ConfigError(
            "model.stand_in",
            "stands in for the weights of model.path, whose shape model.hidden_size and model.n_layers must say",
        )
    if model.path is not None and config.tokenizer.path is None:
        raise ConfigError(
            "tokenizer.path",
            f"is null, which trains a new tokenizer, but the weights of model.path={model.path} know only the ids of their own",
            f"Set tokenizer.path={model.path}.",
        )
    if model.n_params is not None:
        parse_count(model.n_params, "model.n_params")
    elif model.path is None and ":" not in model.name and None in (model.hidden_size, model.n_layers):
        raise ConfigError(
            "model.n_params",
            "is null, so model.hidden_size and model.n_layers must both be set",
            "For example model.n_params=6M, which derives them.",
        )
    if config.data.row_tokens > model.max_positions:
        raise ConfigError(
            "data.row_tokens",
            f"{config.data.row_tokens} is longer than model.max_positions={model.max_positions}",
            "Raise model.max_positions or shorten the row.",
        )
    if model.init != "normal":
        _check_beginning(model)
    if model.hidden_size and model.n_heads and model.hidden_size % (2 * model.n_heads):
        raise ConfigError(
            "model.n_heads", f"model.hidden_size={model.hidden_size} is not an even multiple of {model.n_heads} heads"
        )
    if model.n_heads and model.n_kv_heads and model.n_heads % model.n_kv_heads:
        raise ConfigError(
            "model.n_kv_heads", f"{model.n_kv_heads} does not divide model.n_heads={model.n_heads} evenly"
        )


def _check_future(config: Config) -> None:
    if config.train.loss.name != "next_token":
        raise ConfigError(
            "model.future_heads", f"learn with the loss next_token, not with {config.train.loss.name}", "Set it to 0."
        )
    if config.adapter.name not in ("none", "freeze"):
        raise ConfigError(
            "model.future_heads",
            f"are trained with the model, whose weights adapter.name={config.adapter.name} freezes",
        )
    if config.train.row_growth:
        raise ConfigError("model.future_heads", "count targets in whole rows", "Set train.row_growth=[].")


def _check_beginning(model: ModelConfig) -> None:
    if model.tied or not model.zero_outputs or model.path is not None or ":" in model.name:
        raise ConfigError(
            "model.init",
            f"{model.init} is for a model from scratch whose blocks begin as the identity and whose head is its own",
            "Set model.tied=false model.zero_outputs=true, or model.init=normal.",
        )
    if model.name not in _BEGUN_KINDS[model.init]:
        raise ConfigError(
            "model.init",
            f"{model.init} is known to fit {', '.join(_BEGUN_KINDS[model.init])}, not {model.name}",
            "Set model.init=normal.",
        )
