"""Kajiya: the path of `kajiya train` from the config to the last step, without its plan, evaluations and checkpoints."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from kajiya.run.process import set_up_process
from kajiya.run.store import Store
from work_order import Record, WorkOrder, read_order
from workload import kajiya_config


class NotingLoader:
    """The real loader; every batch that it gives out is noted."""

    def __init__(self, loader: Any, record: Record) -> None:
        self._loader = loader
        self._record = record

    def next(self) -> Any:
        batch = self._loader.next()
        self._record.tokens(batch.tokens.numpy())
        return batch

    def state(self) -> dict[str, int]:
        return self._loader.state()

    def load_state(self, state: dict[str, int]) -> None:
        self._loader.load_state(state)


def train(order: WorkOrder, record: Record) -> None:
    config = kajiya_config(order)
    store = Store(Path(order.store))
    process = set_up_process(config.seed, store.root, config.train.deterministic)

    import torch
    import transformers

    import kajiya
    from kajiya.data.progress import silent
    from kajiya.flows.fitting import prepare
    from kajiya.flows.stages import Stages
    from kajiya.flows.train import prepare_data
    from kajiya.preflight.plan import with_schedule
    from kajiya.training.fit import Hook, StepReport, fit
    from kajiya.training.state import TrainState
    from kajiya.training.terms import drain_window

    data = prepare_data(config, store, Stages(silent))
    prepared = prepare(config, data, store, {})
    setup = with_schedule(prepared.setup, config, order.steps)
    setup = replace(setup, loader=NotingLoader(setup.loader, record))
    initial = float(sum(weight.detach().float().abs().sum() for weight in setup.model.parameters()))

    def log(report: StepReport) -> None:
        record.step(drain_window(report.state)["train/nll"])

    fit(setup, TrainState(), [Hook("log", 1, log)], lambda: False)
    record.answer(
        initial_weights=initial,
        versions={"kajiya": kajiya.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
        settings={
            "precision": setup.precision.name,
            "compiled": prepared.compiled,
            "device": str(setup.strategy.device),
            "threads": torch.get_num_threads(),
            "allocator": process["allocator"],
            "peak_gpu_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        },
    )


if __name__ == "__main__":
    noted = Record()
    train(read_order(), noted)
