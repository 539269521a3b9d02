"""Compose a recipe and its overrides into a frozen `Config`; OmegaConf stops at this door."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kajiya.config.choices import drop_options
from kajiya.config.schema import Config
from kajiya.config.tables import nearest
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
    body = _load_yaml(path)
    keys = _known_keys()
    for key in _flatten(body):
        _check_key(key, keys, f"in {path}")
    body.setdefault("name", path.stem)
    checked = _checked_overrides(overrides, keys, config_dir)

    store = ConfigStore.instance()
    store.store(name="kajiya_schema", node=_writable_schema())
    store.store(name="kajiya_root", node={"defaults": ["kajiya_schema", "kajiya_recipe", "_self_"]})
    GlobalHydra.instance().clear()
    search = [] if config_dir is None else [f"hydra.searchpath=[{Path(config_dir).resolve().as_uri()}]"]

    def composed(content: dict[str, Any], given: Sequence[str]) -> "DictConfig":
        store.store(name="kajiya_recipe", node=content)
        return hydra_compose("kajiya_root", overrides=[*given, *search])

    try:
        with initialize_config_dir(str(_CONF), version_base="1.3"):
            body, checked = drop_options(body, checked, keys, list_groups(config_dir), composed)
            built = OmegaConf.to_object(composed(body, checked))
    except (HydraException, OmegaConfBaseException) as error:
        raise _translated(error, path) from error
    if not isinstance(built, Config):
        raise AssertionError("the schema did not take")
    config: Config = _tuples(built)
    validate(config)
    return config


def from_plain(plain: dict[str, Any]) -> Config:
    """The config that a manifest holds, validated. Raises `ConfigError` when an older one no longer fits the schema."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        built = OmegaConf.to_object(OmegaConf.merge(_writable_schema(), plain))
    except OmegaConfBaseException as error:
        raise _translated(error, Path("the recorded config")) from error
    config: Config = _tuples(built)
    validate(config)
    return config


def find_recipe(recipe: str, config_dir: str | Path | None = None) -> Path:
    """The YAML file of a packaged recipe's name, of one in `config_dir`, or of a path."""
    if recipe.endswith((".yaml", ".yml")):
        path = Path(recipe)
        if not path.is_file():
            raise ConfigError("recipe", f"no file {recipe!r}")
        return path
    known = list_recipes(config_dir)
    if recipe not in known:
        hint = nearest(recipe, known)
        raise ConfigError(
            "recipe",
            f"{recipe!r} is not one of {', '.join(sorted(known))}" + (f"; {hint}" if hint else ""),
            "A recipe of your own is given as the path of its YAML file.",
        )
    return known[recipe]


def list_recipes(config_dir: str | Path | None = None) -> dict[str, Path]:
    """Recipes by name, the user's own in `config_dir` before the packaged ones."""
    folders = [_CONF / "recipes"] + ([] if config_dir is None else [Path(config_dir) / "recipes"])
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.yaml"))}


def list_groups(config_dir: str | Path | None = None) -> dict[str, list[str]]:
    """Names of the YAML files in each config group (`optim: [adamw, muon]`)."""
    groups: dict[str, list[str]] = {}
    for root in [_CONF] + ([] if config_dir is None else [Path(config_dir)]):
        for path in sorted(root.rglob("*.yaml")):
            group = path.parent.relative_to(root).as_posix()
            if group not in (".", "recipes"):
                groups.setdefault(group, []).append(path.stem)
    return groups


def option_paths(section: Any = Config, prefix: str = "") -> Iterator[str]:
    """Every option as a dotted path, in the order of the dataclasses."""
    for item in fields(section):
        path = f"{prefix}{item.name}"
        if is_dataclass(item.type):
            yield from option_paths(item.type, f"{path}.")
        else:
            yield path


def _known_keys() -> set[str]:
    leaves = set(option_paths())
    inner = {leaf[:i] for leaf in leaves for i, letter in enumerate(leaf) if letter == "."}
    return leaves | inner


def _check_key(key: str, known: set[str], where: str) -> None:
    if key in known or _is_free(key):
        return
    hint = nearest(key, known) or nearest(key.split(".")[-1], {name.split(".")[-1] for name in known})
    full = [name for name in known if name.split(".")[-1] == key.split(".")[-1]]
    if full and not hint.startswith(f"did you mean {full[0]!r}"):
        hint = f"did you mean {sorted(full)[0]!r}?"
    raise ConfigError(key, f"unknown key {where}" + (f"; {hint}" if hint else ""), "`kajiya config schema` lists all.")


def _is_free(key: str) -> bool:
    """Whether the key lies in a free-form mapping (`options`, `data.columns`), whose content is checked where it is used."""
    return ".options." in key or key.startswith(tuple(f"{name}." for name in _MAPPINGS))


def _checked_overrides(overrides: Sequence[str], keys: set[str], config_dir: str | Path | None) -> list[str]:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    groups = list_groups(config_dir)
    checked = []
    for text in overrides:
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException as error:
            raise ConfigError(text, "is not an override", "An override is written key=value.") from error
        key = override.key_or_group
        if override.is_sweep_override():
            raise ConfigError(key, "a sweep over several values is not a single config")
        if key in groups and isinstance(override.value(), str):
            value = override.value()
            if value not in groups[key]:
                hint = nearest(str(value), groups[key])
                raise ConfigError(
                    key, f"{value!r} is not one of {', '.join(groups[key])}" + (f"; {hint}" if hint else "")
                )
            checked.append(text)
            continue
        _check_key(key, keys, "in the overrides")
        bare = text.lstrip("+")
        # The mapping as a whole too: its keys are new to the schema.
        checked.append(f"++{bare}" if _is_free(f"{key}.") and not text.startswith("~") else bare)
    return checked


def _load_yaml(path: Path) -> dict[str, Any]:
    import yaml
    from omegaconf import OmegaConf

    try:
        loaded = OmegaConf.to_container(OmegaConf.load(path))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), f"is not readable YAML: {' '.join(str(error).split())}") from error
    if not isinstance(loaded, dict):
        raise ConfigError(str(path), "a recipe is a mapping of sections, for example `train: {minutes: 3}`")
    return {str(key): value for key, value in loaded.items()}


def _flatten(body: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in body.items():
        if prefix == "" and key == "defaults":
            continue
        path = f"{prefix}{key}"
        if isinstance(value, dict) and not _is_free(f"{path}."):
            yield path
            yield from _flatten(value, f"{path}.")
        else:
            yield path


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
        cause = cause.__cause__
    for cause in causes:
        field = str(getattr(cause, "full_key", None) or "")
        if field:
            return ConfigError(field, str(getattr(cause, "msg", cause)).splitlines()[0])
    first = str(error).splitlines()[0]
    named = re.match(r"Error merging override (.*?)=(.*)", first)
    if named:
        return ConfigError(named[1], f"{named[2]!r}: {str(causes[-1]).splitlines()[0]}")
    return ConfigError(str(path), " ".join(str(error).split()))
