"""What GPUs have used up since their driver was loaded, by the counter that NVIDIA's driver keeps; torch says which they are."""

import ctypes
from collections.abc import Iterable, Mapping, Sequence

_LIBRARY = "libnvidia-ml.so.1"


def gpu_names(indices: Sequence[int]) -> list[str]:
    """The driver's name (UUID) of each of torch's CUDA devices, whatever part of a machine's GPUs torch sees."""
    import torch

    return [f"GPU-{torch.cuda.get_device_properties(index).uuid}" for index in indices]


def read_energy(names: Iterable[str]) -> dict[str, int | None]:
    """The counter of each GPU, millijoules; `None` where there is none (before Volta, a part of a GPU, no NVML)."""
    names = list(names)
    if not names:
        return {}
    try:
        library = ctypes.CDLL(_LIBRARY)
    except OSError:
        return dict.fromkeys(names)
    if library.nvmlInit_v2() != 0:
        return dict.fromkeys(names)
    try:
        return {name: _energy_of(library, name) for name in names}
    finally:
        library.nvmlShutdown()


def _energy_of(library: ctypes.CDLL, name: str) -> int | None:
    device, energy = ctypes.c_void_p(), ctypes.c_ulonglong()
    if library.nvmlDeviceGetHandleByUUID(name.encode(), ctypes.byref(device)) != 0:
        return None
    if library.nvmlDeviceGetTotalEnergyConsumption(device, ctypes.byref(energy)) != 0:
        return None
    return energy.value


def joules_since(begun: Mapping[str, int | None]) -> float | None:
    """What all of them have used since `read_energy` gave `begun`, J; `None` where one does not say."""
    now = read_energy(begun)
    total = 0.0
    for name, before in begun.items():
        after = now[name]
        if before is None or after is None:
            return None
        total += (after - before) / 1000
    return total
