"""What a model's head says: the next token, a hidden one, an answer to an input, or one thing about a whole text."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kajiya.errors import ConfigError


@dataclass(frozen=True)
class Task:
    """The head that a loss needs."""

    name: str = "causal"
    """causal, masked, seq2seq, classes (one of several), or score (one number)."""
    labels: tuple[str, ...] = ()
    """Names of the classes, in the order of their numbers."""

    @property
    def has_new_head(self) -> bool:
        """Whether weights of a model of text lack the head, which then begins at random."""
        return self.name in ("classes", "score")

    def config_fields(self) -> dict[str, Any]:
        """What the head adds to a Transformers config."""
        if self.name == "score":
            return {"num_labels": 1, "problem_type": "regression"}
        if self.name == "classes":
            return {
                "id2label": dict(enumerate(self.labels)),
                "label2id": {label: number for number, label in enumerate(self.labels)},
                "problem_type": "single_label_classification",
            }
        return {}


CAUSAL = Task()
CLASS_HEADS = ("score", "classifier")
"""Names that Transformers gives to the heads of classification, which begin at random and so are trained whole."""
_CLASSES: Mapping[str, str] = {
    "causal": "AutoModelForCausalLM",
    "masked": "AutoModelForMaskedLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "classes": "AutoModelForSequenceClassification",
    "score": "AutoModelForSequenceClassification",
}


def auto_class(task: Task) -> Any:
    """The Auto class of Transformers that builds and loads models with the task's head."""
    import transformers

    return getattr(transformers, _CLASSES[task.name])


def require_architecture(task: Task, architecture: Any, field: str) -> None:
    """Raise `ConfigError` naming `field` where Transformers has no model of that architecture with the task's head."""
    if type(architecture) not in auto_class(task)._model_mapping:
        example = {"causal": "llama", "masked": "bert", "seq2seq": "t5"}.get(task.name, "llama or bert")
        raise ConfigError(
            field,
            f"{architecture.model_type} has no {_CLASSES[task.name].removeprefix('AutoModelFor')} head, which the loss needs",
            f"Choose another train.loss.name, or an architecture that has one, for example {example}.",
        )
