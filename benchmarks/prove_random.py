"""Random valid configs, proven one by one: `kajiya prove` should raise no alarm on any of them.

What is drawn: rows and loss (a policy's and a teacher's among them), architecture, size, quantization, adapter (a part of the
weights, or an adapter that is gone on with, too), optimizer, schedule, precision, portions. A config that is refused by name is no
config and another is drawn. Every alarm is printed with the settings that raised it; the exit code is 1 if there was one. About ten
seconds a config on one core, and half a minute for the base that some of them begin with, which stays in the store.
"""

import argparse
import json
import random
import sys
import sysconfig
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from kajiya.config.compose import compose
from kajiya.config.schema import (
    AdapterConfig,
    Config,
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    ScheduleConfig,
    SourceConfig,
)
from kajiya.config.validate import validate
from kajiya.errors import ConfigError, KajiyaError
from kajiya.flows.plan import prove_recipe
from kajiya.flows.train import Scope, train
from kajiya.run.store import Store

STDLIB = Path(sysconfig.get_paths()["stdlib"])
_TEXT = (f"data.source.options.root={STDLIB / 'email'}", "data.heldout_every=5", "data.row_tokens=64")

_FAMILIES: dict[str, list[str]] = {
    "stdlib-pretrain": ["next_token"],
    "stdlib-mlm": ["masked_lm"],
    "stdlib-t5": ["seq2seq"],
    "stdlib-classify": ["classify"],
    "stdlib-kto": ["kto"],
    "stdlib-sft": ["next_token"],
    "stdlib-dpo": ["dpo", "orpo", "simpo", "reward"],
    "stdlib-grpo": ["grpo"],
    "regress": ["regress"],
    "based": ["next_token", "next_token", "distill"],
}
"""Recipes whose rows are taken, and the losses that learn from them. `regress`: texts with a number each; `based`: text of the
standard library, with a trained model to begin from or to learn from."""
_FREEZES = (r"layers\.0|\bh\.0", "norm|ln_", "attn", "embed|wte")
"""Patterns of what is trained alone."""


@cache
def _of_rows(recipe: str, root: Path) -> Config:
    """The recipe on few rows, its model and its tokenizer made anew."""
    if recipe == "regress":
        return replace(_of_rows("stdlib-classify", root), data=_numbered(root))
    if recipe == "based":
        base = _base(root)
        given = (f"model.path={base}", f"tokenizer.path={base}")
        return compose("stdlib-pretrain", [*_TEXT, *given, "model.init=normal", "name=drawn"])
    rows = ["data.source.options.packages=email json xml", "data.source.options.max_bytes=400"]
    if recipe == "stdlib-pretrain":
        rows = list(_TEXT)
    elif recipe == "stdlib-grpo":
        rows = [f"data.source.options.root={STDLIB / 'email'}", "train.loss.options.group_size=4"]
    elif recipe == "stdlib-mlm":
        rows = [f"data.source.options.root={STDLIB / 'email'}", "data.heldout_every=5"]
    elif recipe == "stdlib-classify":
        rows = []
    anew = ["model.path=null", "tokenizer.path=null", "tokenizer.vocab_size=512", "data.max_lost_fraction=1"]
    return compose(recipe, [*rows, *anew, "name=drawn"])


def _numbered(root: Path) -> DataConfig:
    """Texts, each with the share of it that is white space."""
    path = root / "numbers.jsonl"
    texts = [path.read_text(encoding="utf-8") for path in sorted((STDLIB / "email").glob("*.py"))]
    parts = [text[at : at + 300] for text in texts for at in range(0, len(text) - 300, 900)]
    rows = ({"text": part, "label": 10 * sum(map(str.isspace, part)) / len(part)} for part in parts)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    labelled = _of_rows("stdlib-classify", root).data
    return replace(labelled, source=SourceConfig("jsonl", {"files": str(path)}), format="labelled")


@cache
def _base(root: Path, adapter: str = "none") -> str:
    """Run of a small model of the text, or of an adapter beside it; made where it is not there."""
    anew = ["model.n_params=100k", "model.init=normal", "tokenizer.vocab_size=512"]
    if adapter != "none":
        base = _base(root)
        anew = [f"model.path={base}", f"tokenizer.path={base}", f"adapter.name={adapter}", "model.init=normal"]
    settings = [
        "train.minutes=null",
        "train.steps=150",
        "train.row_growth=[]",
        "track.trackers=[]",
        f"name=base-{adapter}",
    ]
    config = compose("stdlib-pretrain", [*_TEXT, *anew, *settings, "train.precision=fp32", "optim=adamw"])
    return train(config, Store(root), scope=Scope(is_evaluated=False, is_reported=False)).run.id


def _drawn(draw: random.Random, root: Path) -> Config:
    """A config whose parts are drawn one by one. Raises `ConfigError` where they do not fit together."""
    recipe = draw.choice([*_FAMILIES, "stdlib-pretrain", "stdlib-pretrain", "stdlib-sft"])
    loss = draw.choice(_FAMILIES[recipe])
    config = _of_rows(recipe, root)
    is_causal = loss not in ("masked_lm", "seq2seq", "classify", "reward", "regress")
    architecture = draw.choice(["llama", "llama", "qwen3", "mistral", "gpt2", "gemma3_text"])
    model = ModelConfig(
        name=architecture if is_causal else config.model.name,
        n_params=draw.choice(["30k", "60k", "100k"]),
        n_layers=draw.choice([None, 1, 3]),
        tied=draw.choice([True, False]),
        quantize=draw.choice(["none"] * 4 + ["nf4", "int8", "torchao-int8"]),
    )
    adapters = ["none"] * 4 + ["freeze", "lora", "lora", "dora", "ia3", "prefix", "prompt"]
    adapter = AdapterConfig(draw.choice(adapters))
    if recipe == "based":
        is_pupil = loss == "distill"
        model = replace(model, name="llama") if is_pupil else replace(config.model, quantize=model.quantize)
        adapter = AdapterConfig(draw.choice([*adapters, *(() if is_pupil else ["load"] * 6)]))
    if adapter.name == "load":
        adapter = replace(adapter, options={"path": _base(root, draw.choice(["lora", "ia3"]))})
    if adapter.name == "freeze":
        adapter = replace(adapter, options={"train": draw.choice(_FREEZES)})
    if adapter.name == "lora":
        inits, targets = ("default", "gaussian", "pissa", "olora"), ("all-linear", "attention", "mlp")
        options = {"init": draw.choice(inits), "targets": draw.choice(targets), "dropout": draw.choice([0.0, 0.1])}
        adapter = replace(adapter, options=options)
    optimizers = ("adamw", "adamw", "muon", "lion", "adafactor", "sgd", "schedule_free", "adamw_8bit")
    name = draw.choice(optimizers)
    # Rates of plain gradient descent are of another size: a small one leaves LoRA's first matrices where they are.
    rate = 10 ** draw.uniform(-3.5, -2.5) * (100 if name == "sgd" else 1)
    optim = OptimConfig(name=name, lr=rate, weight_decay=draw.choice([0.0, 0.1]))
    schedule = ScheduleConfig(
        name=draw.choice(["cosine", "linear", "wsd", "constant", "inverse_sqrt"]),
        warmup_fraction=draw.choice([0.0, 0.05, 0.2]),
    )
    train = replace(
        config.train,
        loss=LossConfig(loss, _loss_options(draw, loss, config)),
        minutes=None,
        steps=draw.choice([30, 200, 5000]),
        micro_batch=draw.choice([1, 2, 4]),
        accumulate=draw.choice([1, 3]),
        row_growth=draw.choice([(), (), (0.5,)]) if recipe == "stdlib-pretrain" else (),
        precision=draw.choice(["fp32", "fp32", "bf16-mixed", "bf16"]),
        gradient_checkpointing=draw.choice(["off", "off", "full", "selective"]),
        ema_decay=draw.choice([None, None, 0.99]),
    )
    made = replace(
        config, seed=draw.randrange(1000), model=model, adapter=adapter, optim=optim, schedule=schedule, train=train
    )
    validate(made)
    return made


def _loss_options(draw: random.Random, loss: str, config: Config) -> dict[str, Any]:
    if loss in ("next_token", "dpo"):
        return {"chunk_tokens": draw.choice([7, 512])} | (
            {"kind": draw.choice(["sigmoid", "sigmoid_norm", "robust", "hinge", "ipo"])} if loss == "dpo" else {}
        )
    if loss == "distill":
        divergence = draw.choice(["forward", "reverse", "jsd"])
        return {"teacher": config.model.path, "top_k": draw.choice([None, 8]), "divergence": divergence}
    return dict(config.train.loss.options) if loss == "grpo" else {}


def _words(config: Config) -> str:
    """The drawn settings in one line."""
    train = config.train
    return (
        f"{train.loss.name} {config.model.name} n_params={config.model.n_params} layers={config.model.n_layers} "
        f"tied={config.model.tied} quantize={config.model.quantize} adapter={config.adapter.name} {config.adapter.options} "
        f"optim={config.optim.name} lr={config.optim.lr:.2g} precision={train.precision} "
        f"micro_batch={train.micro_batch} accumulate={train.accumulate} steps={train.steps} "
        f"checkpointing={train.gradient_checkpointing} ema={train.ema_decay} row_growth={train.row_growth} seed={config.seed}"
    )


def _alarms(config: Config, store: Store) -> list[str]:
    """What the proof says against the config. Raises `ConfigError` where its parts do not go together."""
    try:
        facts = prove_recipe(config, store)
    except ConfigError:
        raise
    except KajiyaError as problem:
        return [" ".join(str(problem).split())]
    return [str(each) for each in facts["findings"] if each["state"] not in ("passed", "skipped")]


def main() -> int:
    """Draw, prove, print the alarms."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--store", type=Path, help="Folder for what is made, which stays; a temporary one without it.")
    given = parser.parse_args()
    draw = random.Random(given.seed)
    n_proven = n_alarms = n_refused = 0
    with tempfile.TemporaryDirectory() as where:
        root = given.store or Path(where)
        while n_proven < given.configs:
            try:
                config = _drawn(draw, root)
                alarms = _alarms(config, Store(root))
            except ConfigError:
                n_refused += 1
                continue
            n_proven += 1
            n_alarms += bool(alarms)
            for alarm in alarms:
                print(f"ALARM at {n_proven}: {alarm}\n  {_words(config)}", flush=True)
    print(f"{n_proven} configs proven, {n_alarms} with an alarm; {n_refused} draws refused by name")
    return int(n_alarms > 0)


if __name__ == "__main__":
    sys.exit(main())
