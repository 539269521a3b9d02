"""What a policy's loss is fed with: prompts, the engine that answers them, rewards, a reference; and its held-out reward."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from kajiya.config.options import GRPOLoss
from kajiya.config.schema import AdapterConfig, Config
from kajiya.config.tables import check_choice
from kajiya.data.prompts import Prompts
from kajiya.data.tokenizer import load_tokenizer
from kajiya.errors import ConfigError
from kajiya.flows.feeding import Data, Evaluation
from kajiya.flows.heldout import Sums
from kajiya.models.adapt import adapter_off, has_adapter
from kajiya.models.beginning import begins_as_base, keep_beginning
from kajiya.training.fit import Setup
from kajiya.training.policy import Policy
from kajiya.training.portions import rows_at_once, rows_of_step
from kajiya.training.precision import Precision
from kajiya.training.rewards import load_rewards
from kajiya.training.rollouts import (
    HELDOUT,
    LogProbs,
    Roller,
    RolloutLoader,
    answer_seed,
    own_log_probs,
    stop_tokens,
)

_SHOWN = 3
_AT_ONCE = 64


@dataclass(frozen=True)
class RolloutFeeding:
    """Opens the rollouts of training, and answers held-out prompts."""

    prompts: dict[str, Prompts]
    """Of both splits."""
    roller: Roller
    seed: int
    micro_batch: int
    step_rows: int

    @property
    def row_tokens(self) -> int:
        """Tokens of a prompt with all its answers, the longest that they can be."""
        return round(self.roller.options.group_size * (self.prompts["train"].mean_tokens + self._options.max_tokens))

    @property
    def _options(self) -> GRPOLoss:
        return self.roller.options

    def loader(self, *, batch: int | None = None, rank: int = 0, world: int = 1) -> RolloutLoader:
        """Rollouts of `batch` prompts at a time (`None`: the config's micro-batch), from the beginning."""
        if world > 1 and self._options.inner_epochs > 1:
            raise ConfigError(
                "train.loss.options.inner_epochs",
                f"{self._options.inner_epochs} in {world} processes: a checkpoint would hold the answers of the first alone",
                "Set it to 1.",
            )
        return RolloutLoader(
            self.prompts["train"],
            self.roller,
            seed=self.seed,
            batch=batch or self.micro_batch,
            step_rows=self.step_rows,
            rank=rank,
            world=world,
        )

    def evaluator(self, setup: Setup, rows: int) -> "HeldoutReward":
        """What answers at most `rows` held-out prompts with the weights as they are."""
        return HeldoutReward(self, rows)


@dataclass(frozen=True)
class HeldoutReward:
    """Answers the same held-out prompts, with the same seeds, every time."""

    feeding: RolloutFeeding
    rows: int | None
    """Most prompts, spread evenly over the split; `None`: all."""

    def __call__(self) -> Evaluation:
        """Means of the rewards, of their sum with its 95 % interval; `eval/loss`, which is to fall, is the sum's negative."""
        sums, samples = self.measure()
        values = {f"eval/{name}": each.mean for name, each in sums.items()}
        interval = sums["reward"].interval()
        if interval is not None:
            values |= {"eval/reward_low": interval[0], "eval/reward_high": interval[1]}
        return Evaluation({"eval/loss": -values["eval/reward"]} | values, samples)

    def texts(self) -> list[str]:
        """The prompts, in the order of the sums."""
        return [self.feeding.prompts["heldout"][place].text for place in self._places()]

    def _places(self) -> list[int]:
        n_all = len(self.feeding.prompts["heldout"])
        n = n_all if self.rows is None else min(self.rows, n_all)
        return [place * n_all // n for place in range(n)]

    def measure(self) -> tuple[dict[str, Sums], list[dict[str, Any]]]:
        """Each reward's sum over the prompts, one answer to each, and a few answers to look at."""
        roller, prompts, places = self.feeding.roller, self.feeding.prompts["heldout"], self._places()
        n = len(places)
        roller.policy.renew()
        rewards: list[list[float]] = []
        lengths: list[float] = []
        cut: list[float] = []
        shown: list[dict[str, Any]] = []
        for first in range(0, n, _AT_ONCE):
            part = [prompts[place] for place in places[first : first + _AT_ONCE]]
            seeds = [[answer_seed(self.feeding.seed, HELDOUT + place, 0)] for place in places[first : first + _AT_ONCE]]
            for prompt, (answer,) in zip(part, roller.roll(part, seeds), strict=True):
                rewards.append(answer.rewards)
                lengths.append(float(len(answer.tokens)))
                cut.append(float(answer.is_cut))
                if len(shown) < _SHOWN:
                    shown.append({"prompt": prompt.text, "text": answer.text, "reward": answer.rewards[0]})
        columns = dict(zip(("reward", *_named(roller.rewards.names)), np.array(rewards).T, strict=True))
        columns |= {"length": np.array(lengths), "cut": np.array(cut)}
        return {name: Sums(column, np.ones(n), _points(name, column)) for name, column in columns.items()}, shown


def open_rollouts(config: Config, data: Data, model: Any, precision: Precision, device: torch.device) -> RolloutFeeding:
    """Prompts of both splits, and what answers them with the weights of `model`, which is as it was before training."""
    options = check_choice("loss", config.train.loss.name, config.train.loss.options, "train.loss")
    assert isinstance(options, GRPOLoss)
    assert data.packing is not None, "prompts are no plain text"
    vocabulary = load_tokenizer(data.tokenizer.path)
    prompts = {
        split: Prompts(data.corpus.path, data.shards.path, data.packing.path, split) for split in ("train", "heldout")
    }
    most = max(each.longest for each in prompts.values()) + options.max_tokens

    def context() -> Any:
        return precision.context(device)

    roller = Roller(
        policy=Policy(model, vocabulary, most, precision.weights),
        rewards=load_rewards(options.rewards, device),
        options=options,
        vocabulary=vocabulary,
        stop_ids=stop_tokens(vocabulary, options.stop),
        old=own_log_probs(model, context, device, options.chunk_tokens) if options.inner_epochs > 1 else None,
        reference=_reference(model, config.adapter, context, device, options) if options.beta else None,
    )
    return RolloutFeeding(prompts, roller, config.seed, rows_at_once(config.train), rows_of_step(config.train))


def _reference(model: Any, adapter: AdapterConfig, context: Any, device: torch.device, options: GRPOLoss) -> LogProbs:
    """The model before training: of a new adapter the base, which is there anyway; of one that is gone on with a copy of it;
    otherwise a copy of the whole model."""
    if not has_adapter(model):
        frozen = copy.deepcopy(model).requires_grad_(False)
        return own_log_probs(frozen, context, device, options.chunk_tokens)
    own = own_log_probs(model, context, device, options.chunk_tokens)

    before = partial(adapter_off, model) if begins_as_base(adapter) else keep_beginning(model)

    def log_probs(rows: Any) -> torch.Tensor:
        with before():
            return own(rows)

    return log_probs


def _points(name: str, values: np.ndarray) -> float | None:
    """Of a reward that every answer either earns or does not, its mean is a share."""
    return 100.0 if name.startswith("reward") and np.isin(values, (0, 1)).all() else None


def _named(names: Sequence[str]) -> list[str]:
    return [f"rewards/{name}" for name in names]
