"""What an answer earns: functions of samples, named in the config, and their weighted sum."""

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kajiya.config.options import ExactMatchReward, ModelReward, RegexReward, UnitTestReward
from kajiya.config.rewards import PLACES, ROW, check_rewards
from kajiya.config.schema import RenderConfig
from kajiya.config.tables import TABLES, import_target, is_options, resolve
from kajiya.data.batch import NO_TARGET, Batch, ExampleBatch
from kajiya.errors import ConfigError, TrainingError
from kajiya.evals.sandbox import run_program, whole_lines
from kajiya.training.time_limit import LateError, time_limit

_FIELD = "train.loss.options.rewards"
_MOST_SHOWN = 200


@dataclass(frozen=True)
class Sample:
    """An answer to be judged."""

    prompt: str
    """The row's prompt, as it stands in the data."""
    answer: str
    """What the model said, without the token that ended it."""
    completion: str | None
    """The row's own completion: what is right, or what tells; `None` of a row that is a prompt alone."""
    is_ended: bool
    """Whether the model ended the answer itself, before its greatest length."""
    row: Mapping[str, Any] = field(default_factory=dict)
    """The columns of its row that `data.keep` names, by their names in the source."""


Reward = Callable[[Sequence[Sample]], Sequence[float]]


@dataclass(frozen=True)
class Rewards:
    """Several rewards and their weights."""

    names: tuple[str, ...]
    weights: tuple[float, ...]
    functions: tuple[Reward, ...]
    seconds: tuple[float, ...]
    """Longest time that each may take over the answers that it is given at once."""

    def judge(self, samples: Sequence[Sample]) -> list[tuple[float, ...]]:
        """Of each sample the weighted sum, and behind it each reward by itself.

        Raises `TrainingError` for a reward that gives something else than a finite number for each sample, or takes too long.
        """
        columns = [
            _numbers(_in_time(function, samples, name, seconds), len(samples), name)
            for name, function, seconds in zip(self.names, self.functions, self.seconds, strict=True)
        ]
        rows = list(zip(*columns, strict=True))
        return [(math.fsum(w * x for w, x in zip(self.weights, row, strict=True)), *row) for row in rows]


def load_rewards(given: Sequence[Any], device: torch.device) -> Rewards:
    """The rewards of `train.loss.options.rewards`, with what they read loaded onto `device`."""
    parts = check_rewards(given, _FIELD)
    names, functions = [], []
    for number, part in enumerate(parts):
        field = f"{_FIELD}[{number}]"
        function, options = resolve("reward", part.name, part.options, field)
        if is_options(options):
            row = TABLES["reward"][part.name]
            needs = import_target(row.needs, field)(options, device) if row.needs else {}
            functions.append(partial(function, options=options, **needs))
        else:
            functions.append(partial(function, **options))
        name = part.name.rpartition(":")[2]
        names.append(name if name not in names else f"{name}_{number}")
    weights, seconds = zip(*((part.weight, part.seconds) for part in parts), strict=True)
    return Rewards(tuple(names), weights, tuple(functions), seconds)


def _in_time(function: Reward, samples: Sequence[Sample], name: str, seconds: float) -> Sequence[float]:
    """What the reward gives. Raises `TrainingError` that shows the answer that it hangs at."""

    def locate(frames: Iterator[dict[str, Any]]) -> str:
        found = next((each for frame in frames for each in frame.values() if isinstance(each, Sample)), None)
        if found is None:
            return f"one of {len(samples)} answers, the first to the prompt {_shown(samples[0].prompt)}"
        words = f"the answer {_shown(found.answer)} to the prompt {_shown(found.prompt)}"
        return words if found.completion is None else f"{words} (completion {_shown(found.completion)})"

    try:
        with time_limit(seconds, locate):
            return function(samples)
    except LateError as late:
        raise TrainingError(
            f"the reward {name} has not judged {len(samples)} answers within {seconds:g} s; it is at {late}.\n"
            "Mend the reward (a pattern like (a+)+b takes forever over some texts), or give it longer: its `seconds`."
        ) from None


def _shown(text: str) -> str:
    return repr(text if len(text) <= _MOST_SHOWN else text[:_MOST_SHOWN] + "…")


def _numbers(given: Sequence[float], n: int, name: str) -> list[float]:
    values = [float(value) for value in given]
    if len(values) != n:
        raise TrainingError(f"the reward {name} gave {len(values)} numbers for {n} answers")
    wrong = next((value for value in values if not math.isfinite(value)), None)
    if wrong is not None:
        raise TrainingError(f"the reward {name} gave {wrong}, which no sum can hold")
    return values


# ---------------------------------------------------------------- rows of the table


def exact_match(samples: Sequence[Sample], options: ExactMatchReward) -> list[float]:
    """1 where the answer is the row's completion, or what its column says."""

    def plain(text: str) -> str:
        text = text.strip() if options.strip else text
        return text.casefold() if options.ignore_case else text

    return [float(plain(each.answer) == plain(_right(each, options.column))) for each in samples]


def regex(samples: Sequence[Sample], options: RegexReward) -> list[float]:
    """1 where the pattern matches the whole answer. Raises `ConfigError` for what is no regular expression."""

    def matches(sample: Sample) -> float:
        answer = sample.answer.strip() if options.strip else sample.answer
        pattern = _right(sample, options.column) if options.pattern is None else options.pattern
        try:
            return float(re.fullmatch(pattern, answer) is not None)
        except re.error as error:
            raise ConfigError(
                f"{_FIELD}[…].options.pattern", f"{pattern!r} is no regular expression: {error}"
            ) from error

    return [matches(each) for each in samples]


def _right(sample: Sample, column: str | None) -> str:
    """What the row's completion, or a column of the row, says."""
    return str(sample.completion) if column is None else str(sample.row[column])


def _put_in(sample: Sample, name: str) -> str:
    """What stands for `{name}` in a program."""
    if name == "answer":
        return whole_lines(sample.answer)
    value = sample.row[name.removeprefix(ROW)] if name.startswith(ROW) else vars(sample)[name]
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def unit_test(samples: Sequence[Sample], options: UnitTestReward) -> list[float]:
    """1 where the program ends without an error within its limits; several run at once."""

    def passes(sample: Sample) -> float:
        source = PLACES.sub(lambda found: _put_in(sample, found[1]), options.program)
        return float(run_program(source, seconds=options.seconds, memory_mb=options.memory_mb).is_passed)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0)), thread_name_prefix="kajiya-tests") as pool:
        return list(pool.map(passes, samples))


def load_reward_model(options: ModelReward, device: torch.device) -> dict[str, Any]:
    """The reward model of `options.path`, frozen, and what renders prompts and answers for it.

    Raises `ConfigError` for a model whose weights have no head that says a number.
    """
    from kajiya.data.render import Renderer
    from kajiya.data.tokenizer import load_tokenizer
    from kajiya.models.adapter_files import hub_folder, is_adapter, is_mergeable
    from kajiya.models.open import open_model
    from kajiya.models.tasks import Task

    folder = Path(options.path)
    if not folder.is_dir():
        folder = hub_folder(options.path, options.revision)
    is_merged = is_adapter(folder) and is_mergeable(folder)
    try:
        model = open_model(folder, torch.float32, is_merged=is_merged, task=Task("score"), needs_head=True)
    except ConfigError as error:
        raise ConfigError(
            f"{_FIELD}[…].options.path",
            f"{options.path!r} is no reward model: {error.problem}",
            "train.loss.name=reward makes one of a model and preference rows.",
        ) from error
    renderer = Renderer(load_tokenizer(folder), RenderConfig(prompt_style=options.prompt_style), "instruction")
    return {"model": model.requires_grad_(False).to(device), "renderer": renderer}


def by_model(samples: Sequence[Sample], options: ModelReward, model: Any, renderer: Any) -> list[float]:
    """The reward model's number for each prompt with its answer."""
    import json

    from kajiya.models.outputs import sequence_logits

    rows = [json.dumps({"prompt": each.prompt, "completion": each.answer}) for each in samples]
    ids = [renderer.render(row).segments[0].ids for row in rows]
    found: list[float] = []
    for first in range(0, len(ids), options.batch):
        batch = _alone(ids[first : first + options.batch])
        with torch.no_grad():
            found += sequence_logits(model, batch.to(model.device)).squeeze(-1).float().tolist()
    return found


def _alone(sequences: Sequence[Any]) -> ExampleBatch:
    """Each sequence in a row of its own, without targets."""
    n, width = len(sequences), max(len(ids) for ids in sequences)
    tokens, owner = torch.zeros(n, width, dtype=torch.int64), torch.full((n, width), -1)
    for row, ids in enumerate(sequences):
        tokens[row, : len(ids)] = torch.as_tensor(ids)
        owner[row, : len(ids)] = row
    positions = torch.arange(width).expand(n, width).contiguous()
    rows = Batch(tokens, torch.full_like(tokens, NO_TARGET), positions, (owner < 0).long(), 0)
    last = torch.tensor([row * width + len(ids) - 1 for row, ids in enumerate(sequences)])
    return ExampleBatch(rows, owner, last, torch.arange(n))
