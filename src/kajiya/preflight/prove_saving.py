"""Checks of what is trained and what is kept: every trainable tensor moves, no frozen one does, and what is saved comes back."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from kajiya.config.quantities import format_bytes, format_count
from kajiya.config.schema import LossConfig
from kajiya.evals.scoring import evaluation_mode
from kajiya.models.adapt import has_adapter
from kajiya.models.fused import fuse_blocks, is_fused
from kajiya.models.future import without_future_heads
from kajiya.models.quantized import count_params
from kajiya.preflight.expected import loss_options
from kajiya.preflight.logits import batch_logits
from kajiya.preflight.portion import Repeated, first_batch
from kajiya.preflight.subject import Finding, Subject, failed, passed, skipped
from kajiya.training.checkpoint import load_checkpoint, save_checkpoint
from kajiya.training.fit import Setup, train_step
from kajiya.training.losses import load_loss
from kajiya.training.movement import changed, checksums
from kajiya.training.state import TrainState

_PROBE_STEPS = 3
_MORE_STEPS, _MORE_RATE = 30, 10.0
"""Steps, and their rate over the run's, where some tensor has not moved by its rounding: whether it can at all is asked."""
_MOST_BYTES = 4 * 2**30
"""More is not written for a proof (the first checkpoint verifies its own hashes), and no larger model is opened."""
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
    frozen = {name: each for name, each in parameters.items() if not each.requires_grad}
    frozen_before = checksums(frozen)
    reached = probe_steps(setup)
    still = _unmoved(setup, before)
    same = _same_in_pairs(subject, still, before) if still else set()
    still = [name for name in still if name not in same]
    if still and reached.issuperset(still):
        # Plain gradient descent moves a matrix behind one that begins at zero by less than its rounding at first.
        probe_steps(setup, _MORE_STEPS, _MORE_RATE)
        still = [name for name in _unmoved(setup, before) if name not in same]
    if still:
        why, remedy = (
            ("gets a gradient and does not move", "Raise optim.lr, or look at the optimizer.")
            if still[0] in reached
            else ("gets no gradient", "Look at what cuts it off from the loss.")
        )
        return failed(
            f"{len(still)} of {len(before)} trainable tensors stay as they are, for example {still[0]}, which {why}",
            f"{remedy} What is not to be trained is frozen by adapter.name=freeze.",
        )
    moved = changed(frozen_before, checksums(frozen))
    if moved:
        return failed(f"{moved[0]} is frozen and was changed", "This is a fault of the model or of the optimizer.")
    n_trained, n_all = count_params(setup.model, trainable=True), count_params(setup.model)
    n_moved = len(before) - len(same)
    text = f"all {n_moved} trainable tensors ({format_count(n_trained)} of {format_count(n_all)} parameters) moved"
    if same:
        text += f" ({', '.join(sorted(same))} is the same in both rewards of a pair, and goes out in their difference)"
    return passed(
        text + (f", none of {len(frozen)} frozen ones" if frozen else ""), n_trainable=n_trained, n_params=n_all
    )


def _unmoved(setup: Setup, before: Mapping[str, torch.Tensor]) -> list[str]:
    return [name for name, master in setup.optimizer.masters.items() if torch.equal(master, before[name])]


def _same_in_pairs(subject: Subject, still: list[str], before: Mapping[str, torch.Tensor]) -> set[str]:
    """Those of a reward model's tensors that are added to both rewards of a pair, and so go out in their difference.

    They are vectors (biases of the head and of the last norm) that move as soon as rewards are held near zero besides.
    """
    if subject.config.train.loss.name != "reward" or loss_options(subject).centering:
        return set()
    centred = load_loss(LossConfig("reward", {"centering": 1.0}), subject.setup.strategy.device)
    probe_steps(replace(subject.setup, loss=centred))
    moved = set(still) - set(_unmoved(subject.setup, before))
    return {name for name in moved if subject.setup.optimizer.masters[name].ndim == 1}


def probe_steps(setup: Setup, n_steps: int = _PROBE_STEPS, times: float = 1.0) -> set[str]:
    """A few steps on one portion at `times` the highest rate, without decay; returns the parameters that had a gradient."""
    decays = [(group, group["weight_decay"]) for each in setup.optimizer.optimizers for group in each.param_groups]
    rate = times * max(setup.lr(step) for step in {1, max(1, setup.steps // 2), setup.steps})
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
        self._reached |= {name for name, grad in optimizer.named_grads().items() if bool(grad.any())}
        norm: torch.Tensor = self._inner.clip(optimizer, max_norm)
        return norm


def check_reload(subject: Subject) -> Finding:
    """After three steps, the checkpoint and what training leaves both give the same logits back, and every trained tensor."""
    setup = subject.setup
    batch = first_batch(setup)
    n_bytes = _bytes_to_write(subject)
    if n_bytes > _MOST_BYTES:
        return skipped(f"{format_bytes(n_bytes)} would be written; the first checkpoint is checked by its hashes")
    start = {name: each.detach().clone() for name, each in setup.optimizer.state_tensors().items()}
    probe_steps(setup)
    expected = _outputs(subject, setup.model, batch)
    # What is saved at the end is the average of the weights, where one is kept; further heads are left out of it.
    with setup.optimizer.averaged(), without_future_heads(setup.model):
        to_save = _outputs(subject, setup.model, batch, is_rounded=False)
        trained = {name: each.detach().cpu().clone() for name, each in _trained(setup.model)}
    with tempfile.TemporaryDirectory(prefix="kajiya-proof-") as where:
        folder = save_checkpoint(
            Path(where) / "checkpoints", TrainState(), setup.model, setup.optimizer, setup.loader.state(), "proof"
        )
        model = Path(where) / "model"
        with setup.optimizer.averaged():
            subject.save(model)
        setup.optimizer.reset(start)
        load_checkpoint(folder, setup.model, setup.optimizer, "proof")
        again = _outputs(subject, setup.model, batch)
        if not torch.equal(again, expected):
            worst = float((again - expected).abs().max())
            return failed(
                f"a checkpoint comes back with logits that differ by {worst:.2g}", "This is a fault of the checkpoint."
            )
        can_open = subject.reopen is not None and _opened_bytes(setup.model) <= _MOST_BYTES
        saved = subject.reopen(model) if subject.reopen is not None and can_open else None
        lost = _lost(trained, model, saved)
    if lost is not None:
        return failed(
            f"what is saved does not hold {lost} as it was trained",
            "Something that is trained is not saved, or is saved under another name.",
        )
    said = f"a checkpoint comes back to the bit; what is saved holds each of {len(trained)} trained tensors"
    if saved is None:
        why = "the user's own module builds it" if subject.reopen is None else "it is large"
        return passed(f"{said} (it is not opened here: {why})", bytes=n_bytes)
    return _compare_opened(subject, batch, saved, to_save, said)


def _compare_opened(subject: Subject, batch: Any, saved: Any, to_save: torch.Tensor, said: str) -> Finding:
    setup = subject.setup
    tied = _tied_words(setup.model, saved)
    if tied is not None:
        return failed(tied, "Weights that are one must be saved as one: see model.tied.")
    saved = saved.to(device=setup.strategy.device, dtype=setup.precision.weights)
    if is_fused(setup.model):
        # Weights are compared here: in bf16 the same ones give other logits by operators that round elsewhere.
        fuse_blocks(saved, setup.precision.weights, setup.strategy.device, is_autocast=False)
    worst = float((_outputs(subject, saved, batch, is_rounded=False) - to_save).abs().max())
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
    return passed(f"{said}, and its logits come back to {worst:.1g}", worst=worst)


def _trained(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    return ((name, each) for name, each in model.named_parameters() if each.requires_grad)


def _bytes_to_write(subject: Subject) -> int:
    """Of a checkpoint (masters, two slots of the optimizer, buffers) and of what is saved at the end, about."""
    model = subject.setup.model
    masters = sum(4 * each.numel() for each in subject.setup.optimizer.masters.values())
    # An adapter of a base in a folder of its own is saved alone.
    is_alone = has_adapter(model) and subject.config.model.path is not None
    saved = [each for _, each in _trained(model)] if is_alone else list(model.parameters())
    kept = [*saved, *model.buffers()]
    return int(3 * masters + sum(each.numel() * each.element_size() for each in kept))


def _opened_bytes(model: nn.Module) -> int:
    """Of the model as it is opened, in float32."""
    return 4 * count_params(model)


def _lost(trained: Mapping[str, torch.Tensor], folder: Path, saved: Any) -> str | None:
    """The first trained tensor that is not in the folder as it is, by name, or by its value where files have names of their own."""
    held = {_plain(name): each for path in folder.glob("*.safetensors") for name, each in load_file(path).items()}
    if saved is not None:
        held |= {_plain(name): each.detach() for name, each in saved.named_parameters()}
    for name, tensor in trained.items():
        found = held.get(_plain(name))
        candidates = held.values() if found is None else (found,)
        if not any(_holds(each, tensor, is_exact=found is None) for each in candidates):
            return name
    return None


def _holds(found: torch.Tensor, tensor: torch.Tensor, *, is_exact: bool) -> bool:
    """Whether `found` is the tensor, or has it as its first block: PiSSA and OLoRA are saved with their beginning behind them."""
    if found.ndim != tensor.ndim or (is_exact and found.shape != tensor.shape):
        return False
    block = found[tuple(slice(n) for n in tensor.shape)]
    return block.shape == tensor.shape and torch.equal(block.cpu(), tensor.to(found.dtype))


def _plain(name: str) -> str:
    """A parameter's name without what PEFT puts into it."""
    return name.removeprefix("base_model.model.").replace(".modules_to_save", "").replace(".default", "")


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
def _outputs(subject: Subject, model: Any, batch: Any, *, is_rounded: bool = True) -> torch.Tensor:
    """What the model says of the batch; without `is_rounded` in the weights' own dtype.

    An adapter may be saved as other matrices of the same product (PiSSA), which autocast would round to another.
    """
    setup = subject.setup
    device = setup.strategy.device
    with evaluation_mode(model), setup.precision.context(device) if is_rounded else nullcontext():
        return batch_logits(model, batch.to(device), subject.config)
