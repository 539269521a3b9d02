"""`kajiya prove` raises no false alarm: every packaged recipe is planned and proven, on real rows."""

import sysconfig
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Finished

from kajiya.config.compose import compose, list_recipes
from kajiya.flows.plan import prove_recipe

STDLIB = Path(sysconfig.get_paths()["stdlib"])
QUICK = ("stdlib-dpo",)
"""Recipes that are proven in every run of the tests; the others are slow ones."""
REAL_BASES = ("gemma-dpo", "llama-3.1-8b-lora", "qwen3-qlora")


@pytest.fixture(autouse=True)
def _short_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    """The speed of a step is nobody's concern here."""
    monkeypatch.setattr("kajiya.flows.planning._ENOUGH_S", {"by time": 0.0, "by steps": 0.0})


def _smaller(name: str, run: str) -> list[str]:
    """The recipe's own settings on few rows and with narrow models; its base is the run, or a stand-in."""
    recipe = compose(name)
    # Of few rows a few long ones are many.
    wanted = ["eval.samples=0", "data.max_lost_fraction=1"]
    if recipe.train.loss.name != "grpo":
        wanted.append("data.row_tokens=512")
    if recipe.data.source.name == "stdlib":
        wanted += [f"data.source.options.root={STDLIB / 'email'}", "data.heldout_every=5", "data.row_tokens=128"]
    elif recipe.data.source.name == "stdlib_pairs" and recipe.data.source.options["rows"] != "labelled":
        wanted += ["data.source.options.packages=email json xml", "data.source.options.max_bytes=600"]
    if recipe.model.path is None:
        # An induction circuit and the C++ operators ask for heads of some width.
        n_params = "200k" if recipe.model.init != "induction" else "2M"
        wanted += ["tokenizer.vocab_size=512", *([] if recipe.model.hidden_size else [f"model.n_params={n_params}"])]
    elif recipe.model.path.startswith("stdlib-"):
        wanted += [f"model.path={run}", f"tokenizer.path={run}"]
    else:
        wanted += ["model.stand_in=true", "tokenizer.vocab_size=512"]
    if recipe.train.loss.name != "grpo":
        wanted += ["train.batch_rows=4" if recipe.train.micro_batch == "auto" else "train.micro_batch=2"]
    return wanted


@pytest.mark.parametrize(
    "name", [pytest.param(each, marks=[] if each in QUICK else pytest.mark.slow) for each in sorted(list_recipes())]
)
def test_a_packaged_recipe_is_planned_and_proven(name: str, own_finished: Finished) -> None:
    heard: dict[str, Any] = {}
    config = compose(name, _smaller(name, own_finished.trained.run.id))
    facts = prove_recipe(config, own_finished.store, lambda kind, **fields: heard.update({kind: fields}))
    assert heard["plan"]["facts"]["steps"] >= 1
    states = {each["name"]: each["state"] for each in facts["findings"]}
    assert len(states) == 10
    assert set(states.values()) <= {"passed", "skipped"}
    assert {states[each] for each in ("targets", "accumulation", "trainable", "reload", "learning")} == {"passed"}


def test_the_recipes_of_real_bases_say_the_shape_that_a_stand_in_takes() -> None:
    for name in REAL_BASES:
        config = compose(name)
        assert "/" in str(config.model.path)
        assert config.tokenizer.path == config.model.path
        assert config.adapter.name == "lora"
    assert compose("qwen3-qlora").model.quantize == "nf4"
    assert compose("gemma-dpo").train.loss.name == "dpo"
