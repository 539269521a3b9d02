"""What `pip install .` puts on a machine: all of the package, nothing else, and it runs from there."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_runs(tmp_path: Path) -> None:
    words = ["-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir"]
    subprocess.run([sys.executable, *words, str(tmp_path)], cwd=ROOT, check=True)
    (wheel,) = tmp_path.glob("kajiya-*-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(tmp_path / "installed")
        names = {name for name in packed.namelist() if ".dist-info/" not in name}
        (entry,) = (packed.read(name).decode() for name in packed.namelist() if name.endswith("entry_points.txt"))
    listed = subprocess.run(["git", "ls-files", "src"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert names == {name.removeprefix("src/") for name in listed.splitlines()}
    assert len(names) > 200
    assert "kajiya = kajiya.cli:main" in entry

    script = "import kajiya, sys; from kajiya.cli import main; print(kajiya.__file__, file=sys.stderr); main()"
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}
    done = subprocess.run(
        [sys.executable, "-c", script, "config", "list"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stderr.startswith(str(tmp_path / "installed"))
    recipes, *groups = done.stdout.splitlines()
    assert len(recipes.split(", ")) == sum(name.startswith("kajiya/conf/recipes/") for name in names)
    assert [line.partition(":")[0] for line in groups] == ["data", "optim", "schedule"]
