"""What a faster training learns: held-out loss of bf16 beside fp32 after equal tokens, and of Muon beside AdamW in equal time.

Every run is Kajiya's own loop on the standard library; the three seeds change the initial weights and the order of the rows. Time
is the process's own (CPU seconds, one thread), so that other work on the machine does not lengthen a run.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

from workload import SIZES

HERE = Path(__file__).resolve().parent
CASES = {
    "AdamW, fp32": ["optim=adamw", "train.precision=fp32"],
    "AdamW, bf16": ["optim=adamw", "train.precision=bf16"],
    "Muon, fp32, in AdamW's time": ["optim=muon", "train.precision=fp32"],
}
_TIMED = "Muon, fp32, in AdamW's time"
_REFERENCE = "AdamW, fp32"


def main() -> int:
    options = parse()
    if options.case:
        print(json.dumps(train_one(options)))
        return 0
    found: dict[str, list[dict[str, float]]] = {case: [] for case in CASES}
    for seed in range(options.seeds):
        for case in CASES:
            budget = found[_REFERENCE][seed]["seconds"] if case == _TIMED else None
            found[case].append(run_one(case, seed, budget))
            print(f"seed {seed}, {case}: {words(found[case][-1])}", file=sys.stderr, flush=True)
    print(
        f"model {options.model}, {options.rows} x {options.tokens} tokens a step, {options.steps} steps, {options.seeds} seeds"
    )
    for case, runs in found.items():
        losses = [run["loss"] for run in runs]
        spread = f" ± {stdev(losses):.4f}" if len(losses) > 1 else ""
        each = " ".join(f"{loss:.4f}" for loss in losses)
        steps = mean(run["steps"] for run in runs)
        print(f"{case:<30} held-out loss {mean(losses):.4f}{spread} nats ({each}), {steps:.0f} steps")
    for case in (name for name in CASES if name != _REFERENCE):
        pairs = zip(found[case], found[_REFERENCE], strict=True)
        apart = [one["loss"] - other["loss"] for one, other in pairs]
        print(f"{case} less {_REFERENCE}, seed by seed: {' '.join(f'{x:+.4f}' for x in apart)} nats")
    return 0


def parse() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SIZES, default="S")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--heldout-rows", type=int, default=32)
    parser.add_argument("--store", help="Kajiya's store (default: $KAJIYA_STORE or ./kajiya-store)")
    parser.add_argument("--text", help="folder of .py files (default: the standard library)")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--budget-s", type=float, help=argparse.SUPPRESS)
    return parser.parse_args()


def run_one(case: str, seed: int, budget_s: float | None) -> dict[str, float]:
    """One training in a process of its own; with a budget it ends with the step that reaches it."""
    command = [sys.executable, __file__, *sys.argv[1:], "--case", case, "--seed", str(seed)]
    if budget_s is not None:
        command += ["--budget-s", str(budget_s)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def train_one(options: argparse.Namespace) -> dict[str, float]:
    """Train; returns the held-out loss (nats), steps, tokens and CPU seconds of the loop."""
    from kajiya.config.compose import compose
    from kajiya.data.progress import silent
    from kajiya.flows import fitting
    from kajiya.flows.heldout import heldout_values
    from kajiya.flows.stages import Stages
    from kajiya.flows.train import prepare_data
    from kajiya.preflight.plan import with_schedule
    from kajiya.run.process import set_up_process
    from kajiya.run.store import default_store
    from kajiya.training.fit import fit
    from kajiya.training.state import TrainState

    size = SIZES[options.model]
    overrides = [
        *CASES[options.case],
        f"seed={options.seed}",
        f"data.row_tokens={options.tokens}",
        "data.isolate=true",
        f"tokenizer.vocab_size={size.vocab_size}",
        "model.n_params=null",
        f"model.hidden_size={size.hidden_size}",
        f"model.n_layers={size.n_layers}",
        f"model.n_heads={size.n_heads}",
        f"model.n_kv_heads={size.n_kv_heads}",
        f"model.ffn_size={size.ffn_size}",
        "schedule.warmup_fraction=0.05",
        "train.minutes=null",
        f"train.steps={options.steps}",
        f"train.micro_batch={options.rows}",
        "train.compile=off",
    ]
    if options.text:
        overrides.append(f"data.source.options.root={Path(options.text).resolve()}")
    config = compose(str(HERE / "pretraining.yaml"), overrides)
    store = default_store(options.store)
    set_up_process(config.seed, store.root, threads=1)
    prepared = fitting.prepare(config, prepare_data(config, store, Stages(silent)), store, {})
    setup = with_schedule(prepared.setup, config, options.steps)
    if options.budget_s is not None:
        # The time decides when it ends; behind the last step of the others it goes on at their last rate.
        rate = setup.lr
        setup = replace(setup, steps=10 * options.steps, lr=lambda step: rate(min(step, options.steps)))
    state = TrainState()
    began = time.process_time()
    fit(setup, state, [], lambda: options.budget_s is not None and time.process_time() - began >= options.budget_s)
    seconds = time.process_time() - began
    kept = list(prepared.feeding.heldout(options.heldout_rows))
    values = heldout_values(config.train.loss.name, setup, kept)
    return {"loss": values["eval/nll"], "steps": state.step, "tokens": state.tokens, "seconds": seconds}


def words(run: dict[str, float]) -> str:
    """One run in words."""
    done = f"{run['loss']:.4f} nats after {run['steps']:.0f} steps, {run['tokens']:,.0f} tokens"
    return f"{done}, {run['seconds']:.1f} s of the processor"


if __name__ == "__main__":
    sys.exit(main())
