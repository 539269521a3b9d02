"""The index of Transformers' models: what is kept of it is what would be made."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kajiya.run import model_index
from kajiya.run.model_index import kept_index

_NAMES = """
import json, sys
if sys.argv[1] == "kept":
    from kajiya.run.model_index import keep_model_index
    keep_model_index()
import transformers
finders = [str(finder) for finder in sys.meta_path if "kajiya" in str(type(finder))]
from transformers import LlamaForCausalLM
print(json.dumps([sorted(dir(transformers)), sorted(dir(transformers.models)), finders, LlamaForCausalLM.__module__]))
"""


def test_transformers_has_the_same_names(tmp_path: Path) -> None:
    said = [_names(tmp_path, way) for way in ("made", "kept", "kept")]
    assert said[0] == said[1] == said[2]
    assert len(said[0][1]) > 1000
    assert said[1][2] == []
    assert [path.suffix for path in (tmp_path / ".cache" / "kajiya" / "model-index").iterdir()] == [""]


def _names(home: Path, way: str) -> list[Any]:
    command = [sys.executable, "-c", _NAMES, way]
    done = subprocess.run(command, env={**os.environ, "HOME": str(home)}, capture_output=True, text=True, check=True)
    found: list[Any] = json.loads(done.stdout)
    return found


def test_a_changed_file_and_a_spoiled_index_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_index, "cache_folder", lambda: tmp_path / "cache")
    models = tmp_path / "models"
    (models / "llama").mkdir(parents=True)
    (models / "__init__.py").touch()
    (models / "llama" / "modeling_llama.py").write_text("first")
    made: list[str] = []

    def make(place: Any) -> Any:
        made.append(str(place))
        return {frozenset({"torch"}): {"llama": {(models / "llama" / "modeling_llama.py").read_text()}}}

    def ask(place: Path = models) -> Any:
        return kept_index(make, models)(place)

    first = ask()
    assert ask() == ask(models / "__init__.py") == first == make(models)
    assert len(made) == 2  # the second is the comparison's
    (models / "llama" / "modeling_llama.py").write_text("second")
    assert ask()[frozenset({"torch"})] == {"llama": {"second"}}
    assert len(made) == 3
    for kept in (tmp_path / "cache" / "model-index").iterdir():
        kept.write_bytes(b"\x00spoiled")
    assert ask()[frozenset({"torch"})] == {"llama": {"second"}}
    assert ask(models / "llama")  # another folder is never kept
    assert made[3:] == [str(models), str(models / "llama")]


def test_without_a_place_to_keep_it_it_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(model_index, "cache_folder", lambda: tmp_path / "file")
    assert kept_index(lambda place: {"of": str(place)}, tmp_path)(tmp_path) == {"of": str(tmp_path)}
