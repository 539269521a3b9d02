"""The size of each tensor's gradient and weights, for those who want to see them in a tracker."""

from collections.abc import Callable

import torch

from kajiya.training.fit import Setup, Watch
from kajiya.training.state import TrainState


def norms_watch(every: int | None, hear: Callable[..., object]) -> Watch | None:
    """Tells `gradient_norm/<name>` (after clipping) and `weight_norm/<name>` as metrics of every `every`-th step."""
    if every is None:
        return None

    def look(setup: Setup, state: TrainState) -> None:
        parameters = setup.optimizer.parameters
        named = [(name, parameters[name], grad) for name, grad in setup.optimizer.named_grads().items()]
        grads = torch._foreach_norm([grad for _, _, grad in named])
        weights = torch._foreach_norm([parameter.detach() for _, parameter, _ in named])
        read = torch.stack([each.float() for each in (*grads, *weights)]).tolist()
        names = [f"{kind}_norm/{name}" for kind in ("gradient", "weight") for name, _, _ in named]
        hear("metrics", step=state.step, values=dict(zip(names, read, strict=True)))

    return Watch(every, look)
