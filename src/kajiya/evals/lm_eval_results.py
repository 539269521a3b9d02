"""lm-eval's results in the shape of the project's own: figures with intervals over rows, and a fingerprint."""

import math
from typing import Any

from kajiya.config.digest import digest
from kajiya.evals.statistics import interval, mean_scores


def figures_of(raw: dict[str, Any], model: str, dtype: str) -> dict[str, Any]:
    """The facts of an evaluation. The interval of a metric that is a mean over rows is this project's bootstrap of it."""
    task = next(iter(raw["results"]))
    samples = raw["samples"][task]
    figures: dict[str, Any] = {}
    for name, value in raw["results"][task].items():
        metric, _, kept = name.partition(",")
        if not isinstance(value, (int, float)) or metric.endswith("_stderr") or metric in ("alias", "sample_len"):
            continue
        figures[metric if kept == "none" else name] = {
            "value": float(value) if math.isfinite(value) else None,
            "interval": _interval(samples, metric, float(value)),
            "is_lower_better": raw.get("higher_is_better", {}).get(task, {}).get(metric) is False,
            "is_mean": False,
            "signature": f"lm-eval version {raw['versions'][task]}",
            "details": {},
        }
    settings = raw["configs"][task]
    template = {key: settings.get(key) for key in ("doc_to_text", "doc_to_target", "doc_to_choice", "num_fewshot")}
    return {
        "task": task,
        "n_rows": len(samples),
        "n_groups": len(samples),
        "figures": figures,
        "fingerprint": {
            "data": digest([sample["doc_hash"] for sample in samples]),
            "template": digest({key: str(value) for key, value in template.items()}),
            "engine": "torch",
            "dtype": dtype,
            "sampling": digest(str(settings.get("generation_kwargs"))),
            "model": model,
        },
        "seconds": float(raw.get("total_evaluation_time_seconds") or 0.0),
    }


def _interval(samples: list[dict[str, Any]], metric: str, value: float) -> list[float] | None:
    values = [sample[metric] for sample in samples if isinstance(sample.get(metric), (int, float))]
    if len(values) < 2 or not math.isclose(sum(values) / len(values), value, rel_tol=1e-6, abs_tol=1e-9):
        return None  # no mean over rows
    return list(interval(mean_scores(values)))
