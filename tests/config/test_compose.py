"""Composition: every recipe composes, and every mistake is one line that names field, value and remedy."""

from dataclasses import fields
from pathlib import Path

import pytest

import kajiya
from kajiya.config.compose import compose, list_recipes, option_paths
from kajiya.config.tables import TABLES, check_choice
from kajiya.errors import ConfigError

OPTIONS = Path(__file__).with_name("options.txt")


def test_every_packaged_recipe_composes() -> None:
    packaged = Path(kajiya.__file__).parent / "conf" / "recipes"
    recipes = list_recipes()
    assert sorted(recipes) == sorted(path.stem for path in packaged.iterdir())
    assert len(recipes) >= 14
    for name in recipes:
        assert compose(name).name == name


def test_the_list_of_options_is_frozen() -> None:
    """Adding an option is a decision: say so here, in `tests/config/options.txt`."""
    of_names = (
        f"{table}.{name}.{option.name}"
        for table, rows in TABLES.items()
        for name, row in rows.items()
        for option in fields(row.options)
    )
    assert [*option_paths(), *of_names] == OPTIONS.read_text(encoding="utf-8").split()


def test_overrides_groups_and_options() -> None:
    config = compose("stdlib-pretrain", ["optim=adamw", "optim.lr=1", "optim.options.beta1=0.8", "eval.baselines=[xz]"])
    assert config.optim.name == "adamw"
    assert config.optim.lr == 1.0
    assert config.optim.options == {"beta1": 0.8}
    assert config.eval.baselines == ("xz",)


def test_mappings_are_given_whole_or_key_by_key() -> None:
    given = ["serve.models={a: x/y, b: z}", "serve.adapters.tuned=runs/t", "optim.options={beta1: 0.8}"]
    config = compose("stdlib-pretrain", [*given, "data.columns={prompt: question}"])
    assert config.serve.models == {"a": "x/y", "b": "z"}
    assert config.serve.adapters == {"tuned": "runs/t"}
    assert config.optim.options["beta1"] == 0.8
    assert config.data.columns == {"prompt": "question"}
    with pytest.raises(ConfigError, match="unknown key"):
        compose("stdlib-pretrain", ["serve.model={a: b}"])


def test_the_config_is_frozen() -> None:
    config = compose("stdlib-pretrain")
    with pytest.raises(AttributeError):
        config.seed = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.lx=3", "did you mean 'optim.lr'?"),
        ("schedule=constant", "~schedule.options.decay_fraction takes it away"),
        ("optm.lr=3", "did you mean 'optim.lr'?"),
        ("lr=3", "did you mean 'optim.lr'?"),
        ("optim.lr=fast", "optim.lr: Value 'fast'"),
        ("optim.lr=-1", "must be more than 0"),
        ("optim=muno", "did you mean 'muon'?"),
        ("optim.name=muno", "did you mean 'muon'?"),
        ("optim.options.momentm=1", "did you mean 'momentum'?"),
        ("optim.options.momentum=2", "must be less than 1"),
        ("optim.options.nesterov=3", "not of type bool"),
        ("train.precision=bf17", "not one of auto, fp32"),
        ("train.steps=10", "exactly one of train.steps, train.epochs, train.minutes"),
        ("train.minutes=null", "given: none of them"),
        ("model.n_params=6Q", "is not a count"),
        ("model.n_params=null", "model.hidden_size and model.n_layers must both be set"),
        ("data.row_tokens=100000", "longer than model.max_positions"),
        ("data.max_tokens=513", "513 is more than a row holds (data.row_tokens=512)"),
        ("data.heldout_source.columns={text: body}", "data.heldout_source.name: is not set"),
        ("model.n_heads=[8]", "model.n_heads"),
        ("model.tied=true", "induction is for a model from scratch"),
        ("data.source.options.root=3", "3 is not of type str or none"),
        ("track.trackers=[mlfow]", "did you mean 'mlflow'?"),
        ("eval.baselines=[zip]", "not one of xz, xz-primed"),
        ("serve.port=70000", "must be at most 65535"),
        ("optim.lr=1,2", "not a single config"),
        ("train", "is not an override"),
        ("optim.name=nowhere.at_all:fn", "no module 'nowhere.at_all'"),
        ("optim.name=textwrap:indnt", "did you mean 'indent'?"),
    ],
)
def test_a_mistake_is_named(override: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose("stdlib-pretrain", [override])
    message = str(caught.value)
    assert expected in message
    assert len(message.splitlines()) <= 2


def test_combinations_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="even multiple"):
        compose("stdlib-pretrain", ["model.hidden_size=100", "model.n_heads=8"])
    with pytest.raises(ConfigError, match="divide"):
        compose("stdlib-pretrain", ["model.n_heads=8", "model.n_kv_heads=3"])
    # Nothing that goes through a frozen block whose output is zero can be learnt.
    for adapter in (["adapter.name=ia3"], ["adapter.name=lora", "adapter.options.init=pissa"]):
        with pytest.raises(ConfigError, match=r"model\.zero_outputs: leaves adapter\.name="):
            compose("stdlib-pretrain", adapter)
    assert compose("stdlib-pretrain", ["adapter.name=lora"]).model.zero_outputs


def test_a_recipe_of_ones_own_and_a_config_dir(tmp_path: Path) -> None:
    (tmp_path / "optim").mkdir()
    (tmp_path / "optim" / "gentle.yaml").write_text("name: adamw\nlr: 1.0e-4\n")
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("defaults:\n  - data: stdlib\n  - optim: gentle\ntrain:\n  micro_batch: 3\n")
    config = compose(str(recipe), ["seed=7"], config_dir=tmp_path)
    assert (config.name, config.optim.lr, config.train.micro_batch, config.seed) == ("mine", 1e-4, 3, 7)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train:\n  micro_batsch: 3\n", "did you mean 'train.micro_batch'?"),
        ("train: [\n", "is not readable YAML"),
        ("- a\n", "a recipe is a mapping"),
        ("optim:\n  lr: quick\n", "optim.lr"),
    ],
)
def test_a_broken_recipe_is_named(tmp_path: Path, text: str, expected: str) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(text)
    with pytest.raises(ConfigError, match=expected.replace("?", r"\?")):
        compose(str(recipe))


def test_an_unknown_recipe_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'stdlib-pretrain"):
        compose("stdlib-pretrian")
    with pytest.raises(ConfigError, match="no file"):
        compose("nowhere.yaml")


def test_options_of_a_users_own_function_fit_its_signature() -> None:
    assert check_choice("schedule", "textwrap:indent", {"prefix": "x"}, "schedule") == {"prefix": "x"}
    with pytest.raises(ConfigError, match=r"schedule\.options\.prefx: textwrap:indent takes no such argument"):
        check_choice("schedule", "textwrap:indent", {"prefx": "x"}, "schedule")
