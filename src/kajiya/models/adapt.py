"""What of a model is trained: every weight, an adapter of PEFT's beside frozen ones, or a part.

PEFT's layers are put into the model in place: it stays the Transformers model that it was, so that losses, evaluation and the
chunked cross-entropy need not know of them.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kajiya.config.options import (
    FreezeOptions,
    IA3Options,
    LoadOptions,
    LoraOptions,
    NoOptions,
    PrefixOptions,
    PromptOptions,
)
from kajiya.config.schema import AdapterConfig
from kajiya.config.tables import is_options, resolve
from kajiya.errors import ConfigError
from kajiya.models.adapter_files import load_adapter
from kajiya.models.adapter_targets import Targets, compiled, ia3_targets, keeps_transposed, lora_targets
from kajiya.models.injection import BEGINNING, adapters_of, inject, is_wrapper, layers
from kajiya.models.quantized import count_params, form_of, is_quantized, quantize
from kajiya.models.tasks import CLASS_HEADS
from kajiya.models.virtual_tokens import (
    attach,
    begin_as,
    embeddings,
    filled_config,
    require_place,
    virtual_tokens,
)

Encode = Callable[[str], list[int]]
"""Token ids of a text, without those that a tokenizer puts around it."""


def transform(
    module: nn.Module, config: AdapterConfig, quantized: str, seed: int, encode: Encode | None = None
) -> dict[str, Any]:
    """Quantize the weights (`model.quantize`) and apply the adapter, in place; returns what was derived.

    Random beginnings are a function of `seed` alone; a prompt's text begins as the tokens that `encode` gives. Raises
    `ConfigError` when nothing would be trained.
    """
    quantize(module, form_of(module, quantized))
    function, options = resolve("adapter", config.name, config.options, "adapter")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if is_options(options):
            function(module, options)
        else:
            function(module, **options)
    if isinstance(options, PromptOptions) and options.text is not None:
        assert encode is not None, "a text cannot be read without a tokenizer"
        begin_as(module, encode(options.text), "adapter.options.text")
    n_trainable = count_params(module, trainable=True)
    if n_trainable == 0:
        raise ConfigError("adapter", f"{config.name} leaves nothing to train")
    return {"model.n_params": count_params(module), "adapter.n_trainable": n_trainable}


def rate_ratios(module: nn.Module, config: AdapterConfig) -> dict[str, float]:
    """Learning rate of each trained parameter over the peak rate, where it is another (LoRA+)."""
    if "lr_ratio" not in config.options:
        return {}
    second = re.compile(r"\.(lora_B|lora_embedding_B)\b")
    named = ((name, each) for name, each in module.named_parameters() if each.requires_grad)
    return {name: float(config.options["lr_ratio"]) for name, _ in named if second.search(name)}


def has_adapter(module: nn.Module) -> bool:
    """Whether the model has an adapter beside its own weights (a partly frozen model has none)."""
    return bool(vars(module).get("peft_config"))


def trains_tokens(module: Any) -> bool:
    """Whether the adapter trains embedding and output head whole, and so brings along the rows that they have for new tokens."""
    parts = (module.get_input_embeddings(), module.get_output_embeddings())
    return all(part is None or is_wrapper(part) for part in parts)


def adapter_names(module: nn.Module) -> list[str]:
    """Names of the adapters that stand beside the model's weights."""
    return list(vars(module).get("peft_config") or ())


def use_adapter(module: nn.Module, name: str) -> None:
    """Make the adapter of that name the one in force. Raises `ConfigError` when there is none."""
    known = adapter_names(module)
    if name not in known:
        raise ConfigError("adapter", f"{name!r} is no adapter of this model; there is: {', '.join(known) or 'none'}")
    for part in layers(module):
        # A module that is trained whole, or in rows, by another adapter alone is the model's own now.
        own = name if name in adapters_of(part) else []
        part.set_adapter(own, inference_mode=not _is_trained(part))


@contextmanager
def adapter_off(module: nn.Module) -> Iterator[None]:
    """Within the block the model computes as its base, as it was before any training (the reference of DPO and its kin).

    For no-grad passes: what the adapter trains keeps its gradients and its state. Raises `ConfigError` without an adapter.
    """
    if not has_adapter(module):
        raise ConfigError("adapter", "there is none to turn off: the model's own weights are trained")
    virtual = virtual_tokens(module)
    parts = list(layers(module))
    trained = [(each, each.requires_grad) for part in parts for each in part.parameters()]
    swapped = [_begin(part) for part in parts if _takes_from_base(part)]
    off = [part for part in parts if not _takes_from_base(part)]
    try:
        if virtual is not None:
            virtual.is_off = True
        for part in off:
            part.enable_adapters(False)
        if swapped:
            # Autocast keeps its casts of a trained matrix, and would take them for the values that stand in it now.
            torch.clear_autocast_cache()
        yield
    finally:
        if virtual is not None:
            virtual.is_off = False
        for part in off:
            part.enable_adapters(True)
        for restore in swapped:
            restore()
        if swapped:
            torch.clear_autocast_cache()
        for each, is_trained in trained:
            each.requires_grad_(is_trained)


def _takes_from_base(part: Any) -> bool:
    """Whether the adapter's beginning was taken out of the weights (PiSSA, OLoRA), which are incomplete without it."""
    return BEGINNING[0] in part._buffers


def _begin(part: Any) -> Callable[[], None]:
    """Put the adapter back to its beginning; returns what undoes it."""
    matrices = [part.lora_A["default"].weight, part.lora_B["default"].weight]
    now = [each.data for each in matrices]
    for each, value in zip(matrices, (part._buffers[buffer] for buffer in BEGINNING), strict=True):
        each.data = value.to(each.dtype)

    def restore() -> None:
        for each, value in zip(matrices, now, strict=True):
            each.data = value

    return restore


def _is_trained(part: nn.Module) -> bool:
    return any(each.requires_grad for each in part.parameters())


# ---------------------------------------------------------------- rows of the table


def everything(module: nn.Module, options: NoOptions) -> None:
    """Every weight is trained."""


def freeze(module: nn.Module, options: FreezeOptions) -> None:
    """Only parameters in whose name the pattern is found are trained."""
    pattern = compiled(options.train, "adapter.options.train")
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(bool(pattern.search(name)))
    if not any(parameter.requires_grad for parameter in module.parameters()):
        names = ", ".join(name for name, _ in list(module.named_parameters())[:4])
        raise ConfigError("adapter.options.train", f"{options.train!r} is found in no parameter's name ({names} …)")


def lora(module: nn.Module, options: LoraOptions) -> None:
    """Low-rank matrices beside the chosen linear layers."""
    _lora(module, options, is_dora=False)


def dora(module: nn.Module, options: LoraOptions) -> None:
    """The same, with the magnitude of each output trained apart from its direction."""
    _lora(module, options, is_dora=True)


def ia3(module: nn.Module, options: IA3Options) -> None:
    """Factors on keys, values and the inside of the feed-forward block, which begin at one."""
    from peft import IA3Config

    outputs = ia3_targets(module, options.targets, "targets")
    inputs = [] if options.feedforward is None else ia3_targets(module, options.feedforward, "feedforward")
    config = IA3Config(
        target_modules=[*outputs, *(name for name in inputs if name not in outputs)],
        feedforward_modules=inputs,
        fan_in_fan_out=any(keeps_transposed(module.get_submodule(name)) for name in outputs),
        task_type=_task(module),
        modules_to_save=_new_heads(module) or None,
    )
    inject(module, config, "default")


def prefix(module: nn.Module, options: PrefixOptions) -> None:
    """Keys and values before each document, in every layer; of an encoder–decoder before what the decoder writes."""
    from peft import PrefixTuningConfig

    require_place(module, "prefix", _task(module))
    heads = _new_heads(module) or None
    given = PrefixTuningConfig(num_virtual_tokens=options.n_tokens, task_type=_task(module), modules_to_save=heads)
    config = filled_config(module, given)
    # Keys and values of a model at its beginning are about this large; a standard normal would drown the text.
    weight = torch.randn(options.n_tokens, config.num_layers * 2 * config.token_dim) * 0.02
    attach(module, config, weight)


def prompt(module: nn.Module, options: PromptOptions) -> None:
    """Embeddings before each document (an encoder–decoder's input), which begin as random tokens', or as a text's (`transform`)."""
    from peft import PromptTuningConfig

    require_place(module, "prompt", _task(module))
    given = PromptTuningConfig(
        num_virtual_tokens=options.n_tokens,
        task_type=_task(module),
        modules_to_save=_new_heads(module) or None,
        num_transformer_submodules=1,  # an encoder–decoder's second half would be read by nothing
    )
    config = filled_config(module, given)
    n_known = len(module.get_input_embeddings().weight)  # type: ignore[operator]
    attach(module, config, embeddings(module, torch.randint(0, n_known, (options.n_tokens,))))


def load(module: nn.Module, options: LoadOptions) -> None:
    """The adapter in a folder, trained on."""
    load_adapter(module, Path(options.path), is_trained=True)


_STARTS: Mapping[str, Any] = {"default": True, "gaussian": "gaussian", "pissa": "pissa", "olora": "olora"}


def _lora(module: nn.Module, options: LoraOptions, *, is_dora: bool) -> None:
    from peft import LoraConfig

    whole, is_tied = _trained_whole(module, options)
    targets = lora_targets(module, options.targets)
    if targets.parameters:
        _require_plain(module, targets, options, "dora" if is_dora else "lora")
    if options.init == "olora" and any(keeps_transposed(module.get_submodule(name)) for name in targets.modules):
        raise ConfigError(
            "adapter.options.init",
            f"olora takes a part out of weights [out, in], and layers of {type(module).__name__} keep them the other way round",
            "Set adapter.options.init=pissa, which knows both, or default.",
        )
    if options.init in ("pissa", "olora"):
        _require_rank(module, targets.modules, options)
    config = LoraConfig(
        r=options.r,
        lora_alpha=options.alpha,  # type: ignore[arg-type]
        lora_dropout=options.dropout,
        use_rslora=options.rslora,
        use_dora=is_dora,
        init_lora_weights=_STARTS[options.init],
        target_modules=targets.modules,
        target_parameters=targets.parameters or None,
        modules_to_save=whole or None,
        ensure_weight_tying=is_tied,
        task_type=_task(module),
    )
    inject(module, config, "default")


def _require_plain(module: nn.Module, targets: Targets, options: LoraOptions, name: str) -> None:
    """Raise `ConfigError` for what PEFT's matrices beside a bare tensor cannot do."""
    what = f"{targets.parameters[0]} and {len(targets.parameters) - 1} more"
    remedy = "or leave experts out: adapter.options.targets=attention, or a regular expression."
    if name == "dora":
        raise ConfigError(
            "adapter.name", f"is dora, which has no magnitudes for {what}", f"Set adapter.name=lora, {remedy}"
        )
    if options.init in ("pissa", "olora"):
        raise ConfigError(
            "adapter.options.init",
            f"is {options.init}, which takes nothing out of {what}",
            f"Set adapter.options.init=default, {remedy}",
        )
    if options.dropout:
        raise ConfigError(
            "adapter.options.dropout",
            f"is {options.dropout}, and what {what} read goes through no adapter that could drop a part of it",
            f"Set adapter.options.dropout=0, {remedy}",
        )
    parameters = dict(module.named_parameters())
    packed = [each for each in targets.parameters if is_quantized(parameters[each]) and parameters[each].ndim == 2]
    if packed:
        raise ConfigError(
            "adapter.options.targets",
            f"means {packed[0]} and {len(packed) - 1} more, which PEFT adapts by the names of their tensors alone, and "
            "not where these are quantized",
            "Set adapter.options.targets=attention,experts, or model.quantize=none.",
        )


def _require_rank(module: nn.Module, targets: list[str], options: LoraOptions) -> None:
    """Raise `ConfigError` where a layer's weights have fewer than `r` directions that could be taken out of them."""
    shapes: dict[str, Any] = {name: module.get_submodule(name).weight.shape for name in targets}
    least = min(shapes, key=lambda name: min(shapes[name]))
    if min(shapes[least]) < options.r:
        raise ConfigError(
            "adapter.options.r",
            f"is {options.r}, and {options.init} takes as many directions out of each layer's weights, of which {least} "
            f"{list(shapes[least])} has {min(shapes[least])}",
            f"Set adapter.options.r={min(shapes[least])} at most, or adapter.options.init=default.",
        )


def _trained_whole(module: Any, options: LoraOptions) -> tuple[list[str], bool]:
    """Names of the modules that are trained whole, and whether they share one weight."""
    names, heads = {id(part): name for name, part in module.named_modules()}, _new_heads(module)
    if not (options.train_embeddings or options.train_head):
        return heads, False
    embedding, head = module.get_input_embeddings(), module.get_output_embeddings()
    is_tied = head is not None and head.weight is embedding.weight
    wanted = [embedding] if options.train_embeddings or is_tied else []
    if options.train_head and not is_tied:
        if head is None:
            raise ConfigError("adapter.options.train_head", f"{type(module).__name__} has no output head")
        wanted.append(head)
    return [names[id(part)] for part in wanted] + heads, is_tied


def _new_heads(module: nn.Module) -> list[str]:
    """Names of the heads that begin at random, which are trained whole beside every adapter of layers."""
    return [name for name, _ in module.named_modules() if name in CLASS_HEADS]


def _task(module: nn.Module) -> str | None:
    """What PEFT calls the model's use, which it wants to know when it loads the adapter."""
    kinds = {
        "ForCausalLM": "CAUSAL_LM",
        "LMHeadModel": "CAUSAL_LM",
        "ForSequenceClassification": "SEQ_CLS",
        "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    }
    return next((task for end, task in kinds.items() if type(module).__name__.endswith(end)), None)
