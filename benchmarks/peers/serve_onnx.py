"""ONNX Runtime GenAI in process, 4 bits, all streams in one batch; its own builder converts the model first.

Prints tokens a second by number of streams, from one JSON order.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime_genai as genai
from prompts import tell


def convert(order: dict) -> Path:
    """The model in ONNX, 4 bits."""
    to = Path(order["scratch"]) / "onnx-int4"
    if not (to / "genai_config.json").exists():
        builder = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
        subprocess.run(
            [*builder, "-i", order["folder"], "-o", str(to), "-p", "int4", "-e", "cpu"], check=True, stdout=2
        )
    config = json.loads((to / "genai_config.json").read_text())
    config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = order["threads"]
    (to / "genai_config.json").write_text(json.dumps(config))
    return to


def main() -> None:
    order = json.loads(sys.argv[1])
    model = genai.Model(str(convert(order)))

    def generate(ids: list[list[int]], n_new: int) -> int:
        params = genai.GeneratorParams(model)
        length = len(ids[0]) + n_new
        # Its end-of-sequence test cannot be turned off; the shortest length is the longest one.
        params.set_search_options(batch_size=len(ids), max_length=length, min_length=length, do_sample=False)
        generator = genai.Generator(model, params)
        generator.append_tokens(np.array(ids, dtype=np.int32))
        n_steps = 0
        while not generator.is_done():
            generator.generate_next_token()
            n_steps += 1
        return n_steps * len(ids)

    generate([[1, 2, 3]], 4)
    tell(order, lambda ids: generate(ids, order["new_tokens"]))


if __name__ == "__main__":
    main()
