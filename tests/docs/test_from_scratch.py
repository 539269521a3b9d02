"""The guide runs as it stands, and prints what it says."""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.docs import pages

from kajiya.config.compose import compose

PAGE = pages.DOCS / "from-scratch.md"
ON_3_11 = sys.version_info[:2] == (3, 11)
TOLERANCE = 0.15 if ON_3_11 else 0.5
"""The text is the interpreter's own library, which differs from version to version."""


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """What each block printed, by its line; the page runs in a process and a folder of its own."""
    done = subprocess.run(
        [sys.executable, str(Path(pages.__file__)), str(PAGE)],
        cwd=tmp_path_factory.mktemp("page"),
        env={name: value for name, value in os.environ.items() if name != "KAJIYA_STORE"} | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "a reader would see this"
    return {entry["line"]: entry["output"] for entry in json.loads(done.stdout)}


def test_every_stated_output_is_the_real_one(real: dict[int, str]) -> None:
    stated = pages.stated_outputs(PAGE)
    assert len(stated) >= 15
    problems = {
        line: problem
        for line, shown in stated.items()
        if ON_3_11 or "Python 3.11" not in shown.title
        if (problem := pages.differences(shown, real[line], TOLERANCE)) is not None
    }
    assert problems == {}


def test_every_block_that_prints_states_its_output(real: dict[int, str]) -> None:
    printed = {line for line, output in real.items() if output}
    silent = printed - pages.stated_outputs(PAGE).keys()
    # Only the text that the model writes is left to the reader's own screen.
    assert len(silent) == 1
    assert "def close(self):" in real[silent.pop()]


def test_the_model_of_the_guide_beats_xz_alone(real: dict[int, str]) -> None:
    outputs = "".join(real.values())
    alone = float(outputs.partition("xz alone: ")[2].split()[0])
    model = float(outputs.partition(" bits per byte over ")[0].split()[-1])
    assert model < alone


def test_the_figures_repeated_in_the_text_are_those_of_the_outputs() -> None:
    text = PAGE.read_text(encoding="utf-8")
    summary = text.partition("The table of pairs needed ")[2].partition("\n\n")[0]
    outputs = " ".join(shown.body for shown in pages.stated_outputs(PAGE).values())
    figures = ["3.47", "2.88", "1.81", "1.39"]
    assert all(figure in summary and figure in outputs for figure in figures)


def _write_recipe(folder: Path, root: Path) -> Path:
    """The page's recipe with its text in `root`."""
    (block,) = [block for block in pages.blocks(PAGE) if '"guide.yaml").write_text' in block.body]
    recipe = block.body.partition('f"""')[2].partition('"""')[0].replace("{Path(asyncio.__file__).parent}", str(root))
    (folder / "guide.yaml").write_text(recipe, encoding="utf-8")
    return folder / "guide.yaml"


def _command() -> list[str]:
    (command,) = [block.body for block in pages.blocks(PAGE) if block.language == "console"]
    return command.split()


def test_the_command_at_the_end_trains_the_recipe_of_the_page(tmp_path: Path) -> None:
    assert _command() == ["$", "kajiya", "train", "guide.yaml"]
    config = compose(str(_write_recipe(tmp_path, tmp_path)))
    assert (config.name, config.train.steps, config.train.minutes) == ("guide", 700, None)


@pytest.mark.slow
def test_the_command_at_the_end_comes_to_the_pages_figure(tmp_path: Path) -> None:
    recipe = _write_recipe(tmp_path, Path(asyncio.__file__).parent)
    words = [sys.executable, "-m", *_command()[1:-1], recipe.name, "--json"]
    environment = {name: value for name, value in os.environ.items() if name != "KAJIYA_STORE"}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["history"]["metrics"]["test/bits_per_byte"] == pytest.approx(1.63, rel=TOLERANCE)
    assert (Path(facts["folder"]) / "report" / "report.html").is_file()
