"""How a step's cost grows: time a token with the length of a row, attention apart; memory of the loss with the vocabulary.

Each point is a process of its own. Tokens of a step stay the same (`--tokens`), in fewer and longer rows.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
VOCABULARIES = (8192, 16384, 32768, 65536, 131072)
_HIDDEN, _LOSS_TOKENS = 256, 8192


def main() -> int:
    options = parse()
    if options.length:
        print(json.dumps(measure_length(options, options.length)))
    elif options.vocabulary:
        print(json.dumps(measure_vocabulary(options.vocabulary)))
    else:
        lengths(options)
        vocabularies()
    return 0


def parse() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2, help="blocks of the model, whose other sizes are S")
    parser.add_argument("--tokens", type=int, default=32768, help="tokens of a step")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--longest", type=int, default=32768, help="longest row")
    parser.add_argument("--store", help="Kajiya's store (default: $KAJIYA_STORE or ./kajiya-store)")
    parser.add_argument("--text", help="folder of .py files (default: the standard library)")
    parser.add_argument("--length", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--vocabulary", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def lengths(options: argparse.Namespace) -> None:
    """The table of rows."""
    print(f"{options.layers} blocks of model S, {options.tokens:,} tokens a step, {options.precision}")
    print(f"{'row':>8}{'us a token':>12}{'attention':>12}{'the rest':>12}{'peak memory':>14}")
    for length in (each for each in LENGTHS if each <= min(options.longest, options.tokens)):
        found = child("--length", length)
        rest = found["step_us"] - found["attention_us"]
        print(
            f"{length:>8,}{found['step_us']:>12.1f}{found['attention_us']:>12.1f}{rest:>12.1f}"
            f"{found['peak_bytes'] / 2**30:>10.2f} GiB",
            flush=True,
        )


def vocabularies() -> None:
    """The table of vocabularies."""
    print(f"\nthe loss alone: {_LOSS_TOKENS:,} tokens of width {_HIDDEN}, forward and backward")
    print(f"{'vocabulary':>10}{'head and its gradient':>24}{'beyond them':>14}{'all logits, fp32':>20}")
    for vocabulary in VOCABULARIES:
        found = child("--vocabulary", vocabulary)
        whole = 4 * _LOSS_TOKENS * vocabulary
        sizes = (found["head_bytes"], found["beyond_bytes"], whole)
        head, beyond, logits = (f"{n / 2**20:,.0f} MiB" for n in sizes)
        print(f"{vocabulary:>10,}{head:>24}{beyond:>14}{logits:>20}", flush=True)


def child(name: str, value: int) -> dict[str, float]:
    """One point, measured in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], name, str(value)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{name} {value} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure_length(options: argparse.Namespace, length: int) -> dict[str, float]:
    """Microseconds a token of Kajiya's step at this length of a row, and those of them in attention."""
    from kajiya.config.compose import compose
    from kajiya.data.progress import silent
    from kajiya.flows import fitting
    from kajiya.flows.stages import Stages
    from kajiya.flows.train import prepare_data
    from kajiya.run.process import set_up_process
    from kajiya.run.store import default_store
    from kajiya.run.usage import peak_memory
    from kajiya.training.fit import train_step
    from kajiya.training.state import TrainState
    from workload import SIZES

    size = SIZES["S"]
    overrides = [
        f"data.row_tokens={length}",
        f"tokenizer.vocab_size={size.vocab_size}",
        "model.n_params=null",
        f"model.hidden_size={size.hidden_size}",
        f"model.n_layers={options.layers}",
        f"model.n_heads={size.n_heads}",
        f"model.n_kv_heads={size.n_kv_heads}",
        f"model.ffn_size={size.ffn_size}",
        f"model.max_positions={length}",
        "train.minutes=null",
        "train.steps=2",
        f"train.micro_batch={options.tokens // length}",
        f"train.precision={options.precision}",
        "train.compile=off",
    ]
    if options.text:
        overrides.append(f"data.source.options.root={Path(options.text).resolve()}")
    config = compose(str(HERE / "pretraining.yaml"), overrides)
    store = default_store(options.store)
    set_up_process(config.seed, store.root)

    import torch

    setup = fitting.prepare(config, prepare_data(config, store, Stages(silent)), store, {}).setup
    state = TrainState()
    train_step(setup, state)
    with torch.profiler.profile() as profile:
        began = time.perf_counter()
        train_step(setup, state)
        seconds = time.perf_counter() - began
    attention = sum(
        # torch's own, or the operator of joined blocks.
        event.self_cpu_time_total
        for event in profile.key_averages()
        if "attention" in event.key
    )
    assert attention > 0, "the step's attention is not where the profiler looks for it"
    return {
        "step_us": 1e6 * seconds / options.tokens,
        "attention_us": attention / options.tokens,
        "peak_bytes": peak_memory(),
    }


def measure_vocabulary(vocabulary: int) -> dict[str, float]:
    """Memory of the chunked loss over this vocabulary beyond the head, its gradient and the hidden states."""
    import torch

    from kajiya.config.options import NextTokenLoss
    from kajiya.run.usage import peak_memory
    from kajiya.training.cross_entropy import chunked_cross_entropy

    torch.manual_seed(0)
    # A product first, so that what the library takes for itself is there before the measurement.
    hidden = torch.randn(_LOSS_TOKENS, _HIDDEN, requires_grad=True)
    head = torch.randn(vocabulary, _HIDDEN, requires_grad=True)
    targets = torch.randint(0, vocabulary, (_LOSS_TOKENS,))
    (hidden[:64] @ head[:64].T).sum().backward()
    before = peak_memory()
    total, _ = chunked_cross_entropy(hidden, head, targets, NextTokenLoss().chunk_tokens)
    total.backward()
    return {"head_bytes": 2 * head.numel() * 4, "beyond_bytes": peak_memory() - before}


if __name__ == "__main__":
    sys.exit(main())
