"""Time from the start of `kajiya train` to the end of its first step, caches warm, the verdict of its checks cached.

Each run is the command itself, in a process of its own. The first of each case fills the caches (data, compiled code, proof); the
ones after it have another seed, which makes them new runs of the same verdict.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from workload import SIZES

HERE = Path(__file__).resolve().parent
_SHOWN = ("corpus", "tokenizer", "shards", "plan", "prove")


def main() -> int:
    options = parse()
    for compiled in options.compile:
        runs = [one_run(options, compiled, seed) for seed in range(options.repeats + 1)][1:]
        first = median(run["first_step"] for run in runs)
        parts = {name: median(run.get(name, 0.0) for run in runs) for name in ("opened", *_SHOWN)}
        said = ", ".join(f"{name} {seconds:.1f}" for name, seconds in parts.items())
        print(
            f"model {options.model}, compile {compiled}: first step after {first:.1f} s (median of {len(runs)}, "
            f"{min(run['first_step'] for run in runs):.1f} to {max(run['first_step'] for run in runs):.1f}); of it {said}",
            flush=True,
        )
    return 0


def parse() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SIZES, default="S", help="size of the model (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=16, help="rows of a batch (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a row (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="steps of each run (default: %(default)s)")
    parser.add_argument("--precision", default="auto", help="as train.precision (default: %(default)s)")
    parser.add_argument("--compile", nargs="+", choices=("off", "on"), default=["off", "on"], help="cases to measure")
    parser.add_argument("--repeats", type=int, default=3, help="runs that count; one more fills the caches")
    parser.add_argument("--store", required=True, help="folder of artifacts and runs; empty: the first run fills it")
    parser.add_argument("--text", help="folder of .py files (default: the standard library)")
    return parser.parse_args()


def one_run(options: argparse.Namespace, compiled: str, seed: int) -> dict[str, float]:
    """Seconds from the start of one process: `opened` (the run's folder), the stages' own times, `first_step`."""
    size = SIZES[options.model]
    sizes = {
        "hidden_size": size.hidden_size,
        "n_layers": size.n_layers,
        "n_heads": size.n_heads,
        "n_kv_heads": size.n_kv_heads,
        "ffn_size": size.ffn_size,
        "n_params": "null",
    }
    command = [sys.executable, "-m", "kajiya", "train", str(HERE / "pretraining.yaml"), "--store", options.store]
    command += [f"name=startup-{compiled}", f"seed={seed}", f"data.row_tokens={options.tokens}"]
    command += [f"tokenizer.vocab_size={size.vocab_size}", *(f"model.{name}={value}" for name, value in sizes.items())]
    command += [f"train.micro_batch={options.rows}", f"train.steps={options.steps}", "train.minutes=null"]
    command += [f"train.precision={options.precision}", f"train.compile={compiled}"]
    if options.text:
        command.append(f"data.source.options.root={options.text}")
    began = time.time()
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"COLUMNS": "200"})
    if done.returncode != 0:
        raise SystemExit(f"kajiya train ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    logs = [path for path in Path(options.store).glob("runs/*/events.jsonl") if path.stat().st_mtime >= began]
    if len(logs) != 1:
        raise SystemExit(f"{len(logs)} runs were written under {options.store} where one was expected")
    events = [json.loads(line) for line in logs[0].read_text().splitlines()]
    times = {"opened": events[0]["t"] - began}
    for event in events:
        if event["kind"] == "stage" and event["state"] != "begun":
            times.setdefault(event["name"], event["seconds"])
        elif event["kind"] == "proof":
            times["prove"] = event["facts"]["seconds"]
        elif event["kind"] == "metrics" and event["step"] == 1 and "train/lr" in event["values"]:
            times["first_step"] = event["t"] - began
    return times


if __name__ == "__main__":
    sys.exit(main())
