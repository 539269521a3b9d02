"""What is set in the process, and only here: threads, the memory allocator, an accelerator's switches, caches, seeds."""

import ctypes
import gc
import importlib.util
import logging
import os
import platform
import random
import sys
import threading
from pathlib import Path
from typing import Any

from kajiya.run.model_index import keep_model_index

_USUAL_THRESHOLD = gc.get_threshold()


def set_up_process(
    seed: int,
    store_root: Path,
    deterministic: bool = False,
    threads: int | None = None,
    fp32_matmul: str = "auto",
) -> dict[str, Any]:
    """Prepare this process for training and say what was set, for the manifest.

    Seeds Python, NumPy and torch; keeps large blocks in the C allocator; puts the compile cache into the store;
    turns the hub's and the tokenizers' chatter off. `threads`: of torch; `None` takes what `default_threads` says.
    """
    import numpy as np
    import torch

    quiet_torchao()
    done: dict[str, Any] = {"seed": seed, "allocator": keep_large_blocks(), "threads": threads or default_threads()}
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(store_root / "compile-cache")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    torch.set_num_threads(done["threads"])
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True)
    if torch.cuda.is_available():
        chosen = ("ieee" if deterministic else "tf32") if fp32_matmul == "auto" else fp32_matmul
        torch.backends.cuda.matmul.fp32_precision = chosen
        done["fp32_matmul"] = torch.backends.cuda.matmul.fp32_precision
    done["deterministic"] = deterministic
    done["torch_threads"] = torch.get_num_threads()
    return done


def default_threads() -> int:
    """Threads of torch when nothing else is asked for: those of OMP_NUM_THREADS, else one for every usable core.

    Processes that torchrun starts on one machine share its cores; the 1 that it sets by itself is nobody's wish.
    """
    from kajiya.run.provenance import usable_cores

    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    wished = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if wished.isdecimal() and int(wished) > 0 and not (processes > 1 and wished == "1"):
        return int(wished)
    return max(1, usable_cores() // processes)


def keep_large_blocks() -> str:
    """Tell glibc's malloc to keep freed memory and to serve large blocks from the heap; returns what was set.

    A training step frees and takes the same large blocks each time; handing them back to the kernel costs a page fault a page.
    """
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
    settings = ((m_mmap_max, 0), (m_trim_threshold, 2**31 - 1), (m_top_pad, 256 * 2**20), (_M_ARENA_MAX, 1))
    return _set_malloc(settings, "no mmap, no trim, one arena, 256 MiB top pad")


def share_heaps() -> str:
    """Have all threads of a server take their memory from two of glibc's heaps; returns what was set.

    Each would have one of its own otherwise, and keep there what it has freed: for every thread, the most that requests ever took.
    """
    return _set_malloc(((_M_ARENA_MAX, 2),), "two arenas")


_M_ARENA_MAX = -8
"""Number of the setting in glibc's malloc.h."""


def _set_malloc(settings: tuple[tuple[int, int], ...], words: str) -> str:
    if sys.platform != "linux":
        return "left as it is"
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return "left as it is (not glibc)"
    taken = sum(libc.mallopt(name, value) for name, value in settings)
    return f"glibc: {words}" if taken == len(settings) else "glibc: refused in part"


def load_torch_ahead() -> None:
    """Have the system load torch's library in a thread, while the command line and the config are read.

    Without torch, or with one whose files lie elsewhere, nothing happens; its import, later, does the same as ever.
    """
    found = importlib.util.find_spec("torch") if sys.platform == "linux" else None
    folder = Path(found.origin).parent / "lib" if found is not None and found.origin else None
    if folder is None or not (folder / "libtorch_cpu.so").is_file():
        return
    # Called as a function of the C library, dlopen leaves Python's lock to the others. In the order in which torch loads.
    dlopen = ctypes.CDLL(None).dlopen
    dlopen.argtypes, dlopen.restype = [ctypes.c_char_p, ctypes.c_int], ctypes.c_void_p
    modes = {"libtorch_global_deps.so": os.RTLD_NOW | os.RTLD_GLOBAL, "libtorch_cpu.so": os.RTLD_NOW}

    def load() -> None:
        for name, mode in modes.items():
            dlopen(os.fsencode(folder / name), mode)

    threading.Thread(target=load, name="load-torch", daemon=True).start()


def import_faster() -> None:
    """Look for garbage more seldom, for imported modules make hundreds of thousands of objects and drop none of them; and see
    `keep_model_index`."""
    keep_model_index()
    gc.set_threshold(100_000, *gc.get_threshold()[1:])


def collect_as_usual() -> None:
    """Look for garbage as often as Python does by itself, but no more among what is there now: modules, which stay."""
    if gc.get_threshold() != _USUAL_THRESHOLD:
        gc.set_threshold(*_USUAL_THRESHOLD)
        gc.freeze()


def use_gpu(device: Any) -> None:
    """Make a GPU that has a number the current one: what names none (events, kernels of libraries) would go to the first."""
    if device.type == "cuda" and device.index is not None:
        import torch

        torch.cuda.set_device(device)


def has_bf16_instructions() -> bool:
    """Whether this CPU may multiply bf16 by instructions of its own: known of x86, elsewhere a measurement tells."""
    import torch

    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def import_transformers() -> None:
    """Import what every model of Transformers is made with, but for what it seldom calls of SciPy, torchao and torch's compiler."""
    from kajiya.run.deferred import OF_TRANSFORMERS, compiler_deferred, deferred

    quiet_torchao()
    keep_model_index()
    with deferred(OF_TRANSFORMERS), compiler_deferred():
        import transformers.masking_utils
        import transformers.modeling_utils  # noqa: F401


def quiet_transformers() -> None:
    """Turn Transformers' own progress bars off: this project draws one for each stage."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    quiet_torchao()


def quiet_torchao() -> None:
    """Turn off what torchao and bitsandbytes say at their import, which Transformers and PEFT bring about wherever they are
    installed.

    They name each GPU library that a CPU cannot load, a package of CPU kernels that nobody asked for, and types that torch has
    come to know by itself.
    """
    for name in ("torchao", "torch.utils._pytree", "bitsandbytes.backends.cpu.ops"):
        logging.getLogger(name).setLevel(logging.ERROR)


def quiet_ray() -> None:
    """Turn Ray's reports to its makers off, which it sends unless told otherwise before its import."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
