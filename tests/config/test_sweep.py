"""Hydra's sweep grammar as dimensions, checked against the schema; W&B's sweep files as the same."""

from pathlib import Path

import pytest

from kajiya.config.compose import compose
from kajiya.config.sweep import Dimension, as_override, check_space, grid, split_sweep
from kajiya.config.wandb_sweep import read_wandb_sweep
from kajiya.errors import ConfigError


def test_the_grammar_becomes_dimensions() -> None:
    fixed, found = split_sweep(
        [
            "seed=3",
            "optim.lr=tag(log,interval(1e-4,1e-2))",
            "model.n_layers=choice(4,6,8)",
            "train.micro_batch=range(2,9,2)",
            "model.n_heads=interval(1,8)",
            "optim=adamw,muon",
            "train.row_growth=[],[0.5]",
        ]
    )
    assert fixed == ["seed=3"]
    assert found == (
        Dimension("optim.lr", low=1e-4, high=1e-2, is_log=True),
        Dimension("model.n_layers", choices=(4, 6, 8)),
        Dimension("train.micro_batch", low=2, high=8, step=2, is_int=True),
        Dimension("model.n_heads", low=1, high=8, is_int=True),  # the schema says int
        Dimension("optim", choices=("adamw", "muon")),
        Dimension("train.row_growth", choices=("[]", "[0.5]")),
    )
    assert found[2].values() == [2, 4, 6, 8]


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("optim.lr=interval(2,1)", "is empty"),
        ("optim.lr=tag(log,interval(0,1))", "logarithmic scale cannot begin at 0"),
        ("seed=glob(x*)", "cannot be searched"),
        ("optim.lr=choice(", "is not an override"),
        ("optim.lr=choice(1e-3,nan)", "nan is no value to search over"),
        ("optim.lr=interval(1e-4,inf)", "no finite range"),
        ("seed=range(0,inf)", "no finite range"),
    ],
)
def test_what_cannot_be_searched_is_refused(override: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        split_sweep([override])


def test_the_space_is_checked_before_the_first_trial() -> None:
    recipe = "stdlib-pretrain"
    base = check_space(recipe, ["seed=7"], split_sweep(["model.n_layers=choice(4,6)"])[1])
    assert (base.seed, base.model.n_layers) == (7, 4)
    for override, problem in (
        ("model.n_layer=1,2", "did you mean 'model.n_layers'"),
        ("model.n_layers=choice(2,0)", r"out of range.*with model.n_layers=0 of the search"),
        ("optim.lr=interval(0.1,1)", None),
        ("optim.name=choice(muon,adamww)", "adamww.*is not one of"),
        ("train.precision=choice(fp32,fp17)", "fp17"),
    ):
        dimensions = split_sweep([override])[1]
        if problem is None:
            check_space(recipe, [], dimensions)
            continue
        with pytest.raises(ConfigError, match=problem):
            check_space(recipe, [], dimensions)


def test_a_grid_is_every_combination() -> None:
    dimensions = split_sweep(["seed=1,2", "optim=adamw,muon"])[1]
    assert grid(dimensions) == [
        {"seed": 1, "optim": "adamw"},
        {"seed": 1, "optim": "muon"},
        {"seed": 2, "optim": "adamw"},
        {"seed": 2, "optim": "muon"},
    ]
    with pytest.raises(ConfigError, match="has no grid"):
        grid(split_sweep(["optim.lr=interval(0.1,1)"])[1])


def test_values_come_back_as_they_went_in() -> None:
    config = compose("stdlib-pretrain", [as_override("optim.clip_norm", None), as_override("model.tied", False),
                                         as_override("optim.lr", 1e-05), as_override("train.row_growth", "[0.5]")])  # fmt: skip
    assert config.optim.clip_norm is None
    assert not config.model.tied
    assert (config.optim.lr, config.train.row_growth) == (1e-05, (0.5,))


def test_a_wandb_sweep_is_read_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(
        """
program: train.py
method: bayes
metric: {name: eval/nll, goal: minimize}
run_cap: 12
early_terminate: {type: hyperband, min_iter: 2, eta: 4}
parameters:
  optim:
    parameters:
      lr: {distribution: log_uniform_values, min: 0.0001, max: 0.01}
  model.n_layers: {values: [2, 4]}
  train.micro_batch: {distribution: q_uniform, min: 2, max: 8, q: 2}
  seed: {value: 5}
  model.n_heads: {min: 1, max: 4}
"""
    )
    overrides, passed_over = read_wandb_sweep(path)
    assert passed_over == ["program"]
    fixed, found = split_sweep(overrides)
    config = check_space("stdlib-pretrain", fixed, [each for each in found if each.key != "model.n_heads"])
    assert config.tune.sampler.name == "tpe"
    assert config.tune.objectives == ("min:eval/nll",)
    assert config.tune.trials == 12
    assert config.tune.pruner.options == {"min_evals": 2, "reduction": 4}
    assert config.seed == 5
    assert {each.key: each for each in found} == {
        "optim.lr": Dimension("optim.lr", low=1e-4, high=1e-2, is_log=True),
        "model.n_layers": Dimension("model.n_layers", choices=(2, 4)),
        "train.micro_batch": Dimension("train.micro_batch", low=2, high=8, step=2, is_int=True),
        "model.n_heads": Dimension("model.n_heads", low=1, high=4, is_int=True),
    }
    path.write_text("parameters: {optim.lr: {distribution: beta, min: 0, max: 1}}")
    with pytest.raises(ConfigError, match=r"beta.*has no counterpart"):
        read_wandb_sweep(path)
    path.write_text("parameters: {}\nagents: 3")
    with pytest.raises(ConfigError, match="agents: is not understood"):
        read_wandb_sweep(path)
