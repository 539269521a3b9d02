"""How a report shows which classes were taken for which."""

from collections.abc import Iterator, Mapping
from typing import Any

from kajiya.flows.report_page import Block, Column, Table, Text

_SHOWN_CLASSES = 20


def confusion_blocks(details: Mapping[str, Any], title: str) -> Iterator[Block]:
    """The confusion matrix of a classification; nothing of any other metric."""
    if "classes" not in details:
        return
    classes = [str(name) for name in details["classes"]]
    if "confusion" not in details or len(classes) > _SHOWN_CLASSES:
        yield Text(f"{title}: the confusion matrix of {len(classes)} classes is not shown.", is_aside=True)
        return
    columns = [Column("right, of " + title), *(Column(name, "number") for name in classes)]
    rows = [[name, *(f"{n:,}" for n in row)] for name, row in zip(classes, details["confusion"], strict=True)]
    yield Text(f"{title}: how often each class (down) was taken for which (across).", is_aside=True)
    yield Table(columns, rows)
