"""Hydra's sweep grammar as dimensions, checked against the schema; W&B's sweep files as the same."""

import math
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from scipy import stats

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
        ("optim.lr=tag(log,choice(1e-3,1e-2))", r"^optim\.lr: tag\(log,…\) says nothing of a choice"),
        ("model.n_layers=tag(log,range(1,9))", r"^model\.n_layers: tag\(log,…\) says nothing of a range"),
        ("optim.lr=tag(logarithmic,interval(1e-4,1e-2))", r"^optim\.lr: the tag 'logarithmic' means nothing"),
        ("seed=shuffle(choice(1,2,3))", r"^seed: shuffle\(…\) changes nothing"),
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
name: my sweep
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
    overrides, notes = read_wandb_sweep(path)
    assert [note.split(",")[0] for note in notes] == [
        "'program' says how W&B starts its agents",
        "'name' is W&B's title of a sweep; a study is named after its recipe",
        "early_terminate.strict is not true; Optuna's hyperband ends trials as if it were",
    ]
    fixed, found = split_sweep(overrides)
    config = check_space("stdlib-pretrain", fixed, [each for each in found if each.key != "model.n_heads"])
    assert config.tune.sampler.name == "tpe"
    assert config.tune.objectives == ("min:eval/nll",)
    assert config.tune.trials == 12
    assert config.tune.pruner.options == {"max_evals": None, "min_evals": 2, "reduction": 4}
    assert config.seed == 5
    assert {each.key: each for each in found} == {
        "optim.lr": Dimension("optim.lr", low=1e-4, high=1e-2, is_log=True),
        "model.n_layers": Dimension("model.n_layers", choices=(2, 4)),
        "train.micro_batch": Dimension("train.micro_batch", low=2, high=8, step=2, is_int=True),
        "model.n_heads": Dimension("model.n_heads", low=1, high=4, is_int=True),
    }


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (
            "{distribution: log_uniform, min: -9, max: -2}",
            "tag(log,interval(0.00012340980408667956,0.1353352832366127))",
        ),
        (
            "{distribution: inv_log_uniform, min: 2, max: 9}",
            "tag(log,interval(0.00012340980408667956,0.1353352832366127))",
        ),
        ("{distribution: inv_log_uniform_values, min: 0.5, max: 4}", "tag(log,interval(0.5,4.0))"),
        ("{distribution: q_log_uniform_values, min: 2, max: 64, q: 1}", "tag(log,int(interval(2,64)))"),
        ("{distribution: int_uniform, min: 2, max: 64}", "int(interval(2,64))"),
        ("{distribution: q_uniform, min: 0, max: 1, q: 0.25}", "range(0.0,1.125,0.25)"),
        ("{distribution: constant, value: [a, 1]}", "['a',1]"),
        ("{distribution: categorical, values: [true, null]}", "true,null"),
        ("{min: 1e-4, max: 0.01}", "interval(0.0001,0.01)"),  # YAML reads the first as text
    ],
)
def test_distributions_of_a_wandb_sweep(entry: str, expected: str, tmp_path: Path) -> None:
    (path := tmp_path / "sweep.yaml").write_text(f"method: random\nparameters: {{x: {entry}}}\n")
    overrides, _ = read_wandb_sweep(path)
    assert overrides == ["tune.sampler.name=random", f"x={expected}"]
    split_sweep(overrides)


def test_brackets_of_a_wandb_sweep(tmp_path: Path) -> None:
    rule = "{type: hyperband, max_iter: 27, s: 2, strict: true}"
    (path := tmp_path / "sweep.yaml").write_text(f"parameters: {{seed: {{value: 1}}}}\nearly_terminate: {rule}\n")
    overrides, notes = read_wandb_sweep(path)
    assert notes == []
    assert overrides[1:4] == [
        "tune.pruner.name=hyperband",
        "tune.pruner.options.min_evals=3",  # 27 / 3 / 3
        "tune.pruner.options.max_evals=27",
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("parameters: {}\nagents: 3", "agents: is not understood"),
        ("parameters: {}\nmetric: {goal: minimize}", r"metric\.name: is missing"),
        ("parameters: {}\nmetric: {name: eval/nll, goal: lower}", r"metric\.goal: 'lower' is not one of"),
        ("parameters: {}\nmetric: {name: eval/nll, target: 2.5}", r"metric\.target: has no counterpart"),
        (
            "parameters: {}\nearly_terminate: {type: hyperband, min_iter: 1, s: 2}",
            r"early_terminate\.s: counts brackets",
        ),
        ("parameters: {}\nearly_terminate: {type: hyperband, strict: 3}", r"early_terminate\.strict: 3 is neither"),
        ("parameters: {}\nearly_terminate: {type: hyperband, eta: x}", r"early_terminate\.eta: 'x' is no count"),
        ("parameters: {}\nearly_terminate: {type: hyperband, iters: 2}", r"early_terminate\.iters: is not understood"),
        (
            "parameters: {x: {values: [1, 2], probabilities: [0.9, 0.1]}}",
            r"parameters\.x\.probabilities: has no counterpart",
        ),
        ("parameters: {x: {distribution: q_log_uniform, min: 1}}", r"(?s)no counterpart.*Take q_log_uniform_values"),
        (
            "parameters: {x: {distribution: q_log_uniform_values, min: 1, max: 9, q: 2}}",
            r"parameters\.x\.q: whole numbers",
        ),
        ("parameters: {x: {distribution: uniform, min: 1}}", r"parameters\.x\.max: is missing"),
        ("parameters: {x: {min: 1, max: 2, q: 3}}", r"parameters\.x\.q: is not understood"),
        ("parameters: {x: {min: low, max: 2}}", r"parameters\.x: min, max and q are numbers"),
        ("parameters: {x: {values: 3}}", r"parameters\.x\.values: is a list"),
        ("parameters: {x: 3}", r"parameters\.x: is a mapping"),
    ],
)
def test_what_a_wandb_sweep_cannot_have_here_is_refused_by_name(text: str, problem: str, tmp_path: Path) -> None:
    (path := tmp_path / "sweep.yaml").write_text(text)
    with pytest.raises(ConfigError, match=problem):
        read_wandb_sweep(path)


@pytest.mark.parametrize(
    ("entry", "distribution"),
    [
        ("{distribution: normal, mu: 0.01, sigma: 2e-3}", stats.norm(0.01, 0.002)),
        ("{distribution: normal}", stats.norm(0, 1)),
        ("{distribution: log_normal, mu: -5, sigma: 0.5}", stats.lognorm(0.5, scale=math.exp(-5))),
        ("{distribution: beta, a: 2, b: 5}", stats.beta(2, 5)),
        ("{distribution: q_normal, mu: 64, sigma: 16, q: 8}", stats.norm(64, 16)),
        ("{distribution: q_log_normal, mu: 4, sigma: 0.5, q: 8}", stats.lognorm(0.5, scale=math.exp(4))),
        ("{distribution: q_beta, a: 2, b: 5, q: 0.25}", stats.beta(2, 5)),
    ],
)
def test_the_function_to_write_for_a_distribution_of_wandb_draws_by_it(
    entry: str, distribution: Any, tmp_path: Path
) -> None:
    (path := tmp_path / "sweep.yaml").write_text(f"parameters: {{optim.lr: {entry}}}\n")
    with pytest.raises(ConfigError, match=r"parameters\.optim\.lr\.distribution: .* has no counterpart") as refused:
        read_wandb_sweep(path)
    said, _, code = str(refused.value).partition("tune.space=own_space:space\n")
    assert "own_space.py" in said
    names: dict[str, Any] = {}
    exec(code, names)
    step = yaml.safe_load(entry).get("q")
    for u in (0.02, 0.5, 0.9):
        (drawn,) = names["space"](optuna.trial.FixedTrial({"optim.lr: quantile": u}), {}).items()
        exact = float(distribution.ppf(u))
        assert drawn == ("optim.lr", pytest.approx(exact if step is None else round(exact / step) * step))
        assert type(drawn[1]) is (int if isinstance(step, int) else float)
