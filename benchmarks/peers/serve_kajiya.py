"""Kajiya's engine in process: tokens a second by number of streams, from one JSON order."""

import json
import sys
from pathlib import Path

import torch
from prompts import tell

from kajiya.serving.loading import load_engine
from kajiya.serving.sequence import SamplingParams


def main() -> None:
    order = json.loads(sys.argv[1])
    torch.set_num_threads(order["threads"])
    settings = {name: order[name] for name in ("precision", "quantize", "device", "runner") if name in order}
    engine = load_engine(Path(order["folder"]), max_batch=64, **{"precision": "fp32", "device": "cpu"} | settings)
    params = SamplingParams(max_tokens=order["new_tokens"], temperature=0, ignore_eos=True)
    engine.generate([[1, 2, 3]], SamplingParams(max_tokens=4, temperature=0))

    def answer(ids: list[list[int]]) -> int:
        return sum(len(one.token_ids) for one in engine.generate(ids, params))

    # Graphs are captured at the first steps of their shapes.
    tell(order, answer, is_warmed=engine.runner.device.type == "cuda")


if __name__ == "__main__":
    main()
