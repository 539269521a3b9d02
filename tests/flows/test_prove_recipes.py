"""`kajiya prove` raises no false alarm: every packaged recipe and fifty random configs are planned and proven, on real rows."""

import random
import sysconfig
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Finished, small_overrides

from kajiya.config.compose import compose, list_recipes
from kajiya.config.schema import AdapterConfig, Config, LossConfig, ModelConfig, OptimConfig, ScheduleConfig
from kajiya.config.validate import validate
from kajiya.errors import ConfigError
from kajiya.flows.plan import prove_recipe

STDLIB = Path(sysconfig.get_paths()["stdlib"])
QUICK = ("stdlib-dpo",)
"""Recipes that are proven in every run of the tests; the others are slow ones."""
REAL_BASES = ("gemma-dpo", "llama-3.1-8b-lora", "qwen3-qlora")
ROUNDS, EACH_ROUND = 5, 10


@pytest.fixture(autouse=True)
def _short_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    """The speed of a step is nobody's concern here."""
    monkeypatch.setattr("kajiya.preflight.plan._ENOUGH_S", {"by time": 0.0, "by steps": 0.0})


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
        # An induction circuit asks for heads of some width.
        n_params = "200k" if recipe.model.init != "induction" else "1M"
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


# ---------------------------------------------------------------- random configs

_FAMILIES: dict[str, list[str]] = {
    "stdlib-pretrain": ["next_token"],
    "stdlib-mlm": ["masked_lm"],
    "stdlib-t5": ["seq2seq"],
    "stdlib-classify": ["classify"],
    "stdlib-kto": ["kto"],
    "stdlib-sft": ["next_token"],
    "stdlib-dpo": ["dpo", "orpo", "simpo", "reward"],
}
"""Recipes whose rows are taken, and the losses that learn from them."""


@cache
def _of_rows(recipe: str) -> Config:
    """The recipe on few rows, its model and its tokenizer made anew."""
    rows = ["data.source.options.packages=email json xml", "data.source.options.max_bytes=400"]
    if recipe == "stdlib-pretrain":
        rows = small_overrides()
    elif recipe == "stdlib-mlm":
        rows = [f"data.source.options.root={STDLIB / 'email'}", "data.heldout_every=5"]
    elif recipe == "stdlib-classify":
        rows = []
    anew = ["model.path=null", "tokenizer.path=null", "tokenizer.vocab_size=512", "data.max_lost_fraction=1"]
    return compose(recipe, [*rows, *anew, "name=drawn"])


def _drawn(draw: random.Random) -> Config:
    """A config whose parts are drawn one by one. Raises `ConfigError` where they do not fit together."""
    recipe = draw.choice([*_FAMILIES, "stdlib-pretrain", "stdlib-pretrain", "stdlib-sft"])
    loss = draw.choice(_FAMILIES[recipe])
    config = _of_rows(recipe)
    is_causal = loss not in ("masked_lm", "seq2seq", "classify", "reward")
    architecture = draw.choice(["llama", "llama", "qwen3", "mistral", "gpt2", "gemma3_text"])
    model = ModelConfig(
        name=architecture if is_causal else config.model.name,
        n_params=draw.choice(["30k", "60k", "100k"]),
        n_layers=draw.choice([None, 1, 3]),
        tied=draw.choice([True, False]),
        quantize=draw.choice(["none"] * 4 + ["nf4", "int8", "torchao-int8"]),
    )
    adapter = AdapterConfig(draw.choice(["none"] * 4 + ["lora", "lora", "dora", "ia3", "prefix", "prompt"]))
    if adapter.name == "lora":
        inits, targets = ("default", "gaussian", "pissa", "olora"), ("all-linear", "attention", "mlp")
        options = {"init": draw.choice(inits), "targets": draw.choice(targets), "dropout": draw.choice([0.0, 0.1])}
        adapter = replace(adapter, options=options)
    optimizers = ("adamw", "adamw", "muon", "lion", "adafactor", "sgd", "schedule_free", "adamw_8bit")
    name = draw.choice(optimizers)
    # Rates of plain gradient descent are of another size: a small one leaves LoRA's first matrices where they are.
    rate = 10 ** draw.uniform(-3.5, -2.5) * (100 if name == "sgd" else 1)
    optim = OptimConfig(name=name, lr=rate, weight_decay=draw.choice([0.0, 0.1]))
    schedule = ScheduleConfig(
        name=draw.choice(["cosine", "linear", "wsd", "constant", "inverse_sqrt"]),
        warmup_fraction=draw.choice([0.0, 0.05, 0.2]),
    )
    train = replace(
        config.train,
        loss=LossConfig(loss, {"chunk_tokens": draw.choice([7, 512])} if loss in ("next_token", "dpo") else {}),
        minutes=None,
        steps=draw.choice([30, 200, 5000]),
        micro_batch=draw.choice([1, 2, 4]),
        accumulate=draw.choice([1, 3]),
        row_growth=draw.choice([(), (), (0.5,)]) if recipe == "stdlib-pretrain" else (),
        precision=draw.choice(["fp32", "fp32", "bf16-mixed", "bf16"]),
        gradient_checkpointing=draw.choice(["off", "off", "full", "selective"]),
        ema_decay=draw.choice([None, None, 0.99]),
    )
    made = replace(
        config, seed=draw.randrange(1000), model=model, adapter=adapter, optim=optim, schedule=schedule, train=train
    )
    validate(made)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("number", range(ROUNDS))
def test_random_configs_are_proven(number: int, own_finished: Finished) -> None:
    draw = random.Random(1000 + number)
    proven: list[Config] = []
    refused = []
    while len(proven) < EACH_ROUND:
        assert len(refused) < 3 * EACH_ROUND, refused
        try:
            config = _drawn(draw)
            facts = prove_recipe(config, own_finished.store)
        except ConfigError as problem:
            # Parts that do not go together are refused by name; that is no config.
            refused.append(str(problem))
            continue
        assert {each["state"] for each in facts["findings"]} <= {"passed", "skipped"}
        proven.append(config)
    assert len({(each.train.loss.name, each.adapter.name, each.optim.name) for each in proven}) > EACH_ROUND // 2
