"""What tracking costs a training step: the same run with and without trackers, interleaved, one metric batch a step.

python benchmarks/tracking_cost.py [--rounds 3] [--steps 150] [--trackers mlflow,tensorboard]
"""

import argparse
import json
import statistics
import sys
import sysconfig
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

SMALL = (
    "tokenizer.vocab_size=2048", "model.n_params=1M", "data.row_tokens=128", "data.heldout_every=5", "train.minutes=null",
    "train.micro_batch=16", "train.log_every=1", "train.eval_every=10000", "train.save_every=10000", "eval.samples=0",
    "eval.baselines=[]", "preflight.skip=[learning,memory,reload,accumulation]",
)  # fmt: skip


def main() -> None:
    """Print JSON: milliseconds of a step in each round, what the emitting itself takes, and both as shares of a step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--trackers", default="mlflow,tensorboard")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(_measure(Path(folder), given), indent=1))


def _measure(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    step_ms: dict[str, list[float]] = {"none": [], "tracked": []}
    emit_ms: list[float] = []
    for round_ in range(given.rounds + 1):
        for name, trackers in (("none", ""), ("tracked", given.trackers)):
            spent, emitted = _run(folder, trackers, given.steps, seed=2 * round_ + (name == "tracked"))
            if round_:  # the first warms up
                step_ms[name].append(spent)
                emit_ms += [emitted] if name == "tracked" else []
    ratios = [b / a for a, b in zip(step_ms["none"], step_ms["tracked"], strict=True)]
    middle = statistics.median(step_ms["none"])
    return {
        "steps": given.steps,
        "trackers": given.trackers,
        "step_ms": step_ms,
        "ratio_by_round": ratios,
        "cost_of_a_step": statistics.median(ratios) - 1,
        "logging_ms_a_step": statistics.median(emit_ms),
        "logging_share_of_a_step": statistics.median(emit_ms) / middle,
    }


def _run(folder: Path, trackers: str, steps: int, seed: int) -> tuple[float, float]:
    """Median milliseconds from step to step, and the mean that the logging hook took."""
    from kajiya.config.compose import compose
    from kajiya.flows.train import train
    from kajiya.run.store import Store

    root = Path(sysconfig.get_paths()["stdlib"]) / "email"
    config = compose(
        "stdlib-pretrain",
        [
            f"data.source.options.root={root}",
            *SMALL,
            f"train.steps={steps}",
            f"track.trackers=[{trackers}]",
            f"seed={seed}",
        ],
    )
    ends: list[float] = []

    def hear(kind: str, **fields: Any) -> None:
        if kind == "progress" and fields.get("stage") == "train":
            ends.append(time.perf_counter())

    done = train(config, Store(folder), on_event=hear)
    spans = [b - a for a, b in pairwise(ends)]
    logging = done.run.manifest()["time"]["spent_s"]["logging"]
    return 1000 * statistics.median(spans), 1000 * logging / steps


if __name__ == "__main__":
    sys.exit(main())
