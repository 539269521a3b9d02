"""Rollouts: answers of the model in training, judged, as batches of a loader whose position is a few integers.

An answer is a function of (seed, number of its prompt since the beginning, number in its group, weights), so that a run that was
killed draws the same ones again. Shape letters: B rows, each one answer behind its prompt, T tokens of a row.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from kajiya.config.options import GRPOLoss
from kajiya.data.batch import NO_TARGET, Batch, RolloutBatch
from kajiya.data.order import ShuffledOrder
from kajiya.data.prompts import Prompt, Prompts
from kajiya.errors import StoreError
from kajiya.evals.scoring import evaluation_mode
from kajiya.run.deferred import uncompiled
from kajiya.serving.text import TextStream
from kajiya.training.policy import Policy
from kajiya.training.rewards import Rewards, Sample

_MULTIPLE = 8
_EPSILON = 1e-4
"""Added to the standard deviation of a group's rewards, as TRL does."""
LogProbs = Callable[[Batch], torch.Tensor]
"""log p of each target, nats, float32 [B, T], without gradient."""


@dataclass(frozen=True)
class Rollout:
    """One answer; lists have an entry for each of its tokens."""

    tokens: list[int]
    sampled: list[float]
    """Log-probabilities as the engine gave them."""
    is_cut: bool
    text: str
    rewards: list[float]
    """The weighted sum, and behind it each reward by itself."""
    advantage: float = 0.0
    old: list[float] | None = None
    reference: list[float] | None = None


@dataclass(frozen=True)
class Roller:
    """Draws answers with the present weights and has them judged."""

    policy: Policy
    rewards: Rewards
    options: GRPOLoss
    vocabulary: Any
    stop_ids: tuple[int, ...]
    old: LogProbs | None
    """The trainer's own log-probabilities, where several steps are taken on the same answers."""
    reference: LogProbs | None
    """Those of the model as it was before training, where the loss holds to it."""

    def roll(self, prompts: Sequence[Prompt], seeds: Sequence[Sequence[int]]) -> list[list[Rollout]]:
        """Answers to each prompt, one for each of its seeds, judged."""
        flat = [prompt for prompt, own in zip(prompts, seeds, strict=True) for _ in own]
        drawn = self.policy.draw(
            [prompt.ids for prompt in flat],
            [seed for own in seeds for seed in own],
            self.options.max_tokens,
            self.stop_ids,
        )
        texts = [
            self._text(prompt, answer.token_ids, answer.finish_reason)
            for prompt, answer in zip(flat, drawn, strict=True)
        ]
        samples = [
            Sample(prompt.text, text, prompt.completion, answer.finish_reason == "stop", prompt.row)
            for prompt, text, answer in zip(flat, texts, drawn, strict=True)
        ]
        judged = self.rewards.judge(samples)
        rollouts = iter(
            Rollout(
                tokens=answer.token_ids,
                sampled=[one.logprob for one in answer.logprobs],
                is_cut=answer.finish_reason == "length",
                text=text,
                rewards=list(earned),
            )
            for answer, text, earned in zip(drawn, texts, judged, strict=True)
        )
        return [[next(rollouts) for _ in own] for own in seeds]

    def _text(self, prompt: Prompt, tokens: Sequence[int], reason: str) -> str:
        """What the tokens say behind the prompt, without the token that ends it, and cut at a stop string."""
        stream = TextStream(self.vocabulary, prompt.ids)
        if tokens and tokens[-1] in self.policy.end_ids:
            tokens = tokens[:-1]
        said = "".join(stream.push(token) for token in tokens)
        ends = [at for stop in self.options.stop if (at := said.find(stop)) >= 0] if reason == "stop" else []
        return said[: min(ends)] if ends else said


class RolloutLoader:
    """Batches of rollouts. Its position is the number of prompts given out; a step's worth come `inner_epochs` times.

    New answers are drawn when they are asked for, with the weights of that moment: the first micro-batch of a step that needs
    them has the weights handed over to the engine.
    """

    def __init__(
        self,
        prompts: Prompts,
        roller: Roller,
        *,
        seed: int,
        batch: int,
        step_rows: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.prompts = prompts
        self.roller = roller
        self.batch = batch
        self.step_rows = step_rows
        self.rank = rank
        self.world = world
        self.row = 0
        self.waited_s = 0.0
        """Time that steps have waited for answers, seconds."""
        self._order = ShuffledOrder(len(prompts), seed)
        self._held: dict[int, list[Rollout]] = {}

    @property
    def rows_per_epoch(self) -> int:
        """Prompts until each has been given out."""
        return len(self.prompts)

    def next(self) -> RolloutBatch:
        """This rank's prompts of the next group, with answers."""
        epochs = self.roller.options.inner_epochs
        phase, within = divmod(self.row, self.step_rows * epochs)
        if within == 0:
            self._held = {}
            began = time.perf_counter()
            self.roller.policy.renew()
            self.waited_s += time.perf_counter() - began
        first = phase * self.step_rows + within % self.step_rows + self.rank * self.batch
        numbers = list(range(first, first + self.batch))
        prompts = self._prompts(numbers)
        missing = [number not in self._held for number in numbers]
        if any(missing):
            began = time.perf_counter()
            self._draw(numbers, prompts)
            self.waited_s += time.perf_counter() - began
        groups = [self._held[number] for number in numbers]
        if epochs == 1:
            self._held = {}
        self.row += self.batch * self.world
        return assemble(prompts, groups, self.roller)

    def heaviest(self) -> RolloutBatch:
        """The longest prompt with answers as long as they may be, as many as `next` gives; the position stays."""
        roller, options = self.roller, self.roller.options
        token = roller.vocabulary.pad_token_id or 0
        blank = [0.0] * options.max_tokens
        answer = Rollout(
            tokens=[token] * options.max_tokens,
            sampled=blank,
            is_cut=True,
            text="",
            rewards=[0.0] * (1 + len(roller.rewards.names)),
            old=blank if roller.old else None,
            reference=blank if roller.reference else None,
        )
        longest = Prompt((token,) * self.prompts.longest, "")
        return assemble([longest] * self.batch, [[answer] * options.group_size] * self.batch, roller)

    def _prompts(self, numbers: Sequence[int]) -> list[Prompt]:
        places = self._order.places(np.array(numbers, dtype=np.int64)) % len(self.prompts)
        return [self.prompts[int(place)] for place in places]

    def _draw(self, numbers: Sequence[int], prompts: Sequence[Prompt]) -> None:
        size = self.roller.options.group_size
        seeds = [[answer_seed(self._order.seed, number, i) for i in range(size)] for number in numbers]
        groups = self.roller.roll(prompts, seeds)
        judged = [with_advantages(group, self.roller.options.scale_advantages) for group in groups]
        self._held |= zip(numbers, with_log_probs(prompts, judged, self.roller), strict=True)

    def state(self) -> dict[str, Any]:
        """The position, what it is a position in, and the answers that are still to be learnt from."""
        within = self.row % (self.step_rows * self.roller.options.inner_epochs)
        held = {str(number): [asdict(each) for each in group] for number, group in self._held.items()} if within else {}
        return {"row": self.row, "epoch": self._n_drawn() // len(self.prompts)} | self._stream() | {"held": held}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a `state`. Raises `StoreError` when it belongs to another stream of prompts."""
        for name, value in self._stream().items():
            if state.get(name) != value:
                raise StoreError(
                    f"the data position was saved at {name}={state.get(name)}, and here it is {name}={value}: the answers "
                    "after it would be others.\nGo on with the settings and the data of the saved run, or begin a new run."
                )
        self.row = state["row"]
        self._held = {int(number): [Rollout(**each) for each in group] for number, group in state["held"].items()}

    def _n_drawn(self) -> int:
        phase, within = divmod(self.row, self.step_rows * self.roller.options.inner_epochs)
        return phase * self.step_rows + min(within, self.step_rows)

    def _stream(self) -> dict[str, int]:
        options = self.roller.options
        return {
            "seed": self._order.seed,
            "n_prompts": len(self.prompts),
            "step_rows": self.step_rows,
            "group_size": options.group_size,
            "inner_epochs": options.inner_epochs,
        }


HELDOUT = 1 << 63
"""What the numbers of held-out prompts begin with: no training prompt has such a number."""


def answer_seed(seed: int, number: int, answer: int) -> int:
    """Seed of an answer: of the run's seed, the number of its prompt since the beginning, its number in the group."""
    # Any injective mixing will do: `random.Random` hashes what it is given.
    return (((seed << 64) + number) << 32) + answer


def with_advantages(group: Sequence[Rollout], is_scaled: bool) -> list[Rollout]:
    """Each answer's reward over the mean of its group; scaled by the group's standard deviation (Bessel's), plus 10⁻⁴."""
    rewards = np.array([each.rewards[0] for each in group])
    advantages = rewards - rewards.mean()
    if is_scaled:
        advantages = advantages / (rewards.std(ddof=1) + _EPSILON)
    return [replace(each, advantage=float(value)) for each, value in zip(group, advantages, strict=True)]


def with_log_probs(
    prompts: Sequence[Prompt], groups: Sequence[Sequence[Rollout]], roller: Roller
) -> list[list[Rollout]]:
    """The answers with what the trainer, or the reference, gives their tokens, where the loss will ask for it."""
    wanted = {name: function for name, function in (("old", roller.old), ("reference", roller.reference)) if function}
    if not wanted:
        return [list(group) for group in groups]
    rows = assemble(prompts, groups, roller).rows
    found = {name: function(rows).cpu() for name, function in wanted.items()}
    is_target_BT = rows.targets != NO_TARGET
    result, row = [], 0
    for group in groups:
        filled = []
        for each in group:
            values: dict[str, Any] = {name: table[row][is_target_BT[row]].tolist() for name, table in found.items()}
            filled.append(replace(each, **values))
            row += 1
        result.append(filled)
    return result


def assemble(prompts: Sequence[Prompt], groups: Sequence[Sequence[Rollout]], roller: Roller) -> RolloutBatch:
    """The answers behind their prompts as one batch."""
    pairs = [(prompt.ids, each) for prompt, group in zip(prompts, groups, strict=True) for each in group]
    longest = max(len(ids) + len(each.tokens) - 1 for ids, each in pairs)
    shape = len(pairs), -(-longest // _MULTIPLE) * _MULTIPLE
    tokens, positions, segments = (torch.zeros(shape, dtype=torch.int64) for _ in range(3))
    targets = torch.full(shape, NO_TARGET)
    tables = {name: torch.zeros(shape) for name in ("sampled", "old", "reference")}
    tokens += roller.vocabulary.pad_token_id or 0
    for row, (ids, each) in enumerate(pairs):
        n = len(ids) + len(each.tokens) - 1
        answer = slice(len(ids) - 1, n)
        tokens[row, :n] = torch.tensor([*ids, *each.tokens][:-1])
        targets[row, answer] = torch.tensor(each.tokens)
        positions[row, :n] = torch.arange(n)
        positions[row, n:] = torch.arange(shape[1] - n)
        segments[row, n:] = 1
        for name, table in tables.items():
            values = vars(each)[name]
            if values is not None:
                table[row, answer] = torch.tensor(values)
    answers = [each for _, each in pairs]
    return RolloutBatch(
        rows=Batch(tokens, targets, positions, segments, sum(len(each.tokens) for each in answers)),
        sampled=tables["sampled"],
        advantages=torch.tensor([each.advantage for each in answers], dtype=torch.float32),
        rewards=torch.tensor([each.rewards for each in answers], dtype=torch.float32),
        names=roller.rewards.names,
        group_size=len(groups[0]),
        is_cut=torch.tensor([each.is_cut for each in answers]),
        old=tables["old"] if answers[0].old is not None else None,
        reference=tables["reference"] if answers[0].reference is not None else None,
    )


def own_log_probs(model: Any, context: Callable[[], Any], device: torch.device, chunk_tokens: int) -> LogProbs:
    """What the model gives, as it is when it is asked, in evaluation mode and in the precision of `context`."""
    from kajiya.training.losses.sequences import token_log_probs

    def log_probs(rows: Batch) -> torch.Tensor:
        with evaluation_mode(model), torch.no_grad(), uncompiled(), context():
            return token_log_probs(model, rows.to(device), chunk_tokens).float()

    return log_probs


def stop_tokens(vocabulary: Any, stops: Sequence[str]) -> tuple[int, ...]:
    """Ids of the tokens whose text holds one of the strings."""
    if not stops:
        return ()
    texts = vocabulary.batch_decode([[token] for token in range(len(vocabulary))])
    return tuple(token for token, text in enumerate(texts) if any(stop in text for stop in stops))
