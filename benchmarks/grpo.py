"""What `stdlib-grpo` learns by reward alone: held-out reward over several seeds, beside a control whose weights do not move.

Every run is `kajiya train stdlib-grpo` as it is packaged, proof and evaluation included, all in one new store. The control goes
through the same steps at a rate that is lost in rounding, without the proof. Time is the process's own (CPU seconds, one thread).
The exit code is 1 where the control reaches 0.3, or a seed of the whole 200 steps does not reach 0.7.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from kajiya.config.compose import compose
from kajiya.config.validate import CHECKS
from kajiya.flows.train import Scope, train
from kajiya.run.store import Store

WHOLE = 200
CONTROL_BELOW, REACHED = 0.3, 0.7


@dataclass(frozen=True)
class Outcome:
    """Reward on the held-out lines, with its 95 % interval."""

    reward: float
    low: float
    high: float
    seconds: float


def main() -> int:
    options = parse()
    # The proof would rightly stop a training in which nothing moves.
    control = ["optim.lr=1e-12", f"preflight.skip=[{','.join(CHECKS)}]"]
    cases = {f"control: optim.lr=1e-12, {options.control_steps} steps": (0, options.control_steps, control)}
    cases |= {f"seed {seed}": (seed, options.steps, []) for seed in range(options.seeds)}
    print("| Run | Held-out reward | | CPU seconds |\n|---|---|---|---|", flush=True)
    rewards = []
    with tempfile.TemporaryDirectory() as folder:
        for words, (seed, steps, settings) in cases.items():
            settings = [*settings, f"seed={seed}", f"train.steps={steps}", "track.trackers=[]"]
            found = run_one(settings, Store(Path(folder)))
            print(
                f"| {words} | {found.reward:.3f} | {found.low:.3f}–{found.high:.3f} | {found.seconds:.0f} |", flush=True
            )
            rewards.append(found.reward)
    is_learnt = options.steps < WHOLE or min(rewards[1:]) > REACHED
    return 0 if rewards[0] < CONTROL_BELOW and is_learnt else 1


def parse() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=WHOLE)
    parser.add_argument("--control-steps", type=int, default=WHOLE)
    return parser.parse_args()


def run_one(settings: list[str], store: Store) -> Outcome:
    """Train with these settings; the evaluation of all held-out lines."""
    started = time.process_time()
    trained = train(compose("stdlib-grpo", settings), store, scope=Scope(is_reported=False, threads=1))
    entry = trained.run.manifest()["artifacts"]["evaluation"]
    reward = json.loads((store.root / entry["path"] / "figures.json").read_text())["reward"]
    return Outcome(reward["value"], *reward["interval"], time.process_time() - started)


if __name__ == "__main__":
    sys.exit(main())
