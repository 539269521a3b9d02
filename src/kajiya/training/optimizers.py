"""Optimizers: rows that make torch optimizers over named parameters, and `MasterOptimizer`, which the loop drives.

A row is `make(named, lr, weight_decay, roles, options) -> [torch.optim.Optimizer, …]`; `roles` says of each name whether it is a
hidden matrix, the embedding, the head or a vector. A group keeps the ratio of its own rate to the peak rate over the whole run.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import nn

from kajiya.config.options import AdamWOptions, MuonOptions
from kajiya.config.schema import OptimConfig
from kajiya.config.tables import is_options, resolve
from kajiya.errors import ConfigError, StoreError
from kajiya.training.muon import Muon

Named = Sequence[tuple[str, torch.Tensor]]
Role = Literal["matrix", "embedding", "head", "vector"]
Roles = Mapping[str, Role]


def load_optimizer(config: OptimConfig, model: nn.Module) -> "MasterOptimizer":
    """The optimizer that the config names, over the model's trainable parameters."""
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not trainable:
        raise ConfigError("model", "has no trainable parameter")
    masters = [(name, _master(parameter)) for name, parameter in trainable]
    make, options = resolve("optimizer", config.name, config.options, "optim")
    arguments = {"options": options} if is_options(options) else options
    made = make(masters, lr=config.lr, weight_decay=config.weight_decay, roles=parameter_roles(model), **arguments)
    optimizers = made if isinstance(made, list) else [made]
    return MasterOptimizer(dict(trainable), dict(masters), optimizers, config.lr)


def adamw(
    named: Named, lr: float, weight_decay: float, roles: Roles, options: AdamWOptions
) -> list[torch.optim.Optimizer]:
    """AdamW (arXiv:1711.05101); matrices decay, embeddings, norms and biases do not."""
    decayed = [tensor for name, tensor in named if roles[name] == "matrix"]
    plain = [tensor for name, tensor in named if roles[name] != "matrix"]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    betas = (options.beta1, options.beta2)
    return [torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=betas, eps=options.eps, fused=True)]


def muon(
    named: Named, lr: float, weight_decay: float, roles: Roles, options: MuonOptions
) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices, AdamW without decay for embeddings, head, norms and biases."""
    matrices = [tensor for name, tensor in named if roles[name] == "matrix"]
    others = options.adamw_lr or lr
    rates = {"vector": others, "embedding": options.embedding_lr or others, "head": options.head_lr or others}
    groups = [
        {"params": [tensor for name, tensor in named if roles[name] == role], "lr": rate}
        for role, rate in rates.items()
    ]
    dtype = torch.bfloat16 if any(tensor.is_cuda for tensor in matrices) else torch.float32
    made: list[torch.optim.Optimizer] = []
    if matrices:
        made.append(Muon(matrices, lr, weight_decay, options.momentum, options.nesterov, options.ns_steps, dtype))
    rest = [group for group in groups if group["params"]]
    if rest:
        betas = (options.beta1, options.beta2)
        made.append(torch.optim.AdamW(rest, lr=others, betas=betas, eps=options.eps, weight_decay=0.0, fused=True))
    return made


class MasterOptimizer:
    """One or more torch optimizers over float32 masters of the model's parameters.

    A parameter in float32 is its own master. One in bf16 or fp16 has a float32 copy that is updated and rounded back after
    each step, so that small updates are not lost.
    """

    def __init__(
        self,
        parameters: dict[str, torch.Tensor],
        masters: dict[str, torch.Tensor],
        optimizers: list[torch.optim.Optimizer],
        peak_lr: float,
    ) -> None:
        self.parameters = parameters
        self.masters = masters
        self.optimizers = optimizers
        self._ratios = [[group["lr"] / peak_lr for group in each.param_groups] for each in optimizers]
        self._copied = [name for name in parameters if masters[name] is not parameters[name]]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update at learning rate `lr` (each group keeps its ratio to the peak), then clear the gradients."""
        for name in self._copied:
            grad = self.parameters[name].grad
            self.masters[name].grad = None if grad is None else grad.float()
        for optimizer, ratios in zip(self.optimizers, self._ratios, strict=True):
            for group, ratio in zip(optimizer.param_groups, ratios, strict=True):
                group["lr"] = lr * ratio
            optimizer.step()
        if self._copied:
            torch._foreach_copy_(
                [self.parameters[name] for name in self._copied], [self.masters[name] for name in self._copied]
            )
        self.clear_grads()

    def clear_grads(self) -> None:
        """Forget all gradients."""
        for tensor in (*self.parameters.values(), *self.masters.values()):
            tensor.grad = None

    def grads(self) -> list[torch.Tensor]:
        """Gradients at hand, in the order of the parameters."""
        return [tensor.grad for tensor in self.parameters.values() if tensor.grad is not None]

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """The whole state by parameter name: `master/<name>` and `<slot>/<name>`; scalars as 0-d float64 tensors."""
        names = {id(tensor): name for name, tensor in self.masters.items()}
        state = {f"master/{name}": tensor.detach() for name, tensor in self.masters.items()}
        for optimizer in self.optimizers:
            for tensor, slots in optimizer.state.items():
                for slot, value in slots.items():
                    kept = value if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=torch.float64)
                    state[f"{slot}/{names[id(tensor)]}"] = kept
        return state

    @torch.no_grad()
    def load_state_tensors(self, state: dict[str, torch.Tensor]) -> None:
        """Restore what `state_tensors` gave; raises `StoreError` when the parameters are not the same."""
        by_name: dict[str, dict[str, torch.Tensor]] = {}
        for key, value in state.items():
            slot, _, name = key.partition("/")
            by_name.setdefault(name, {})[slot] = value
        if by_name.keys() != self.masters.keys():
            odd = sorted(by_name.keys() ^ self.masters.keys())[0]
            raise StoreError(f"the checkpoint's parameters are not the model's: {odd!r} is in one of them only")
        owners = {
            id(p): (each, group) for each in self.optimizers for group in each.param_groups for p in group["params"]
        }
        for name, slots in by_name.items():
            master = self.masters[name]
            master.copy_(slots.pop("master"))
            self.parameters[name].copy_(master)
            optimizer, group = owners[id(master)]
            # torch keeps the count of steps on the CPU, unless the optimizer is one fused kernel; plain numbers stay too.
            restored = {
                slot: value.clone()
                if (slot == "step" and not group.get("fused")) or value.dtype == torch.float64
                else value.to(master.device, copy=True)
                for slot, value in slots.items()
            }
            if restored:
                optimizer.state[master] = {
                    slot: value.item() if value.ndim == 0 and value.dtype == torch.float64 else value
                    for slot, value in restored.items()
                }

    def reset(self, state: dict[str, torch.Tensor]) -> None:
        """Go back to an earlier `state_tensors`, a slot that was not there then included."""
        for optimizer in self.optimizers:
            optimizer.state.clear()
        self.load_state_tensors(state)


def _master(parameter: torch.Tensor) -> torch.Tensor:
    return parameter if parameter.dtype == torch.float32 else parameter.detach().float().clone()


def parameter_roles(model: nn.Module) -> dict[str, Role]:
    """What each parameter is for: a hidden matrix, the embedding (tied to the head or not), an output head, a vector."""
    from transformers import PreTrainedModel

    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    roles: dict[str, Role] = {}
    for name, parameter in model.named_parameters():
        if id(parameter) in embeddings:
            roles[name] = "embedding"
        elif isinstance(head, nn.Linear) and parameter is head.weight:
            roles[name] = "head"
        else:
            roles[name] = "matrix" if parameter.ndim == 2 else "vector"
    return roles
