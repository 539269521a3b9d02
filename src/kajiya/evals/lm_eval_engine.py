"""lm-eval's tasks on the project's own engine: its library scores, the project's model answers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kajiya.errors import ConfigError, MissingExtraError
from kajiya.evals.answers import LocalModel, Sampling, cut_at
from kajiya.evals.scoring import score_continuations, score_documents


def run_lm_eval(
    folder: Path, tasks: Sequence[str], *, limit: int | None, batch: int, context_tokens: int | None = None
) -> dict[str, Any]:
    """lm-eval's results on the model in `folder`; a task is a name, or the path of a task's YAML.

    Returns lm-eval's own dictionary, with `samples`. Raises `MissingExtraError` without lm-eval.
    """
    require_lm_eval()
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    names, folders = [], []
    for task in tasks:
        path = Path(task)
        if task.endswith((".yaml", ".yml")):
            names.append(_name_of(path))
            folders.append(str(path.resolve().parent))
        else:
            names.append(task)
    manager = TaskManager(include_path=folders or None)
    found = simple_evaluate(
        model=make_lm(folder, batch, context_tokens),
        tasks=names,
        task_manager=manager,
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


def _name_of(path: Path) -> str:
    import re

    if not path.is_file():
        raise ConfigError("--tasks", f"no file {str(path)!r}")
    # lm-eval's YAML has tags of its own (!function), which a plain reader refuses.
    found = re.search(r"^task:\s*['\"]?([\w\-.]+)", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    if found is None:
        raise ConfigError(str(path), "a task of lm-eval has a line `task: NAME`")
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
            alike: dict[Sampling, list[int]] = {}
            for i, request in enumerate(requests):
                alike.setdefault(_sampling(request.args[1]), []).append(i)
            for sampling, places in alike.items():  # what is drawn alike is drawn together
                texts = self._complete([requests[i].args[0] for i in places], sampling)
                for i, text in zip(places, texts, strict=True):
                    answers[i] = cut_at(text, sampling.stop)
            return answers

        def _complete(self, prompts: list[str], sampling: Sampling) -> list[str]:
            from kajiya.serving.sequence import SamplingParams

            engine = self.local._engine
            room = engine.context_tokens - sampling.max_tokens
            ids = [self.tok_encode(prompt)[-room:] or [self.prefix_token_id] for prompt in prompts]
            params = SamplingParams(
                max_tokens=sampling.max_tokens, temperature=sampling.temperature, seed=sampling.seed
            )
            done = engine.generate(ids, params)
            return [str(self.tokenizer.decode(each.token_ids, skip_special_tokens=True)) for each in done]

    return EngineLM()


def _sampling(settings: dict[str, Any]) -> Sampling:
    """How a request of lm-eval is to be drawn."""
    until = settings.get("until") or []
    warm = float(settings.get("temperature", 0.0)) if settings.get("do_sample") else 0.0
    stop = (until,) if isinstance(until, str) else tuple(until)
    return Sampling(int(settings.get("max_gen_toks", 256)), warm, 0, 1, stop, False)
