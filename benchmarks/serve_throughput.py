"""Generated tokens a second beside the peers: one model, the same prompts, in process, interleaved, as ratios.

Each peer is a script in `peers/`, run by a Python of its own where it needs one (`--python llamacpp=…`; requirements in
`peers/*.txt`), which prints one JSON line of tokens/s by the number of streams. Peers without a Python are left out, by name.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path
from statistics import median

from serving_model import SHAPES, make_model, run_peer

CASES = {
    "kajiya fp32": ("serve_kajiya", {"precision": "fp32"}),
    "kajiya bf16": ("serve_kajiya", {"precision": "bf16"}),
    "kajiya int8": ("serve_kajiya", {"quantize": "int8"}),
    "kajiya int4": ("serve_kajiya", {"quantize": "int4"}),
    "kajiya through Transformers bf16": ("serve_kajiya", {"precision": "bf16", "runner": "transformers"}),
    "transformers bf16": ("serve_transformers", {"precision": "bfloat16"}),
    "transformers fp32": ("serve_transformers", {"precision": "float32"}),
    "llama.cpp f32": ("serve_llamacpp", {"type": "f32"}),
    "llama.cpp bf16": ("serve_llamacpp", {"type": "bf16"}),
    "llama.cpp Q8_0": ("serve_llamacpp", {"type": "q8_0"}),
    "llama.cpp Q4_0": ("serve_llamacpp", {"type": "q4_0"}),
    "OpenVINO bf16": ("serve_openvino", {"weights": "f16", "precision": "bf16"}),
    "OpenVINO int8": ("serve_openvino", {"weights": "int8", "precision": "bf16"}),
    "ONNX Runtime int4": ("serve_onnx", {}),
}
"""Name → script and what it is told."""
GPU_CASES = {
    "kajiya bf16, GPU": ("serve_kajiya", {"precision": "bf16", "device": "cuda"}),
    "transformers bf16, GPU": ("serve_transformers", {"precision": "bfloat16", "device": "cuda"}),
    "vLLM bf16, GPU": ("serve_vllm", {"precision": "bfloat16"}),
}
"""Those of `--gpu`."""
PYTHONS = {"serve_llamacpp": "llamacpp", "serve_openvino": "openvino", "serve_onnx": "onnx", "serve_vllm": "vllm"}
"""Scripts that need a Python of their own → its name on the command line."""
PAIRS = (
    ("kajiya bf16", "kajiya through Transformers bf16"),
    ("kajiya int8", "kajiya through Transformers bf16"),
    ("kajiya bf16", "transformers bf16"),
    ("kajiya bf16", "llama.cpp bf16"),
    ("kajiya bf16", "OpenVINO bf16"),
    ("kajiya int8", "llama.cpp Q8_0"),
    ("kajiya int8", "OpenVINO int8"),
    ("kajiya int4", "llama.cpp Q4_0"),
    ("kajiya int4", "ONNX Runtime int4"),
    ("kajiya fp32", "llama.cpp f32"),
    ("kajiya fp32", "transformers fp32"),
    ("kajiya bf16, GPU", "vLLM bf16, GPU"),
    ("kajiya bf16, GPU", "transformers bf16, GPU"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 16, 32])
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: processor time, for busy machines"
    )
    parser.add_argument("--cases", nargs="+", choices=CASES | GPU_CASES)
    parser.add_argument("--gpu", action="store_true", help="the cases on a GPU in place of those on the processor")
    parser.add_argument(
        "--shape", choices=SHAPES, default="llama-52m", help="of the model; one --scratch holds one shape"
    )
    parser.add_argument(
        "--python", action="append", default=[], metavar="PEER=PYTHON", help="llamacpp, openvino, onnx, vllm"
    )
    parser.add_argument("--scratch", type=Path, help="where the model and its conversions are kept for another run")
    args = parser.parse_args()
    known = CASES | GPU_CASES
    asked = args.cases or [*(GPU_CASES if args.gpu else CASES)]
    pythons = dict(one.split("=", 1) for one in args.python)
    missing = [case for case in asked if PYTHONS.get(known[case][0], "") not in ["", *pythons]]
    cases = [case for case in asked if case not in missing]
    print(f"left out, for want of a --python: {', '.join(missing) or 'none'}", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        scratch = args.scratch or Path(temporary)
        folder = scratch / "model"
        if not (folder / "config.json").exists():
            make_model(folder, args.shape)
        order = {
            "folder": str(folder),
            "scratch": str(scratch),
            "vocab": SHAPES[args.shape][1]["vocab_size"],
            "streams": args.streams,
            "prompt_tokens": args.prompt_tokens,
            "new_tokens": args.new_tokens,
            "threads": args.threads,
            "clock": args.clock,
        }
        found: dict[str, list[dict[str, float]]] = {case: [] for case in cases}
        for repeat in range(args.repeats):
            for case in cases:
                script, settings = known[case]
                python = pythons[PYTHONS[script]] if script in PYTHONS else sys.executable
                found[case].append(run_peer(script, order | settings, python))
                rates = " ".join(f"{rate:.0f}" for rate in found[case][-1].values())
                print(f"{repeat + 1}/{args.repeats} {case}: {rates}  load {os.getloadavg()[0]:.1f}", flush=True)
    report(found, args.streams)


def report(found: dict[str, list[dict[str, float]]], streams: list[int]) -> None:
    """Print tokens a second, and the ratios of the pairs."""
    print("\n| tokens/s (median) | " + " | ".join(map(str, streams)) + " |\n|---|" + "---|" * len(streams))
    for case, runs in found.items():
        print(f"| {case} | " + " | ".join(f"{median(run[str(n)] for run in runs):.0f}" for n in streams) + " |")
    print("\n| ratio (median of pairs) | " + " | ".join(map(str, streams)) + " |\n|---|" + "---|" * len(streams))
    for ours, theirs in PAIRS:
        if ours in found and theirs in found:
            pairs = [*zip(found[ours], found[theirs], strict=True)]
            ratios = [median(a[str(n)] / b[str(n)] for a, b in pairs) for n in streams]
            print(f"| {ours} / {theirs} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")


if __name__ == "__main__":
    main()
