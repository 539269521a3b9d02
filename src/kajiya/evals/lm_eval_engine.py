"""lm-eval's tasks on the project's own engine: its library scores, the project's model answers."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from kajiya.config.digest import digest
from kajiya.errors import ConfigError, DataError, MissingExtraError
from kajiya.evals.answers import LocalModel, cut_at
from kajiya.evals.scoring import score_continuations, score_documents
from kajiya.run.hashing import hash_file
from kajiya.serving.sequence import SamplingParams


@dataclass(frozen=True)
class Opened:
    """What names of lm-eval stand for, loaded with their data sets."""

    manager: Any
    """The `TaskManager` that has loaded them."""
    tasks: Mapping[str, Any]
    """Every single task, by name."""
    groups: Mapping[str, Any]
    beside: Mapping[str, str]
    """Digest of each Python file beside a task's YAML, whose functions the task may use."""

    @property
    def roots(self) -> list[Any]:
        """The groups and tasks that belong to no other group."""
        within = {name for group in self.groups.values() for name in group.child_names}
        return [each for name, each in {**self.groups, **self.tasks}.items() if name not in within]

    def digests(self, limit: int | None) -> dict[str, str]:
        """`data`: of the rows that are asked (and of those shown as examples); `template`: of all that the tasks say else."""
        rows, settings = hashlib.sha256(), {}
        for name, task in sorted(self.tasks.items()):
            said = task.dump_config()
            shots = list(task.fewshot_docs() or ()) if said.get("num_fewshot") else []
            for row in chain(islice(task.eval_docs, limit), shots):
                rows.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
            settings[name] = {key: str(value) for key, value in said.items() if key not in _PLACE}
        groups = {name: [*group.child_names, str(group.aggregate_metric_list)] for name, group in self.groups.items()}
        return {"data": rows.hexdigest(), "template": digest([settings, groups, dict(self.beside)])}

    def aggregations(self) -> dict[str, Any]:
        """Of each task, the function from a metric's values to its figure, by metric."""
        return {name: task.aggregation() for name, task in self.tasks.items()}

    def dtype(self, local: LocalModel) -> str:
        """What the answers are computed in; two, where texts are scored in another precision than they are written in."""
        kinds = {"generate" if each.OUTPUT_TYPE == "generate_until" else "choose" for each in self.tasks.values()}
        return " and ".join(sorted({local.dtype(kind) for kind in kinds}))


_PLACE = ("dataset_path", "dataset_name", "dataset_kwargs", "metadata")
"""Of a task's settings, where its rows come from: their own digest says which they are."""


def open_tasks(names: Sequence[str]) -> Opened:
    """Load tasks and groups by their names, or the paths of their YAML files. Raises `MissingExtraError` without lm-eval."""
    require_lm_eval()
    from lm_eval.tasks import TaskManager

    wanted = [task_name(name) for name in names]
    folders = [Path(name).resolve().parent for name in names if _is_file(name)]
    manager = TaskManager(include_path=[str(folder) for folder in folders] or None)
    try:
        loaded = manager.load(wanted)
    except KeyError as problem:
        raise ConfigError("--tasks", f"lm-eval knows no task {problem}") from problem
    beside = {path.name: hash_file(path) for folder in folders for path in sorted(folder.glob("*.py"))}
    return Opened(manager, loaded["tasks"], loaded["groups"], beside)


def run_lm_eval(
    folder: Path, opened: Opened, *, limit: int | None, batch: int, context_tokens: int | None = None
) -> dict[str, Any]:
    """lm-eval's results on the model in `folder`: its own dictionary, with `samples`."""
    from lm_eval import simple_evaluate

    found = simple_evaluate(
        model=make_lm(folder, batch, context_tokens),
        tasks=opened.roots,
        task_manager=opened.manager,
        limit=limit,
        log_samples=True,
        bootstrap_iters=0,
    )
    assert found is not None
    return dict(found)


def require_lm_eval() -> None:
    """Raise `MissingExtraError` unless lm-eval is installed."""
    from importlib.util import find_spec

    if find_spec("lm_eval") is None:
        raise MissingExtraError("lm-eval", "eval", "A task of lm-eval")


def _is_file(task: str) -> bool:
    return task.endswith((".yaml", ".yml"))


def task_name(task: str) -> str:
    """lm-eval's name of a task or group: the name itself, or that which a YAML file gives it."""
    if not _is_file(task):
        return task
    path = Path(task)
    if not path.is_file():
        raise ConfigError("--tasks", f"no file {str(path)!r}")
    # lm-eval's YAML has tags of its own (!function), which a plain reader refuses.
    text = path.read_text(encoding="utf-8")
    found = re.search(r"^(?:group|task):[ \t]*['\"]?([\w\-.]+)", text, flags=re.MULTILINE)
    if found is None:
        raise ConfigError(str(path), "a task of lm-eval has a line `task: NAME`, a group one `group: NAME`")
    return found[1]


def make_lm(folder: Path, batch: int, context_tokens: int | None = None) -> Any:
    """An `lm_eval.api.model.LM` over the model in `folder`."""
    from lm_eval.api.model import TemplateLM

    from kajiya.data.tokenizer import load_tokenizer

    class EngineLM(TemplateLM):  # type: ignore[misc]  # lm-eval is not typed
        """Scores by the project's scoring, text by the engine that serves."""

        def __init__(self) -> None:
            super().__init__()
            self.local = LocalModel(folder, batch)
            self.tokenizer = load_tokenizer(folder)
            self.max_length = context_tokens or self.local.context_tokens

        @property
        def eot_token_id(self) -> int:
            return int(self.tokenizer.eos_token_id)

        @property
        def prefix_token_id(self) -> int:
            # As lm-eval's own backend: the beginning-of-sequence token where there is one.
            start = self.tokenizer.bos_token_id
            return int(self.eot_token_id if start is None else start)

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            # As lm-eval's own backend: the tokenizer's special tokens, unless the text brings its beginning along.
            if add_special_tokens is None:
                start = self.tokenizer.bos_token
                add_special_tokens = not (start and string.startswith(start))
            ids: list[int] = self.tokenizer.encode(string, add_special_tokens=add_special_tokens)
            return ids

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            pairs = [(context, continuation) for _, context, continuation in requests]
            found = score_continuations(self.local.model, pairs, context_tokens=self.max_length, batch=batch)
            return [(each.logprob, each.is_greedy) for each in found]

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            documents = []
            for request in requests:
                ids = self.tok_encode(request.args[0])
                documents.append([self.prefix_token_id, *ids])
            nats = score_documents(
                self.local.model, [np.array(ids) for ids in documents], context_tokens=self.max_length,
                stride=self.max_length, batch=batch, device=next(self.local.model.parameters()).device,
            )  # fmt: skip
            return [-float(each) for each in nats]

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            answers = [""] * len(requests)
            alike: dict[Drawing, list[int]] = {}
            for i, request in enumerate(requests):
                alike.setdefault(drawing_of(request.args[1]), []).append(i)
            for drawing, places in alike.items():  # what is drawn alike is drawn together
                texts = self._complete([requests[i].args[0] for i in places], drawing.params)
                for i, text in zip(places, texts, strict=True):
                    answers[i] = cut_at(text, drawing.stop)
            return answers

        def _complete(self, prompts: list[str], params: SamplingParams) -> list[str]:
            engine = self.local._engine
            room = prompt_room(min(engine.context_tokens, self.max_length), params.max_tokens)
            ids = [self.tok_encode(prompt)[-room:] or [self.prefix_token_id] for prompt in prompts]
            done = engine.generate(ids, params)
            return [str(self.tokenizer.decode(each.token_ids, skip_special_tokens=True)) for each in done]

    return EngineLM()


@dataclass(frozen=True)
class Drawing:
    """How an answer is drawn, and before which texts it ends."""

    params: SamplingParams
    stop: tuple[str, ...]


_HEEDED = ("until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k")
_WITHOUT_EFFECT: Mapping[str, tuple[Any, ...]] = {
    "num_beams": (1, None), "num_return_sequences": (1, None), "repetition_penalty": (1, 1.0, None),
    "min_p": (0, 0.0, None), "typical_p": (1, 1.0, None),
}  # fmt: skip
"""Values of arguments of Transformers' `generate` that ask for nothing beyond what the engine does."""
_OF_BEAMS = ("length_penalty", "early_stopping", "use_cache", "pad_token_id")
"""Arguments that change nothing without beams, or nothing at all in what is written."""


def drawing_of(settings: Mapping[str, Any]) -> Drawing:
    """A request's generation arguments, read as lm-eval's own backend reads them.

    Raises `ConfigError` for what the engine does not do, by its name.
    """
    from lm_eval.models.utils import normalize_gen_kwargs

    given = normalize_gen_kwargs(dict(settings), 256)
    for name, value in given.items():
        if name in _HEEDED or name in _OF_BEAMS or value in _WITHOUT_EFFECT.get(name, ()):
            continue
        raise ConfigError(
            f"generation_kwargs.{name}",
            f"{value!r} of a task of lm-eval is nothing that the engine does; it knows {', '.join(_HEEDED)}",
            "Leave it out in a YAML of your own, or run the task with lm-eval's own backend.",
        )
    warm = float(given.get("temperature", 1.0)) if given["do_sample"] else 0.0
    params = SamplingParams(
        max_tokens=given["max_gen_toks"], temperature=warm, seed=0,
        top_p=float(given.get("top_p", 1.0)) if warm else 1.0, top_k=(given.get("top_k") or None) if warm else None,
    )  # fmt: skip
    return Drawing(params, tuple(text for text in given["until"] if text))


def prompt_room(context_tokens: int, max_tokens: int) -> int:
    """Tokens that a prompt may have beside its answer. Raises `DataError` where there are none."""
    if max_tokens >= context_tokens:
        raise DataError(
            f"A task of lm-eval asks for answers of up to {max_tokens} tokens, and the model's context has {context_tokens}.\n"
            "Set max_gen_toks lower in a YAML of your own, or take a model with a longer context."
        )
    return context_tokens - max_tokens
