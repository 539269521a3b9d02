"""What a model was before its training, where that is no base with an adapter turned off."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn

from kajiya.config.schema import AdapterConfig


def begins_as_base(config: AdapterConfig) -> bool:
    """Whether the model with a new adapter of that kind is, before training, what its base alone is taken for.

    One that is gone on with is not, and of one's own nothing is known.
    """
    return config.name != "load" and ":" not in config.name


def keep_beginning(module: nn.Module) -> Callable[[], AbstractContextManager[None]]:
    """A copy of what is trained, as it is now; within the blocks of what is returned the model computes with it again.

    For no-grad passes, and for an adapter that is no identity at its beginning (`load`, one's own).
    """
    kept = [(each, each.detach().clone()) for each in module.parameters() if each.requires_grad]

    @contextmanager
    def beginning() -> Iterator[None]:
        now = [each.data for each, _ in kept]
        for each, value in kept:
            each.data = value.to(each.data)
        # As in `adapter_off`: autocast would take its casts of the present values for these.
        torch.clear_autocast_cache()
        try:
            yield
        finally:
            for (each, _), value in zip(kept, now, strict=True):
                each.data = value
            torch.clear_autocast_cache()

    return beginning
