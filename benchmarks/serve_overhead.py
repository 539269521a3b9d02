"""What HTTP costs: one engine in process and one behind the server, in turn on the same prompts, by the clock and in CPU time.

Both are processes that live through all rounds and rest while the other works: A B C, A B C, … The prompts are token ids, so that
both read the same. The client is a process of its own; its CPU time and the server's are told apart, and in the server its event
loop's and its engine's. Where other work disturbs the clock, the loop's CPU time a token beside the engine's is the overhead.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from serving_model import SHAPE, make_model

CASES = ("in process", "HTTP, whole", "HTTP, streamed")


def prompts(n_streams: int, seed: int) -> list[list[int]]:
    """Prompts of 64 token ids, no two with a common beginning."""
    draw = random.Random(seed)
    return [[draw.randrange(1, SHAPE["vocab_size"]) for _ in range(64)] for _ in range(n_streams)]


# ---------------------------------------------------------------- the engine alone


def inside(order: dict[str, Any]) -> None:
    """Load the engine that the server has; for each seed that is read, answer its prompts and say it is done."""
    import torch

    from kajiya.serving.loading import load_engine
    from kajiya.serving.sequence import SamplingParams

    torch.set_num_threads(order["threads"])
    engine = load_engine(Path(order["folder"]), precision=order["precision"], device="cpu", max_batch=order["streams"])
    params = SamplingParams(max_tokens=order["new_tokens"], temperature=0, ignore_eos=True)
    print("ready", flush=True)
    for line in sys.stdin:
        found = engine.generate(prompts(order["streams"], int(line)), params)
        print(sum(len(each.token_ids) for each in found), flush=True)


# ---------------------------------------------------------------- the client


async def ask(port: int, model: str, ids: list[int], n_new: int, is_stream: bool) -> int:
    """One completion; how many tokens the server says it has. What comes is only put together, and looked at at its end."""
    body = {"model": model, "prompt": ids, "max_tokens": n_new, "temperature": 0, "ignore_eos": True}
    if is_stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    data = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    writer.write(f"{head}\r\nConnection: close\r\n\r\n".encode() + data)
    pieces = []
    while piece := await reader.read(1 << 16):
        pieces.append(piece)
    writer.close()
    text = b"".join(pieces)
    if b" 200 " not in text.split(b"\r\n", 1)[0]:
        raise SystemExit(f"the server answered {text[:500]!r}")
    return int(text.rpartition(b'"completion_tokens":')[2].split(b",", 1)[0])


async def ask_all(port: int, model: str, given: list[list[int]], n_new: int, is_stream: bool) -> int:
    """Requests that come at once; their tokens."""
    return sum(await asyncio.gather(*(ask(port, model, ids, n_new, is_stream) for ids in given)))


# ---------------------------------------------------------------- both


class Cpu:
    """CPU seconds of a process since the last look: all of it, and its main thread's (a server's event loop)."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self._before = self._now()

    def _now(self) -> tuple[float, float]:
        threads = self._process.threads()
        main = next(each for each in threads if each.id == self._process.pid)
        whole = self._process.cpu_times()
        return whole.user + whole.system, main.user_time + main.system_time

    def since(self) -> tuple[float, float]:
        before, self._before = self._before, self._now()
        return self._before[0] - before[0], self._before[1] - before[1]


@contextlib.contextmanager
def started(command: list[str], threads: int, **streams: Any) -> Iterator[subprocess.Popen[str]]:
    """A process, ended at the end."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, env=environment, text=True, start_new_session=True, **streams)
    try:
        yield process
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


def await_server(port: int, model: str, server: subprocess.Popen[str], log: Any) -> None:
    """Return when it answers."""
    end = time.monotonic() + 120
    while True:
        try:
            asyncio.run(ask(port, model, [1, 2, 3], 1, is_stream=False))
            return
        except (OSError, ValueError):
            if server.poll() is not None or time.monotonic() > end:
                log.seek(0)
                raise SystemExit(f"the server did not start: {log.read()[-3000:]!r}") from None
            time.sleep(0.05)


def measure(folder: Path, args: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """For each case and round: seconds, CPU seconds of the process that computes, of its main thread, and of the client."""
    order = {"folder": str(folder), "precision": args.precision, "threads": args.threads}
    order |= {"streams": args.streams, "new_tokens": args.new_tokens}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = [f"serve.port={port}", f"serve.precision={args.precision}", f"serve.max_batch={args.streams}"]
    command = [sys.executable, "-m", "kajiya", "serve", str(folder), *flags, "serve.device=cpu", *args.settings]
    alone = [sys.executable, __file__, "--inside", json.dumps(order)]
    found: dict[str, list[dict[str, float]]] = {case: [] for case in CASES}
    with (
        tempfile.TemporaryFile() as log,
        started(alone, args.threads, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as engine,
        started(command, args.threads, stdout=log, stderr=log) as server,
    ):
        assert engine.stdin is not None
        assert engine.stdout is not None
        engine.stdout.readline()
        await_server(port, folder.name, server, log)
        for turn in range(-1, args.repeats):  # the first is to warm up
            for case in CASES:
                computing, client = Cpu(engine.pid if case == "in process" else server.pid), Cpu(os.getpid())
                begun = time.perf_counter()
                if case == "in process":
                    engine.stdin.write(f"{turn}\n")
                    engine.stdin.flush()
                    n = int(engine.stdout.readline())
                else:
                    given = prompts(args.streams, turn)
                    n = asyncio.run(ask_all(port, folder.name, given, args.new_tokens, case == "HTTP, streamed"))
                seconds = time.perf_counter() - begun
                assert n == args.streams * args.new_tokens, n
                (cpu, main), (asking, _) = computing.since(), client.since()
                one = {"tokens/s": n / seconds}
                each = {"CPU": cpu, "main thread": main, "client": asking}
                one |= {name: value / n * 1e6 for name, value in each.items()}
                if turn >= 0:
                    found[case].append(one)
                    print(f"{turn + 1}/{args.repeats} {case}: {told(one)}  load {os.getloadavg()[0]:.1f}", flush=True)
    return found


def told(one: dict[str, float]) -> str:
    """Figures in a line."""
    return ", ".join(f"{name} {value:.0f}" for name, value in one.items())


def report(found: dict[str, list[dict[str, float]]]) -> None:
    """Medians; in the last three columns, what HTTP costs over the engine alone of the same round."""
    names = [*found[CASES[0]][0]]
    print("\n| median | tokens/s | CPU, µs a token | its main thread | the client | by the clock | CPU | event loop |")
    print("|---|---|---|---|---|---|---|---|")
    for case, runs in found.items():
        cells = [f"{median(run[name] for run in runs):.0f}" for name in names]
        pairs = [*zip(runs, found[CASES[0]], strict=True)]
        over = [
            median(base["tokens/s"] / run["tokens/s"] - 1 for run, base in pairs),
            median(run["CPU"] / base["CPU"] - 1 for run, base in pairs),
            0.0 if case == CASES[0] else median(run["main thread"] / base["CPU"] for run, base in pairs),
        ]
        print(f"| {case} | " + " | ".join([*cells, *(f"{each:+.1%}" for each in over)]) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--settings", nargs="*", default=[], help="of the server, for example serve.stream_interval=1")
    parser.add_argument("--scratch", type=Path, default=Path("serving-scratch"), help="where the model is kept")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        inside(json.loads(args.inside))
        return
    folder = args.scratch.resolve() / "model"
    if not (folder / "config.json").exists():
        make_model(folder)
    report(measure(folder, args))


if __name__ == "__main__":
    main()
