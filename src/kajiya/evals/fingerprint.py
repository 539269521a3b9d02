"""What a figure depends on beside the model's skill; figures of different fingerprints are no comparison."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from kajiya.config.digest import digest
from kajiya.run.store import Artifact, read_manifest


@dataclass(frozen=True)
class Fingerprint:
    """Digests and names of all that an evaluation's figures are made with."""

    data: str
    """Digest of the rows."""
    template: str
    """Digest of what turns a row into a prompt and an answer into a score."""
    code: str
    """Digest of the user's own functions among that."""
    engine: str
    dtype: str
    """Precision in which the model was computed."""
    sampling: str
    """Digest of how answers are drawn."""
    model: str
    """Digest of the model's files, or an endpoint's address and model name."""

    def differences(self, other: "Fingerprint") -> list[str]:
        """Names of the fields, the model left out, in which two evaluations are not alike."""
        mine, theirs = asdict(self), asdict(other)
        return [name for name in mine if name != "model" and mine[name] != theirs[name]]

    @property
    def manner(self) -> tuple[str, ...]:
        """Everything but the model."""
        return tuple(value for name, value in asdict(self).items() if name != "model")


def read_fingerprint(facts: Mapping[str, Any]) -> Fingerprint:
    """The fingerprint among an evaluation's facts. Raises `KeyError` for facts of an older version, which lack some of it."""
    given = facts["fingerprint"]
    return Fingerprint(**{item.name: given[item.name] for item in fields(Fingerprint)})


def heldout_digest(corpus: Artifact) -> str:
    """Digest of a corpus's held-out documents and their names alone: other training text is no other test."""
    files = read_manifest(corpus.path)["files"]
    return digest({name: entry["sha256"] for name, entry in files.items() if name.startswith("heldout.")})
