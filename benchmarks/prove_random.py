"""Random valid configs, proven one by one: `kajiya prove` should raise no alarm on any of them.

What is drawn: rows and loss, architecture, size, quantization, adapter, optimizer, schedule, precision, portions. A config that is
refused by name is no config and another is drawn. Every alarm is printed with the settings that raised it; the exit code is
1 if there was one. About twenty seconds a config on one core.
"""

import argparse
import random
import sys
import sysconfig
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path

from kajiya.config.compose import compose
from kajiya.config.schema import AdapterConfig, Config, LossConfig, ModelConfig, OptimConfig, ScheduleConfig
from kajiya.config.validate import validate
from kajiya.errors import ConfigError, KajiyaError
from kajiya.flows.plan import prove_recipe
from kajiya.run.store import Store

STDLIB = Path(sysconfig.get_paths()["stdlib"])

_FAMILIES: dict[str, list[str]] = {
    "stdlib-pretrain": ["next_token"],
    "stdlib-mlm": ["masked_lm"],
    "stdlib-t5": ["seq2seq"],
    "stdlib-classify": ["classify"],
    "stdlib-kto": ["kto"],
    "stdlib-sft": ["next_token"],
    "stdlib-dpo": ["dpo", "orpo", "simpo", "reward"],
}
"""Recipes whose rows are taken, and the losses that learn from them."""


@cache
def _of_rows(recipe: str) -> Config:
    """The recipe on few rows, its model and its tokenizer made anew."""
    rows = ["data.source.options.packages=email json xml", "data.source.options.max_bytes=400"]
    if recipe == "stdlib-pretrain":
        rows = [f"data.source.options.root={STDLIB / 'email'}", "data.heldout_every=5", "data.row_tokens=64"]
    elif recipe == "stdlib-mlm":
        rows = [f"data.source.options.root={STDLIB / 'email'}", "data.heldout_every=5"]
    elif recipe == "stdlib-classify":
        rows = []
    anew = ["model.path=null", "tokenizer.path=null", "tokenizer.vocab_size=512", "data.max_lost_fraction=1"]
    return compose(recipe, [*rows, *anew, "name=drawn"])


def _drawn(draw: random.Random) -> Config:
    """A config whose parts are drawn one by one. Raises `ConfigError` where they do not fit together."""
    recipe = draw.choice([*_FAMILIES, "stdlib-pretrain", "stdlib-pretrain", "stdlib-sft"])
    loss = draw.choice(_FAMILIES[recipe])
    config = _of_rows(recipe)
    is_causal = loss not in ("masked_lm", "seq2seq", "classify", "reward")
    architecture = draw.choice(["llama", "llama", "qwen3", "mistral", "gpt2", "gemma3_text"])
    model = ModelConfig(
        name=architecture if is_causal else config.model.name,
        n_params=draw.choice(["30k", "60k", "100k"]),
        n_layers=draw.choice([None, 1, 3]),
        tied=draw.choice([True, False]),
        quantize=draw.choice(["none"] * 4 + ["nf4", "int8", "torchao-int8"]),
    )
    adapter = AdapterConfig(draw.choice(["none"] * 4 + ["lora", "lora", "dora", "ia3", "prefix", "prompt"]))
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
        loss=LossConfig(loss, {"chunk_tokens": draw.choice([7, 512])} if loss in ("next_token", "dpo") else {}),
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
    given = parser.parse_args()
    draw = random.Random(given.seed)
    n_proven = n_alarms = n_refused = 0
    with tempfile.TemporaryDirectory() as where:
        while n_proven < given.configs:
            try:
                config = _drawn(draw)
                alarms = _alarms(config, Store(Path(where)))
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
