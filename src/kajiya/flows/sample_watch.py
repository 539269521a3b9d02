"""What the model in training writes: held-out prompts, gone on with by the engine that serves it, as it would be saved."""

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kajiya.config.schema import Config
from kajiya.config.tables import loss_row
from kajiya.data.batch import NO_TARGET, ExampleBatch
from kajiya.errors import ConfigError
from kajiya.flows.feeding import Feeding, Feeds
from kajiya.training.generators import undisturbed

_TEXT_TOKENS = 32
"""Longest prompt that is taken of a text without one."""


@dataclass(frozen=True)
class SampleWatch:
    """Writes the model into a folder below `beside`, asks it, and removes the folder."""

    prompts: list[list[int]]
    max_tokens: int
    temperature: float
    seed: int
    save: Callable[[Path], object]
    """Writes the model, as it is now, into a folder."""
    beside: Path

    def __call__(self) -> list[tuple[str, str]]:
        """Each prompt and what the model wrote, as text; nothing of the training moves, its random numbers neither."""
        from kajiya.data.tokenizer import load_tokenizer
        from kajiya.serving.loading import load_engine
        from kajiya.serving.sequence import SamplingParams

        with tempfile.TemporaryDirectory(dir=self.beside, prefix=".samples-") as name, undisturbed():
            folder = Path(name)
            self.save(folder)
            engine = load_engine(folder, max_batch=len(self.prompts))
            tokenizer = load_tokenizer(folder)
            n = min(self.max_tokens, engine.context_tokens // 2)
            prompts = [ids[-(engine.context_tokens - n - 1) :] for ids in self.prompts]
            params = SamplingParams(max_tokens=n, temperature=self.temperature, seed=self.seed)
            written = [answer.token_ids for answer in engine.generate(prompts, params)]
        prompted, answered = (
            [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in each] for each in (prompts, written)
        )
        return list(zip(prompted, answered, strict=True))


def open_samples(
    config: Config, feeding: Feeds, save: Callable[[Path], object], beside: Path
) -> Callable[[], list[tuple[str, str]]] | None:
    """What `train.samples_every` asks for; `None` where it is not set. Raises `ConfigError` for a model that cannot be asked."""
    if config.train.samples_every is None:
        return None
    why = _why_not(config)
    if why is not None:
        raise ConfigError("train.samples_every", why, "Set train.samples_every=null.")
    assert isinstance(feeding, Feeding), "what goes on with held-out texts is fed with them"
    prompts = heldout_prompts(feeding.heldout(config.eval.samples))
    return SampleWatch(prompts, config.eval.sample_tokens, config.eval.temperature, config.seed, save, beside)


def _why_not(config: Config) -> str | None:
    if ":" in config.model.name:
        return "the engine serves models that Transformers can load, not a module of one's own"
    if config.adapter.name in ("prefix", "prompt"):
        return "the engine does not know virtual tokens (prefix and prompt tuning)"
    row = loss_row(config.train.loss.name)
    if row.task != "causal" or row.takes not in ("tokens", "preference", "feedback"):
        return f"train.loss.name={config.train.loss.name} trains no model that goes on with held-out texts"
    if config.eval.samples == 0:
        return "eval.samples is 0, and says how many prompts there are"
    return None


def heldout_prompts(batches: Iterable[Any]) -> list[list[int]]:
    """Of each row's first sequence what stands before its first target; of a text, which has no such part, its first tokens."""
    prompts = []
    for batch in batches:
        rows = batch.rows if isinstance(batch, ExampleBatch) else batch
        for tokens, targets, segments in zip(rows.tokens, rows.targets, rows.segments, strict=True):
            n = int((segments == segments[0]).sum())
            wanted = (targets[:n] != NO_TARGET).nonzero()
            first = int(wanted[0]) if len(wanted) else n - 1
            prompts.append(tokens[: first + 1 if first else max(1, min(_TEXT_TOKENS, n // 2))].tolist())
    return prompts
