"""Streaming perplexity beside lm-eval's Hugging Face backend: the same model, rows, windows and batch, interleaved.

python benchmarks/eval_throughput.py [--rounds 3] [--rows 48] [--vocab 32000]
python benchmarks/eval_throughput.py --memory       # peak memory of evaluating ever more documents, a process each
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any


def main() -> None:
    """Measure and print JSON: seconds of each, their ratio round by round, the largest difference of a row's nats."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=48, help="documents of the standard library")
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--evaluate", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.evaluate:
        print(_peak_of_evaluating(given.evaluate))
        return
    if given.memory:
        command = [sys.executable, __file__, "--evaluate"]
        counts = (500, 5000, 20_000)
        peaks = {n: int(subprocess.run([*command, str(n)], check=True, capture_output=True).stdout) for n in counts}
        print(json.dumps({"peak_mb_by_documents": {n: round(peak / 1e6) for n, peak in peaks.items()}}))
        return
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(_measure(Path(folder), given), indent=1))


def _measure(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    import torch
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from kajiya.evals.lm_eval_engine import make_lm

    texts = _texts(given.rows)
    tokenizer = _tokenizer(texts, given.vocab)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=given.vocab, hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=6,
        num_key_value_heads=6, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    ours = make_lm(folder, given.batch)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = HFLM(pretrained=model, tokenizer=PreTrainedTokenizerFast.from_pretrained(folder), batch_size=given.batch,
                  max_length=512)  # fmt: skip
    requests = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(texts)]
    answers = {}
    seconds: dict[str, list[float]] = {"kajiya": [], "lm-eval": []}
    cpu_seconds: dict[str, list[float]] = {"kajiya": [], "lm-eval": []}
    for round_ in range(given.rounds + 1):
        for name, lm in (("kajiya", ours), ("lm-eval", theirs)):
            began, cpu_began = time.perf_counter(), time.process_time()
            answers[name] = lm.loglikelihood_rolling(requests, disable_tqdm=True)
            if round_:  # the first warms up
                seconds[name].append(time.perf_counter() - began)
                cpu_seconds[name].append(time.process_time() - cpu_began)
    ratios, cpu_ratios = (
        [b / a for a, b in zip(spent["kajiya"], spent["lm-eval"], strict=True)] for spent in (seconds, cpu_seconds)
    )
    apart = max(abs(a - b) / abs(b) for a, b in zip(answers["kajiya"], answers["lm-eval"], strict=True))
    return {
        "documents": len(texts),
        "tokens": sum(len(ours.tok_encode(text)) for text in texts),
        "seconds": seconds,
        "ratio_by_round": ratios,
        "ratio": statistics.median(ratios),
        "cpu_seconds": cpu_seconds,
        "cpu_ratio": statistics.median(cpu_ratios),
        "largest_relative_difference": apart,
        "peak_bytes_of_the_process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _peak_of_evaluating(n_documents: int) -> int:
    """Peak memory of a process that does all of an evaluation of so many documents of 240 bytes, bytes: baselines, scores,
    intervals, rows; the model is tiny."""
    import numpy as np
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from kajiya.config.schema import EvalConfig
    from kajiya.data.documents import DocumentWriter
    from kajiya.evals.evaluate import evaluate_model, measure_baselines
    from kajiya.run.store import Artifact, Store, produce

    words = [b"def", b"return", b"self", b"None", b"value", b"name", b"import", b"yield"]

    def write_corpus(folder: Path) -> dict[str, Any]:
        random = np.random.default_rng(0)
        for split in ("train", "heldout"):
            with DocumentWriter(folder, split) as writer:
                for number in range(n_documents):
                    writer.add(f"{number}.py", b" ".join(words[i] for i in random.integers(0, 8, size=48))[:240])
                writer.finish()
        return {}

    def write_model(folder: Path) -> dict[str, Any]:
        tokenizer = _tokenizer([" ".join(word.decode() for word in words)] * 9, 300)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
        config = LlamaConfig(vocab_size=512, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                             num_attention_heads=2, max_position_embeddings=256, bos_token_id=None, eos_token_id=0)  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder)
        return {}

    def made(store: Store, name: str, make: Any) -> Artifact:
        return produce(store, name, code="benchmark", config=n_documents, parents={}, make=make)[0]

    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder))
        corpus, model = made(store, "corpus", write_corpus), made(store, "model", write_model)
        measure_baselines(("xz", "xz-primed"), corpus, store)
        evaluation, _ = evaluate_model(EvalConfig(samples=0), model, corpus, store, context_tokens=256, seed=0)
        assert evaluation.facts["n_documents"] == n_documents
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _texts(n: int) -> list[str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    return [path.read_text(encoding="utf-8")[:6000] for path in sorted(root.glob("*.py"))[:n]]


def _tokenizer(texts: list[str], vocab: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab, special_tokens=["<end>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


if __name__ == "__main__":
    sys.exit(main())
