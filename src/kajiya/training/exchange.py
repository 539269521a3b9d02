"""What several processes bring together: sums of gradients in float32, and the first one's tensors for all."""

from collections.abc import Iterator, Sequence

import torch

_AT_ONCE = 2**24
"""Numbers that are added up at once: 64 MiB."""


class Exchange:
    """Adds tensors up over all ranks, in float32, through one buffer of at most 64 MiB on the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffer: torch.Tensor | None = None

    def reserve(self, n_numbers: int) -> None:
        """Have the buffer ready for tensors of so many numbers in all, so that `add_up` needs no memory any more."""
        size = min(_AT_ONCE, n_numbers)
        if self._buffer is None or self._buffer.numel() < size:
            self._buffer = torch.empty(size, dtype=torch.float32, device=self._device)

    def add_up(self, tensors: Sequence[torch.Tensor]) -> None:
        """Each tensor becomes its sum over all ranks; they are float32, and the same ones on every rank."""
        self.reserve(sum(tensor.numel() for tensor in tensors))
        waiting: list[torch.Tensor] = []
        n_waiting = 0
        for tensor in tensors:
            if tensor.numel() >= _AT_ONCE and tensor.is_contiguous() and tensor.device.type == self._device.type:
                torch.distributed.all_reduce(tensor)
                continue
            for piece in _pieces(tensor):
                if n_waiting + piece.numel() > _AT_ONCE:
                    self._pass_through(waiting)
                    waiting, n_waiting = [], 0
                waiting.append(piece)
                n_waiting += piece.numel()
        self._pass_through(waiting)

    def _pass_through(self, pieces: list[torch.Tensor]) -> None:
        if self._buffer is None or not pieces:
            return
        sizes = [piece.numel() for piece in pieces]
        used = self._buffer[: sum(sizes)]
        places = [place.view(piece.shape) for place, piece in zip(used.split(sizes), pieces, strict=True)]
        torch._foreach_copy_(places, pieces)
        torch.distributed.all_reduce(used)
        torch._foreach_copy_(pieces, places)


def _pieces(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Views of parts of the tensor, none larger than the buffer."""
    if tensor.numel() <= _AT_ONCE:
        yield tensor
    elif tensor.is_contiguous():
        yield from tensor.view(-1).split(_AT_ONCE)
    else:
        longest = max(range(tensor.ndim), key=lambda dim: tensor.shape[dim])
        for part in tensor.chunk(2, longest):
            yield from _pieces(part)


def take_first_ranks(tensors: Sequence[torch.Tensor]) -> None:
    """The tensors, of any dtype, become the first rank's on every rank."""
    if not tensors:
        return
    whole = [tensor.detach().contiguous().view(-1).view(torch.uint8) for tensor in tensors]
    sent = torch.cat(whole)
    torch.distributed.broadcast(sent, 0)
    for tensor, part in zip(tensors, sent.split([each.numel() for each in whole]), strict=True):
        # A part by itself begins where its dtype may begin.
        tensor.detach().copy_(part.clone().view(tensor.dtype).view(tensor.shape))


def fill_gradients(masters: Sequence[torch.Tensor]) -> None:
    """A gradient of zeros for each tensor that has none here, and has one on another rank."""
    has = torch.tensor([master.grad is not None for master in masters], dtype=torch.int32)
    torch.distributed.all_reduce(has, torch.distributed.ReduceOp.MAX)
    for master, is_wanted in zip(masters, has.tolist(), strict=True):
        if is_wanted and master.grad is None:
            master.grad = torch.zeros_like(master)
