"""The config: one frozen dataclass a section, each field documented beneath it, no default anywhere else."""

from dataclasses import dataclass, field
from typing import Any

from kajiya.config.setting import setting


@dataclass(frozen=True)
class SourceConfig:
    """Where the rows come from."""

    name: str = "stdlib"
    """Kind of source: stdlib, text, jsonl, csv, parquet, arrow, hub, mixture, or `my_pkg.mod:fn`."""
    options: dict[str, Any] = field(default_factory=dict)
    """Settings of that source; `kajiya config schema` lists them."""


@dataclass(frozen=True)
class HeldoutSourceConfig:
    """Where the held-out rows come from, when not from the training rows' source."""

    name: str | None = None
    """Kind of source, as `data.source.name`; `None`: one in `data.heldout_every` of the training rows' source."""
    options: dict[str, Any] = field(default_factory=dict)
    """Settings of that source."""
    columns: dict[str, str] = field(default_factory=dict)
    """Our name of a column → that source's; none given: as `data.columns`."""


@dataclass(frozen=True)
class RenderConfig:
    """How a row of messages, of a prompt and its answer, or of pairs becomes token ids, and which of them are trained."""

    template: str | None = None
    """Path of a Jinja chat template; `None`: the tokenizer's own, or the packaged one where it has none."""
    train_on: str = setting("assistant", choices=("assistant", "last", "completion", "all"))
    """Messages that are trained: every answer, the last answer, all answers behind the last question, or every token.
    A message's own `weight` (a number) or `train` (true, false) goes before it."""
    prompt_style: str = setting("chat", choices=("chat", "plain"))
    """A prompt and its completion, where they are texts: turns of a conversation, or one directly behind the other."""
    append_eos: str = setting("auto", choices=("auto", "always", "never"))
    """End-of-text behind the last answer; auto: where the template closes it with no special token."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further variables of the template, for example `{enable_thinking: false}`."""


@dataclass(frozen=True)
class DataConfig:
    """Rows: where they come from, what is held out, how they are cut or packed."""

    source: SourceConfig = field(default_factory=SourceConfig)
    """Where the rows come from."""
    format: str = setting(
        "auto",
        choices=("auto", "text", "prompt", "instruction", "chat", "preference", "feedback", "labelled", "seq2seq"),
    )
    """Kind of the rows; auto: found by their columns, and said."""
    columns: dict[str, str] = field(default_factory=dict)
    """Our name of a column → the source's, for example `{prompt: question, completion: answer}`; `message.role` and its like
    name keys of each message, and a key that none of them names is left out."""
    keep: tuple[str, ...] = ()
    """Columns of the source that rewards see with each answer (`Sample.row`), beside those that make the prompt."""
    render: RenderConfig = field(default_factory=RenderConfig)
    """How rows become token ids."""
    max_tokens: int | None = setting(None, ge=8)
    """Longest sequence of a row that is no plain text, tokens; `None`: `row_tokens`."""
    on_long: str = setting("error", choices=("error", "drop", "cut"))
    """What a longer one does: stop the work, be dropped, or lose its end; counted in the ledger."""
    heldout_source: HeldoutSourceConfig = field(default_factory=HeldoutSourceConfig)
    """Where the held-out rows come from, when not from `source`."""
    heldout_every: int = setting(20, ge=2)
    """One document in this many, chosen by a hash of its name, is held out for evaluation."""
    heldout_by: str = setting("name", choices=("name", "prompt"))
    """What that hash is of: a row's name (its group's, where rows belong together), or its prompt, so that all rows of one prompt
    are on one side."""
    near_duplicate: float | None = setting(0.5, gt=0, le=1)
    """A training document that shares this fraction of its lines, or more, with a held-out one is removed; `None`: off."""
    duplicates: str = setting("exact", choices=("off", "exact", "minhash"))
    """Doubles within the training documents: kept; removed where equal; or removed where nearly equal, too, and then also
    those nearly equal to a held-out one. (A training document equal to a held-out one is always removed.)"""
    minhash_similarity: float = setting(0.8, ge=0.3, le=1)
    """Nearly equal: of the distinct word sequences of both, at least this fraction is common (Jaccard)."""
    minhash_words: int = setting(5, ge=1, le=64)
    """Words in such a sequence."""
    contamination_words: int | None = setting(None, ge=1, le=64)
    """A training document that holds sequences of this many words of a held-out one is removed (13 is usual); `None`: off."""
    contamination_share: float = setting(0.0, ge=0, lt=1)
    """It is removed when it holds more than this fraction of a held-out document's sequences; 0: when it holds any."""
    max_lost_fraction: float = setting(0.01, ge=0, le=1)
    """Largest fraction of the rows, bytes or tokens that may be lost: unreadable, too long, cut off. What is left out on
    purpose (doubles, contamination, rows not drawn, empty texts) is counted apart."""
    on_unreadable: str = setting("error", choices=("error", "drop"))
    """What an unreadable or undecodable document does: stop the work, or be dropped and counted."""
    row_tokens: int = setting(512, ge=8)
    """Tokens in a training row, T."""
    isolate: bool = True
    """Documents that share a row do not see each other."""
    packing: str = setting("auto", choices=("auto", "best_fit", "concatenate", "bucketed"))
    """How sequences share rows. best_fit: whole examples, as many as fit; concatenate: text, cut where a row is full;
    bucketed: a row each, batches of about one length. auto: concatenate for text, best_fit for all else, bucketed for a
    model that cannot keep the sequences of a row apart."""
    shard_bytes: int = setting(67_108_864, ge=1024)
    """Text behind one shard file, bytes, about: a document is never divided."""
    memory_mib: int = setting(4096, ge=128)
    """Most memory that preparing the data takes, MiB, the whole process: tokenizing goes in smaller portions, a tokenizer is
    trained on documents spread evenly; a document too large for it is an error."""


@dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer: trained on the training text, or loaded."""

    path: str | None = None
    """Folder or hub name of a tokenizer to load; `None` trains a byte-level BPE."""
    revision: str | None = None
    """Commit, tag or branch on the hub."""
    vocab_size: int = setting(8192, ge=260)
    """Vocabulary of a tokenizer that is trained, special tokens included."""
    min_frequency: int = setting(2, ge=1)
    """A pair seen less often is not merged."""
    add_tokens: tuple[str, ...] = ()
    """Strings that become tokens of their own wherever they stand; the model's embedding grows with them."""
    add_special_tokens: tuple[str, ...] = ()
    """Strings that become special tokens: only a template says them, never the text of a row or of a request."""


@dataclass(frozen=True)
class ModelConfig:
    """The model: built from a few numbers, loaded from a folder or the hub, or the user's own module."""

    name: str = "llama"
    """Architecture that Transformers knows (its `model_type`: llama, qwen3 …), or `my_pkg.mod:fn` that makes an `nn.Module`."""
    path: str | None = None
    """Weights to start from: a run, a recipe's name (its newest finished run) or an artifact of the store, a folder, or a
    hub name; `None` builds from scratch."""
    revision: str | None = None
    """Commit, tag or branch on the hub."""
    n_params: str | None = "6M"
    """The one dial: parameters, embeddings counted once (`6M`, `1.3B`); sizes that are `None` are derived from it."""
    hidden_size: int | None = setting(None, ge=8)
    """Width of the residual stream; `None`: derived."""
    n_layers: int | None = setting(None, ge=1)
    """Decoder blocks; `None`: derived."""
    n_heads: int | None = setting(None, ge=1)
    """Query heads; `None`: derived."""
    n_kv_heads: int | None = setting(None, ge=1)
    """Key and value heads; `None`: derived."""
    ffn_size: int | None = setting(None, ge=8)
    """Width inside the feed-forward block; `None`: derived."""
    max_positions: int = setting(2048, ge=8)
    """Longest sequence that the model is declared for, tokens."""
    rope_theta: float = setting(10_000.0, gt=0)
    """Base of the rotary position angles."""
    zero_outputs: bool = False
    """Matrices that write into the residual stream begin at zero, so that every block begins as the identity."""
    tied: bool = True
    """Embedding and output head share their weights."""
    init: str = setting("normal", choices=("normal", "bigram", "induction"))
    """Random weights; an embedding and a head that begin as a bigram model of the training text; or both that and two
    attention heads that begin by copying what followed a token's last occurrence."""
    init_std: float = setting(0.02, gt=0, le=1)
    """Standard deviation of the initial weights."""
    quantize: str = setting("none", choices=("none", "nf4", "int8", "torchao-int8"))
    """Frozen weights of the linear layers, under an adapter: nf4 (QLoRA: 4 bits, double quantization; of a mixture's experts too),
    int8 (LLM.int8), both of bitsandbytes, or torchao-int8 (weights alone)."""
    future_heads: int = setting(0, ge=0, le=8)
    """Heads for the tokens behind the next one, trained beside it (multi-token prediction) and left out of what is saved."""
    stand_in: bool = False
    """Take a small random model of the same architecture in the place of `model.path`, to try a recipe out without its weights."""
    attention: str = setting("sdpa", choices=("sdpa", "eager", "flex_attention", "flash_attention_2"))
    """Attention implementation of Transformers."""
    trust_remote_code: bool = False
    """Run Python code that comes with a hub model."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further fields of the architecture's Transformers config, or the arguments of the user's own function."""


@dataclass(frozen=True)
class AdapterConfig:
    """What of the model is trained: all of it, an adapter beside frozen weights, or a part."""

    name: str = "none"
    """none (every weight), lora, dora, ia3, prefix, prompt, freeze, load (go on with an adapter), or `my_pkg.mod:fn`."""
    options: dict[str, Any] = field(default_factory=dict)
    """Settings of that adapter."""


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer."""

    name: str = "adamw"
    """adafactor, adamw, adamw_8bit, lion, muon, schedule_free, sgd, or `my_pkg.mod:fn`."""
    lr: float = setting(3e-3, gt=0)
    """Peak learning rate."""
    weight_decay: float = setting(0.1, ge=0)
    """Decay of the weights, decoupled from the gradient (but in sgd)."""
    decayed: tuple[str, ...] = ("matrix",)
    """What decays: any of matrix, embedding, head, vector (norms, biases)."""
    clip_norm: float | None = setting(1.0, gt=0)
    """Largest global norm of the gradient; `None`: not clipped."""
    max_skipped: int = setting(10, ge=0)
    """Steps whose gradient is not finite are skipped and counted; past this many the run stops."""
    offload: bool = False
    """Masters and moments lie in the host's memory, and its processor updates them (GPU)."""
    options: dict[str, Any] = field(default_factory=dict)
    """Settings of that optimizer."""


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over the run; its one clock is the optimizer step."""

    name: str = "cosine"
    """constant, cosine, inverse_sqrt, linear, wsd, or `my_pkg.mod:fn`."""
    warmup_fraction: float = setting(0.02, ge=0, lt=1)
    """Share of the steps in which the rate rises linearly from zero."""
    options: dict[str, Any] = field(default_factory=dict)
    """Settings of that schedule."""


@dataclass(frozen=True)
class LossConfig:
    """What is minimized."""

    name: str = "next_token"
    """next_token, or `my_pkg.mod:fn` with the signature of the loss contract."""
    options: dict[str, Any] = field(default_factory=dict)
    """Settings of that loss."""


@dataclass(frozen=True)
class TrainConfig:
    """The loop: how long, in which portions, in which precision, what is kept."""

    loss: LossConfig = field(default_factory=LossConfig)
    """What is minimized."""
    steps: int | None = setting(None, ge=1)
    """Optimizer steps. Exactly one of `steps`, `epochs`, `minutes` is set."""
    epochs: float | None = setting(None, gt=0)
    """Passes over the training rows."""
    minutes: float | None = setting(3.0, gt=0)
    """Time for training, minutes; the number of steps is derived from the measured speed and recorded. The default gives way to
    `steps` or `epochs`."""
    micro_batch: int | str = 8
    """Rows that pass through the model at once; auto: the most that memory holds, found by measuring."""
    accumulate: int = setting(1, ge=1)
    """Micro-batches in one optimizer step, over all processes."""
    batch_rows: int | None = setting(None, ge=1)
    """Rows in one optimizer step, over all processes, in place of `accumulate`; `None`: micro_batch x accumulate."""
    row_growth: tuple[float, ...] = ()
    """Shares of the steps at which rows double: `[0.4, 0.7]` trains on quarter rows, half rows, then whole rows."""
    precision: str = setting("auto", choices=("auto", "fp32", "bf16", "bf16-mixed", "fp16-mixed", "fp8"))
    """fp32; bf16 (with fp32 masters in the optimizer); bf16-mixed (autocast); fp16-mixed (autocast, scaled loss); fp8 (bf16 with
    fp8 products, on GPUs that have them); auto picks from the hardware, on a CPU by a short measurement, and says why."""
    fp32_matmul: str = setting("auto", choices=("auto", "ieee", "tf32"))
    """How a GPU multiplies fp32: exactly (ieee), or rounded to 10 bits (tf32); auto: ieee where deterministic, else tf32."""
    strategy: str = setting("auto", choices=("auto", "single", "ddp"))
    """single: one process; ddp: torchrun's processes, each with its part of every step; auto: as it was started."""
    on_spike: str = setting("tell", choices=("tell", "skip", "rollback"))
    """What a loss that leaps does: a warning, leaving its update out, or going back to the last checkpoint's weights besides."""
    spike_sigmas: float | None = setting(8.0, gt=0)
    """Standard deviations above its running mean at which a loss has leapt; `None`: not looked for."""
    compile: str = setting("auto", choices=("auto", "on", "off"))
    """torch.compile; auto: where a compiler is found, the run is long enough to repay it, and no C++ operators take its place."""
    gradient_checkpointing: str = setting("off", choices=("off", "full", "selective", "offload"))
    """Activations made again in the backward pass: each block's (full), all but products and attention (selective), or each
    block's with what they are made from in the host's memory (offload; GPU)."""
    ema_decay: float | None = setting(None, gt=0, lt=1)
    """Decay of an exponential average of the weights, which is what is evaluated and saved; `None`: none is kept."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:0, mps."""
    deterministic: bool = False
    """Only deterministic kernels (a GPU needs it for bit-exact resume; a CPU is exact without it)."""
    profile: bool = False
    """Two steps under the profiler: a trace, a table by module and operation, in the run's folder."""
    layer_norms_every: int | None = setting(None, ge=1)
    """Steps between two lines of each tensor's gradient norm and weight norm; `None`: none."""
    histograms_every: int | None = setting(None, ge=1)
    """Steps between two histograms of each tensor's gradient and weights; `None`: none."""
    samples_every: int | None = setting(None, ge=1)
    """Steps between two looks at what the model writes: `eval.samples` held-out prompts, gone on with; `None`: none."""
    log_every: int = setting(10, ge=1)
    """Steps between two lines of metrics."""
    eval_every: int | None = setting(None, ge=1)
    """Steps between two evaluations on held-out rows; `None`: ten over the run."""
    eval_rows: int = setting(32, ge=1)
    """Held-out rows in each evaluation during training."""
    save_every: int | None = setting(None, ge=1)
    """Steps between two checkpoints; `None`: ten over the run."""
    tasks: tuple[str, ...] = ()
    """Tasks asked at every evaluation during training: packaged names, paths of YAML files, lm-eval:NAME. Their figures are
    `task/<task>/<metric>`, which `best_metric` may name."""
    task_rows: int = setting(32, ge=1)
    """Most rows of each of these tasks."""
    best_metric: str | None = None
    """Metric of an evaluation by which the best checkpoint is told, minimized; `max:` before it maximizes it; `None`: the
    held-out loss."""
    early_stop_evals: int | None = setting(None, ge=1)
    """Evaluations without a better one after which the training ends; `None`: it runs to its last step."""
    early_stop_delta: float = setting(0.0, ge=0)
    """By how much an evaluation must be better to count as better."""
    final: str = setting("last", choices=("last", "best"))
    """Whether the model is that of the last step, or of the best evaluation."""
    keep_last: int = setting(2, ge=1)
    """Most recent checkpoints that are kept, beside the best and the last of `save_every`, to which a rollback goes."""


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation of the finished model."""

    context_tokens: int | None = setting(None, ge=8)
    """Length of a window, tokens; `None`: the training row."""
    stride_fraction: float = setting(0.5, gt=0, le=1)
    """Share of a window whose tokens are scored; the rest is context already scored before."""
    batch: int = setting(16, ge=1)
    """Windows that pass through the model at once."""
    baselines: tuple[str, ...] = ("xz", "xz-primed")
    """Compressors measured on the same held-out bytes: xz, and xz-primed, which has seen the last 64 MiB of the training text."""
    samples: int = setting(4, ge=0)
    """Completions of unseen functions to sample; of held-out prompts during training (`train.samples_every`)."""
    sample_tokens: int = setting(96, ge=1)
    """Tokens in each sample."""
    temperature: float = setting(0.7, ge=0)
    """Sampling temperature of the samples; 0 is greedy."""


@dataclass(frozen=True)
class ServeConfig:
    """The OpenAI-compatible server."""

    engine: str = "torch"
    """Engine behind the API."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = setting(8000, ge=0, le=65535)
    """Port to listen on; 0 takes a free one."""
    api_key: str | None = None
    """Key that requests must carry as a bearer token; `@file`: any of those in the file, one a line; `None`: none."""
    model_name: str | None = None
    """Name of the model in the API; `None`: that of its recipe or folder."""
    max_batch: int = setting(16, ge=1)
    """Sequences that are decoded together; for `engine=vllm` see `vllm_max_batch`."""
    max_waiting: int = setting(256, ge=1)
    """Requests that may wait; past it the server answers 429."""
    default_max_tokens: int = setting(256, ge=1)
    """Tokens generated when a request does not say."""
    stream_interval: int | str = "auto"
    """Steps whose tokens a chunk of a stream holds, but for an answer's first token and its end; `auto`: one, and from 16 streams
    on as many as 50 ms hold, 8 at most (vLLM's own with `engine=vllm`)."""
    max_answer_tokens: int | None = setting(None, ge=1)
    """Longest answer that a request may ask for, tokens; past it 400. `None`: what the context leaves."""
    precision: str = setting("auto", choices=("auto", "fp32", "bf16"))
    """Precision of the weights."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:0, mps."""
    runner: str = setting("auto", choices=("auto", "native", "transformers", "plain"))
    """What computes a step: the decoder in C++, Transformers over the paged cache, or plain Transformers without a cache,
    slow but right for any model; `auto`: the first of the first two that drives the model."""
    quantize: str = setting("none", choices=("none", "int8", "int4"))
    """Weights in 8 or 4 bits, in groups of 32 (native runner)."""
    cache_precision: str = setting("auto", choices=("auto", "fp32", "bf16", "int8"))
    """Keys and values; `auto`: as the weights, bf16 where those are quantized. 8 bits take the native runner."""
    cache_tokens: int | None = setting(None, ge=32)
    """Positions in the key-value cache; `None`: the whole batch at full length, in 4 GiB at most."""
    guesses: int = setting(0, ge=0, le=16)
    """Tokens guessed from the text so far and confirmed together in one step; answers stay the same. 0: none."""
    draft: str | None = None
    """A smaller model with the same tokens that guesses in place of the text so far: a run, an artifact, a folder, a hub name."""
    adapters: dict[str, str] = field(default_factory=dict)
    """LoRA adapters of the model, name → run, artifact or folder as PEFT saves it; requests choose one as their `model`."""
    models: dict[str, str] = field(default_factory=dict)
    """Further models, name → run, artifact, folder or hub name, loaded when they are first asked for."""
    idle_unload_s: float | None = setting(None, gt=0)
    """Further models are let go after that many seconds without a request; `None`: never."""
    allow_loading: bool = False
    """Clients may load and unload models and adapters from this machine's folders."""
    max_body_bytes: int = setting(16_000_000, ge=1000)
    """Largest body of a request, bytes; past it 413."""
    request_timeout_s: float | None = setting(None, gt=0)
    """Longest time for a request, its body's coming included, seconds; `None`: no limit."""
    body_timeout_s: float | None = setting(60.0, gt=0)
    """Longest time for a request's head to come, and then for its body, seconds; past it 408. `None`: no limit."""
    drain_s: int = setting(20, ge=0)
    """Longest wait for running answers after SIGINT or SIGTERM, seconds."""
    access_log: bool = False
    """A JSON line for each request on the error output."""
    log_prompts: bool = False
    """The access log has the bodies of requests too."""
    cors_origins: tuple[str, ...] = ()
    """Web origins whose pages may call the API; none by default."""
    vllm: str = "vllm"
    """Command of vLLM, in an environment of its own, for `engine=vllm`."""
    vllm_max_batch: int = setting(256, ge=1)
    """Sequences that vLLM decodes together."""
    vllm_start_s: float = setting(600.0, gt=0)
    """Longest wait until vLLM is ready, seconds."""
    tls_certificate: str | None = None
    """PEM file with the certificate; with it the server speaks HTTPS."""
    tls_key: str | None = None
    """PEM file with the certificate's key."""


@dataclass(frozen=True)
class TrackConfig:
    """Trackers that follow the event log."""

    trackers: tuple[str, ...] = ("mlflow",)
    """Any of mlflow, tensorboard, wandb, or `my_pkg.mod:Class`."""
    options: dict[str, Any] = field(default_factory=dict)
    """Settings by tracker name, for example `{mlflow: {experiment: mine}}`."""
    timeout_s: float = setting(20.0, gt=0)
    """Longest wait for a tracker at the end of a run before it is left behind with a warning."""


@dataclass(frozen=True)
class SamplerConfig:
    """What proposes the next trial."""

    name: str = "tpe"
    """grid, random, tpe, cmaes, gp, nsga2, or `my_pkg.mod:fn` that returns an Optuna sampler."""
    options: dict[str, Any] = field(default_factory=dict)
    """Settings of that sampler."""


@dataclass(frozen=True)
class PrunerConfig:
    """What ends a trial that will not come to much; it is asked after every evaluation during training."""

    name: str = "none"
    """none, median, asha, hyperband, wilcoxon, or `my_pkg.mod:fn` that returns an Optuna pruner."""
    options: dict[str, Any] = field(default_factory=dict)
    """Settings of that pruner; its resources are counted in evaluations."""


@dataclass(frozen=True)
class LauncherConfig:
    """What runs several things at once."""

    name: str = "joblib"
    """process (plain worker processes), joblib (loky workers), ray (a cluster)."""
    options: dict[str, Any] = field(default_factory=dict)
    """Settings of that launcher."""


@dataclass(frozen=True)
class TuneConfig:
    """The search over settings (`kajiya tune`); nothing here changes a run of its own."""

    trials: int | None = setting(None, ge=1)
    """Configurations that are tried, failed and pruned ones among them; `None`: all of a grid, 20 of any other search."""
    parallel: int = setting(1, ge=1)
    """Trials at the same time; the processor's cores are shared out among them."""
    objectives: tuple[str, ...] = ("eval/nll",)
    """Metrics that a run logs (`eval/…`, `train/…`, `task/NAME/…`, `test/…`), to be minimized; `max:` before a name maximizes it.
    Names under `test/` cost an evaluation."""
    value: str = setting("last", choices=("last", "best"))
    """Which value of a metric that is logged several times counts."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """What proposes the next trial."""
    pruner: PrunerConfig = field(default_factory=PrunerConfig)
    """What ends a hopeless trial early."""
    launcher: LauncherConfig = field(default_factory=LauncherConfig)
    """What runs trials side by side, and the runs of `kajiya train -m`."""
    storage: str | None = None
    """Where the study is kept: `None` is SQLite in the store, `journal` a log file there, else a database URL."""
    space: str | None = None
    """Function `my_pkg.mod:fn(trial, values)` that returns further settings as a mapping: spaces with conditions."""
    trial_minutes: float | None = setting(None, gt=0)
    """Longest time of one trial; past it the trial has failed."""
    trial_memory_gb: float | None = setting(None, gt=0)
    """Address space of a trial's process, GiB; past it the trial is out of memory."""
    minutes: float | None = setting(None, gt=0)
    """Time after which no further trial is begun."""
    confirm_seeds: int = setting(3, ge=0)
    """Fresh seeds over which the best two, and the recipe as it was, are run again; 0: not, and 1 shows no noise."""


@dataclass(frozen=True)
class PreflightConfig:
    """Checks before the first step."""

    skip: tuple[str, ...] = ()
    """Names of checks to skip; the report says so in red."""


@dataclass(frozen=True)
class Config:
    """Everything that a run depends on."""

    name: str = "unnamed"
    """Name of the recipe, used for the run and the model."""
    seed: int = setting(0, ge=0, le=2**63 - 1)
    """Seed of every random generator."""
    data: DataConfig = field(default_factory=DataConfig)
    """Text."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """Tokenizer."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Model."""
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    """What of it is trained."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Learning-rate schedule."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Training loop."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Evaluation."""
    serve: ServeConfig = field(default_factory=ServeConfig)
    """Server."""
    track: TrackConfig = field(default_factory=TrackConfig)
    """Trackers."""
    tune: TuneConfig = field(default_factory=TuneConfig)
    """Search over settings."""
    preflight: PreflightConfig = field(default_factory=PreflightConfig)
    """Checks before the first step."""


TRAINING_SECTIONS = ("data", "tokenizer", "model", "adapter", "optim", "schedule", "train")
"""Sections that a training reads, beside its name and its seed."""
