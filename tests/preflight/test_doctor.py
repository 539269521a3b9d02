"""The doctor: what it says of this machine is so, and each thing that can be wrong is seen, with its remedy."""

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kajiya.preflight import doctor
from kajiya.preflight.doctor import Finding, diagnose


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    named = {finding.name: finding for finding in findings}
    assert len(named) == len(findings)
    return named


def test_this_machine(tmp_path: Path) -> None:
    found = by_name(diagnose(tmp_path / "not" / "yet"))
    assert sys.executable in found["python"].value
    assert found["kajiya"].state == "ok"
    assert torch.__version__ in found["torch"].value
    assert str(tmp_path) in found["disk"].value
    assert {"processor", "cores", "memory", "precision", "compiler", "operators", "programs"} <= set(found)
    assert any(name.startswith("gpu") for name in found)
    assert {"extra track", "extra report", "extra metrics", "extra tune", "extra wandb"} <= set(found)
    assert {finding.state for finding in found.values()} <= {"ok", "warn", "missing"}
    assert all(finding.remedy for finding in found.values() if finding.state != "ok")
    assert json.loads(json.dumps([dataclasses.asdict(finding) for finding in found.values()]))


def test_of_the_heavy_packages_only_torch_is_imported(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from kajiya.preflight.doctor import diagnose
diagnose(Path(sys.argv[1]))
heavy = {"torchvision", "transformers", "datasets", "mlflow", "wandb", "pandas", "sklearn", "optuna", "tensorboard"}
print(sorted(heavy & set(sys.modules)), "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True, text=True)
    assert done.stdout == "[] True\n"


def test_a_torch_that_does_not_load_hides_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    found = by_name(diagnose(tmp_path))
    assert found["torch"].state == "missing"
    assert "does not load (ModuleNotFoundError" in found["torch"].value
    assert "install --force-reinstall torch" in found["torch"].remedy
    assert {"processor", "memory", "disk", "extra track"} <= set(found)


@pytest.fixture
def distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Makes a distribution, found before an installed one of its name: `distribution(name, version, metadata, files)`."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(name: str, version: str, metadata: str = "", files: dict[str, bytes] | None = None) -> Path:
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{metadata}")
        for path, content in (files or {}).items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_bytes(content)
        (folder / "RECORD").write_text("".join(f"{path},,\n" for path in files or {}))
        return folder

    return make


EXTRAS = """Requires-Python: >=3.11
Provides-Extra: there
Provides-Extra: absent
Provides-Extra: old
Provides-Extra: both
Requires-Dist: torch>=2
Requires-Dist: pytest>=7; extra == "there"
Requires-Dist: no-such-thing<4,>=3.5; extra == "absent"
Requires-Dist: never-wanted; sys_platform == "plan9" and extra == "absent"
Requires-Dist: pytest>=999; extra == "old"
Requires-Dist: kajiya[absent,there]; extra == "both"
"""


def test_extras_come_from_the_packages_own_metadata(distribution: Callable[..., Path]) -> None:
    distribution("kajiya", "9.9", EXTRAS)
    found = by_name([doctor._extra(name) for name in doctor.declared_extras()])
    assert list(found) == ["extra there", "extra absent", "extra old", "extra both"]
    assert found["extra there"] == Finding("extra there", "ok", f"pytest {pytest.__version__}")
    assert found["extra absent"].value == "without no-such-thing<4,>=3.5"
    assert found["extra old"].value == "without pytest>=999"
    assert found["extra both"].value == "without no-such-thing<4,>=3.5"
    assert found["extra both"].state == "missing"
    assert found["extra both"].remedy == f"{sys.executable} -m pip install 'kajiya[both]'"
    assert doctor._installation().value.startswith("9.9 at ")


def test_a_missing_requirement_of_the_package_itself(distribution: Callable[..., Path]) -> None:
    distribution("kajiya", "9.9", "Requires-Python: >=4\nRequires-Dist: no-such-thing\n")
    assert doctor._installation().state == "missing"
    assert "without no-such-thing" in doctor._installation().value
    assert doctor._interpreter().state == "missing"
    assert "Python >=4" in doctor._interpreter().remedy


@pytest.mark.parametrize(
    ("origin", "words"),
    [
        ({"url": "file:///a%20b/kajiya", "dir_info": {"editable": True}}, "install -e '/a b/kajiya[track]'"),
        ({"url": "file:///src/kajiya", "dir_info": {}}, "install '/src/kajiya[track]'"),
        ({"url": "https://x.org/k.whl", "archive_info": {}}, "install 'kajiya[track] @ https://x.org/k.whl'"),
    ],
)
def test_the_command_installs_from_where_the_package_came(
    origin: dict[str, Any], words: str, distribution: Callable[..., Path]
) -> None:
    folder = distribution("kajiya", "9.9")
    (folder / "direct_url.json").write_text(json.dumps(origin))
    assert doctor.install_command("track") == f"{sys.executable} -m pip {words}"


def test_the_command_is_uvs_where_there_is_no_pip(
    distribution: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    distribution("kajiya", "9.9")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert doctor.install_command("track") == f"uv pip install --python {sys.executable} 'kajiya[track]'"


CPU_TORCH = SimpleNamespace(__version__="2.13.0+cpu", version=SimpleNamespace(cuda=None, hip=None))
CUDA_TORCH = SimpleNamespace(__version__="2.13.0+cu130", version=SimpleNamespace(cuda="13.0", hip=None))


@pytest.mark.parametrize(
    ("made_for", "links", "installed", "state", "words"),
    [
        ("torch==2.13.0", b"libtorch_cuda.so", CPU_TORCH, "warn", "CUDA build beside a CPU torch"),
        ("torch==2.12.0", b"libtorch_cpu.so", CPU_TORCH, "warn", "was built for torch==2.12.0"),
        ("torch==2.13.0", b"libtorch_cpu.so", CPU_TORCH, "ok", "0.28.0"),
        ("torch==2.13.0", b"libtorch_cuda.so", CUDA_TORCH, "ok", "0.28.0"),
        ("torch==2.13.0", b"libtorch_cuda.so", None, "warn", "torch does not load"),
    ],
)
def test_a_torchvision_for_another_torch_is_seen(
    made_for: str, links: bytes, installed: Any, state: str, words: str, distribution: Callable[..., Path]
) -> None:
    files = {"torchvision/_C.so": b"\x7fELF" + links + b"\0", "torchvision/__init__.py": b""}
    distribution("torchvision", "0.28.0", f"Requires-Dist: numpy\nRequires-Dist: {made_for}\n", files)
    (finding,) = doctor._torchvision(installed)
    assert finding.state == state
    assert words in finding.value
    if state == "warn":
        assert finding.remedy


def test_processor_flags_and_container_limits_are_read(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nflags\t\t: fpu avx2 avx512f amx_bf16\n\nprocessor\t: 1\nflags\t\t: fpu\n")
    assert doctor._cpu_flags(info) == {"fpu", "avx2", "avx512f", "amx_bf16"}
    info.write_text("processor : 0\nFeatures : fp asimd bf16\n")
    assert doctor._cpu_flags(info) == {"fp", "asimd", "bf16"}
    assert doctor._cpu_flags(tmp_path / "none") == set()
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert doctor._cgroup_cores(tmp_path / "cpu.max") == 1.5
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert doctor._cgroup_cores(tmp_path / "cpu.max") is None
    (tmp_path / "memory.max").write_text("1073741824\n")
    assert doctor._cgroup_memory(tmp_path / "memory.max") == 2**30
    (tmp_path / "memory.max").write_text("max\n")
    assert doctor._cgroup_memory(tmp_path / "memory.max") is None
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:       4 kB\n")
    assert doctor._available_memory(tmp_path / "meminfo") == 4096
    assert doctor._available_memory(tmp_path / "none") is None


def test_little_room_is_a_warning_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=2**30))
    assert doctor._disk(tmp_path) == Finding(
        "disk",
        "warn",
        f"1.0 GiB free at {tmp_path}",
        "Free some space (kajiya store gc), or put the store elsewhere with --store.",
    )
    monkeypatch.setattr(doctor, "_available_memory", lambda path: 2**30)
    assert doctor._memory().state == "warn"
    assert doctor._memory().value.endswith("1.0 GiB available")
    monkeypatch.setattr(doctor, "_cgroup_cores", lambda path: 0.5)
    assert doctor._cores(None).state == "warn"
    assert "0.5 cores' time" in doctor._cores(None).value


def test_the_compiler_is_the_one_that_inductor_would_take(monkeypatch: pytest.MonkeyPatch) -> None:
    from kajiya.training.compile import compiler_problem

    finding = doctor._compiler()
    assert (finding.state == "ok") == (compiler_problem(torch.device("cpu")) is None)
    monkeypatch.setenv("CXX", "no-such-compiler")
    finding = doctor._compiler()
    assert finding.state == "warn"
    assert finding.value == "no no-such-compiler: training runs without torch.compile"
    assert finding.remedy


def test_the_operators_compiler_is_the_one_that_builds_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kajiya.run.native.build import NativeBuildError, build_library

    monkeypatch.setattr("kajiya.run.native.build.cache_folder", lambda: tmp_path / "built")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", sys.executable)
    assert doctor._compiler().state == "ok", "torch's is another question"
    assert doctor._operators().state == "warn"
    assert "torch's own operators" in doctor._operators().value
    assert doctor._operators().remedy
    with pytest.raises(NativeBuildError, match="no C\\+\\+ compiler"):
        build_library("operators", "kajiya.models.native", ("operators.cpp",), "operators.cpp")
    (tmp_path / "c++").write_text("#!/bin/sh\n")
    (tmp_path / "c++").chmod(0o755)
    assert doctor._operators() == Finding("operators", "ok", f"built by {tmp_path}/c++")


def test_gpus_are_listed_with_memory_and_generation() -> None:
    cuda = SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: 2,
        get_device_properties=lambda index: SimpleNamespace(name=f"GPU {index}", major=9 - 2 * index, minor=0),
        mem_get_info=lambda index: (2**30, 2**31),
    )
    first, second = doctor._gpus(SimpleNamespace(cuda=cuda))
    assert first == Finding("gpu 0", "ok", "GPU 0, 2.0 GiB (1.0 GiB free), sm_90, bf16")
    assert second.value.endswith("sm_70, no bf16")


def test_a_machine_that_cannot_confine_programs_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "why_unconfined", lambda: "no Landlock")
    finding = doctor._programs()
    assert (finding.state, finding.value) == ("warn", "what a model wrote can change your files: no Landlock")
    assert "container" in finding.remedy
