"""How many threads a process takes: what the user said, what the machine grants."""

import logging
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kajiya.run.process import default_threads, quiet_torchao, use_gpu
from kajiya.run.provenance import _cpu_limits, usable_cores


@pytest.mark.parametrize(
    ("said", "processes", "threads"),
    [
        (None, None, 8),
        ("3", None, 3),
        ("1", None, 1),
        ("2,4", None, 2),  # of nested regions, the outer ones
        ("all", None, 8),
        ("0", None, 8),
        (None, "4", 2),
        ("1", "4", 2),  # torchrun sets it, not the user
        ("3", "4", 3),
        (None, "16", 1),
    ],
)
def test_the_users_own_number_of_threads_comes_first(
    said: str | None, processes: str | None, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kajiya.run.provenance.usable_cores", lambda: 8)
    for name, value in (("OMP_NUM_THREADS", said), ("LOCAL_WORLD_SIZE", processes)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert default_threads() == threads


def test_a_ranks_gpu_becomes_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    for name in ("cuda:1", "cuda", "cpu"):
        use_gpu(torch.device(name))
    assert taken == [torch.device("cuda:1")]


def test_a_training_process_keeps_to_it() -> None:
    code = (
        "from pathlib import Path\n"
        "from kajiya.run.process import set_up_process\n"
        "import torch\n"
        "assert set_up_process(0, Path('.'))['torch_threads'] == torch.get_num_threads() == 1\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


_HEAPS = """
import ctypes, sys, threading
from kajiya.run.process import share_heaps
if sys.argv[2] == "shared":
    assert share_heaps() == "glibc: two arenas"
libc = ctypes.CDLL("libc.so.6")
libc.malloc.restype, libc.fopen.restype = ctypes.c_void_p, ctypes.c_void_p
all_here = threading.Barrier(6)
def work():
    all_here.wait(30)
    libc.malloc(3000)
    all_here.wait(30)
threads = [threading.Thread(target=work) for _ in range(6)]
[each.start() for each in threads]
[each.join() for each in threads]
file = ctypes.c_void_p(libc.fopen(sys.argv[1].encode(), b"w"))
libc.malloc_info(0, file)
libc.fclose(file)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's heaps")
def test_the_threads_of_a_server_share_two_heaps(tmp_path: Path) -> None:
    n_heaps = {}
    for how in ("shared", "as they are"):
        subprocess.run([sys.executable, "-c", _HEAPS, str(tmp_path / "told"), how], check=True, timeout=120)
        n_heaps[how] = (tmp_path / "told").read_text().count("<heap ")
    assert n_heaps["shared"] <= 2 < n_heaps["as they are"]


@pytest.mark.parametrize(
    ("files", "limits"),
    [
        ({}, []),
        ({"cpu.max": "max 100000"}, []),
        ({"cpu.max": "250000 100000"}, [(250_000, 100_000)]),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, []),
        ({"cpu/cpu.cfs_quota_us": "150000", "cpu/cpu.cfs_period_us": "100000"}, [(150_000, 100_000)]),
    ],
)
def test_a_containers_limit_is_read(files: dict[str, str], limits: list[tuple[int, int]], tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert _cpu_limits(tmp_path) == limits


def test_usable_cores_are_at_most_those_of_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)), raising=False)
    monkeypatch.setattr("kajiya.run.provenance._cpu_limits", lambda _: [(250_000, 100_000)])
    assert usable_cores() == 3
    monkeypatch.setattr("kajiya.run.provenance._cpu_limits", lambda _: [(1_000, 100_000)])
    assert usable_cores() == 1
    monkeypatch.setattr("kajiya.run.provenance._cpu_limits", lambda _: [])
    assert usable_cores() == 64


def test_the_products_of_a_gpu_are_as_they_are_asked_for(tmp_path: Path) -> None:
    """A GPU is only said to be there; the setting itself is torch's own."""
    code = (
        "import sys, torch\nfrom pathlib import Path\nfrom kajiya.run.process import set_up_process\n"
        "torch.cuda.is_available = lambda: True\n"
        "for wished, exact in (('auto', False), ('auto', True), ('ieee', False), ('tf32', True)):\n"
        f"    done = set_up_process(0, Path({str(tmp_path)!r}), exact, fp32_matmul=wished)\n"
        "    print(done['fp32_matmul'], torch.backends.cuda.matmul.fp32_precision)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == [each for chosen in ("tf32", "ieee", "ieee", "tf32") for each in (chosen, chosen)]


def test_libraries_say_nothing_of_what_they_did_not_find(caplog: pytest.LogCaptureFixture) -> None:
    """LoRA on a CPU imports bitsandbytes, which names a package of kernels to be installed."""
    loggers = [logging.getLogger(name) for name in ("torchao", "bitsandbytes.backends.cpu.ops")]
    before = [each.level for each in loggers]
    try:
        quiet_torchao()
        for each in loggers:
            each.warning("pip install kernels")
            each.error("broken")
    finally:
        for each, level in zip(loggers, before, strict=True):
            each.setLevel(level)
    assert [record.message for record in caplog.records] == ["broken", "broken"]
