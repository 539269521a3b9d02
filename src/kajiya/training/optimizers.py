"""Optimizers: rows that make torch optimizers over named parameters.

A row is `make(named, lr, weight_decay, roles, options) -> [torch.optim.Optimizer, …]`. `weight_decay` is each tensor's own by name;
`roles` says of each name whether it is a hidden matrix, the embedding, the head or a vector. A group keeps the ratio of its own
rate to the peak rate over the whole run.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from kajiya.config.options import (
    AdafactorOptions,
    AdamW8bitOptions,
    AdamWOptions,
    LionOptions,
    MuonOptions,
    ScheduleFreeOptions,
    SGDOptions,
)
from kajiya.config.schema import OptimConfig
from kajiya.config.tables import is_options, resolve
from kajiya.errors import ConfigError, MissingExtraError
from kajiya.training.lion import Lion
from kajiya.training.masters import MasterOptimizer
from kajiya.training.muon import Muon
from kajiya.training.rounding_adamw import rounding
from kajiya.training.schedule_free import ScheduleFreeAdamW

Named = Sequence[tuple[str, torch.Tensor]]
Role = Literal["matrix", "embedding", "head", "vector"]
Roles = Mapping[str, Role]
Decays = Mapping[str, float]
Made = list[torch.optim.Optimizer]


def load_optimizer(
    config: OptimConfig, model: nn.Module, ema_decay: float | None = None, rates: Mapping[str, float] | None = None
) -> MasterOptimizer:
    """The optimizer that the config names, over the model's trainable parameters.

    `rates`, by name, are the learning rates of some of them over the rate that they would have.
    """
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not trainable:
        raise ConfigError("model", "has no trainable parameter")
    masters = [(name, _master(parameter, on_host=config.offload)) for name, parameter in trainable]
    roles = parameter_roles(model)
    if "head" in config.decayed and "head" not in roles.values():
        raise ConfigError(
            "optim.decayed",
            "names the head, and this model has none of its own",
            "Name embedding, which a tied head is.",
        )
    decays = {name: config.weight_decay if roles[name] in config.decayed else 0.0 for name, _ in trainable}
    make, options = resolve("optimizer", config.name, config.options, "optim")
    arguments = {"options": options} if is_options(options) else options
    made = make(masters, lr=config.lr, weight_decay=decays, roles=roles, **arguments)
    optimizers = made if isinstance(made, list) else [made]
    turned = inputs_first(model)
    _turn(optimizers, {id(tensor) for name, tensor in masters if name in turned})
    _set_rates(optimizers, {id(tensor): (rates or {}).get(name, 1.0) for name, tensor in masters})
    weights = {id(master): weight for (_, master), (_, weight) in zip(masters, trainable, strict=True)}
    optimizers = [rounding(each, weights) for each in optimizers]
    return MasterOptimizer(dict(trainable), dict(masters), optimizers, config.lr, ema_decay)


def _turn(optimizers: Sequence[torch.optim.Optimizer], turned: set[int]) -> None:
    """Move Muon's matrices that have their inputs first into groups that say so."""
    for optimizer in optimizers:
        if not isinstance(optimizer, Muon):
            continue
        for group in list(optimizer.param_groups):
            parts = [
                [each for each in group["params"] if (id(each) in turned) == is_turned] for is_turned in (False, True)
            ]
            if not all(parts):
                group["inputs_first"] = bool(parts[1])
                continue
            group["params"] = parts[0]
            settings = {name: value for name, value in group.items() if name != "params"}
            optimizer.add_param_group(settings | {"params": parts[1], "inputs_first": True})


def _set_rates(optimizers: Sequence[torch.optim.Optimizer], rates: Mapping[int, float]) -> None:
    """Move parameters whose rate is another into groups of their own."""
    for optimizer in optimizers:
        for group in list(optimizer.param_groups):
            kinds = sorted({rates[id(tensor)] for tensor in group["params"]})
            parts = {rate: [each for each in group["params"] if rates[id(each)] == rate] for rate in kinds}
            settings = {name: value for name, value in group.items() if name != "params"}
            group["params"] = parts[kinds[0]]
            group["lr"] = settings["lr"] * kinds[0]
            for rate in kinds[1:]:
                optimizer.add_param_group(settings | {"params": parts[rate], "lr": settings["lr"] * rate})


def adamw(named: Named, lr: float, weight_decay: Decays, roles: Roles, options: AdamWOptions) -> Made:
    """AdamW (arXiv:1711.05101)."""
    betas = (options.beta1, options.beta2)
    return [torch.optim.AdamW(_groups(named, weight_decay), lr=lr, betas=betas, eps=options.eps, fused=True)]


def muon(named: Named, lr: float, weight_decay: Decays, roles: Roles, options: MuonOptions) -> Made:
    """Muon for the hidden matrices, AdamW for embeddings, head, norms and biases."""
    matrices = [(name, tensor) for name, tensor in named if roles[name] == "matrix"]
    others = options.adamw_lr or lr
    rates = {"vector": others, "embedding": options.embedding_lr or others, "head": options.head_lr or others}
    rest = [
        group | {"lr": rate}
        for role, rate in rates.items()
        for group in _groups([(name, tensor) for name, tensor in named if roles[name] == role], weight_decay)
    ]
    dtype = torch.bfloat16 if any(tensor.is_cuda for _, tensor in matrices) else torch.float32
    made: Made = []
    if matrices:
        groups = _groups(matrices, weight_decay)
        made.append(Muon(groups, lr, 0.0, options.momentum, options.nesterov, options.ns_steps, dtype))
    if rest:
        betas = (options.beta1, options.beta2)
        made.append(torch.optim.AdamW(rest, lr=others, betas=betas, eps=options.eps, fused=True))
    return made


def adamw_8bit(named: Named, lr: float, weight_decay: Decays, roles: Roles, options: AdamW8bitOptions) -> Made:
    """AdamW whose moments are held in 8 bits, block by block (arXiv:2110.02861); small tensors keep 32."""
    try:
        from bitsandbytes.optim import adamw as blockwise
    except ModuleNotFoundError as error:
        raise MissingExtraError("bitsandbytes", "quant", "optim.name=adamw_8bit") from error
    betas = (options.beta1, options.beta2)
    return [blockwise.AdamW8bit(_groups(named, weight_decay), lr=lr, betas=betas, eps=options.eps)]


def lion(named: Named, lr: float, weight_decay: Decays, roles: Roles, options: LionOptions) -> Made:
    """Lion (arXiv:2302.06675)."""
    return [Lion(_groups(named, weight_decay), lr, options.beta1, options.beta2)]


def adafactor(named: Named, lr: float, weight_decay: Decays, roles: Roles, options: AdafactorOptions) -> Made:
    """Adafactor (arXiv:1804.04235): a matrix's second moment as the product of a row and a column."""
    eps = (None, options.eps)
    settings: dict[str, Any] = {"beta2_decay": options.beta2_decay, "eps": eps, "d": options.clip}
    return [torch.optim.Adafactor(_groups(named, weight_decay), lr=lr, **settings)]


def sgd(named: Named, lr: float, weight_decay: Decays, roles: Roles, options: SGDOptions) -> Made:
    """Stochastic gradient descent with momentum; its decay is part of the gradient."""
    groups = _groups(named, weight_decay)
    return [torch.optim.SGD(groups, lr=lr, momentum=options.momentum, nesterov=options.nesterov)]


def schedule_free(named: Named, lr: float, weight_decay: Decays, roles: Roles, options: ScheduleFreeOptions) -> Made:
    """Schedule-free AdamW (arXiv:2405.15682); what is evaluated and saved is its average of the weights."""
    return [ScheduleFreeAdamW(_groups(named, weight_decay), lr, options.beta1, options.beta2, options.eps)]


def _groups(named: Named, weight_decay: Decays) -> list[dict[str, Any]]:
    """One group for each weight decay that occurs."""
    found: dict[float, list[torch.Tensor]] = {}
    for name, tensor in named:
        found.setdefault(weight_decay[name], []).append(tensor)
    return [{"params": tensors, "weight_decay": decay} for decay, tensors in found.items()]


def require_other_memory(config: OptimConfig, device: torch.device) -> None:
    """Raises `ConfigError` where `optim.offload` is set and the device's memory is the host's own."""
    if config.offload and device.type != "cuda":
        raise ConfigError(
            "optim.offload",
            f"moves the optimizer's state from a GPU into the host's memory, and this is {device.type}",
            "Set optim.offload=false.",
        )


def _master(parameter: torch.Tensor, *, on_host: bool) -> torch.Tensor:
    """The parameter itself, or a float32 copy of it: of another dtype, or in the host's memory."""
    if on_host:
        return parameter.detach().to("cpu", torch.float32, copy=True)
    return parameter if parameter.dtype == torch.float32 else parameter.detach().float().clone()


def inputs_first(model: nn.Module) -> set[str]:
    """Names of the matrices [inputs, outputs]: Transformers' `Conv1D` (GPT-2), and experts that say so of themselves (gpt-oss)."""
    from transformers.pytorch_utils import Conv1D

    names: set[str] = set()
    for prefix, module in model.named_modules():
        if isinstance(module, Conv1D) or vars(module).get("is_transposed") is True:
            own = module.named_parameters(prefix, recurse=False)
            names |= {name for name, parameter in own if parameter.ndim >= 2}
    return names


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def parameter_roles(model: nn.Module) -> dict[str, Role]:
    """What each parameter is for: a hidden matrix (or a stack of them, one an expert), the embedding (tied to the head or not), an
    output head, a vector (or a stack of biases, one an expert)."""
    from transformers import PreTrainedModel

    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    heads = set() if head is None else {id(parameter) for parameter in head.parameters() if parameter.ndim == 2}
    kernels = {id(module.weight) for module in model.modules() if isinstance(module, _CONVOLUTIONS)}
    roles: dict[str, Role] = {}
    for name, parameter in model.named_parameters():
        if id(parameter) in embeddings:
            roles[name] = "embedding"
        elif id(parameter) in heads:
            roles[name] = "head"
        else:
            # The factors of IA³ are rows or columns, and so vectors.
            is_matrix = parameter.ndim in (2, 3) and 1 not in parameter.shape[-2:] and not name.endswith("bias")
            roles[name] = "matrix" if is_matrix and id(parameter) not in kernels else "vector"
    return roles
