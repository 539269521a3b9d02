"""Memory for weights and cache: pages of zeros, huge where the system has them, that are taken only once they are written."""

import contextlib
import ctypes
import mmap
import sys
import threading

_HUGE = 2 << 20
_POPULATE_WRITE = 23
"""Linux's MADV_POPULATE_WRITE, which Python's `mmap` does not name: pages are there as if written to, their content stays."""
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

    def populate(self, pieces: list[tuple[int, int]]) -> None:
        """Have the pages of these addresses and sizes at hand soon, in a thread of its own, while others use them or not.

        A page's first use takes milliseconds where the system has to find it, in the midst of a step. A system that cannot do
        this ahead does it then.
        """
        if sys.platform == "linux":
            threading.Thread(target=self._populate, args=(pieces,), name="kajiya-pages", daemon=True).start()

    def _populate(self, pieces: list[tuple[int, int]]) -> None:
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        for address, size in pieces:
            # A huge page at a time: other threads that map memory wait for no more.
            end = address + size
            for page in range(address // _HUGE * _HUGE, end, _HUGE):
                if madvise(page, min(_HUGE, end - page), _POPULATE_WRITE):
                    return  # an old kernel

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
