"""The ledger: what became of every row that entered, in rows, bytes and tokens, over the whole path; and when to stop."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from kajiya.data.values import escaped
from kajiya.errors import DataError

_N_EXAMPLES = 5

# ---------------------------------------------------------------- what becomes of a row

TRAIN, HELDOUT = "train", "heldout"
LOST, EMPTY, DUPLICATE, CONTAMINATED, NOT_DRAWN = "lost", "empty", "duplicate", "contaminated", "not drawn"
KINDS = (LOST, EMPTY, DUPLICATE, CONTAMINATED, NOT_DRAWN)
"""Why a row is on neither side. Only what is lost counts for `data.max_lost_fraction`: the others are asked for."""


@dataclass
class Tally:
    """Rows and their bytes, with a few names."""

    documents: int = 0
    bytes: int = 0
    examples: list[str] = field(default_factory=list)
    kind: str = ""

    def add(self, n_bytes: int, example: str | None = None) -> None:
        """Count one row."""
        self.documents += 1
        self.bytes += n_bytes
        if example is not None and len(self.examples) < _N_EXAMPLES:
            self.examples.append(escaped(example))

    def facts(self) -> dict[str, Any]:
        """As it stands in a manifest."""
        counts: dict[str, Any] = {"documents": self.documents, "bytes": self.bytes}
        named = {"kind": self.kind, "examples": self.examples}
        return counts | {name: value for name, value in named.items() if value}


@dataclass
class CorpusLedger:
    """What entered a corpus and what became of it."""

    entered: Tally = field(default_factory=Tally)
    train: Tally = field(default_factory=Tally)
    heldout: Tally = field(default_factory=Tally)
    dropped: dict[str, Tally] = field(default_factory=dict)

    def drop(self, kind: str, reason: str, n_bytes: int, example: str) -> None:
        """Count a row that is left out; `kind` is one of `KINDS`."""
        self.dropped.setdefault(reason, Tally(kind=kind)).add(n_bytes, example)

    def facts(self) -> dict[str, Any]:
        """As it stands in a manifest: `entered`, `train`, `heldout`, `dropped` by reason. It must add up."""
        parts = [self.train, self.heldout, *self.dropped.values()]
        assert self.entered.documents == sum(part.documents for part in parts), "the ledger does not add up"
        assert self.entered.bytes == sum(part.bytes for part in parts), "the ledger does not add up"
        return {
            "entered": self.entered.facts(),
            "train": self.train.facts(),
            "heldout": self.heldout.facts(),
            "dropped": {reason: tally.facts() for reason, tally in sorted(self.dropped.items())},
        }


# ---------------------------------------------------------------- the whole path


@dataclass(frozen=True)
class Line:
    """One thing that became of rows."""

    what: str
    """In words."""
    kind: str
    """train, heldout, or one of `KINDS`."""
    rows: int = 0
    bytes: int = 0
    tokens: int | None = None
    """`None`: it went before it was tokenized."""
    examples: tuple[str, ...] = ()
    setting: str = ""
    """Of what is lost: the setting that would change it."""


@dataclass(frozen=True)
class DataLedger:
    """Everything that entered, line by line. `problems` says in words what does not add up; with any, the work stops."""

    rows: int
    """Rows that entered."""
    bytes: int
    """Their bytes."""
    tokens: int | None
    """Tokens that were made of what the corpus kept; `None`: not yet tokenized."""
    lines: tuple[Line, ...]
    problems: tuple[str, ...]

    def of(self, *kinds: str) -> list[Line]:
        """The lines of these kinds."""
        return [line for line in self.lines if line.kind in kinds]

    @property
    def lost(self) -> dict[str, tuple[int, int]]:
        """What is lost, and of how much, by unit: rows and bytes of those that were to be read, tokens of those made."""
        asked = self.of(TRAIN, HELDOUT, LOST)
        lost = self.of(LOST)
        counts = {
            "rows": (sum(line.rows for line in lost), sum(line.rows for line in asked)),
            "bytes": (sum(line.bytes for line in lost), sum(line.bytes for line in asked)),
        }
        if self.tokens is not None:
            counts["tokens"] = (sum(line.tokens or 0 for line in lost), self.tokens)
        return counts

    def facts(self) -> dict[str, Any]:
        """As JSON."""
        lines = [
            {name: value for name, value in vars(line).items() if value not in ("", ())} | {"examples": line.examples}
            for line in self.lines
        ]
        totals = {"rows": self.rows, "bytes": self.bytes, "tokens": self.tokens}
        return {"entered": totals, "lines": lines, "lost": self.lost, "problems": self.problems}


def data_ledger(
    corpus: Mapping[str, Any], shards: Mapping[str, Any] | None = None, packing: Mapping[str, Any] | None = None
) -> DataLedger:
    """Join the facts of the artifacts corpus, shards and packing (as far as there are any) into one ledger."""
    ledger = corpus["ledger"]
    lines = [line for split in (TRAIN, HELDOUT) for line in _split_lines(split, ledger[split], shards, packing)]
    lines += [
        Line(reason, tally["kind"], tally["documents"], tally["bytes"], None, tuple(tally.get("examples", ())),
             "data.on_unreadable" if tally["kind"] == LOST else "")
        for reason, tally in ledger["dropped"].items()
    ]  # fmt: skip
    entered = ledger["entered"]
    tokens = None if shards is None else sum(shards[split]["tokens"] for split in (TRAIN, HELDOUT))
    problems = tuple(_problems(ledger, lines, tokens, shards, packing))
    return DataLedger(entered["documents"], entered["bytes"], tokens, tuple(lines), problems)


_WORDS = {TRAIN: "to train on", HELDOUT: "held out"}
_LONG = "data.row_tokens, data.max_tokens or data.on_long"


def _split_lines(
    split: str, tally: Mapping[str, Any], shards: Mapping[str, Any] | None, packing: Mapping[str, Any] | None
) -> Iterator[Line]:
    """What became of a split: whole, and where rows were longer than they may be, cut and dropped."""
    unrendered = {} if shards is None or "dropped" not in shards[split] else shards[split]["dropped"]
    rows, n_bytes = tally["documents"], tally["bytes"]
    if unrendered:
        rows, n_bytes = rows - unrendered["documents"], n_bytes - unrendered["bytes"]
    tokens = None if shards is None else shards[split]["tokens"]
    packed = (packing or {}).get(split, {})
    long = dict.fromkeys(_LONG_FACTS, 0) | {name: value for name, value in packed.items() if name in _LONG_FACTS}
    n_cut = long["cut_tokens"] + long["dropped_tokens"]
    whole = _WORDS[split] + (f", {long['cut_examples']:,} of them cut at their end" if long["cut_examples"] else "")
    yield Line(
        whole,
        split,
        rows - long["dropped_examples"],
        n_bytes - long["dropped_bytes"],
        None if tokens is None else tokens - n_cut,
    )
    if long["cut_tokens"]:
        yield Line(f"{_WORDS[split]}: cut off", LOST, tokens=long["cut_tokens"], setting=_LONG)
    if long["dropped_examples"]:
        what, setting = f"{_WORDS[split]}: dropped, longer than a row may be", _LONG
        if "answer_tokens" in packed:
            what += f", or than leaves room for an answer of {packed['answer_tokens']} tokens"
            setting += " or train.loss.options.max_tokens"
        counts = (long["dropped_examples"], long["dropped_bytes"], long["dropped_tokens"])
        yield Line(what, LOST, *counts, setting=setting)
    if unrendered:
        counts = (unrendered["documents"], unrendered["bytes"], None)
        yield Line(_NOT_RENDERED, LOST, *counts, tuple(unrendered["examples"]), "data.on_unreadable or data.render")


_NOT_RENDERED = "cannot be rendered"
_LONG_FACTS = ("cut_examples", "cut_tokens", "dropped_examples", "dropped_tokens", "dropped_bytes")


def _problems(
    ledger: Mapping[str, Any],
    lines: list[Line],
    tokens: int | None,
    shards: Mapping[str, Any] | None,
    packing: Mapping[str, Any] | None,
) -> Iterator[str]:
    """Each sum that should hold and does not. The parts were counted apart, by different stages."""
    entered = ledger["entered"]
    sums = [
        ("rows entered", entered["documents"], "accounted for", sum(line.rows for line in lines)),
        ("bytes entered", entered["bytes"], "accounted for", sum(line.bytes for line in lines)),
    ]
    if tokens is not None:
        sums.append(("tokens made", tokens, "accounted for", sum(line.tokens or 0 for line in lines)))
    for split in (TRAIN, HELDOUT):
        if shards is not None:
            refused = shards[split].get("dropped") or {"documents": 0, "bytes": 0}
            for noun, unit in (("rows", "documents"), ("bytes", "bytes")):
                n_read = shards[split][unit] + refused[unit]
                sums.append((f"{noun} {_WORDS[split]}", ledger[split][unit], "tokenized", n_read))
        if shards is not None and packing is not None and "dropped_examples" in packing.get(split, {}):
            packed = packing[split]
            n_tokens = packed["tokens"] + packed["cut_tokens"] + packed["dropped_tokens"]
            sums.append((f"tokens {_WORDS[split]}", shards[split]["tokens"], "packed, cut or dropped", n_tokens))
            n_rows = packed["examples"] + packed["dropped_examples"]
            sums.append((f"rows {_WORDS[split]}", shards[split]["documents"], "packed or dropped", n_rows))
    for left, n_left, right, n_right in sums:
        if n_left != n_right:
            yield f"{n_left:,} {left}, but {n_right:,} {right}"


# ---------------------------------------------------------------- on the screen, and when to stop


def ledger_table(ledger: DataLedger) -> list[list[str]]:
    """The ledger as rows of text, the first and the last the sums: what, rows, bytes, tokens."""

    def row(what: str, rows: int, n_bytes: int, tokens: int | None) -> list[str]:
        return [what, f"{rows:,}", f"{n_bytes:,}", "—" if tokens is None else f"{tokens:,}"]

    total = [sum(line.rows for line in ledger.lines), sum(line.bytes for line in ledger.lines)]
    made = None if ledger.tokens is None else sum(line.tokens or 0 for line in ledger.lines)
    return [
        row("entered", ledger.rows, ledger.bytes, ledger.tokens),
        *(row(_labelled(line), line.rows, line.bytes, line.tokens) for line in ledger.lines),
        row("accounted for", total[0], total[1], made),
    ]


def _labelled(line: Line) -> str:
    return line.what if line.kind in (TRAIN, HELDOUT) else f"{line.kind}: {line.what}"


def ledger_words(ledger: DataLedger) -> str:
    """The sum in one line: `813 rows entered = 700 to train on + 40 held out + 73 contaminated; 0 of 3,000,000 tokens lost`."""
    by_kind = {kind: sum(line.rows for line in ledger.of(kind)) for kind in (TRAIN, HELDOUT, *KINDS)}
    parts = [f"{rows:,} {_WORDS.get(kind, kind)}" for kind, rows in by_kind.items() if rows]
    lost = [f"{lost:,} of {whole:,} {unit}" for unit, (lost, whole) in ledger.lost.items() if unit == "tokens"]
    return f"{ledger.rows:,} rows entered = {' + '.join(parts)}" + "".join(f"; {words} lost" for words in lost)


def require_kept(ledger: DataLedger, max_lost_fraction: float) -> None:
    """Raise `DataError` when a larger share of the rows, bytes or tokens is lost, with the settings that would change it.

    One that does not add up is refused as well.
    """
    if ledger.problems:
        raise DataError(
            f"The ledger of the data does not add up: {'; '.join(ledger.problems)}.\n"
            "A part of the store was changed or damaged: kajiya store verify finds it."
        )
    shares = {unit: lost / max(1, whole) for unit, (lost, whole) in ledger.lost.items()}
    worst = max(shares, key=lambda unit: shares[unit])
    if shares[worst] <= max_lost_fraction:
        return
    n_lost, n_asked = ledger.lost[worst]
    lost = ledger.of(LOST)
    what = "; ".join(_said(line) for line in lost)
    settings = " / ".join(dict.fromkeys(line.setting for line in lost))
    raise DataError(
        f"data.max_lost_fraction={max_lost_fraction:g}: {shares[worst]:.2%} of the {worst} are lost "
        f"({n_lost:,} of {n_asked:,}): {what}.\n"
        f"Change {settings}, mend the rows, or allow it with data.max_lost_fraction={_above(shares[worst])}."
    )


def _said(line: Line) -> str:
    counts = {"rows": line.rows, "bytes": line.bytes, "tokens": line.tokens or 0}
    amounts = ", ".join(f"{n:,} {unit}" for unit, n in counts.items() if n)
    return f"{line.what}: {amounts}" + (f" (for example {line.examples[0]})" if line.examples else "")


def _above(share: float) -> str:
    """The share rounded up to two places of a per cent."""
    return f"{min(1.0, (int(share * 10_000) + 1) / 10_000):g}"
