"""What the loop moves to the device: a batch of rows, targets already shifted.

Shape letters: B rows of the micro-batch, T tokens of a row, E examples, S sequences (k of each example: S = E · k).
"""

from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass, replace
from typing import Any

import torch

NO_TARGET = -100
"""Target of a position where nothing is predicted."""


def is_on_host(tensor: torch.Tensor) -> bool:
    """Whether a question about the tensor's values waits for no device."""
    return tensor.device.type == "cpu"


def target_places(targets: torch.Tensor) -> torch.Tensor:
    """The places of the flattened targets, of any shape, where something is predicted, ascending, int64 [n]."""
    return (targets.reshape(-1) != NO_TARGET).nonzero().squeeze(1)


@dataclass(frozen=True)
class Layout:
    """What the host knows of a batch's rows, so that the device need not be asked, which would make the host wait."""

    places: torch.Tensor
    """`target_places`."""
    bounds: torch.Tensor
    """Where each segment begins, the rows one behind the other, and where the last one ends, int32 [n + 1]."""
    longest: int
    """Tokens of the longest segment."""
    is_split: bool
    """Whether any row has two segments."""
    weight: float | None
    """Sum of the weights of the targets, where they have some."""
    sources: torch.Tensor | None = None
    """`Batch.sources` of the places, int64 [n]; stays on the CPU."""

    def to(self, device: torch.device | str, *, is_pinned: bool) -> "Layout":
        """The same on another device, through page-locked memory where the batch is in such."""

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            return (tensor.pin_memory() if is_pinned else tensor).to(device, non_blocking=True)

        return replace(self, places=moved(self.places), bounds=moved(self.bounds))


def segment_bounds(segments: torch.Tensor) -> torch.Tensor:
    """`Layout.bounds` of segments [B, T]."""
    is_first = torch.ones_like(segments, dtype=torch.bool)
    is_first[:, 1:] = segments[:, 1:] != segments[:, :-1]
    starts = is_first.flatten().nonzero().flatten()
    end = torch.tensor([segments.numel()], device=segments.device)
    return torch.cat([starts, end]).to(torch.int32)


@dataclass(frozen=True)
class Batch:
    """Packed text. All tensors are int64 [B, T]."""

    tokens: torch.Tensor
    """Token ids."""
    targets: torch.Tensor
    """The id that follows each token within its segment; `NO_TARGET` where there is none."""
    positions: torch.Tensor
    """Position within the segment, from 0."""
    segments: torch.Tensor
    """Segment of each token within its row, from 0; tokens of different segments do not see each other."""
    n_targets: int
    """Positions that have a target."""
    weights: torch.Tensor | None = None
    """Weight of each target in the loss, float32 [B, T]; `None`: all 1."""
    is_causal: bool = True
    """A token sees only what stands before it; `False`: its whole segment (masked-LM rows, whose targets are not shifted)."""
    sources: torch.Tensor | None = None
    """Place of each token among the tokens of its split, int64 [B, T], −1 where the row is filled up; stays on the CPU."""

    future: tuple[float, ...] = ()
    """Of the tokens behind the next one that are learnt too, how many there are (the sum of their weights), one further each."""
    layout: Layout | None = None
    """Comes with a batch that was moved off the host; whoever changes such a batch's rows leaves it out."""

    @property
    def n_tokens(self) -> int:
        """Tokens that go through the model."""
        return self.tokens.numel()

    @property
    def places(self) -> torch.Tensor:
        """`target_places`, on the batch's device."""
        return target_places(self.targets) if self.layout is None else self.layout.places

    @property
    def tells_places(self) -> bool:
        """Whether nobody waits for a device that is asked for the `places`."""
        return self.layout is not None or is_on_host(self.targets)

    def laid_out(self) -> "Batch":
        """The same with its layout."""
        bounds = segment_bounds(self.segments)
        n_rows = self.segments.shape[0]
        places = target_places(self.targets)
        layout = Layout(
            places=places,
            bounds=bounds,
            longest=int(bounds.diff().max()),
            is_split=len(bounds) > n_rows + 1,
            weight=self._weight(),
            sources=None if self.sources is None else self.sources.reshape(-1)[places],
        )
        return replace(self, layout=layout)

    def _weight(self) -> float | None:
        return None if self.weights is None else float(self.weights[self.targets != NO_TARGET].sum())

    @property
    def counts(self) -> dict[str, float]:
        """What a loss can be a sum over, by unit; the loop divides by the sum of it over a group and all ranks."""
        weight = self._weight() if self.layout is None else self.layout.weight
        weighed = {} if weight is None else {"loss": weight}
        further = {f"future_{k}": n for k, n in enumerate(self.future, start=1)}
        return {"targets": self.n_targets} | weighed | further

    def further(self, k: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Targets and weights, [B, T] each, of the token that stands `k` places behind the next one of the same segment."""
        targets = torch.full_like(self.targets, NO_TARGET)
        same = self.segments[:, k:] == self.segments[:, :-k]
        targets[:, :-k] = torch.where(same, self.targets[:, k:], NO_TARGET)
        if self.weights is None:
            return targets, None
        return targets, torch.cat([self.weights[:, k:], torch.zeros_like(self.weights[:, :k])], dim=1)

    def with_future(self, n: int) -> "Batch":
        """The same, `n` tokens behind the next one counted."""
        counts = []
        for targets, weights in map(self.further, range(1, n + 1)):
            wanted = targets != NO_TARGET
            counts.append(float(wanted.sum() if weights is None else weights[wanted].sum()))
        return replace(self, future=tuple(counts))

    def cut(self, pieces: int) -> "Batch":
        """The same tokens in rows of T / `pieces`: [B · pieces, T / pieces]. A piece sees nothing of the one before it."""
        if pieces == 1:
            return self
        shape = (self.tokens.shape[0] * pieces, self.tokens.shape[1] // pieces)
        segments, positions = self.segments.reshape(shape), self.positions.reshape(shape)
        goes_on = segments == segments[:, :1]
        return Batch(
            tokens=self.tokens.reshape(shape),
            targets=self.targets.reshape(shape),
            positions=torch.where(goes_on, positions - positions[:, :1], positions),
            segments=segments - segments[:, :1],
            n_targets=self.n_targets,
            weights=None if self.weights is None else self.weights.reshape(shape),
            is_causal=self.is_causal,
            sources=None if self.sources is None else self.sources.reshape(shape),
            future=self.future,
        )

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device; off the host it brings its layout."""
        if self.layout is None and is_on_host(self.tokens) and torch.device(device).type != "cpu":
            return self.laid_out().to(device)
        return Batch(
            tokens=self.tokens.to(device, non_blocking=True),
            targets=self.targets.to(device, non_blocking=True),
            positions=self.positions.to(device, non_blocking=True),
            segments=self.segments.to(device, non_blocking=True),
            n_targets=self.n_targets,
            weights=None if self.weights is None else self.weights.to(device, non_blocking=True),
            is_causal=self.is_causal,
            sources=self.sources,
            future=self.future,
            layout=None if self.layout is None else self.layout.to(device, is_pinned=self.tokens.is_pinned()),
        )


@dataclass(frozen=True)
class ExampleBatch:
    """Packed rows whose examples are whole: preference pairs (k = 2), labelled feedback and classification (k = 1)."""

    rows: Batch
    """The sequences, each a segment of a row of its own or of a shared one; an example's sequences share a row."""
    owner: torch.Tensor
    """Sequence of each token, int64 [B, T], −1 where the row is filled up. Sequence j of example e is e · k + j; of a
    preference pair, j = 0 is the chosen one, j = 1 the rejected."""
    last: torch.Tensor
    """Where each sequence's last token is in the flattened rows (b · T + t), int64 [S]."""
    examples: torch.Tensor
    """Number of each example within its split, int64 [E]."""
    labels: torch.Tensor | None = None
    """Label of each example [E]: int64 class, float32 value of a regression, 1 and 0 for good and bad feedback, or float32 margin
    of a preference (0: the row says none)."""
    reference: torch.Tensor | None = None
    """Log-probability of each sequence's targets under the reference model, float32 [S], nats."""
    mismatched: "ExampleBatch | None" = None
    """Of feedback for KTO: each example's prompt with the answer to another, which its reference point is measured on."""
    measured: Mapping[str, float | torch.Tensor] | None = None
    """Means over the whole group, which the loss asked the loop to measure before the micro-batches."""
    known_longest: int | None = None
    """`longest`; comes with a batch that was moved off the host."""

    @property
    def n_targets(self) -> int:
        """Positions that have a target."""
        return self.rows.n_targets

    @property
    def n_tokens(self) -> int:
        """Tokens that go through the model."""
        return self.rows.n_tokens

    @property
    def counts(self) -> dict[str, float]:
        """As a `Batch`'s, and the examples."""
        return self.rows.counts | {"examples": len(self.examples)}

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        if self.known_longest is not None:
            return self.known_longest
        return int(torch.where(self.owner >= 0, self.rows.positions, 0).max()) + 1

    def laid_out(self) -> "ExampleBatch":
        """The same with what the host knows of its rows."""
        other = None if self.mismatched is None else self.mismatched.laid_out()
        return replace(self, rows=self.rows.laid_out(), mismatched=other, known_longest=self.longest)

    def to(self, device: torch.device | str) -> "ExampleBatch":
        """The same batch on another device; off the host it brings what is known of its rows."""
        if self.known_longest is None and is_on_host(self.owner) and torch.device(device).type != "cpu":
            return self.laid_out().to(device)
        return ExampleBatch(
            rows=self.rows.to(device),
            owner=self.owner.to(device, non_blocking=True),
            last=self.last.to(device, non_blocking=True),
            examples=self.examples.to(device, non_blocking=True),
            labels=None if self.labels is None else self.labels.to(device, non_blocking=True),
            reference=None if self.reference is None else self.reference.to(device, non_blocking=True),
            mismatched=None if self.mismatched is None else self.mismatched.to(device),
            measured=self.measured,
            known_longest=self.known_longest,
        )


@dataclass(frozen=True)
class Seq2SeqBatch:
    """Input and target sequences of an encoder–decoder, padded: one pair a row. N tokens of the longest input."""

    inputs: torch.Tensor
    """What the encoder reads, int64 [B, N]."""
    inputs_mask: torch.Tensor
    """Which of them are no padding, bool [B, N]."""
    tokens: torch.Tensor
    """What the decoder reads, int64 [B, T]: the targets, one place later, behind its start token."""
    targets: torch.Tensor
    """What the decoder says, int64 [B, T]; `NO_TARGET` behind the end."""
    n_targets: int
    """Positions that have a target."""
    examples: torch.Tensor | None = None
    """Number of each pair within its split, int64 [B]; stays on the CPU. `None` of pairs that are from no split."""
    known_places: torch.Tensor | None = None
    """`places`; comes with a batch that was moved off the host."""

    @property
    def places(self) -> torch.Tensor:
        """`target_places`, on the batch's device."""
        return target_places(self.targets) if self.known_places is None else self.known_places

    def laid_out(self) -> "Seq2SeqBatch":
        """The same with its places."""
        return replace(self, known_places=target_places(self.targets))

    @property
    def n_tokens(self) -> int:
        """Tokens that go through the model."""
        return self.inputs.numel() + self.tokens.numel()

    @property
    def counts(self) -> dict[str, float]:
        """As a `Batch`'s."""
        return {"targets": self.n_targets}

    def to(self, device: torch.device | str) -> "Seq2SeqBatch":
        """The same batch on another device; off the host it brings its places."""
        if self.known_places is None and is_on_host(self.targets) and torch.device(device).type != "cpu":
            return self.laid_out().to(device)
        return Seq2SeqBatch(
            inputs=self.inputs.to(device, non_blocking=True),
            inputs_mask=self.inputs_mask.to(device, non_blocking=True),
            tokens=self.tokens.to(device, non_blocking=True),
            targets=self.targets.to(device, non_blocking=True),
            n_targets=self.n_targets,
            examples=self.examples,
            known_places=None if self.known_places is None else self.known_places.to(device, non_blocking=True),
        )


@dataclass(frozen=True)
class RolloutBatch:
    """Answers that the model gave to prompts, one a row, k to each prompt one behind the other, and what they earned."""

    rows: Batch
    """Prompt and answer, the answer's tokens being targets; padded to the longest."""
    sampled: torch.Tensor
    """Log-probability of each target as the engine that drew it gave it, nats, float32 [B, T]; 0 where there is none."""
    advantages: torch.Tensor
    """Of each answer over the others to its prompt, float32 [S]."""
    rewards: torch.Tensor
    """Weighted sum of each answer, and behind it each reward by itself, float32 [S, 1 + n]."""
    names: tuple[str, ...]
    """Of the rewards, [n]."""
    group_size: int
    """Answers to each prompt, k."""
    is_cut: torch.Tensor
    """Whether the answer reached its greatest length before it ended, bool [S]."""
    old: torch.Tensor | None = None
    """As `sampled`, by the trainer's own forward pass, before the first step on these answers; `None` where there is but one."""
    reference: torch.Tensor | None = None
    """As `old`, under the model as it was before training."""

    @property
    def n_targets(self) -> int:
        """Tokens of all answers."""
        return self.rows.n_targets

    @property
    def n_tokens(self) -> int:
        """Tokens that go through the model."""
        return self.rows.n_tokens

    @property
    def counts(self) -> dict[str, float]:
        """As a `Batch`'s, the answers (`sequences`), and the prompts (`examples`)."""
        n = len(self.advantages)
        return self.rows.counts | {"sequences": n, "examples": n // self.group_size}

    def to(self, device: torch.device | str) -> "RolloutBatch":
        """The same batch on another device."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, torch.Tensor)
        }
        return replace(self, rows=self.rows.to(device), **moved)


def pinned(batch: Any, device: torch.device) -> Any:
    """A batch of any kind with its tensors in page-locked memory; `device` is the GPU that it is for."""

    def locked(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.pin_memory()
        if is_dataclass(value) and not isinstance(value, type):
            return replace(value, **{name: locked(each) for name, each in vars(value).items()})
        return value

    # In a thread of its own another GPU would be the current one, and get a context for it.
    with torch.cuda.device(device):
        return locked(batch)
