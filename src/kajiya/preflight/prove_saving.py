"""Checks of what is trained and what is kept: every trainable tensor moves, no frozen one does, and what is saved comes back."""

import tempfile
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from kajiya.config.quantities import format_bytes, format_count
from kajiya.data.batch import Batch
from kajiya.models.fused import fuse_blocks, is_fused
from kajiya.models.hidden import all_logits
from kajiya.models.quantized import count_params
from kajiya.preflight.portion import Repeated, first_batch
from kajiya.preflight.subject import Finding, Subject, failed, passed, skipped
from kajiya.training.checkpoint import load_checkpoint, save_checkpoint
from kajiya.training.fit import Setup, train_step
from kajiya.training.state import TrainState

_PROBE_STEPS = 3
_MOST_BYTES = 2 * 2**30
"""A larger state is not written for a proof: the first checkpoint verifies its own hashes."""
_TOLERANCE = {"fp32": 2e-4, "bf16": 0.1, "bf16-mixed": 2e-4, "fp16-mixed": 2e-4, "fp8": 0.2}


def check_trainable(subject: Subject) -> Finding:
    """Over three steps each trainable tensor gets a gradient and moves, and each frozen one does not."""
    setup = subject.setup
    parameters = dict(setup.model.named_parameters())
    missing = [
        name for name, each in parameters.items() if each.requires_grad and name not in setup.optimizer.parameters
    ]
    if missing:
        return failed(
            f"{missing[0]} is to be trained, but the optimizer does not know it", "This is a fault of the optimizer."
        )
    before = {name: master.detach().clone() for name, master in setup.optimizer.masters.items()}
    frozen = {name: each._version for name, each in parameters.items() if not each.requires_grad}
    reached = probe_steps(setup)
    still = [name for name, master in setup.optimizer.masters.items() if torch.equal(master, before[name])]
    if still:
        why = "gets no gradient" if still[0] not in reached else "gets a gradient and does not move"
        return failed(
            f"{len(still)} of {len(before)} trainable tensors stay as they are, for example {still[0]}, which {why}",
            "Freeze what is not to be trained (adapter.name=freeze), or look at what cuts it off from the loss.",
        )
    moved = [name for name, version in frozen.items() if parameters[name]._version != version]
    if moved:
        return failed(f"{moved[0]} is frozen and was changed", "This is a fault of the model or of the optimizer.")
    n_trained, n_all = count_params(setup.model, trainable=True), count_params(setup.model)
    text = f"all {len(before)} trainable tensors ({format_count(n_trained)} of {format_count(n_all)} parameters) moved"
    return passed(
        text + (f", none of {len(frozen)} frozen ones" if frozen else ""), n_trainable=n_trained, n_params=n_all
    )


def probe_steps(setup: Setup, n_steps: int = _PROBE_STEPS) -> set[str]:
    """A few steps on one portion at a constant rate without decay; returns the parameters that had a gradient."""
    decays = [(group, group["weight_decay"]) for each in setup.optimizer.optimizers for group in each.param_groups]
    rate = max(setup.lr(step) for step in {1, max(1, setup.steps // 2), setup.steps})
    loader: Any = Repeated([first_batch(setup)])
    setup.model.train()
    reached: set[str] = set()
    state = TrainState()
    for group, _ in decays:
        group["weight_decay"] = 0.0
    try:
        for _ in range(n_steps):
            strategy: Any = _Watched(setup, reached)
            tried = replace(
                setup, loader=loader, accumulate=1, steps=n_steps, lr=lambda _: rate, row_growth=(), strategy=strategy
            )
            train_step(tried, state)
    finally:
        for group, decay in decays:
            group["weight_decay"] = decay
    return reached


class _Watched:
    """The setup's strategy, which notes who got a gradient before it clips."""

    def __init__(self, setup: Setup, reached: set[str]) -> None:
        self._inner = setup.strategy
        self._reached = reached

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def clip(self, optimizer: Any, max_norm: float | None) -> torch.Tensor:
        """As the inner one's."""
        for name, each in optimizer.parameters.items():
            if each.grad is not None and bool(each.grad.any()):
                self._reached.add(name)
        norm: torch.Tensor = self._inner.clip(optimizer, max_norm)
        return norm


def check_reload(subject: Subject) -> Finding:
    """After three steps, the checkpoint and what training leaves both give the same logits back."""
    setup = subject.setup
    batch = first_batch(setup)
    n_bytes = sum(each.numel() * each.element_size() for each in setup.optimizer.state_tensors().values())
    n_bytes += sum(each.numel() * each.element_size() for each in setup.model.parameters())
    if n_bytes > _MOST_BYTES:
        return skipped(f"{format_bytes(n_bytes)} would be written; the first checkpoint is checked by its hashes")
    start = {name: each.detach().clone() for name, each in setup.optimizer.state_tensors().items()}
    probe_steps(setup)
    expected = _outputs(setup.model, setup, batch)
    # What is saved at the end is the average of the weights, where one is kept.
    with setup.optimizer.averaged():
        to_save = _outputs(setup.model, setup, batch, is_rounded=False)
    with tempfile.TemporaryDirectory(prefix="kajiya-proof-") as where:
        folder = save_checkpoint(
            Path(where) / "checkpoints", TrainState(), setup.model, setup.optimizer, setup.loader.state(), "proof"
        )
        with setup.optimizer.averaged():
            subject.save(Path(where) / "model")
        setup.optimizer.reset(start)
        load_checkpoint(folder, setup.model, setup.optimizer, "proof")
        again = _outputs(setup.model, setup, batch)
        if not torch.equal(again, expected):
            worst = float((again - expected).abs().max())
            return failed(
                f"a checkpoint comes back with logits that differ by {worst:.2g}", "This is a fault of the checkpoint."
            )
        if subject.reopen is None:
            return passed(
                "a checkpoint comes back to the bit (what is saved at the end is built by the user's own module)"
            )
        saved = subject.reopen(Path(where) / "model")
    tied = _tied_words(setup.model, saved)
    if tied is not None:
        return failed(tied, "Weights that are one must be saved as one: see model.tied.")
    saved = saved.to(device=setup.strategy.device, dtype=setup.precision.weights)
    if is_fused(setup.model):
        # Weights are compared here: in bf16 the same ones give other logits by operators that round elsewhere.
        fuse_blocks(saved, setup.precision.weights, setup.strategy.device, is_autocast=False)
    found = _outputs(saved, setup, batch, is_rounded=False)
    worst = float((found - to_save).abs().max())
    # A base in few bits is opened as the weights that these stand for; LLM.int8 rounds activations besides.
    limit = _TOLERANCE[setup.precision.name]
    if subject.config.model.quantize == "int8":
        limit = max(5e-2, limit)
    if not worst <= limit:
        return failed(
            f"the saved model's logits differ by {worst:.2g} from those of the one in memory",
            "Something that is trained is not saved, or is saved under another name.",
            worst=worst,
        )
    return passed(f"a checkpoint comes back to the bit, the saved model to {worst:.1g}", worst=worst, bytes=n_bytes)


def _tied_words(model: Any, saved: Any) -> str | None:
    from transformers import PreTrainedModel

    if not (isinstance(model, PreTrainedModel) and isinstance(saved, PreTrainedModel)):
        return None
    now, then = (_is_tied(each) for each in (model, saved))
    if now == then or now is None or then is None:
        return None
    words = ("tied", "two weights")
    return f"embedding and head are {words[not now]} in memory and {words[not then]} in what was saved"


def _is_tied(model: Any) -> bool | None:
    head = model.get_output_embeddings()
    return None if head is None else bool(head.weight is model.get_input_embeddings().weight)


@torch.no_grad()
def _outputs(model: Any, setup: Setup, batch: Any, *, is_rounded: bool = True) -> torch.Tensor:
    """Logits of the batch, or the loss where the model is read in another way; without `is_rounded` in the weights' own dtype.

    An adapter may be saved as other matrices of the same product (PiSSA), which autocast would round to another.
    """
    training = model.training
    model.eval()
    placed = batch.to(setup.strategy.device)
    with setup.precision.context(setup.strategy.device) if is_rounded else nullcontext():
        if isinstance(placed, Batch) and placed.is_causal:
            result = all_logits(model, placed).float()
        else:
            result = _values(model, setup, placed)
    model.train(training)
    return result


def _values(model: Any, setup: Setup, batch: Any) -> torch.Tensor:
    if setup.measure is not None:
        terms = setup.measure(model, batch)
        batch = replace(batch, measured={name: float(value) for name, (value, _) in terms.items()})
    terms, _ = setup.loss(model, batch)
    counts = [batch.counts[count] if isinstance(count, str) else float(count) for _, count in terms.values()]
    return torch.stack([value.float() / max(1.0, n) for (value, _), n in zip(terms.values(), counts, strict=True)])
