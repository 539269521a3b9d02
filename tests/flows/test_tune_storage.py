"""Studies in a database server, and Optuna's own dashboard over a study."""

import json
import os
import pwd
import shutil
import socket
import subprocess
import sysconfig
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Finished, small_overrides
from tests.flows.test_tune import LAYERS, LR, RECIPE, Trials

from kajiya.errors import MissingExtraError, StoreError
from kajiya.flows.tune import tune
from kajiya.flows.tune_search import _with_driver


def _tune(own_finished: Finished, *words: str, **more: Any) -> Any:
    quick = ("tune.confirm_seeds=0", "tune.sampler.name=random", "tune.launcher.name=process")
    return tune(RECIPE, [*small_overrides(), *quick, *words], own_finished.store, **more)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _programs() -> Path | None:
    """The folder of the newest PostgreSQL server."""
    found = shutil.which("initdb")
    if found is not None:
        return Path(found).parent
    return next((path.parent for path in sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), reverse=True)), None)


@pytest.fixture
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address, with its password, of a server of its own."""
    programs = _programs()
    if programs is None:
        pytest.skip("no PostgreSQL server on this machine (initdb is missing)")
    user: str | None = None
    if os.geteuid() == 0:  # the server refuses to run as root
        try:
            user = pwd.getpwnam("postgres").pw_name
        except KeyError:
            pytest.skip("PostgreSQL does not run as root, and there is no user postgres")
    folder = Path("/tmp") / f"kajiya-postgres-{os.getpid()}-{time.time_ns()}"  # a socket's path must be short
    folder.mkdir(mode=0o700)
    (folder / "password").write_text("h4mmer")
    if user is not None:
        for path in (folder, folder / "password"):
            shutil.chown(path, user)
    port = _free_port()

    def call(program: str, *words: str) -> None:
        command = [str(programs / program), "-D", str(folder / "data"), *words]
        subprocess.run(command, check=True, user=user, cwd="/", stdout=subprocess.DEVNULL, timeout=120)

    try:
        call("initdb", "-U", "smith", f"--pwfile={folder / 'password'}", "-A", "scram-sha-256", "--no-sync")
        options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
        call("pg_ctl", "-w", "-l", str(folder / "log"), "-o", options, "start")
        try:
            yield f"postgresql://smith:h4mmer@127.0.0.1:{port}/postgres"
        finally:
            call("pg_ctl", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
def test_a_study_in_postgresql_goes_on_and_keeps_its_password_to_itself(
    postgres: str, own_finished: Finished, trials: Trials
) -> None:
    import psycopg

    storage = f"tune.storage={postgres}"
    command = ["kajiya", "tune", RECIPE, storage]
    first = _tune(own_finished, LR, LAYERS, storage, "tune.trials=3", "tune.parallel=2", command=command)
    again = _tune(own_finished, LR, LAYERS, storage, "tune.trials=5", command=command)
    assert first.run.id == again.run.id
    assert again.counts == {"finished": 5}
    assert not (again.run.folder / "study.db").exists()
    with psycopg.connect(postgres) as connection:
        states = connection.execute("select state from trials order by number").fetchall()
    assert [str(state) for (state,) in states] == ["COMPLETE"] * 5
    said = [path for path in again.run.folder.rglob("*") if path.is_file() and b"h4mmer" in path.read_bytes()]
    assert not said, "the password stands in the study's files"
    assert all(job.config.tune.storage is None for job in trials.jobs)
    with pytest.raises(StoreError, match=r"tune\.storage: cannot be opened") as problem:
        _tune(own_finished, LR, storage.replace("h4mmer", "wrong1"))
    assert "wrong1" not in str(problem.value)


def test_a_missing_driver_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"kajiya\[postgres\]"):
        _with_driver("postgres://a@b/c")
    assert _with_driver("sqlite:///x") == "sqlite:///x"


@pytest.mark.slow
def test_optunas_dashboard_reads_the_study(own_finished: Finished, trials: Trials) -> None:
    tuned = _tune(own_finished, LR, LAYERS, "tune.trials=4")
    port = _free_port()
    words = [f"sqlite:///{tuned.run.folder / 'study.db'}", "--port", str(port)]
    with subprocess.Popen(
        [str(Path(sysconfig.get_path("scripts")) / "optuna-dashboard"), *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as server:
        try:
            base = f"http://127.0.0.1:{port}/api/studies"
            (summary,) = _get(base, server)["study_summaries"]
            assert summary["study_name"] == tuned.run.id
            detail = _get(f"{base}/{summary['study_id']}", server)
        finally:
            server.terminate()
    assert [trial["state"] for trial in detail["trials"]] == ["Complete"] * 4
    assert {each["name"] for each in detail["union_search_space"]} == {"optim.lr", "model.n_layers"}
    assert all(trial["intermediate_values"] for trial in detail["trials"])


def _get(url: str, server: "subprocess.Popen[bytes]") -> Any:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while True:
        assert server.poll() is None, "the dashboard has ended"
        try:
            with opener.open(url, timeout=30) as reply:
                return json.loads(reply.read())
        except OSError:
            time.sleep(0.2)
