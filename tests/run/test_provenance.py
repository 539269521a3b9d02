"""What a result came from beside its config."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kajiya.run.provenance import (
    collect_provenance,
    git_state,
    gpu_facts,
    machine_facts,
    package_version,
    package_versions,
)


def test_provenance_names_packages_and_machine() -> None:
    facts = collect_provenance()
    assert facts["python"] == ".".join(map(str, sys.version_info[:3]))
    assert facts["packages"]["torch"] == torch.__version__
    assert facts["packages"]["kajiya"]
    assert facts["working_directory"] == str(Path.cwd())
    assert json.loads(json.dumps(facts)) == facts


def test_every_installed_requirement_is_named_and_no_tool(monkeypatch: pytest.MonkeyPatch) -> None:
    named = package_versions()
    declared: dict[str, set[str]] = {}
    for text in importlib.metadata.requires("kajiya") or []:
        extra = re.search(r"extra == ['\"]([\w-]+)", text)
        declared.setdefault(extra[1] if extra else "", set()).add(re.split(r"[^\w.-]", text)[0])
    needed = set().union(*(names for extra, names in declared.items() if extra not in ("test", "lint", "docs")))
    assert {"torch", "accelerate", "bitsandbytes", "torchao", "fastokens", "hydra-core", "mlflow"} <= needed
    installed = {name for name in needed if package_version(name) is not None}
    assert named.keys() - {"omegaconf", "triton"} == installed | {"kajiya"}
    assert all(named[name] == package_version(name) for name in named)
    assert declared["lint"]
    assert "pytest" not in named
    monkeypatch.setattr("kajiya.run.provenance._PROJECT", "no-such-distribution")
    assert {"torch", "pytest"} <= package_versions().keys(), "sources that are not installed: all that is there"


SMI = """#!/bin/sh
[ "$1" = --query-gpu=name,memory.total,driver_version ] || exit 9
echo 'NVIDIA H100 80GB HBM3, 81559, 570.86.15'
echo 'NVIDIA GB10, [N/A], 580.95.05'
exit $STATUS
"""


def test_gpus_are_named_with_memory_and_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nvidia-smi").write_text(SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("STATUS", "0")
    assert machine_facts()["gpus"] == [
        {"name": "NVIDIA H100 80GB HBM3", "memory_bytes": 81559 * 2**20, "driver": "570.86.15"},
        {"name": "NVIDIA GB10", "memory_bytes": None, "driver": "580.95.05"},
    ]
    monkeypatch.setenv("STATUS", "9")  # a driver that does not answer
    assert gpu_facts() == []
    monkeypatch.setenv("PATH", "")
    assert gpu_facts() == []


def test_machine_facts_are_plausible() -> None:
    facts = machine_facts()
    assert facts["cores"] >= 1
    assert facts["memory_bytes"] > 2**28
    assert facts["processor"]


def test_a_missing_package_has_no_version() -> None:
    assert package_version("no-such-distribution") is None


def test_git_state_counts_changed_files(tmp_path: Path) -> None:
    assert git_state(tmp_path) is None

    def git(*words: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        done = subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    git("init", "-q")
    (tmp_path / "f").write_text("1")
    git("add", "f")
    git("commit", "-qm", "first")
    assert git_state(tmp_path) == {"commit": git("rev-parse", "HEAD"), "changed_files": 0}
    (tmp_path / "f").write_text("2")
    (tmp_path / "untracked").write_text("")
    state = git_state(tmp_path)
    assert state is not None
    assert state["changed_files"] == 1
