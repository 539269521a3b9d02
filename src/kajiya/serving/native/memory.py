"""Memory for weights and cache: pages of zeros, huge where the system has them, that are taken only once they are written."""

import contextlib
import ctypes
import mmap
import sys

_HUGE = 2 << 20
_REGION = 64 << 20
_LINE = 64


class Arena:
    """Pieces of memory that stay where they are until the arena goes.

    Weights are read from end to end at every token: in pages of 2 MiB that is twice as fast as in pages of 4 KiB, at whose
    ends the processor's reading ahead stops.
    """

    def __init__(self) -> None:
        self._regions: list[mmap.mmap] = []
        self._at = 0
        self._end = 0

    def take(self, size: int) -> int:
        """The address of `size` bytes of zeros, at the beginning of a cache line."""
        if self._at + size > self._end:
            self._map(max(size, _REGION))
        address = self._at
        self._at += -(-size // _LINE) * _LINE
        return address

    def _map(self, size: int) -> None:
        if sys.platform == "win32":
            region = mmap.mmap(-1, size + _HUGE)
        else:
            region = mmap.mmap(-1, size + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if sys.platform == "linux":
            with contextlib.suppress(OSError):  # a kernel without huge pages
                region.madvise(mmap.MADV_HUGEPAGE)
        self._regions.append(region)
        self._at = -(-ctypes.addressof(ctypes.c_char.from_buffer(region)) // _HUGE) * _HUGE
        self._end = self._at + size
