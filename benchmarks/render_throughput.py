"""Conversations rendered with masks: Kajiya beside TRL's `assistant_only_loss`, on the same conversations, in the same minutes.

    python benchmarks/render_throughput.py --conversations 2000 --repeats 5

TRL prepares as its SFTTrainer does: `datasets.map` over `apply_chat_template(…, return_assistant_tokens_mask=True)` with its own
training template for Qwen2.5 (with `{% generation %}` blocks), then labels. Kajiya renders the same rows with the same template
text and tokenizer (it needs no blocks, and verifies every prefix). Ids and masks are compared.
"""

import argparse
import json
import random
import statistics
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from kajiya.config.schema import RenderConfig
from kajiya.data.examples import Example
from kajiya.data.render import Renderer
from kajiya.data.tokenizer import train_bpe

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="every figure")
    arguments = parser.parse_args()

    tokenizer, rows = _tokenizer(), conversations(arguments.conversations)
    ours, theirs = _kajiya(tokenizer, rows), _trl(tokenizer, rows)
    _compare(tokenizer, ours()[1], theirs()[1])
    seconds: dict[str, list[float]] = {"kajiya": [], "trl": []}
    cpu: dict[str, list[float]] = {"kajiya": [], "trl": []}
    for _ in range(arguments.repeats):
        for name, peer in (("kajiya", ours), ("trl", theirs)):
            before = time.process_time()
            seconds[name].append(peer()[0])
            cpu[name].append(time.process_time() - before)
    ratios, cpu_ratios = (
        [trl / mine for mine, trl in zip(each["kajiya"], each["trl"], strict=True)] for each in (seconds, cpu)
    )
    n_bytes = sum(len(message["content"].encode()) for row in rows for message in row)
    if arguments.json:
        print(
            json.dumps({"seconds": seconds, "cpu": cpu, "ratios": ratios, "bytes": n_bytes, "conversations": len(rows)})
        )
        return
    for name, each in seconds.items():
        median = statistics.median(each)
        print(f"{name:8} {len(rows) / median:8,.0f} conversations/s {n_bytes / median / 1e6:6.2f} MB/s")
    print(
        f"ratio    {statistics.median(ratios):8.2f} (from {min(ratios):.2f} to {max(ratios):.2f}, {len(ratios)} rounds)"
    )
    print(f"CPU time {statistics.median(cpu_ratios):8.2f} (from {min(cpu_ratios):.2f} to {max(cpu_ratios):.2f})")


def conversations(count: int) -> list[list[dict[str, str]]]:
    """Conversations of one to four turns, cut from the standard library's text; a function of the count alone."""
    draw = random.Random(0)
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = "".join(path.read_text(encoding="utf-8", errors="ignore") for path in files)
    rows = []
    for _ in range(count):
        messages = [{"role": "system", "content": "You write Python."}] if draw.random() < 0.5 else []
        for _ in range(draw.randint(1, 4)):
            for role, longest in (("user", 400), ("assistant", 1200)):
                start = draw.randrange(len(text) - longest)
                # A letter first: white space at the border is what the two treat differently, on purpose.
                messages.append(
                    {"role": role, "content": "x" + text[start : start + draw.randint(40, longest)].strip()}
                )
        rows.append(messages)
    return rows


def _tokenizer() -> Any:
    from transformers import PreTrainedTokenizerFast

    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-f]*.py"))
    texts = (path.read_text(encoding="utf-8", errors="ignore") for path in files)
    made = PreTrainedTokenizerFast(tokenizer_object=train_bpe(texts, 8192, 2), eos_token="<|im_end|>")
    made.add_special_tokens({"extra_special_tokens": SPECIALS})
    return made


def _kajiya(tokenizer: Any, rows: list[Any]) -> Callable[[], tuple[float, list[Any]]]:
    documents = [(str(i), json.dumps({"messages": row})) for i, row in enumerate(rows)]

    def run() -> tuple[float, list[Any]]:
        tokenizer.chat_template = _template("qwen2_5")
        started = time.perf_counter()
        found = list(Renderer(tokenizer, RenderConfig(), "chat").render_many(documents))
        seconds = time.perf_counter() - started
        assert all(isinstance(example, Example) for example in found)
        pairs = [
            (example.segments[0].ids, example.segments[0].weights > 0)
            for example in found
            if isinstance(example, Example)
        ]
        return seconds, pairs

    return run


def _trl(tokenizer: Any, rows: list[Any]) -> Callable[[], tuple[float, list[Any]]]:
    import datasets
    from trl.data_utils import _tokenize

    datasets.disable_caching()
    datasets.disable_progress_bars()

    def tokenize(example: dict[str, Any]) -> dict[str, Any]:
        template = _template("qwen2_5_training")
        processed = _tokenize(
            tokenizer, example["messages"], return_assistant_tokens_mask=True, chat_template=template, tools=None
        )
        return {key: processed[key] for key in ("input_ids", "assistant_masks")}

    def label(example: dict[str, Any]) -> dict[str, Any]:
        pairs = zip(example["input_ids"], example["assistant_masks"], strict=True)
        return {"labels": [token if mask else -100 for token, mask in pairs]}

    def run() -> tuple[float, list[Any]]:
        given = datasets.Dataset.from_dict({"messages": rows})
        started = time.perf_counter()
        made = given.map(tokenize).map(label)
        seconds = time.perf_counter() - started
        return seconds, [(np.array(row["input_ids"]), np.array(row["assistant_masks"], dtype=bool)) for row in made]

    return run


def _template(name: str) -> str:
    import trl

    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


def _compare(tokenizer: Any, ours: list[Any], theirs: list[Any]) -> None:
    """TRL's blocks hold the line end before an answer (which the prompt ends with) and the one behind its end; else the same."""
    same_ids = same_masks = 0
    for (ids, mask), (other_ids, other_mask) in zip(ours, theirs, strict=True):
        same_ids += np.array_equal(ids, other_ids)
        apart = ids[mask != other_mask] if len(ids) == len(other_ids) else [-1]
        same_masks += all(tokenizer.decode([token]).isspace() for token in apart)
    print(f"{len(ours)} conversations: ids equal in {same_ids}, masks equal but for line ends in {same_masks}")


if __name__ == "__main__":
    main()
