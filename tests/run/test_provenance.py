"""What a result came from beside its config."""

import json
import subprocess
import sys
from pathlib import Path

import torch

from kajiya.run.provenance import collect_provenance, git_state, machine_facts, package_version


def test_provenance_names_packages_and_machine() -> None:
    facts = collect_provenance()
    assert facts["python"] == ".".join(map(str, sys.version_info[:3]))
    assert facts["packages"]["torch"] == torch.__version__
    assert facts["working_directory"] == str(Path.cwd())
    assert json.loads(json.dumps(facts)) == facts


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
