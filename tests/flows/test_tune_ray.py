"""The launcher ray: a real search on a cluster of this machine's own, which reports to nobody."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.conftest import small_overrides

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _ray_is_there() -> None:
    pytest.importorskip("ray", reason="ray is not installed (the test extra brings it)")


def test_two_trials_are_searched_by_two_workers_of_ray(tmp_path: Path) -> None:
    import optuna

    words = ["optim.lr=tag(log,interval(1e-4,1e-2))", "tune.trials=2", "tune.parallel=2", "tune.launcher.name=ray",
             "tune.confirm_seeds=0"]  # fmt: skip
    command = [sys.executable, "-m", "kajiya", "tune", "stdlib-pretrain", *small_overrides(), *words, "--json"]
    # A cluster that a variable names is none that the config named.
    environment = os.environ | {"RAY_ADDRESS": "127.0.0.1:1"}
    done = subprocess.run(
        [*command, "--store", str(tmp_path)], capture_output=True, text=True, timeout=400, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["trials"] == {"finished": 2}
    study = optuna.load_study(
        study_name=facts["study"], storage=f"sqlite:///{tmp_path}/studies/{facts['study']}/study.db"
    )
    owners = {trial.user_attrs["owner"]["pid"] for trial in study.get_trials()}
    manifest = json.loads((tmp_path / "studies" / facts["study"] / "manifest.json").read_text())
    assert len(owners) == 2
    assert manifest["owner"]["pid"] not in owners
    for trial in study.get_trials():
        assert (tmp_path / "runs" / trial.user_attrs["run"] / "manifest.json").is_file()


def test_ray_runs_jobs_and_reports_to_nobody() -> None:
    code = (
        "import os\n"
        "from kajiya.config.schema import LauncherConfig\n"
        "from kajiya.flows.launch import launch\n"
        "def job(n): return n * n, os.getpid(), os.environ['RAY_USAGE_STATS_ENABLED']\n"
        "found = list(launch(LauncherConfig('ray'), job, [1, 2, 3, 4, 5], 2))\n"
        "assert {sent for _, _, sent in found} == {'0'}\n"
        "assert os.getpid() not in {pid for _, pid, _ in found}\n"
        "print(sorted(value for value, _, _ in found))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("[1, 4, 9, 16, 25]")
