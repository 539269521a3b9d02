"""Kajiya: the path of `kajiya train` from the config to the last step, without its plan, proof, evaluations and checkpoints.

Options of this peer are overrides of its config, and `without=a+b`: what to do without, for an ablation (`_TRICKS`).
"""

import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from kajiya.run.process import set_up_process
from kajiya.run.store import Store
from samples import samples_of
from work_order import Record, WorkOrder, read_order
from workload import kajiya_config


class KeepingLoader:
    """The real loader; every batch that it gives out is kept."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader
        self.given: list[Any] = []

    @property
    def waited_s(self) -> float:
        return self._loader.waited_s

    def next(self) -> Any:
        batch = self._loader.next()
        self.given.append(batch)
        return batch

    def state(self) -> dict[str, int]:
        return self._loader.state()

    def load_state(self, state: dict[str, int]) -> None:
        self._loader.load_state(state)


class TimedReference:
    """`build_reference`, timed; its result is not left for the next run to find."""

    def __init__(self, build: Callable[..., Any]) -> None:
        self._build = build
        self._folder: Path | None = None
        self.seconds = 0.0
        self.cpu_seconds = 0.0

    def __call__(self, *arguments: Any) -> Any:
        began, cpu_began = time.perf_counter(), time.process_time()
        made = self._build(*arguments)
        if made is not None:
            self.seconds = time.perf_counter() - began
            self.cpu_seconds = time.process_time() - cpu_began
            self._folder = made[0].path
        return made

    def forget(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder)


_TRICKS: dict[str, tuple[str, str, Any]] = {
    "allocator": ("kajiya.run.process", "keep_large_blocks", lambda: "left as it is"),
    "joined": ("kajiya.flows.fitting", "fuse_blocks", lambda *_, **__: "no: left out"),
    "places": ("kajiya.models.hidden", "is_fused", lambda _: False),
    "rounding": ("kajiya.training.optimizers", "rounding", lambda optimizer, _: optimizer),
    "plain": ("kajiya.models.fused_products", "is_plain_call", lambda: False),
    "softmax": ("kajiya.training.cross_entropy", "_way", lambda *_: "torch"),
}
"""What can be left out: where it stands, its name, what takes its place. glibc's settings; joined blocks; a last block that makes
the states that are read alone; AdamW in one C++ pass; C++ called past torch's dispatcher; the loss's softmax in C++."""


def train(order: WorkOrder, record: Record) -> None:
    options = dict(order.options)
    left_out = [name for name in options.pop("without", "").split("+") if name]
    for name in left_out:
        module, attribute, other = _TRICKS[name]
        __import__(module)
        setattr(sys.modules[module], attribute, other)
    order = replace(order, options=options)
    config = kajiya_config(order)
    store = Store(Path(order.store))
    process = set_up_process(config.seed, store.root, config.train.deterministic)

    import torch
    import transformers

    import kajiya
    from kajiya.data.progress import silent
    from kajiya.flows import fitting
    from kajiya.flows.stages import Stages
    from kajiya.flows.train import prepare_data
    from kajiya.preflight.plan import with_schedule
    from kajiya.training.fit import Hook, StepReport, fit
    from kajiya.training.state import TrainState
    from kajiya.training.terms import drain_window

    data = prepare_data(config, store, Stages(silent))
    reference = TimedReference(fitting.build_reference)
    fitting.build_reference = reference
    prepared = fitting.prepare(config, data, store, {})
    rows_per_epoch = prepared.feeding.loader().rows_per_epoch
    loader = KeepingLoader(prepared.setup.loader)
    setup = replace(with_schedule(prepared.setup, config, order.steps), loader=loader)
    # Of weights in 4 bits there is no sum to compare; those that stay whole are the same ones in every peer.
    weights = (
        weight for name, weight in setup.model.named_parameters() if "lora_" not in name and weight.is_floating_point()
    )
    initial = float(sum(weight.detach().float().abs().sum() for weight in weights))
    loss_name = "train/loss" if order.method == "dpo" else "train/nll"

    def log(report: StepReport) -> None:
        record.step(drain_window(report.state)[loss_name])

    fit(setup, TrainState(), [Hook("log", 1, log)], lambda: False)
    reference.forget()
    # The reference is of all examples; these steps are charged with their share of it.
    share = min(1.0, order.steps * order.rows / rows_per_epoch)
    record.answer(
        initial_weights=initial,
        step_tokens=note(order, loader.given, record),
        before_s=reference.seconds * share,
        before_cpu_s=reference.cpu_seconds * share,
        versions={"kajiya": kajiya.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
        settings={
            "precision": setup.precision.name,
            "compiled": prepared.compiled,
            "device": str(setup.strategy.device),
            "threads": torch.get_num_threads(),
            "allocator": process["allocator"],
            "without": left_out,
            "peak_gpu_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        },
    )


def note(order: WorkOrder, batches: list[Any], record: Record) -> list[int]:
    """Note the ids that went into the model; returns how many each step had, padding left out."""
    counts = []
    for batch in batches:
        is_text = order.method == "pretrain"
        parts = [batch.tokens.numpy()] if is_text else [sample.ids for sample in samples_of(batch)]
        for ids in parts:
            record.tokens(ids)
        counts.append(sum(ids.size for ids in parts))
    each = len(counts) // order.steps
    return [sum(counts[step * each : (step + 1) * each]) for step in range(order.steps)]


if __name__ == "__main__":
    noted = Record()
    train(read_order(), noted)
