"""What opening and resuming cost with a million rows: time, and memory that does not grow with them.

Run: `python benchmarks/loader.py`. The rows are packed examples, examples in buckets of about one length, and text; the figures of
ten thousand rows stand beside.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROWS = (10_000, 1_000_000)
T = 64


def write(folder: Path, n_rows: int) -> None:
    """Shards of `n_rows` rows' worth of short documents, written as `kajiya.data.shards` does, with their packing."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(8, 2 * T - 8, size=n_rows)
    lengths[-1] += n_rows * T - lengths.sum()
    np.save(folder / "train.offsets.npy", np.concatenate([[0], np.cumsum(lengths)]))
    np.save(folder / "train.bytes.npy", lengths)
    rng.integers(0, 60_000, size=n_rows * T, dtype=np.uint16).tofile(folder / "train-000000000.bin")
    special = {"bos_id": 0, "eos_id": 1, "pad_id": 2}
    files = [{"name": "train-000000000.bin", "tokens": n_rows * T, "weights": None}]
    index = {"dtype": "<u2", "is_text": True, "segments": 1, "train": files} | special
    (folder / "shards.json").write_text(json.dumps(index))
    order = np.arange(n_rows)
    np.save(folder / "train.examples.npy", order)
    np.save(folder / "train.rows.npy", np.arange(n_rows + 1))
    np.save(folder / "train.starts.npy", (order * T)[:, None])
    np.save(folder / "train.lengths.npy", np.full((n_rows, 1), T))


MEASURE = """
import json, resource, sys, time
from pathlib import Path
from kajiya.data.loader import Feed, open_loader
folder, n, kind = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
packing = {"packed": "best_fit", "bucketed": "bucketed", "text": "concatenate"}[kind]
feed = Feed(64, packing=packing, packed=None if kind == "text" else folder)
def anon(): return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))
before = anon()
began = time.perf_counter(); loader = open_loader(folder, "train", feed, batch=8, seed=1); loader.next()
opened = time.perf_counter() - began
state = loader.state() | {"row": 123 * n // 7 // 8 * 8}
fresh = open_loader(folder, "train", feed, batch=8, seed=1)
began = time.perf_counter(); fresh.load_state(state); fresh.next(); resumed = time.perf_counter() - began
began = time.perf_counter()
for _ in range(200): fresh.next()
each = (time.perf_counter() - began) / 200
began = time.perf_counter(); fresh.state(); stated = time.perf_counter() - began

print(json.dumps({
    "open_s": opened, "resume_s": resumed, "batch_ms": 1e3 * each, "state_ms": 1e3 * stated,
    "grown_mib": (anon() - before) / 1024,
}))
"""


def main() -> None:
    """Print a line for each kind and number of rows."""
    for n_rows in ROWS:
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder), n_rows)
            for kind in ("packed", "bucketed", "text"):
                command = [sys.executable, "-c", MEASURE, folder, str(n_rows), kind]
                found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
                print(
                    f"{kind:8} {n_rows:>9,} rows: " + ", ".join(f"{name} {value:.4f}" for name, value in found.items())
                )


if __name__ == "__main__":
    main()
