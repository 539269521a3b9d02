"""Kajiya's engine in process: tokens a second by number of streams, from one JSON order."""

import json
import sys
from pathlib import Path

import torch
from prompts import prompts, seconds

from kajiya.serving.loading import load_engine
from kajiya.serving.sequence import SamplingParams


def main() -> None:
    order = json.loads(sys.argv[1])
    torch.set_num_threads(order["threads"])
    settings = {name: order[name] for name in ("precision", "quantize", "device") if name in order}
    engine = load_engine(Path(order["folder"]), max_batch=64, **{"precision": "fp32", "device": "cpu"} | settings)
    found = {}
    params = SamplingParams(max_tokens=order["new_tokens"], temperature=0, ignore_eos=True)
    engine.generate([[1, 2, 3]], SamplingParams(max_tokens=4, temperature=0))
    for n in order["streams"]:
        if engine.runner.device.type == "cuda":
            engine.generate(prompts(order, n, 1), params)  # graphs are captured at the first steps of their shapes
        given = prompts(order, n)
        begun = seconds(order)
        engine.generate(given, params)
        found[n] = n * order["new_tokens"] / (seconds(order) - begun)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
