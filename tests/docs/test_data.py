"""The page on data: its blocks run and print what it says."""

import json
import re
import subprocess
import sys
from pathlib import Path

from tests.docs import pages

from kajiya.config.compose import compose
from kajiya.config.schema import DataConfig
from kajiya.config.setting import check_bounds
from kajiya.data.ledger import KINDS

PAGE = pages.DOCS / "data.md"


def test_every_block_prints_what_is_stated(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, pages.__file__, str(PAGE)], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    printed = {row["line"]: row["output"] for row in json.loads(done.stdout)}
    stated = pages.stated_outputs(PAGE)
    assert len(stated) == 2
    for line, shown in stated.items():
        assert pages.differences(shown, printed[line]) is None


def test_formats_and_kinds_of_the_ledger_are_those_there_are() -> None:
    text = PAGE.read_text(encoding="utf-8")
    named = re.findall(r"^\| `(\w+)` \|", text.partition("## Formats")[2].partition("\n\nHeld-out")[0], re.M)
    assert len(named) == 7
    for name in named:
        check_bounds(DataConfig(format=name))
    table = text.partition("## The ledger")[2].partition("\n\nOnly what")[0]
    assert set(KINDS) <= set(re.findall(r"`([^`]+)`", table))


def test_the_recipe_composes_from_nothing_and_from_a_model() -> None:
    assert compose("stdlib-sft").model.path is None
    given = ["model.path=my-model", "tokenizer.path=my-model", "model.init=normal"]
    assert compose("stdlib-sft", given).model.path == "my-model"
