"""Servers over HTTP, one after the other on the same requests: start, tokens a second, time to first token.

Every server gets `POST /v1/completions` with the same texts of 64 tokens, greedy. Kajiya's start is measured from the command to
the first answer, and its engine in process beside its server at 32 streams.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from serving_model import SHAPE, make_model, run_peer


def kajiya(folder: Path, port: int, _: argparse.Namespace) -> list[str]:
    """Kajiya's server, weights in bf16."""
    flags = [f"serve.port={port}", "serve.precision=bf16", "serve.max_batch=32"]
    return [sys.executable, "-m", "kajiya", "serve", str(folder), *flags]


def transformers(folder: Path, port: int, args: argparse.Namespace) -> list[str]:
    """`transformers serve` with continuous batching."""
    command = [str(Path(args.transformers).parent / "transformers"), "serve", str(folder), "--port", str(port)]
    return [*command, "--continuous-batching", "--dtype", "bfloat16", "--device", "cpu"]


def llamacpp(folder: Path, port: int, args: argparse.Namespace) -> list[str]:
    """llama-cpp-python's server over a GGUF in bf16."""
    run_peer("serve_llamacpp", _order(folder, 1, args) | {"streams": [], "type": "bf16"}, args.llamacpp)
    flags = ["--port", str(port), "--n_threads", str(args.threads), "--n_threads_batch", str(args.threads)]
    model = str(folder.parent / "model-bf16.gguf")
    return [args.llamacpp, "-m", "llama_cpp.server", "--model", model, *flags, "--verbose", "False"]


SERVERS: dict[str, Callable[[Path, int, argparse.Namespace], list[str]]] = {
    "kajiya": kajiya,
    "transformers": transformers,
    "llamacpp": llamacpp,
}


def _order(folder: Path, streams: int, args: argparse.Namespace) -> dict:
    return {
        "folder": str(folder),
        "scratch": str(folder.parent),
        "vocab": SHAPE["vocab_size"],
        "streams": [streams],
        "prompt_tokens": 64,
        "new_tokens": args.new_tokens,
        "threads": args.threads,
        "clock": "wall",
    }


# ---------------------------------------------------------------- a client


async def ask(port: int, model: str, prompt: str, n_new: int, streams: bool) -> tuple[float, float, int]:
    """One completion: seconds to the first token and to the end, and the answer's tokens."""
    body = {"model": model, "prompt": prompt, "max_tokens": n_new, "temperature": 0, "stream": streams}
    data = json.dumps(body).encode()
    begun = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    writer.write(f"{head}\r\nConnection: close\r\n\r\n".encode() + data)
    await writer.drain()
    first, text = 0.0, b""
    while chunk := await reader.read(65536):
        text += chunk
        if not first and b"data:" in text:
            first = time.perf_counter() - begun
    end = time.perf_counter() - begun
    writer.close()
    if b" 200 " not in text.split(b"\r\n", 1)[0]:
        raise SystemExit(f"the server answered {text[:500]!r}")
    if streams:
        return first, end, text.count(b"data:") - 1
    answer = json.loads(text[text.index(b"{") : text.rindex(b"}") + 1])
    return end, end, answer["usage"]["completion_tokens"]


def texts(folder: Path, n: int, seed: int) -> list[str]:
    """Texts of 64 tokens, no two with a common beginning."""
    from transformers import AutoTokenizer

    tokenizer, draw, found = AutoTokenizer.from_pretrained(folder), random.Random(seed), []
    for _ in range(n):
        text = ""
        while len(tokenizer(text)["input_ids"]) < 64:
            text += draw.choice("abcdefghijklmnopqrstuvwxyz0123456789 ")
        found.append(text)
    return found


async def together(port: int, model: str, prompts: list[str], n_new: int) -> float:
    """Tokens a second of requests that come at once."""
    begun = time.perf_counter()
    done = await asyncio.gather(*(ask(port, model, prompt, n_new, streams=False) for prompt in prompts))
    return sum(n for _, _, n in done) / (time.perf_counter() - begun)


async def arriving(port: int, model: str, prompts: list[str], n_new: int, rate: float) -> list[float]:
    """Seconds to the first token of requests that come `rate` a second, as they please."""
    draw, tasks = random.Random(1), []
    for prompt in prompts:
        tasks.append(asyncio.create_task(ask(port, model, prompt, n_new, streams=True)))
        await asyncio.sleep(draw.expovariate(rate))
    return [first for first, _, _ in await asyncio.gather(*tasks)]


# ---------------------------------------------------------------- a server


def measure(name: str, folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """Start a server, ask it, and end it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = SERVERS[name](folder, port, args)
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
    begun = time.perf_counter()
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            model = {"transformers": str(folder), "llamacpp": "model"}.get(name, folder.name)
            prompts = texts(folder, 64, seed=0) if name != "kajiya" else []
            while True:
                try:
                    asyncio.run(ask(port, model, "hello", 1, streams=False))
                    break
                except (OSError, ValueError) as error:
                    if server.poll() is not None or time.perf_counter() - begun > 300:
                        log.seek(0)
                        raise SystemExit(f"{name} did not start: {error}\n{log.read()[-3000:]!r}") from error
                    time.sleep(0.02)
            found = {"start to first answer, s": time.perf_counter() - begun}
            prompts = prompts or texts(folder, 64, seed=0)
            found |= asyncio.run(_ask_all(name, port, model, prompts, args))
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            try:
                server.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)
                server.wait()
    return found


async def _ask_all(name: str, port: int, model: str, prompts: list[str], args: argparse.Namespace) -> dict[str, float]:
    await together(port, model, prompts[:2], 8)
    n_new = args.new_tokens
    rates = [await together(port, model, prompts[i * 16 : i * 16 + 16], n_new) for i in range(args.repeats)]
    found = {"16 streams, tokens/s": median(rates)}
    if name != "kajiya":
        return found
    fresh = texts(Path(args.scratch) / "model", 32 * args.repeats + 12 + args.arrivals, seed=7)
    rates = [await together(port, model, fresh[i * 32 : i * 32 + 32], n_new) for i in range(args.repeats)]
    found["32 streams, tokens/s"] = median(rates)
    fresh = fresh[32 * args.repeats :]
    firsts = [(await ask(port, model, prompt, 8, streams=True))[0] for prompt in fresh[:12]]
    found["first token, idle, ms (median)"] = median(firsts[2:]) * 1e3
    rate = 0.7 * found["16 streams, tokens/s"] / n_new
    firsts = await arriving(port, model, fresh[12:], n_new, rate)
    found["arrivals a second at 70 % load"] = rate
    found["first token at 70 % load, ms (median)"] = median(firsts) * 1e3
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--servers", nargs="+", choices=SERVERS, default=[*SERVERS])
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--arrivals", type=int, default=40)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--transformers", help="a Python that has transformers[serving]")
    parser.add_argument("--llamacpp", help="a Python that has llama-cpp-python[server] and gguf")
    parser.add_argument("--scratch", type=Path, default=Path("serving-scratch"), help="where the model is kept")
    args = parser.parse_args()
    folder = args.scratch.resolve() / "model"
    if not (folder / "config.json").exists():
        make_model(folder)
    found = {}
    for name in args.servers:
        if name != "kajiya" and getattr(args, name) is None:
            print(f"{name} is left out, for want of --{name}", flush=True)
            continue
        found[name] = measure(name, folder, args)
        print(name, {key: round(value, 2) for key, value in found[name].items()}, flush=True)
    if "kajiya" in found:
        order = _order(folder, 32, args) | {"precision": "bf16"}
        inside = median(run_peer("serve_kajiya", order, sys.executable)["32"] for _ in range(args.repeats))
        served = found["kajiya"]["32 streams, tokens/s"]
        print(f"engine in process, 32 streams: {inside:.0f} tokens/s; over HTTP {served / inside - 1:+.1%}")
        for name in found.keys() - {"kajiya"}:
            ratio = found["kajiya"]["16 streams, tokens/s"] / found[name]["16 streams, tokens/s"]
            print(f"16 streams over HTTP, kajiya / {name}: {ratio:.2f}")


if __name__ == "__main__":
    main()
