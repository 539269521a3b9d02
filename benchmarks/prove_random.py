"""Random valid configs, proven one by one: `kajiya prove` should raise no alarm on any of them.

What is drawn: rows and loss (a policy's and a teacher's among them) with its options, packing, architecture, size, quantization,
adapter (a part of the weights, or an adapter that is gone on with, too), optimizer, schedule, precision, portions. A config that is
refused by name is no config and another is drawn in its place. Config number n is a function of the seed and n alone, so that
`--first 10 --configs 10` goes on where `--configs 10` ended; with `--store` on the same folder, so do the rows and the bases.

One line for each config: its number, the verdict, the seconds, its settings. Every alarm is printed with what it says, refusals are
counted; the exit
code is 1 if there was one. One thread, one process; nothing is compiled, which would take minutes of each.
"""

import argparse
import json
import random
import sys
import sysconfig
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
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
    TrainConfig,
)
from kajiya.config.validate import validate
from kajiya.errors import ConfigError, KajiyaError
from kajiya.flows import planning
from kajiya.flows.plan import prove_recipe
from kajiya.flows.train import Scope, train
from kajiya.run.store import Store

STDLIB = Path(sysconfig.get_paths()["stdlib"])
_EMAIL = f"data.source.options.root={STDLIB / 'email'}"
_TEXT = (_EMAIL, "data.heldout_every=5", "data.row_tokens=64")
_PAIRS = (
    "data.source.options.packages=email json xml",
    "data.source.options.max_bytes=400",
    "data.row_tokens=384",
    "data.near_duplicate=null",
    "data.on_long=drop",
)
_DECODERS = ("llama", "llama", "qwen3", "mistral", "gpt2", "gemma3_text")


@dataclass(frozen=True)
class _Kind:
    """Rows of one kind, and what learns from them."""

    recipe: str
    settings: tuple[str, ...]
    losses: tuple[str, ...]
    architectures: tuple[str, ...] = _DECODERS


_KINDS: Mapping[str, _Kind] = {
    "text": _Kind("stdlib-pretrain", _TEXT, ("next_token",)),
    "masked": _Kind("stdlib-mlm", (_EMAIL, "data.heldout_every=5", "data.row_tokens=64"), ("masked_lm",), ("bert",)),
    "pairs": _Kind("stdlib-t5", _PAIRS, ("seq2seq",), ("t5", "t5", "bart")),
    "labelled": _Kind(
        "stdlib-classify",
        ("data.source.options.max_bytes=400", "data.row_tokens=256"),
        ("classify",),
        ("llama", "bert", "gpt2", "qwen3"),
    ),
    "values": _Kind("stdlib-classify", (), ("regress",), ("llama", "bert", "gpt2", "qwen3")),
    "feedback": _Kind("stdlib-kto", _PAIRS, ("kto",)),
    "chat": _Kind("stdlib-sft", _PAIRS, ("next_token",)),
    "instruction": _Kind("stdlib-sft", (*_PAIRS, "data.source.options.rows=instruction"), ("next_token",)),
    "preference": _Kind("stdlib-dpo", _PAIRS, ("dpo", "dpo", "orpo", "simpo")),
    "ranking": _Kind("stdlib-dpo", _PAIRS, ("reward",), ("llama", "bert", "gpt2", "qwen3")),
    "prompts": _Kind(
        "stdlib-grpo", (_EMAIL, "train.loss.options.group_size=4"), ("grpo",), ("llama", "qwen3", "mistral", "gpt2")
    ),
    "based": _Kind("stdlib-pretrain", _TEXT, ("next_token", "distill"), ("llama",)),
}
"""`values`: texts with a number each; `based`: text with a trained model to begin from or to learn from."""
_MORE = ("text", "chat", "preference", "based")
"""Kinds that are drawn twice as often."""
_FREEZES = (r"layers\.0|\bh\.0", "norm|ln_", "attn", "embed|wte")
"""Patterns of what is trained alone."""


# ---------------------------------------------------------------- rows and bases


@cache
def _of_rows(kind: str, root: Path) -> Config:
    """The recipe on few rows, its model and its tokenizer made anew."""
    rows = _KINDS[kind]
    if kind == "values":
        return replace(_of_rows("labelled", root), data=_numbered(root))
    given: tuple[str, ...] = ("model.path=null", "tokenizer.path=null", "tokenizer.vocab_size=512")
    if kind == "based":
        base = _base(root)
        given = (f"model.path={base}", f"tokenizer.path={base}", "model.init=normal")
    return compose(rows.recipe, [*rows.settings, *given, "data.max_lost_fraction=1", "name=drawn"])


def _numbered(root: Path) -> DataConfig:
    """Texts, each with the share of it that is white space."""
    path = root / "numbers.jsonl"
    texts = [path.read_text(encoding="utf-8") for path in sorted((STDLIB / "email").glob("*.py"))]
    parts = [text[at : at + 300] for text in texts for at in range(0, len(text) - 300, 900)]
    rows = ({"text": part, "label": 10 * sum(map(str.isspace, part)) / len(part)} for part in parts)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    labelled = _of_rows("labelled", root).data
    return replace(labelled, source=SourceConfig("jsonl", {"files": str(path)}), format="labelled")


@cache
def _base(root: Path, adapter: str = "none") -> str:
    """Run of a small model of the text, or of an adapter beside it; made where it is not there."""
    anew = ["model.n_params=60k", "model.init=normal", "tokenizer.vocab_size=512"]
    if adapter != "none":
        base = _base(root)
        anew = [f"model.path={base}", f"tokenizer.path={base}", f"adapter.name={adapter}", "model.init=normal"]
    settings = [
        "train.minutes=null",
        "train.steps=120",
        "train.row_growth=[]",
        "train.compile=off",
        "track.trackers=[]",
        "preflight.skip=[trainable,reload,accumulation,learning]",
        f"name=base-{adapter}",
    ]
    config = compose("stdlib-pretrain", [*_TEXT, *anew, *settings, "train.precision=fp32", "optim=adamw"])
    return train(config, Store(root), scope=Scope(is_evaluated=False, is_reported=False, threads=1)).run.id


# ---------------------------------------------------------------- drawing


def _drawn(draw: random.Random, root: Path) -> Config:
    """A config whose parts are drawn one by one. Raises `ConfigError` where they do not fit together."""
    kind = draw.choice([*_KINDS, *_MORE])
    loss = draw.choice(_KINDS[kind].losses)
    rows = _of_rows(kind, root)
    model = _drawn_model(draw, kind, loss, rows)
    adapter = _drawn_adapter(draw, root, can_go_on=kind == "based" and loss != "distill")
    if adapter.name == "load":
        # It goes on beside the weights that it was trained beside.
        model = replace(model, quantize="none")
    made = replace(
        rows,
        seed=draw.randrange(1000),
        data=_drawn_data(draw, kind, rows.data),
        model=model,
        adapter=adapter,
        optim=_drawn_optim(draw, adapter.name),
        schedule=ScheduleConfig(
            name=draw.choice(["cosine", "linear", "wsd", "constant", "inverse_sqrt"]),
            warmup_fraction=draw.choice([0.0, 0.05, 0.2]),
        ),
        train=_drawn_train(draw, kind, loss, rows, has_future=model.future_heads > 0),
    )
    validate(made)
    return made


def _drawn_data(draw: random.Random, kind: str, data: DataConfig) -> DataConfig:
    packings = ["auto", "auto", "bucketed"]
    if kind in ("text", "based"):
        packings = ["auto", "auto", "best_fit", "bucketed"]
    render = replace(
        data.render,
        train_on=draw.choice(["assistant", "last", "completion", "all"])
        if kind in ("chat", "instruction")
        else "assistant",
        prompt_style=draw.choice(["chat", "plain"]) if kind != "prompts" else data.render.prompt_style,
    )
    isolate = draw.choice([True, True, True, False]) if kind == "text" else True
    return replace(data, packing=draw.choice(packings), isolate=isolate, render=render)


def _drawn_model(draw: random.Random, kind: str, loss: str, rows: Config) -> ModelConfig:
    init = draw.choice(["normal", "normal", "normal", "bigram"]) if kind in ("text", "chat") else "normal"
    model = ModelConfig(
        name=draw.choice(_KINDS[kind].architectures),
        n_params=draw.choice(["30k", "60k"]),
        n_layers=draw.choice([None, 1, 2]),
        tied=draw.choice([True, False]) and init == "normal",
        zero_outputs=init != "normal",
        init=init,
        quantize=draw.choice(["none"] * 4 + ["nf4", "int8", "torchao-int8"]),
        future_heads=draw.choice([0, 0, 0, 2]) if kind == "text" else 0,
    )
    if kind != "based" or loss == "distill":
        return model
    return replace(rows.model, quantize=model.quantize)


def _drawn_adapter(draw: random.Random, root: Path, *, can_go_on: bool) -> AdapterConfig:
    names = ["none"] * 4 + ["freeze", "lora", "lora", "dora", "ia3", "prefix", "prompt"]
    name = draw.choice([*names, *(["load"] * 6 if can_go_on else [])])
    options: dict[str, Any] = {}
    if name == "load":
        options = {"path": _base(root, draw.choice(["lora", "ia3"]))}
    elif name == "freeze":
        options = {"train": draw.choice(_FREEZES)}
    elif name == "lora":
        inits, targets = ("default", "gaussian", "pissa", "olora"), ("all-linear", "attention", "mlp")
        options = {"init": draw.choice(inits), "targets": draw.choice(targets), "dropout": draw.choice([0.0, 0.1])}
    return AdapterConfig(name, options)


def _drawn_optim(draw: random.Random, adapter: str) -> OptimConfig:
    name = draw.choice(("adamw", "adamw", "muon", "lion", "adafactor", "sgd", "schedule_free", "adamw_8bit"))
    # Rates of plain gradient descent are of another size: small ones leave LoRA's first matrices where they are. Those of Lion,
    # whose updates are all of one length, are a few times smaller than AdamW's (arXiv:2302.06675, section 5).
    times = {"sgd": 30 if adapter in ("none", "freeze") else 300, "lion": 0.2}
    rate = 10 ** draw.uniform(-3.5, -2.5) * times.get(name, 1)
    return OptimConfig(name=name, lr=rate, weight_decay=draw.choice([0.0, 0.1]))


def _drawn_train(draw: random.Random, kind: str, loss: str, rows: Config, *, has_future: bool) -> TrainConfig:
    return replace(
        rows.train,
        loss=LossConfig(loss, _loss_options(draw, loss, rows)),
        minutes=None,
        steps=draw.choice([30, 200, 5000]),
        micro_batch=draw.choice([1, 2, 4]),
        accumulate=draw.choice([1, 3]),
        row_growth=draw.choice([(), (), (0.5,)]) if kind == "text" and not has_future else (),
        precision=draw.choice(["fp32", "fp32", "bf16-mixed", "bf16"]),
        gradient_checkpointing=draw.choice(["off", "off", "full", "selective"]),
        ema_decay=draw.choice([None, None, 0.99]),
        compile="off",
    )


def _loss_options(draw: random.Random, loss: str, rows: Config) -> dict[str, Any]:
    smoothing = {"label_smoothing": draw.choice([0.0, 0.0, 0.1])}
    chunks = {"chunk_tokens": draw.choice([7, 512])}
    choices: dict[str, dict[str, Any]] = {
        "next_token": {
            **smoothing,
            **chunks,
            "z_loss": draw.choice([0.0, 1e-4]),
            "neftune_alpha": draw.choice([None, None, 5.0]),
        },
        "masked_lm": smoothing,
        "seq2seq": smoothing,
        "classify": smoothing,
        "regress": {"huber_delta": draw.choice([None, 0.5])},
        "reward": {"centering": draw.choice([0.0, 0.01])},
        "kto": {**chunks, "desirable_weight": draw.choice([1.0, 2.0])},
        "dpo": {**chunks, "kind": draw.choice(["sigmoid", "sigmoid_norm", "robust", "hinge", "ipo"])},
        "orpo": chunks,
        "simpo": chunks,
        "distill": {
            "teacher": rows.model.path,
            "top_k": draw.choice([None, 8]),
            "divergence": draw.choice(["forward", "reverse", "jsd"]),
            "temperature": draw.choice([1.0, 2.0]),
            "teacher_weight": draw.choice([1.0, 0.5]),
        },
        "grpo": dict(rows.train.loss.options),
    }
    return choices[loss]


def _words(config: Config) -> str:
    """The drawn settings in one line."""
    train, data, model = config.train, config.data, config.model
    options = {name: value for name, value in train.loss.options.items() if name not in ("teacher", "rewards")}
    return (
        f"{train.loss.name} {options} format={data.format} rows={data.source.options.get('rows', data.source.name)} "
        f"packing={data.packing} isolate={data.isolate} train_on={data.render.train_on} style={data.render.prompt_style} "
        f"{model.name} from={'run' if model.path else model.init} n_params={model.n_params} layers={model.n_layers} "
        f"tied={model.tied} future={model.future_heads} quantize={model.quantize} adapter={config.adapter.name} "
        f"{config.adapter.options} optim={config.optim.name} lr={config.optim.lr:.2g} decay={config.optim.weight_decay} "
        f"schedule={config.schedule.name} warmup={config.schedule.warmup_fraction} precision={train.precision} "
        f"micro_batch={train.micro_batch} accumulate={train.accumulate} steps={train.steps} "
        f"checkpointing={train.gradient_checkpointing} ema={train.ema_decay} row_growth={train.row_growth} seed={config.seed}"
    )


# ---------------------------------------------------------------- proving


@dataclass(frozen=True)
class _Proven:
    """What the proof said of a config."""

    config: Config
    seconds: float
    verdict: str
    alarms: list[str]


def _proven(config: Config, store: Store) -> _Proven:
    """Raises `ConfigError` where the config's parts do not go together."""
    findings: list[dict[str, Any]] = []

    def hear(kind: str, **fields: Any) -> None:
        if kind == "proof":
            findings[:] = fields["facts"]["findings"]

    began = time.perf_counter()
    alarms: list[str] = []
    try:
        prove_recipe(config, store, hear, threads=1)
    except ConfigError:
        raise
    except KajiyaError as problem:
        alarms = [" ".join(str(problem).split())]
    except Exception:  # a valid config that breaks is an alarm, and the others are to be proven all the same
        alarms = [traceback.format_exc()]
    by_state = {
        state: [each["name"] for each in findings if each["state"] == state]
        for state in ("passed", "skipped", "failed")
    }
    verdict = f"{len(by_state['passed'])} passed"
    for state in ("skipped", "failed"):
        if by_state[state]:
            verdict += f", {state}: {' '.join(by_state[state])}"
    return _Proven(config, time.perf_counter() - began, verdict, alarms)


def _draw_and_prove(seed: int, number: int, root: Path) -> tuple[_Proven, list[str]]:
    """Config `number`, and why the draws before it were refused."""
    draw = random.Random(f"{seed}/{number}")
    refusals: list[str] = []
    while True:
        try:
            return _proven(_drawn(draw, root), Store(root)), refusals
        except ConfigError as problem:
            refusals.append(str(problem).partition("\n")[0])


def main() -> int:
    """Draw, prove, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", type=int, default=50, help="How many (50).")
    parser.add_argument("--first", type=int, default=0, help="Number of the first (0).")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--store", type=Path, help="Folder for what is made, which stays; a temporary one without it.")
    given = parser.parse_args()
    # What a step costs is nobody's concern here; it is still measured, by the fewest steps.
    planning._ENOUGH_S = dict.fromkeys(planning._ENOUGH_S, 0.0)
    n_alarms = 0
    seconds: list[float] = []
    refused: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as where:
        root = given.store or Path(where)
        root.mkdir(parents=True, exist_ok=True)
        for number in range(given.first, given.first + given.configs):
            proven, refusals = _draw_and_prove(given.seed, number, root)
            n_alarms += bool(proven.alarms)
            refused.update(refusals)
            seconds.append(proven.seconds)
            state = "ALARM" if proven.alarms else "no alarm"
            print(
                f"{number:3} {state:8} {proven.seconds:5.1f} s  {proven.verdict}  {_words(proven.config)}", flush=True
            )
            for alarm in proven.alarms:
                print(f"    {alarm}", flush=True)
    for refusal, n in refused.most_common():
        print(f"{n:3} refused: {refusal}")
    print(
        f"{len(seconds)} configs proven, {n_alarms} with an alarm; {refused.total()} draws refused by name; "
        f"{sum(seconds) / len(seconds):.1f} s a config on average, {max(seconds):.1f} s at most"
    )
    return int(n_alarms > 0)


if __name__ == "__main__":
    sys.exit(main())
