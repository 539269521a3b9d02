"""What a stage has made, in the words that stand behind its name on the screen and in the log."""

from kajiya.config.quantities import format_bytes, format_count
from kajiya.run.store import Artifact


def figures_words(evaluation: Artifact) -> str:
    """The figures of a model on held-out rows."""
    figures = {name: row["value"] for name, row in evaluation.facts["figures"].items()}
    return "held out: " + ", ".join(f"{name} {value:.3f}" for name, value in figures.items() if value is not None)


def corpus_words(corpus: Artifact) -> str:
    """What became of the rows of a corpus."""
    ledger = corpus.facts["ledger"]
    reasons = ", ".join(f"{part['documents']:,} {reason}" for reason, part in ledger["dropped"].items())
    return (
        f"{ledger['entered']['documents']:,} documents ({format_bytes(ledger['entered']['bytes'])}): "
        f"{ledger['train']['documents']:,} to train on, {ledger['heldout']['documents']:,} held out "
        f"({ledger['heldout']['bytes']:,} bytes)" + (f", {reasons}" if reasons else "")
    )


def tokenizer_words(tokenizer: Artifact) -> str:
    """The size of a tokenizer."""
    return f"vocabulary {tokenizer.facts['vocab_size']:,}"


def shards_words(shards: Artifact) -> str:
    """Tokens, and what tokenizing took."""
    train = shards.facts["train"]
    return (
        f"{format_count(train['tokens'])} tokens, {train['bytes'] / train['tokens']:.2f} bytes a token, by "
        f"{shards.facts['encoder']}; {format_bytes(shards.facts['peak_memory_bytes'])} of memory at most"
    )


def packing_words(packing: Artifact) -> str:
    """How full the rows are."""
    train = packing.facts["train"]
    return f"{train['examples']:,} examples in {train['rows']:,} rows, {train['fill']:.1%} full"


def model_words(model: Artifact) -> str:
    """The size of a model, and its steps."""
    size = sum(path.stat().st_size for path in model.path.iterdir())
    return f"{format_count(model.facts['n_params'])} parameters, {model.facts['steps']:,} steps, {format_bytes(size)}"


def baseline_words(baselines: Artifact) -> str:
    """Bits per byte of each compressor."""
    return ", ".join(f"{name} {row['bits_per_byte']:.3f}" for name, row in baselines.facts["baselines"].items())


def evaluation_words(evaluation: Artifact) -> str:
    """Bits per byte and perplexity."""
    facts = evaluation.facts
    bounds = facts["bits_per_byte_interval"]
    interval = "" if bounds is None else f" [{bounds[0]:.3f}, {bounds[1]:.3f}]"
    return (
        f"{facts['bits_per_byte']:.3f} bits per byte{interval} over {facts['n_bytes']:,} held-out bytes, "
        f"perplexity {facts['perplexity']:.1f}"
    )
