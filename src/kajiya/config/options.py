"""Options of every row of every table: one small dataclass for each name a config can choose."""

from dataclasses import dataclass, field
from typing import Any

from kajiya.config.setting import setting


@dataclass(frozen=True)
class NoOptions:
    """A choice without settings of its own."""


# ---------------------------------------------------------------- sources of rows (data.source)


@dataclass(frozen=True)
class StdlibSource:
    """The Python standard library of the running interpreter, one row per `.py` file."""

    root: str | None = None
    """Folder to read in its place; `None` is the interpreter's own standard library."""


@dataclass(frozen=True)
class StdlibPairsSource:
    """Pairs made of the standard library's documented functions: signature and docstring → body, code → docstring."""

    root: str | None = None
    """Folder to read in its place; `None` is the interpreter's own standard library."""
    rows: str = setting("chat", choices=("chat", "instruction", "preference", "feedback", "labelled", "seq2seq"))
    """Kind of the rows: chat or instruction; preference (the real body over one with its lines mixed) and feedback (either,
    judged); labelled (which package a function is from); seq2seq (code to the first line of its docstring)."""
    packages: str | None = None
    """Only these top-level packages, separated by spaces; `None`: all."""
    max_bytes: int = setting(1200, ge=64)
    """Longest pair that is made, prompt and answer together, bytes."""


@dataclass(frozen=True)
class StdlibBracketsSource:
    """Lines of the standard library's code up to the brackets that end them → these brackets."""

    root: str | None = None
    """Folder to read in its place; `None` is the interpreter's own standard library."""
    max_chars: int = setting(40, ge=8)
    """Longest line that is taken, characters, without its indentation."""


@dataclass(frozen=True)
class TextSource:
    """Plain text files, one row per file, or per part of a file."""

    files: str = setting("")
    """Glob of the files, relative to the working directory, for example `corpus/**/*.txt`."""
    encoding: str = "utf-8"
    """Text encoding of the files."""
    split_on: str | None = None
    """What stands between the documents of a file: blank_line (lines with nothing but white space), or the string itself, for
    example `<|endoftext|>`, which is of no document; `None`: each file is one document."""
    max_row_bytes: int = setting(67_108_864, ge=1024)
    """With `split_on`: longest document that is read, bytes; a longer one is refused."""


@dataclass(frozen=True)
class TableSource:
    """Rows of csv, parquet or arrow files."""

    files: str = setting("")
    """Glob of the files, relative to the working directory."""


@dataclass(frozen=True)
class LinesSource:
    """Rows of files with a JSON object in each line."""

    files: str = setting("")
    """Glob of the files, relative to the working directory."""
    max_row_bytes: int = setting(67_108_864, ge=1024)
    """Longest line that is read, bytes; a longer one is refused."""


@dataclass(frozen=True)
class HubSource:
    """A data set of the Hugging Face hub, a folder of data files, or one saved by `datasets.save_to_disk`."""

    path: str = setting("")
    """Hub name, or a local folder."""
    subset: str | None = None
    """Configuration of the data set, where it has several."""
    split: str = "train"
    """Split to read."""
    revision: str | None = None
    """Commit, tag or branch on the hub; resolved to a commit and recorded."""
    streaming: bool = False
    """Read rows over the network as they are needed, without a local copy."""


@dataclass(frozen=True)
class MixtureSource:
    """Rows of several sources, drawn by weight without repeating any."""

    parts: list[Any] = field(default_factory=list)
    """Each `{source: {name, options}, columns, format, weight, max_rows, label}`; without weights every row is taken."""
    seed: int = setting(0, ge=0)
    """Seed of the draw."""


@dataclass(frozen=True)
class MixturePart:
    """One part of a mixture."""

    source: dict[str, Any] = field(default_factory=dict)
    """Name and options of its source, as `data.source`."""
    label: str | None = None
    """Name of the part, before the names of its rows; `None`: its number and its source's name."""
    format: str = "auto"
    """Kind of its rows, as `data.format`."""
    columns: dict[str, Any] = field(default_factory=dict)
    """Names of its columns, as `data.columns`."""
    weight: float | None = setting(None, gt=0)
    """Share of the drawn rows, relative to the other parts'; all parts have one, or none has."""
    max_rows: int | None = setting(None, ge=1)
    """At most this many rows of the part; `None`: all."""


# ---------------------------------------------------------------- losses (train.loss)


@dataclass(frozen=True)
class NextTokenLoss:
    """Cross-entropy of the next token."""

    z_loss: float = setting(0.0, ge=0)
    """Weight of the squared log-partition term (PaLM, arXiv:2204.02311, section 5)."""
    label_smoothing: float = setting(0.0, ge=0, lt=1)
    """Share of each target that is spread over the whole vocabulary."""
    future_weight: float = setting(0.3, gt=0)
    """Weight of the tokens behind the next one, all of `model.future_heads` together."""
    neftune_alpha: float | None = setting(None, gt=0)
    """Noise on the embeddings while training (NEFTune, arXiv:2310.05914; 5 is usual); `None`: none."""
    chunk_tokens: int = setting(2048, ge=1)
    """Tokens whose logits are held at once."""


@dataclass(frozen=True)
class MaskedLoss:
    """Cross-entropy of masked tokens, read from both sides."""

    label_smoothing: float = setting(0.0, ge=0, lt=1)
    """Share of each target that is spread over the whole vocabulary."""


@dataclass(frozen=True)
class Seq2SeqLoss:
    """Cross-entropy of an encoder–decoder's target."""

    label_smoothing: float = setting(0.0, ge=0, lt=1)
    """Share of each target that is spread over the whole vocabulary."""


@dataclass(frozen=True)
class DPOLoss:
    """Direct preference optimization."""

    kind: str = setting("sigmoid", choices=("sigmoid", "sigmoid_norm", "robust", "hinge", "ipo"))
    """sigmoid (DPO), sigmoid_norm (its length-normalised form), robust (flipped labels), hinge (SLiC), ipo."""
    beta: float = setting(0.1, gt=0)
    """How strongly the model is held to the reference; for ipo, tau."""
    label_smoothing: float = setting(0.0, ge=0, lt=0.5)
    """Share of the pairs that may be labelled the wrong way round (sigmoid, sigmoid_norm, robust)."""
    chunk_tokens: int = setting(2048, ge=1)
    """Tokens whose logits are held at once."""


@dataclass(frozen=True)
class ORPOLoss:
    """Odds-ratio preference optimization, without a reference."""

    beta: float = setting(0.1, gt=0)
    """Weight of the odds ratio beside the chosen answer's own loss (lambda in the paper)."""
    chunk_tokens: int = setting(2048, ge=1)
    """Tokens whose logits are held at once."""


@dataclass(frozen=True)
class SimPOLoss:
    """Simple preference optimization, without a reference."""

    beta: float = setting(2.0, gt=0)
    """Scale of the log-probability per token."""
    gamma: float = setting(1.0, ge=0)
    """Margin that the chosen answer is to have."""
    chunk_tokens: int = setting(2048, ge=1)
    """Tokens whose logits are held at once."""


@dataclass(frozen=True)
class KTOLoss:
    """Kahneman–Tversky optimization: answers that were called good or bad."""

    beta: float = setting(0.1, gt=0)
    """How strongly the model is held to the reference."""
    desirable_weight: float = setting(1.0, gt=0)
    """Weight of a good answer."""
    undesirable_weight: float = setting(1.0, gt=0)
    """Weight of a bad answer."""
    chunk_tokens: int = setting(2048, ge=1)
    """Tokens whose logits are held at once."""


@dataclass(frozen=True)
class RewardLoss:
    """Bradley–Terry reward model."""

    centering: float = setting(0.0, ge=0)
    """Weight of the squared sum of a pair's rewards, which keeps them around zero."""


@dataclass(frozen=True)
class ClassifyLoss:
    """Cross-entropy of the class of a text."""

    label_smoothing: float = setting(0.0, ge=0, lt=1)
    """Share of each label that is spread over all classes."""


@dataclass(frozen=True)
class RegressLoss:
    """Squared error of a number that belongs to a text."""

    huber_delta: float | None = setting(None, gt=0)
    """Error past which the loss grows only linearly; `None`: never."""


@dataclass(frozen=True)
class DistillLoss:
    """Next token, learnt from a teacher's distribution."""

    teacher: str = setting("")
    """Run, recipe, artifact, folder or hub name of the teacher, which reads the same tokens."""
    teacher_revision: str | None = None
    """Commit, tag or branch of the teacher on the hub."""
    teacher_dtype: str = setting("fp32", choices=("fp32", "bf16", "fp16"))
    """Of the teacher's weights in memory, and of its computing where the run's precision does not say another."""
    top_k: int | None = setting(None, ge=1)
    """Most probable tokens of the teacher that are kept for each place of the text, computed once before training; all others
    count as one. `None`: the teacher runs beside the student, and gives all."""
    divergence: str = setting("forward", choices=("forward", "reverse", "jsd"))
    """KL from the teacher (forward), KL to the teacher (reverse), or the generalized Jensen–Shannon divergence."""
    temperature: float = setting(1.0, gt=0)
    """Softens both distributions."""
    teacher_weight: float = setting(1.0, ge=0, le=1)
    """Share of the divergence; the rest is the cross-entropy of the text's own targets."""
    jsd_teacher_share: float = setting(0.5, gt=0, lt=1)
    """The teacher's share of the mixture (jsd)."""
    chunk_tokens: int = setting(1024, ge=1)
    """Tokens whose logits are held at once."""


@dataclass(frozen=True)
class GRPOLoss:
    """Group relative policy optimization: answers that the model itself gives, each judged beside the others to its prompt."""

    rewards: list[Any] = field(default_factory=list)
    """What an answer earns, each `{name, weight, options}`; the reward is their weighted sum."""
    group_size: int = setting(8, ge=2)
    """Answers drawn to each prompt."""
    max_tokens: int = setting(64, ge=1)
    """Longest answer, tokens."""
    stop: list[str] = field(default_factory=list)
    """An answer ends with the first token whose text holds one of these; its text is cut there."""
    scale_advantages: bool = True
    """Divide a group's advantages by the standard deviation of its rewards; false: Dr. GRPO (arXiv:2503.20783)."""
    normalize: str = setting("token", choices=("token", "sequence", "constant"))
    """Mean over all tokens of a step (DAPO), over the answers' own means (GRPO), or over answers times `max_tokens` (Dr. GRPO)."""
    clip_low: float = setting(0.2, ge=0, lt=1)
    """How far below 1 a token's probability ratio is followed."""
    clip_high: float = setting(0.2, ge=0)
    """How far above 1; a larger one than `clip_low` leaves rare tokens more room (DAPO, arXiv:2503.14476)."""
    beta: float = setting(0.0, ge=0)
    """Weight of the KL divergence from the model as it was before training; 0: none, and no reference is kept."""
    inner_epochs: int = setting(1, ge=1)
    """Optimizer steps on each set of answers."""
    chunk_tokens: int = setting(2048, ge=1)
    """Tokens whose logits are held at once."""


# ---------------------------------------------------------------- rewards (train.loss.options.rewards)


@dataclass(frozen=True)
class RewardPart:
    """One of several rewards."""

    name: str = setting()
    """exact_match, regex, unit_test, model, or `my_pkg.mod:fn`."""
    weight: float = 1.0
    """Factor in the sum; a negative one punishes."""
    seconds: float = setting(600.0, gt=0)
    """Longest time for the answers that are judged at once; a reward that takes longer ends the run, and its row is told."""
    options: dict[str, Any] = field(default_factory=dict)
    """Settings of that reward."""


@dataclass(frozen=True)
class ExactMatchReward:
    """1 for an answer that is the row's completion, else 0."""

    column: str | None = None
    """Column of `data.keep` that holds what is right; `None`: the row's completion."""
    strip: bool = True
    """White space around both does not count."""
    ignore_case: bool = False
    """Upper and lower case are the same."""


@dataclass(frozen=True)
class RegexReward:
    """1 for an answer that a regular expression matches as a whole, else 0."""

    pattern: str | None = None
    """The expression; `None`: that of `column`."""
    column: str | None = None
    """Column of `data.keep` that holds it; `None`: the row's completion is one."""
    strip: bool = True
    """White space around the answer does not count."""


@dataclass(frozen=True)
class UnitTestReward:
    """1 for an answer with which a Python program ends without an error, in a process of its own with limits, else 0."""

    program: str = "{prompt}{answer}\n{completion}\n"
    """The program: `{answer}` is the model's, `{completion}` the row's own, which holds the tests; `{row.tests}` the column
    `tests` of `data.keep`, of a list each entry on a line of its own."""
    seconds: float = setting(5.0, gt=0)
    """Longest time."""
    memory_mb: int = setting(512, ge=64)
    """Largest address space, MiB."""


@dataclass(frozen=True)
class ModelReward:
    """What a reward model (`train.loss.name=reward`) gives for prompt and answer."""

    path: str = setting()
    """The reward model: a run, a recipe's name, an artifact, a folder (also of an adapter) or a hub name."""
    revision: str | None = None
    """Commit, tag or branch on the hub."""
    prompt_style: str = setting("chat", choices=("chat", "plain"))
    """How it was shown prompts and answers (`data.render.prompt_style`)."""
    batch: int = setting(16, ge=1)
    """Answers that pass through it at once."""


# ---------------------------------------------------------------- what is trained (adapter)


@dataclass(frozen=True)
class LoraOptions:
    """Low-rank matrices beside frozen ones (Hu et al., arXiv:2106.09685); dora: and a magnitude each output (arXiv:2402.09353)."""

    r: int = setting(16, ge=1)
    """Rank."""
    alpha: float = setting(32.0, gt=0)
    """Scale: the product of the matrices counts alpha / r times."""
    dropout: float = setting(0.0, ge=0, lt=1)
    """Dropout on what the adapter reads."""
    rslora: bool = False
    """Scale by alpha / √r instead (arXiv:2312.03732)."""
    init: str = setting("default", choices=("default", "gaussian", "pissa", "olora"))
    """default and gaussian begin beside the weights, as nothing; pissa (arXiv:2404.02948) and olora (arXiv:2406.01775) take their
    beginning out of them."""
    targets: str = "all-linear"
    """all-linear (all but the head), attention, mlp, experts (of a mixture; all-linear and mlp have them too), several with commas
    between them, or a regular expression that whole names of modules, or of experts' tensors, match."""
    train_embeddings: bool = False
    """Train the embedding too, whole; tied to the head, both are."""
    train_head: bool = False
    """Train the output head too, whole; tied to the embedding, both are."""
    lr_ratio: float = setting(1.0, gt=0)
    """Learning rate of the second matrices over that of the first (LoRA+, arXiv:2402.12354)."""


@dataclass(frozen=True)
class IA3Options:
    """A factor for each output of some layers and each input of others (Liu et al., arXiv:2205.05638)."""

    targets: str = "keys-values"
    """Layers with a factor for each output: keys-values (the products that give them, the queries too where one gives all), down,
    all-linear, attention, mlp, or a regular expression that whole module names match."""
    feedforward: str | None = "down"
    """Layers with a factor for each input: down (those that lead from the inside of a feed-forward block back), or another of
    the same words; `None`: none. A layer that is in both has it for its inputs."""


@dataclass(frozen=True)
class PrefixOptions:
    """Keys and values of tokens that are not there, before each document, of an encoder–decoder before what it writes (Li & Liang,
    arXiv:2101.00190)."""

    n_tokens: int = setting(16, ge=1)
    """Virtual tokens."""


@dataclass(frozen=True)
class PromptOptions:
    """Embeddings of tokens that are not there, before each document or input (Lester et al., arXiv:2104.08691)."""

    n_tokens: int = setting(16, ge=1)
    """Virtual tokens; each begins as the embedding of a random token unless `text` is set."""
    text: str | None = None
    """What they begin as: the embeddings of this text's tokens, cut to `n_tokens` or begun again where there are fewer."""


@dataclass(frozen=True)
class FreezeOptions:
    """A part of the model's own weights is trained."""

    train: str = setting()
    """Regular expression; parameters in whose name it is found are trained, the rest are frozen."""


@dataclass(frozen=True)
class LoadOptions:
    """Training goes on with an adapter that is there, of whatever tool."""

    path: str = setting()
    """Its folder, or the run or artifact that has it."""
    lr_ratio: float = setting(1.0, gt=0)
    """Learning rate of the second matrices over that of the first (LoRA+)."""


# ---------------------------------------------------------------- optimizers (optim)


@dataclass(frozen=True)
class AdamWOptions:
    """AdamW (Loshchilov & Hutter, arXiv:1711.05101)."""

    beta1: float = setting(0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = setting(0.95, ge=0, lt=1)
    """Decay of the second moment."""
    eps: float = setting(1e-8, gt=0)
    """Term added to the denominator."""


@dataclass(frozen=True)
class MuonOptions:
    """Muon for the hidden matrices (Jordan et al., 2024), AdamW for embeddings, head, norms and biases."""

    momentum: float = setting(0.95, ge=0, lt=1)
    """Momentum of the matrices' gradient."""
    nesterov: bool = True
    """Look ahead by one step of momentum."""
    ns_steps: int = setting(5, ge=1, le=20)
    """Iterations of the orthogonalization."""
    adamw_lr: float | None = setting(None, gt=0)
    """Peak learning rate of the parameters that AdamW trains; `None` is that of the matrices."""
    embedding_lr: float | None = setting(None, gt=0)
    """That of the embedding table (tied to the head or not); `None` is `adamw_lr`."""
    head_lr: float | None = setting(None, gt=0)
    """That of an output head of its own; `None` is `adamw_lr`."""
    beta1: float = setting(0.9, ge=0, lt=1)
    """AdamW: decay of the first moment."""
    beta2: float = setting(0.95, ge=0, lt=1)
    """AdamW: decay of the second moment."""
    eps: float = setting(1e-8, gt=0)
    """AdamW: term added to the denominator."""


@dataclass(frozen=True)
class AdamW8bitOptions:
    """AdamW with its moments in 8 bits (Dettmers et al., arXiv:2110.02861), by bitsandbytes."""

    beta1: float = setting(0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = setting(0.95, ge=0, lt=1)
    """Decay of the second moment."""
    eps: float = setting(1e-8, gt=0)
    """Term added to the denominator."""


@dataclass(frozen=True)
class LionOptions:
    """Lion (Chen et al., arXiv:2302.06675); its rate is three to ten times lower than AdamW's, its decay as much higher."""

    beta1: float = setting(0.9, ge=0, lt=1)
    """Share of the momentum in the update whose sign is taken."""
    beta2: float = setting(0.99, ge=0, lt=1)
    """Decay of the momentum."""


@dataclass(frozen=True)
class AdafactorOptions:
    """Adafactor (Shazeer & Stern, arXiv:1804.04235), without a first moment; an update is relative to its tensor's own size.

    The rate of update t is at most 1/√t, whatever the schedule says; `train/lr` in the log is the one that was applied.
    """

    beta2_decay: float = setting(-0.8, lt=0)
    """Exponent c of the second moment's decay, 1 − tᶜ."""
    eps: float = setting(1e-3, gt=0)
    """Smallest size that a tensor is taken to have."""
    clip: float = setting(1.0, gt=0)
    """Root mean square that an update is held under, before the rate."""


@dataclass(frozen=True)
class SGDOptions:
    """Stochastic gradient descent."""

    momentum: float = setting(0.9, ge=0, lt=1)
    """Momentum of the gradient; 0: none."""
    nesterov: bool = False
    """Look ahead by one step of momentum."""


@dataclass(frozen=True)
class ScheduleFreeOptions:
    """Schedule-free AdamW (Defazio et al., arXiv:2405.15682); wants a warm-up and then schedule=constant, no falling one."""

    beta1: float = setting(0.9, gt=0, lt=1)
    """Share of the average in the weights at which the gradient is taken."""
    beta2: float = setting(0.99, ge=0, lt=1)
    """Decay of the second moment."""
    eps: float = setting(1e-8, gt=0)
    """Term added to the denominator."""


# ---------------------------------------------------------------- schedules (schedule)


@dataclass(frozen=True)
class CosineOptions:
    """Half a cosine from the peak to the floor (Loshchilov & Hutter, arXiv:1608.03983)."""

    min_ratio: float = setting(0.0, ge=0, le=1)
    """Final learning rate as a fraction of the peak."""


@dataclass(frozen=True)
class LinearOptions:
    """A straight line from the peak to the floor."""

    min_ratio: float = setting(0.0, ge=0, le=1)
    """Final learning rate as a fraction of the peak."""


@dataclass(frozen=True)
class WSDOptions:
    """Warm-up, stable, decay (Hu et al., MiniCPM, arXiv:2404.06395)."""

    decay_fraction: float = setting(0.4, gt=0, le=1)
    """Share of the steps in which the rate falls linearly to the floor."""
    min_ratio: float = setting(0.0, ge=0, le=1)
    """Final learning rate as a fraction of the peak."""


@dataclass(frozen=True)
class InverseSqrtOptions:
    """One over the square root of the steps (Vaswani et al., arXiv:1706.03762)."""

    timescale: float = setting(0.02, gt=0, le=1)
    """Share s of the steps after warm-up in factor √(s / (s + progress)); the warm-up's own share gives the paper's curve."""


# ---------------------------------------------------------------- trackers (track)


@dataclass(frozen=True)
class MLflowOptions:
    """MLflow, on the SQLite database in the store unless an address is given."""

    uri: str | None = None
    """Tracking server or database; `None` is `sqlite:///<store>/mlflow.db`."""
    experiment: str = "kajiya"
    """Experiment that the run is filed under."""
    register: bool = True
    """Register the finished model, with its lineage as tags; not that of a trial of a study."""
    aliases: tuple[str, ...] = ("newest",)
    """Aliases that its version takes over, unless a run begun later has them (`latest` is reserved by MLflow)."""
    tags: dict[str, Any] = field(default_factory=dict)
    """Tags of the run, beside its recipe, command and git commit."""


@dataclass(frozen=True)
class TensorBoardOptions:
    """TensorBoard event files."""

    folder: str | None = None
    """Folder of the event files; `None` is `tensorboard/` in the run folder."""
    embeddings: int = setting(2000, ge=0)
    """Tokens whose input embeddings the finished model gives to the projector; 0: none."""


@dataclass(frozen=True)
class WandbOptions:
    """Weights & Biases, offline unless said."""

    project: str = "kajiya"
    """Project that the run is filed under."""
    entity: str | None = None
    """Account or team."""
    online: bool = False
    """Send while training; otherwise kept in the run folder for `wandb sync`."""


# ---------------------------------------------------------------- samplers (tune.sampler)


@dataclass(frozen=True)
class TPEOptions:
    """Tree-structured Parzen estimator (Bergstra et al., 2011; Watanabe, arXiv:2304.11127)."""

    startup_trials: int = setting(10, ge=0)
    """Random trials before the first proposal."""
    multivariate: bool = True
    """Model the settings together."""


@dataclass(frozen=True)
class CMAESOptions:
    """Covariance matrix adaptation (Hansen, arXiv:1604.00772); numbers alone, choices are drawn at random."""

    startup_trials: int = setting(1, ge=0)
    """Random trials before the first proposal."""


@dataclass(frozen=True)
class GPOptions:
    """Gaussian process with expected improvement."""

    startup_trials: int = setting(10, ge=0)
    """Random trials before the first proposal."""


@dataclass(frozen=True)
class NSGA2Options:
    """Non-dominated sorting genetic algorithm for several objectives (Deb et al., 2002)."""

    population: int = setting(16, ge=2)
    """Trials in a generation."""


# ---------------------------------------------------------------- pruners (tune.pruner)


@dataclass(frozen=True)
class MedianPruner:
    """A trial ends when it is worse than the median of the earlier ones at the same evaluation."""

    startup_trials: int = setting(5, ge=0)
    """Finished trials before anything is pruned."""
    warmup_evals: int = setting(1, ge=0)
    """Evaluations of each trial that are left alone."""


@dataclass(frozen=True)
class ASHAPruner:
    """Asynchronous successive halving (Li et al., arXiv:1810.05934): only the best go on from each rung.

    A trial that was ended at a rung and is among its best later on goes on from its checkpoint.
    """

    min_evals: int = setting(1, ge=1)
    """Evaluations to the first rung."""
    reduction: int = setting(3, ge=2)
    """One in this many goes on from a rung; the next is this many times further."""


@dataclass(frozen=True)
class HyperbandPruner:
    """Successive halving in several brackets (Li et al., arXiv:1603.06560)."""

    min_evals: int = setting(1, ge=1)
    """Evaluations to the first rung of the most eager bracket."""
    max_evals: int | None = setting(10, ge=1)
    """Evaluations of a whole trial; `None`: as many as the first one that comes to its end has."""
    reduction: int = setting(3, ge=2)
    """One in this many goes on from a rung."""


@dataclass(frozen=True)
class WilcoxonPruner:
    """A trial ends when a signed-rank test against the best one, evaluation by evaluation, says that it is worse."""

    p_threshold: float = setting(0.1, ge=0, le=1)
    """Smaller p-values end a trial."""
    warmup_evals: int = setting(2, ge=0)
    """Evaluations of each trial that are left alone."""


# ---------------------------------------------------------------- launchers (tune.launcher)


@dataclass(frozen=True)
class RayLauncher:
    """Ray, on this machine or on a cluster whose machines share the store's folder."""

    address: str | None = None
    """Address of a running cluster (`auto` finds one on this machine); `None` starts one here."""
    cpus: float = setting(1.0, gt=0)
    """Processor cores that Ray reserves for each."""
    gpus: float = setting(0.0, ge=0)
    """Accelerators that Ray reserves for each."""
