"""Composition: every recipe composes, and every mistake is one line that names field, value and remedy."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

import kajiya
from kajiya.config.compose import compose, list_groups, list_recipes, option_paths
from kajiya.config.options import MLflowOptions
from kajiya.config.tables import TABLES, check_choice, check_options
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


@pytest.mark.parametrize(
    ("recipe", "given", "said"),
    [
        ("stdlib-dpo", ["kind=ipo", "label_smoothing=0.1"], "label_smoothing: 0.1 changes nothing with .*kind=ipo"),
        ("stdlib-dpo", ["kind=hinge", "label_smoothing=0.1"], "label_smoothing: 0.1 changes nothing with .*kind=hinge"),
        ("stdlib-grpo", ["clip_high=0.3"], "clip_high: 0.3 changes nothing with .*inner_epochs=1"),
        ("stdlib-grpo", ["clip_low=0.1"], "clip_low: 0.1 changes nothing with .*inner_epochs=1"),
        ("stdlib-sft", ["future_weight=0.5"], "future_weight: 0.5 changes nothing with model.future_heads=0"),
    ],
)
def test_an_option_of_a_loss_that_changes_nothing_is_refused(recipe: str, given: list[str], said: str) -> None:
    options = [f"+train.loss.options.{each}" for each in given]
    with pytest.raises(ConfigError, match=said):
        compose(recipe, options)


def test_options_of_a_loss_that_change_something_are_taken() -> None:
    for recipe, given in {
        "stdlib-dpo": ["kind=robust", "label_smoothing=0.1"],
        "stdlib-grpo": ["clip_high=0.3", "inner_epochs=2"],
    }.items():
        options = compose(recipe, [f"+train.loss.options.{each}" for each in given]).train.loss.options
        assert all(str(options[key]) == value for key, value in (each.split("=") for each in given))


def test_mappings_are_given_whole_or_key_by_key() -> None:
    given = ["serve.models={a: x/y, b: z}", "serve.adapters.tuned=runs/t", "optim.options={beta1: 0.8}"]
    config = compose("stdlib-pretrain", [*given, "data.columns={prompt: question}"])
    assert config.serve.models == {"a": "x/y", "b": "z"}
    assert config.serve.adapters == {"tuned": "runs/t"}
    assert config.optim.options["beta1"] == 0.8
    assert config.data.columns == {"prompt": "question"}
    with pytest.raises(ConfigError, match="unknown key"):
        compose("stdlib-pretrain", ["serve.model={a: b}"])


def test_the_words_at_the_head_of_a_recipe_work() -> None:
    """Settings that a recipe's comment names, such as those for your own data, compose on top of it."""
    own = {}
    for name, path in list_recipes().items():
        head = re.match(r"(#.*\n)*", path.read_text(encoding="utf-8"))
        assert head is not None
        filled = re.sub(r"<[^>]*>", "a-place", head[0].replace("\n#", ""))
        words = [word.rstrip(".;,:") for word in filled.split()]
        settings = [word for word in words if re.match(r"[a-z_]+(\.[a-z_]+)*=.", word)]
        config = compose(name, settings)
        if settings:
            own[name] = config.data.source.name, config.data.source.options
    chats, pairs = ("jsonl", {"files": "chats.jsonl"}), ("jsonl", {"files": "pairs.jsonl"})
    assert {name: own[name] for name in ("llama-3.1-8b-lora", "qwen3-qlora", "gemma-dpo")} == {
        "llama-3.1-8b-lora": chats,
        "qwen3-qlora": chats,
        "gemma-dpo": pairs,
    }


@pytest.mark.parametrize(
    ("overrides", "section", "expected"),
    [
        (["schedule=constant"], "schedule", ("constant", {})),
        (["schedule.name=constant"], "schedule", ("constant", {})),
        (["schedule=wsd"], "schedule", ("wsd", {"decay_fraction": 0.8})),
        (["schedule.name=wsd"], "schedule", ("wsd", {"decay_fraction": 0.8})),
        (["schedule=inverse_sqrt"], "schedule", ("inverse_sqrt", {"timescale": 0.02})),
        (["schedule=inverse_sqrt", "schedule.name=cosine"], "schedule", ("cosine", {})),
        (["schedule.options.timescale=0.1", "schedule.name=inverse_sqrt"], "schedule", ("inverse_sqrt", {"timescale": 0.1})),
        (["schedule.name='constant'", "~schedule.options.decay_fraction"], "schedule", ("constant", {})),
        (["schedule=inverse_sqrt", "~schedule.options.timescale"], "schedule", ("inverse_sqrt", {})),
        (["optim=muon", "schedule=constant"], "optim", ("muon", {"adamw_lr": 0.01, "embedding_lr": 0.01, "head_lr": 0.004})),
        (["optim=muon", "optim.name=sgd", "optim.options.momentum=0.5"], "optim", ("sgd", {"momentum": 0.5})),
        (["train.loss.name=distill", "train.loss.options.teacher=t"], "train.loss", ("distill", {"teacher": "t"})),
    ],
)  # fmt: skip
def test_another_choice_begins_without_the_options_of_the_recipes(
    overrides: list[str], section: str, expected: tuple[str, dict[str, object]]
) -> None:
    found = compose("stdlib-pretrain-long", overrides)
    for part in section.split("."):
        found = getattr(found, part)
    assert (found.name, found.options) == expected


def test_options_beside_another_name_in_one_recipe_are_told(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("defaults:\n  - data: stdlib\n  - schedule: wsd\nschedule:\n  name: constant\n")
    with pytest.raises(ConfigError, match=r"~schedule\.options\.decay_fraction takes it away"):
        compose(str(recipe))
    assert compose(str(recipe), ["~schedule.options.decay_fraction"]).schedule.options == {}


def test_what_averages_by_itself_takes_a_rate_that_stays() -> None:
    assert compose("stdlib-pretrain", ["optim=schedule_free", "schedule=constant"]).schedule.name == "constant"
    with pytest.raises(ConfigError, match=r"schedule\.name: linear[^\n]*\nSet schedule=constant"):
        compose("stdlib-pretrain", ["optim=schedule_free", "schedule=linear"])


def test_the_config_is_frozen() -> None:
    config = compose("stdlib-pretrain")
    with pytest.raises(AttributeError):
        config.seed = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.lx=3", "did you mean 'optim.lr'?"),
        ("optm.lr=3", "did you mean 'optim.lr'?"),
        ("lr=3", "did you mean 'optim.lr'?"),
        ("optim.lr=fast", "optim.lr: 'fast' is not a number, more than 0"),
        ("optim.lr=-1", "must be more than 0"),
        ("optim=muno", "did you mean 'muon'?"),
        ("optim=null", "optim: null is not one of adafactor, adamw"),
        ("optim=3", "optim: 3 is not one of adafactor, adamw"),
        ("optim=[muno]", "did you mean 'muon'?"),
        ("optim={lrr: 3}", "optim.lrr: unknown key"),
        ("optm.options.beta1=0.5", "optm.options.beta1: unknown key"),
        ("optim.options=3", "optim.options: 3 is not a mapping, for example {a: b}"),
        ("~optim.lr", "optim.lr: cannot be taken away"),
        ("tasks=stdlib-body", "did you mean 'train.tasks'?"),
        ("data.source=jsonl", "data.source: 'jsonl' is not a section of settings, for example data.source.name"),
        ("data.row_tokens=null", "data.row_tokens: null is not a whole number, at least 8"),
        ("track.trackers=mlflow", "track.trackers: 'mlflow' is not a list of texts, for example [a, b]"),
        ("train.micro_batch=[1]", "train.micro_batch: [1] is not a whole number or a text"),
        ("train.precision=[fp32]", "train.precision: ['fp32'] is not one of auto, fp32"),
        ("optim.lr=${nothing}", "optim.lr: Interpolation key 'nothing' not found"),
        ("seed=1" + 23 * "0", "is out of range: it must be at most 9223372036854775807"),
        ("train.minutes=inf", "train.minutes: inf is not a finite number"),
        ("optim=schedule_free", "lowers the rate, in whose place optim.name=schedule_free averages the weights"),
        ("optim.lr=nan", "optim.lr: nan is not a finite number"),
        ("optim.options.adamw_lr=inf", "optim.options.adamw_lr: inf is not a finite number"),
        ("train.row_growth=[0.5, inf]", "train.row_growth: inf is not a finite number"),
        ("train.tasks=[stdlib-bodi]", "train.tasks: 'stdlib-bodi' is not one of stdlib-body"),
        ("train.device=gpu7", "train.device: 'gpu7' is not one of auto, cpu, cuda, cuda:0, mps"),
        ("serve.device=cuda:x", "serve.device: 'cuda:x' is not one of auto"),
        ("name=a/b", "name: 'a/b' cannot name a run"),
        ("name=..", "name: '..' cannot name a run"),
        ("name=.hidden", "the first no dot"),
        ("name=''", "name: '' cannot name a run"),
        ("optim.name=muno", "did you mean 'muon'?"),
        ("optim.options.momentm=1", "did you mean 'momentum'?"),
        ("optim.options.momentum=2", "must be less than 1"),
        ("optim.options.nesterov=3", "not of type bool"),
        ("train.precision=bf17", "not one of auto, fp32"),
        ("model.init_std=2", "model.init_std: 2.0 is out of range: it must be at most 1"),
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
        ("track.options.mlflow.aliases=[a, 1]", "aliases: 1 is not of type str"),
        ("track.options.mlflow.aliases=champion", "aliases: 'champion' is not of type tuple"),
        ("eval.baselines=[zip]", "not one of xz, xz-primed"),
        ("serve.port=70000", "must be at most 65535"),
        (
            "serve.stream_interval=often",
            "serve.stream_interval: 'often' is neither a number of steps, 1 or more, nor auto",
        ),
        ("serve.stream_interval=0", "serve.stream_interval: 0 is neither a number of steps, 1 or more, nor auto"),
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


def test_a_list_in_the_options_of_a_choice() -> None:
    given = compose("stdlib-pretrain", ["track.options.mlflow.aliases=[champion,newest]"]).track.options["mlflow"]
    assert check_options(MLflowOptions, given, "track.options.mlflow").aliases == ("champion", "newest")


def test_combinations_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="even multiple"):
        compose("stdlib-pretrain", ["model.hidden_size=100", "model.n_heads=8"])
    with pytest.raises(ConfigError, match="divide"):
        compose("stdlib-pretrain", ["model.n_heads=8", "model.n_kv_heads=3"])
    with pytest.raises(ConfigError, match=r"train\.on_spike: rollback changes nothing with train\.spike_sigmas=null"):
        compose("stdlib-pretrain", ["train.on_spike=rollback", "train.spike_sigmas=null"])
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


def test_the_default_length_gives_way_to_another_and_a_length_that_is_said_does_not(tmp_path: Path) -> None:
    (path := tmp_path / "mine.yaml").write_text("train: {steps: 4}\n")
    assert (compose(str(path)).train.steps, compose(str(path)).train.minutes) == (4, None)
    path.write_text("seed: 1\n")
    assert compose(str(path)).train.minutes is not None
    assert compose(str(path), ["train.epochs=2"]).train.minutes is None
    assert compose(str(path), ["train.steps=null"]).train.minutes is not None
    path.write_text("train: {minutes: 2}\n")
    with pytest.raises(ConfigError, match=r"given: train\.steps and train\.minutes"):
        compose(str(path), ["train.steps=4"])


def test_off_in_a_recipe_is_the_word_and_no_boolean(tmp_path: Path) -> None:
    (path := tmp_path / "mine.yaml").write_text(
        "train: {compile: off, gradient_checkpointing: off, deterministic: on}\ndata: {duplicates: off}\n"
    )
    config = compose(str(path))
    assert (config.train.compile, config.train.gradient_checkpointing, config.data.duplicates) == ("off",) * 3
    assert config.train.deterministic is True
    path.write_text("train: {compile: on}\n")
    assert compose(str(path)).train.compile == "on"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train:\n  micro_batsch: 3\n", "did you mean 'train.micro_batch'?"),
        ("train: [\n", "is not readable YAML"),
        ("- a\n", "is no mapping of settings"),
        ("optim:\n  lr: quick\n", r"optim.lr: 'quick' in .*mine\.yaml is not a number"),
        ("optim: muon\n", r"optim: 'muon' in .*mine\.yaml is not a section[\s\S]*`- optim: muon`"),
        ("seed: {a: 3}\n", "seed: {'a': 3} in .*is not a whole number, at least 0"),
        ("defaults: 3\n", r"defaults: 3 in .*mine\.yaml is not a list"),
        (
            "defaults: [optim: muno]\n",
            r"'muno' is not one of adafactor.*did you mean 'muon'? \(defaults in .*mine\.yaml\)",
        ),
        ("defaults: [optmi: muon]\n", r"'optmi' is not one of data, optim.*did you mean 'optim'? \(in .*mine\.yaml\)"),
        ("defaults: [muon]\n", "defaults: 'muon' is not one of data, optim, schedule"),
    ],
)
def test_a_broken_recipe_is_named(tmp_path: Path, text: str, expected: str) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(text)
    with pytest.raises(ConfigError, match=expected.replace("?", r"\?")):
        compose(str(recipe))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: adamw\nlrr: 1.0e-3\n", r"optim.lrr: unknown key in .*optim/mine\.yaml; did you mean 'optim.lr'?"),
        ("# @package _global_\noptim: {lrr: 1}\n", r"optim.lrr: unknown key in .*optim/mine\.yaml; did you"),
        ("lr: fast\n", r"optim.lr: 'fast' in .*optim/mine\.yaml is not a number, more than 0"),
        ("- lr\n", r"optim/mine\.yaml: is no mapping"),
        ("a: [\n", r"optim/mine\.yaml: is not readable YAML"),
    ],
)
def test_a_broken_group_file_is_named(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "optim").mkdir()
    (tmp_path / "optim" / "mine.yaml").write_text(text)
    recipe = tmp_path / "r.yaml"
    recipe.write_text("defaults: [optim: mine]\n")
    for given in [("stdlib-pretrain", ["optim=mine"]), (str(recipe), [])]:
        with pytest.raises(ConfigError, match=expected.replace("?", r"\?")):
            compose(*given, config_dir=tmp_path)


def test_a_group_of_ones_own_goes_before_the_packaged_one_of_its_name(tmp_path: Path) -> None:
    (tmp_path / "optim").mkdir()
    (tmp_path / "optim" / "adamw.yaml").write_text("name: adamw\nlr: 0.5\n")
    assert compose("stdlib-pretrain", ["optim=adamw"], config_dir=tmp_path).optim.lr == 0.5
    assert compose("stdlib-grpo", ["schedule=linear"], config_dir=tmp_path).schedule.name == "linear"


def test_a_group_is_chosen_for_a_recipe_that_chooses_none_of_it() -> None:
    assert compose("stdlib-grpo", ["optim=lion"]).optim.name == "lion"


def test_a_config_dir_is_a_folder(tmp_path: Path) -> None:
    for ask in (lambda where: compose("stdlib-pretrain", config_dir=where), list_recipes, list_groups):
        with pytest.raises(ConfigError, match=r"--config-dir: no folder .*nowhere"):
            ask(tmp_path / "nowhere")


def test_an_unknown_recipe_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'stdlib-pretrain"):
        compose("stdlib-pretrian")
    with pytest.raises(ConfigError, match="no file"):
        compose("nowhere.yaml")


def test_options_of_a_users_own_function_fit_its_signature() -> None:
    assert check_choice("schedule", "textwrap:indent", {"prefix": "x"}, "schedule") == {"prefix": "x"}
    with pytest.raises(ConfigError, match=r"schedule\.options\.prefx: textwrap:indent takes no such argument"):
        check_choice("schedule", "textwrap:indent", {"prefx": "x"}, "schedule")
