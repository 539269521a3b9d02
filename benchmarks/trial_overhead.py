"""A tuning trial's fixed overhead: from the start of its process to its first step, with warm caches and a kept verdict.

python benchmarks/trial_overhead.py [--trials 4] [KEY=VALUE ...]
"""

import argparse
import json
import statistics
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

SMALL = (
    "tokenizer.vocab_size=2048", "model.n_params=1M", "data.row_tokens=128", "data.heldout_every=5", "train.minutes=null",
    "train.steps=20", "train.micro_batch=8", "train.eval_rows=8", "track.trackers=[]", "tune.confirm_seeds=0",
)  # fmt: skip


def main() -> None:
    """Run a search whose trials differ by their seed alone, and print JSON: seconds of each trial, the first one apart."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=4)
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(_measure(Path(folder), given.trials, given.overrides), indent=1))


def _measure(folder: Path, n_trials: int, overrides: list[str]) -> dict[str, Any]:
    import optuna

    from kajiya.flows.tune import tune
    from kajiya.run.store import Store

    store = Store(folder)
    root = Path(sysconfig.get_paths()["stdlib"]) / "email"
    seeds = ",".join(str(i) for i in range(n_trials + 1))
    words = [
        f"data.source.options.root={root}",
        *SMALL,
        *overrides,
        f"seed=choice({seeds})",
        f"tune.trials={n_trials + 1}",
    ]
    tuned = tune("stdlib-pretrain", [*words, "tune.sampler.name=grid"], store)
    study = optuna.load_study(study_name=tuned.run.id, storage=f"sqlite:///{tuned.run.folder / 'study.db'}")
    trials = study.get_trials(deepcopy=False)
    spans = [float(trial.user_attrs["to_first_step"]) for trial in trials]
    return {
        "first_trial_s": spans[0],
        "to_first_step_s": spans[1:],
        "median_s": statistics.median(spans[1:]),
        "trials": tuned.counts,
    }


if __name__ == "__main__":
    sys.exit(main())
