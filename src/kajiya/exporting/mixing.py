"""Several models of one shape made into one: linear, SLERP, TIES, DARE; tensor by tensor, in float32."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from kajiya.errors import ConfigError

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Mixing:
    """How models are made into one."""

    method: str
    """One of `METHODS`."""
    weights: tuple[float, ...]
    """Of each model."""
    density: float = 0.2
    """Share of each difference to the base that is kept (ties: the largest, dare: at random)."""
    scale: float = 1.0
    """What the joint difference to the base is multiplied with."""
    seed: int = 0
    """Of what dare keeps."""


def mix(models: Sequence[Tensors], base: Tensors | None, mixing: Mixing) -> dict[str, torch.Tensor]:
    """The tensors of the joint model. Raises `ConfigError` where models do not fit each other or the method."""
    if mixing.method not in METHODS:
        raise ConfigError("--method", f"{mixing.method!r} is not one of {', '.join(METHODS)}")
    if len(mixing.weights) != len(models):
        raise ConfigError("--weights", f"{len(mixing.weights)} weights are given for {len(models)} models")
    for weight in mixing.weights:
        if not 0 < weight < float("inf"):
            raise ConfigError(
                "--weights", f"{weight:g} is no share of a whole", "Give a number above 0 for each model."
            )
    if not 0 < mixing.density <= 1:
        raise ConfigError("--density", f"{mixing.density:g} is no share: above 0, at most 1")
    if mixing.method == "slerp" and len(models) != 2:
        raise ConfigError("--method", f"slerp goes from one model to a second; given: {len(models)}")
    if mixing.method in ("ties", "dare") and base is None:
        raise ConfigError("--base", f"{mixing.method} joins differences to the base that the models began from")
    for other in models[1:] if base is None else (*models[1:], base):
        _require_same_shapes(models[0], other)
    generator = torch.Generator().manual_seed(mixing.seed)
    made = {}
    for name, first in models[0].items():
        parts = [model[name].float() for model in models]
        origin = None if base is None else base[name].float()
        made[name] = METHODS[mixing.method](parts, origin, mixing, generator).to(first.dtype)
    return made


def _require_same_shapes(first: Tensors, other: Tensors) -> None:
    odd = sorted(first.keys() ^ other.keys()) or [name for name in first if first[name].shape != other[name].shape]
    if odd:
        raise ConfigError("merge", f"the models are not of one shape: {odd[0]!r} is not the same in all")


def _linear(
    parts: list[torch.Tensor], base: torch.Tensor | None, mixing: Mixing, generator: torch.Generator
) -> torch.Tensor:
    """Σ wᵢ Wᵢ / Σ wᵢ (model soups, arXiv:2203.05482)."""
    total = sum(mixing.weights)
    return torch.stack([part * (weight / total) for part, weight in zip(parts, mixing.weights, strict=True)]).sum(0)


def _slerp(
    parts: list[torch.Tensor], base: torch.Tensor | None, mixing: Mixing, generator: torch.Generator
) -> torch.Tensor:
    """Along the great circle between the directions of the two (Shoemake, 1985); nearly parallel ones in a straight line."""
    first, second = parts
    share = mixing.weights[1] / sum(mixing.weights)
    cosine = torch.nn.functional.cosine_similarity(first.flatten(), second.flatten(), dim=0)
    angle = cosine.clamp(-1, 1).acos()
    if float(angle.sin()) < 1e-4:
        return first * (1 - share) + second * share
    return (first * ((1 - share) * angle).sin() + second * (share * angle).sin()) / angle.sin()


def _ties(
    parts: list[torch.Tensor], base: torch.Tensor | None, mixing: Mixing, generator: torch.Generator
) -> torch.Tensor:
    """Trim, elect the sign, average what agrees with it (arXiv:2306.01708, algorithm 1).

    Each tensor is trimmed by itself, not the whole vector of differences as there: every tensor keeps its share.
    """
    if base is None:
        raise AssertionError("mix() asks for the base")
    trimmed = torch.stack([_largest(part - base, mixing.density) for part in parts])
    weights = torch.tensor(mixing.weights).view(-1, *[1] * base.ndim)
    sign = (trimmed * weights).sum(0).sign()
    agrees = ((trimmed.sign() == sign) & (trimmed != 0)).float() * weights
    return base + mixing.scale * (trimmed * agrees).sum(0) / agrees.sum(0).clamp(min=1e-12)


def _largest(difference: torch.Tensor, density: float) -> torch.Tensor:
    """The share `density` of the entries that is largest, the others zero."""
    n_kept = max(1, round(density * difference.numel()))
    least = difference.abs().flatten().kthvalue(difference.numel() - n_kept + 1).values
    return difference * (difference.abs() >= least)


def _dare(
    parts: list[torch.Tensor], base: torch.Tensor | None, mixing: Mixing, generator: torch.Generator
) -> torch.Tensor:
    """Drop at random and rescale, then add up (arXiv:2311.03099, section 3.2)."""
    if base is None:
        raise AssertionError("mix() asks for the base")
    joint = torch.zeros_like(base)
    total = sum(mixing.weights)
    for part, weight in zip(parts, mixing.weights, strict=True):
        kept = torch.rand(base.shape, generator=generator) < mixing.density
        joint += (weight / total) * (part - base) * kept / mixing.density
    return base + mixing.scale * joint


METHODS: Mapping[str, Callable[[list[torch.Tensor], torch.Tensor | None, Mixing, torch.Generator], torch.Tensor]] = {
    "linear": _linear,
    "slerp": _slerp,
    "ties": _ties,
    "dare": _dare,
}
