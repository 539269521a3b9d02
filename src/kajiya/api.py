"""The verbs as functions: all that the command line does, a notebook can."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kajiya.config.schema import Config
    from kajiya.flows.train import Trained


def compose(recipe: str, overrides: Sequence[str] = (), config_dir: str | Path | None = None) -> "Config":
    """The validated config of a recipe (a packaged name or the path of a YAML file) with Hydra overrides on top."""
    from kajiya.config.compose import compose as compose_config

    return compose_config(recipe, overrides, config_dir)


def train(
    config: "Config", store: str | Path | None = None, on_event: Callable[..., object] | None = None
) -> "Trained":
    """Train, evaluate and report; run again with the same config, it goes on where it was or reuses what is done."""
    from kajiya.data.progress import silent
    from kajiya.flows.train import train as train_flow
    from kajiya.run.store import default_store

    return train_flow(config, default_store(store), on_event=on_event or silent)


def load(
    target: str | Path, store: str | Path | None = None, *, adapters: Mapping[str, str | Path] | None = None
) -> tuple[Any, Any]:
    """Model (evaluation mode, on the CPU) and tokenizer of a run, an artifact, a folder or a hub name.

    With `adapters`, name → one of the same, these stand beside the model's weights, which all were trained on; the first is in
    force until `use_adapter` says another.
    """
    from kajiya.data.tokenizer import load_tokenizer
    from kajiya.flows.targets import find_model
    from kajiya.models.open import model_dtype, open_adapters, open_model
    from kajiya.models.tokenizer_of import tokenizer_folder
    from kajiya.run.store import default_store

    known = default_store(store)
    folder = find_model(str(target), known).model.path
    if not adapters:
        return open_model(folder, model_dtype(folder)), load_tokenizer(folder)
    folders = {name: find_model(str(each), known).model.path for name, each in adapters.items()}
    tokenizer = load_tokenizer(tokenizer_folder(next(iter(folders.values()))))
    return open_adapters(folder, folders, model_dtype(folder)), tokenizer


def use_adapter(model: Any, name: str) -> None:
    """Make that one of the adapters which `load` put beside the model's weights the one in force."""
    from kajiya.models.adapt import use_adapter as use

    use(model, name)


def evaluate(
    target: str | Path,
    config: "Config",
    store: str | Path | None = None,
    *,
    model_name: str | None = None,
    api_key: str | None = None,
) -> dict[str, Any]:
    """Figures of a run, an artifact, a folder, a hub name or an endpoint on the held-out text of `config`, with the baselines';
    of a run's model that writes no text (a classifier, say) those on its run's own held-out rows.

    `model_name` (`None`: the first that is served) and `api_key` are an endpoint's."""
    from kajiya.flows.evaluate import evaluate as evaluate_flow
    from kajiya.run.store import default_store

    evaluation, baselines = evaluate_flow(
        str(target), config, default_store(store), model_name=model_name, api_key=api_key
    )
    return {**evaluation.facts, **(baselines.facts if baselines else {})}
