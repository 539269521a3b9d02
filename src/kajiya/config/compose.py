"""Compose a recipe and its overrides into a frozen `Config`; OmegaConf stops at this door."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from kajiya.config.choices import drop_options
from kajiya.config.mistakes import Given, find_mistake
from kajiya.config.schema import Config
from kajiya.config.setting import with_words
from kajiya.config.tables import nearest, not_one_of
from kajiya.config.validate import validate
from kajiya.errors import ConfigError

if TYPE_CHECKING:
    from omegaconf import DictConfig

_MAPPINGS = ("data.columns", "data.heldout_source.columns", "serve.adapters", "serve.models")
_CONF = Path(str(resources.files("kajiya").joinpath("conf")))


def compose(recipe: str, overrides: Sequence[str] = (), config_dir: str | Path | None = None) -> Config:
    """The validated config of `recipe`, a packaged name or the path of a YAML file, with Hydra overrides on top.

    Options that the recipe sets beside a name (`optim.name`, `optim.options`) go where an override says another name.
    `config_dir` holds further groups and recipes (`<dir>/optim/mine.yaml`, `<dir>/recipes/mine.yaml`).
    Raises `ConfigError` for an unknown key, a wrong type, a value out of range or an impossible combination.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    path = find_recipe(recipe, config_dir)
    body = with_words(_load_yaml(path), Config)
    groups = _group_files(config_dir)
    chosen = _chosen_groups(body, groups, path)
    own = {key: value for key, value in body.items() if key != "defaults"}
    given = [Given(key, value, str(path)) for key, value in _settings(own)]
    given += [each for group, names in chosen.items() for each in _group_settings(group, names, groups)]
    checked = _checked_overrides(overrides, groups, chosen, given)
    for each in given:
        _check_key(each)
    checked += _yielding(given)
    body.setdefault("name", path.stem)

    store = ConfigStore.instance()
    store.store(name="kajiya_schema", node=_writable_schema())
    store.store(name="kajiya_root", node={"defaults": ["kajiya_schema", "kajiya_recipe", "_self_"]})
    GlobalHydra.instance().clear()
    *packaged, first = _roots(config_dir)
    search = [f"hydra.searchpath=[{folder.as_uri()}]" for folder in packaged]

    def composed(content: dict[str, Any], words: Sequence[str]) -> "DictConfig":
        store.store(name="kajiya_recipe", node=content)
        return hydra_compose("kajiya_root", overrides=[*words, *search])

    try:
        with initialize_config_dir(str(first.resolve()), version_base="1.3"):
            body, checked = drop_options(body, checked, _known_keys(), groups, composed)
            built = OmegaConf.to_object(composed(body, checked))
    except (HydraException, OmegaConfBaseException) as error:
        raise find_mistake(given, _writable_schema()) or _translated(error, path) from error
    if not isinstance(built, Config):
        raise AssertionError("the schema did not take")
    config: Config = _tuples(built)
    validate(config)
    return config


def from_plain(plain: dict[str, Any]) -> Config:
    """The config that a manifest holds, validated. Raises `ConfigError` when an older one no longer fits the schema."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    place = "the recorded config"
    given = [Given(key, value, place) for key, value in _settings(plain)]
    for each in given:
        _check_key(each)
    try:
        built = OmegaConf.to_object(OmegaConf.merge(_writable_schema(), plain))
    except OmegaConfBaseException as error:
        raise find_mistake(given, _writable_schema()) or _translated(error, Path(place)) from error
    config: Config = _tuples(built)
    validate(config)
    return config


def recompose(plain: Mapping[str, Any], overrides: Sequence[str] = (), config_dir: str | Path | None = None) -> Config:
    """The config that a manifest holds, with Hydra overrides on top. Raises as `compose`."""
    import yaml

    with TemporaryDirectory() as folder:
        path = Path(folder) / "recorded.yaml"
        path.write_text(yaml.safe_dump(dict(plain), allow_unicode=True), encoding="utf-8")
        return compose(str(path), overrides, config_dir)


def find_recipe(recipe: str, config_dir: str | Path | None = None) -> Path:
    """The YAML file of a packaged recipe's name, of one in `config_dir`, or of a path."""
    if recipe.endswith((".yaml", ".yml")):
        path = Path(recipe)
        if not path.is_file():
            raise ConfigError("recipe", f"no file {recipe!r}")
        return path
    known = list_recipes(config_dir)
    if recipe not in known:
        remedy = "A recipe of your own is given as the path of its YAML file."
        raise ConfigError("recipe", not_one_of(recipe, known), remedy)
    return known[recipe]


def list_recipes(config_dir: str | Path | None = None) -> dict[str, Path]:
    """Recipes by name, the user's own in `config_dir` before the packaged ones."""
    return {path.stem: path for root in _roots(config_dir) for path in sorted((root / "recipes").glob("*.yaml"))}


def list_groups(config_dir: str | Path | None = None) -> dict[str, list[str]]:
    """Names of the YAML files in each config group (`optim: [adamw, muon]`)."""
    return {group: list(files) for group, files in _group_files(config_dir).items()}


def _group_files(config_dir: str | Path | None) -> dict[str, dict[str, Path]]:
    """The YAML files of each config group by their names, the user's own before the packaged ones."""
    groups: dict[str, dict[str, Path]] = {}
    for root in _roots(config_dir):
        for path in sorted(root.rglob("*.yaml")):
            group = path.parent.relative_to(root).as_posix()
            if group not in (".", "recipes", "tasks"):
                groups.setdefault(group, {})[path.stem] = path
    return groups


def _roots(config_dir: str | Path | None) -> list[Path]:
    """The folders of recipes and groups, the one that is looked into first at the end."""
    if config_dir is None:
        return [_CONF]
    if not Path(config_dir).is_dir():
        raise ConfigError(
            "--config-dir", f"no folder {str(config_dir)!r}", "It holds `recipes/` or groups as `optim/`."
        )
    return [_CONF, Path(config_dir)]


def option_paths(section: Any = Config, prefix: str = "") -> Iterator[str]:
    """Every option as a dotted path, in the order of the dataclasses."""
    for item in fields(section):
        path = f"{prefix}{item.name}"
        if is_dataclass(item.type):
            yield from option_paths(item.type, f"{path}.")
        else:
            yield path


@cache
def _option_keys() -> frozenset[str]:
    return frozenset(option_paths())


@cache
def _known_keys() -> frozenset[str]:
    leaves = _option_keys()
    return leaves | {leaf[:i] for leaf in leaves for i, letter in enumerate(leaf) if letter == "."}


def _check_key(each: Given) -> None:
    key, known = each.key, _known_keys()
    if key in known or _is_free(key):
        return
    hint = nearest(key, known) or nearest(key.split(".")[-1], {name.split(".")[-1] for name in known})
    full = [name for name in known if name.split(".")[-1] == key.split(".")[-1]]
    if full and not hint.startswith(f"did you mean {full[0]!r}"):
        hint = f"did you mean {sorted(full)[0]!r}?"
    raise ConfigError(
        key, f"unknown key {each.where}" + (f"; {hint}" if hint else ""), "`kajiya config schema` lists all."
    )


def _is_free(key: str) -> bool:
    """Whether the key lies in a free-form mapping (`options`, `data.columns`), whose content is checked where it is used."""
    section, found, _ = key.partition(".options.")
    if found and f"{section}.options" in _option_keys():
        return True
    return key.startswith(tuple(f"{name}." for name in _MAPPINGS))


def _chosen_groups(body: dict[str, Any], groups: dict[str, dict[str, Path]], path: Path) -> dict[str, list[Any]]:
    """Names by group that the recipe's `defaults` choose. Raises `ConfigError` for one that is not there."""
    defaults = body.get("defaults", [])
    if not isinstance(defaults, list):
        raise ConfigError(
            "defaults", f"{defaults!r} in {path} is not a list", "For example `defaults: [{optim: muon}]`."
        )
    chosen: dict[str, list[Any]] = {}
    for entry in defaults:
        pairs = entry if isinstance(entry, dict) else dict([str(entry).rpartition("/")[::2]])
        for group, names in pairs.items():
            if entry == "_self_" or any(mark in group for mark in "@ "):
                continue  # The rest of Hydra's grammar is checked by Hydra.
            if group not in groups:
                raise ConfigError("defaults", f"{not_one_of(group or entry, groups)} (in {path})")
            chosen[group] = names if isinstance(names, list) else [] if names is None else [names]
            _check_names(group, chosen[group], groups[group], f" (defaults in {path})")
    return chosen


def _check_names(group: str, names: list[Any], known: dict[str, Path], where: str) -> None:
    for name in names:
        if name not in known:
            raise ConfigError(group, f"{not_one_of(name, known)}{where}")


def _group_settings(group: str, names: list[Any], groups: dict[str, dict[str, Path]]) -> Iterator[Given]:
    """What the chosen files of a group set."""
    for path in (groups[group][name] for name in names):
        package = re.search(r"^#\s*@package\s+(\S+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        prefix = group.replace("/", ".") if package is None else package[1].replace("_global_", "")
        body = _load_yaml(path)
        body.pop("defaults", None)
        for key, value in _settings(body, prefix):
            yield Given(key, value, str(path))


def _checked_overrides(
    overrides: Sequence[str],
    groups: dict[str, dict[str, Path]],
    chosen: dict[str, list[Any]],
    given: list[Given],
) -> list[str]:
    """The overrides as Hydra takes them; what they set is added to `given`."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    checked = []
    for text in overrides:
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException as error:
            raise ConfigError(text, "is not an override", "An override is written key=value.") from error
        key, bare = override.key_or_group, text.lstrip("+")
        if override.is_sweep_override():
            raise ConfigError(key, "a sweep over several values is not a single config")
        if override.is_delete():
            if not _is_free(key) and key not in groups:
                raise ConfigError(key, "cannot be taken away; ~ is for options and groups", "Set it to another value.")
            checked.append(text)
            continue
        value = override.value()
        if key in groups and override.package is None and not isinstance(value, dict):
            names = value if isinstance(value, list) else [value]
            _check_names(key, names, groups[key], "")
            given += _group_settings(key, names, groups)
            # A group that the recipe has not chosen comes behind its own settings.
            checked.append(bare if key in chosen else f"+{bare}")
            continue
        given += [Given(*each) for each in _settings(value, key)]
        # The mapping as a whole too: its keys are new to the schema.
        checked.append(f"++{bare}" if _is_free(f"{key}.") else bare)
    return checked


def _yielding(given: Sequence[Given]) -> Iterator[str]:
    """The default length gives way to one in another unit; where both are said, `validate` refuses them."""
    said = {each.key for each in given if each.value is not None}
    if said & {"train.steps", "train.epochs"} and not any(each.key == "train.minutes" for each in given):
        yield "train.minutes=null"


def _load_yaml(path: Path) -> dict[str, Any]:
    import yaml
    from omegaconf import OmegaConf

    try:
        loaded = OmegaConf.to_container(OmegaConf.load(path))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), f"is not readable YAML: {' '.join(str(error).split())}") from error
    if not isinstance(loaded, dict):
        raise ConfigError(str(path), "is no mapping of settings, for example `train: {minutes: 3}`")
    return {str(key): value for key, value in loaded.items()}


def _settings(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of every setting in a section; a free-form mapping is one."""
    if isinstance(value, dict) and (value or not key) and key not in _option_keys() and not _is_free(key):
        for name, inner in value.items():
            yield from _settings(inner, f"{key}.{name}" if key else str(name))
    else:
        yield key, value


def _writable_schema() -> "DictConfig":
    from omegaconf import OmegaConf

    schema: DictConfig = OmegaConf.structured(Config)
    _clear_readonly(schema)
    return schema


def _clear_readonly(node: "DictConfig") -> None:
    """Frozen dataclasses come out read-only, which would make every override raise."""
    from omegaconf import DictConfig

    node._set_flag("readonly", None)
    for key in node:
        child = node._get_node(key)
        if isinstance(child, DictConfig):
            _clear_readonly(child)


def _tuples(section: Any) -> Any:
    """OmegaConf gives lists where the dataclass says tuple."""
    changed = {}
    for item in fields(section):
        value = getattr(section, item.name)
        if is_dataclass(value):
            changed[item.name] = _tuples(value)
        elif isinstance(value, list):
            changed[item.name] = tuple(value)
    return replace(section, **changed)


def _translated(error: Exception, path: Path) -> ConfigError:
    """Hydra's and OmegaConf's errors in one line: field, value, what is expected."""
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    for cause in causes:
        field = str(getattr(cause, "full_key", None) or "")
        if field:
            return ConfigError(field, str(getattr(cause, "msg", cause)).splitlines()[0])
    first = str(error).splitlines()[0]
    named = re.match(r"Error merging override (.*?)=(.*)", first)
    if named:
        return ConfigError(named[1], f"{named[2]!r}: {str(causes[-1]).splitlines()[0]}")
    return ConfigError(str(path), " ".join(str(error).split()))
