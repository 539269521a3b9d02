"""Clients of the OpenAI API that others have written, against the real server."""

import warnings
from pathlib import Path
from typing import Any

import pytest

from .conftest import NAME, open_engine


def test_the_api_model_of_lm_eval_scores_as_the_engine_does(
    model_folder: Path, tokenizer: Any, server_url: str
) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is in the extra eval")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lm-eval's own imports
        from lm_eval.api.instance import Instance
        from lm_eval.models.openai_completions import LocalCompletionsAPI

        model = LocalCompletionsAPI(
            base_url=f"{server_url}/v1/completions",
            model=NAME,
            tokenizer=str(model_folder),
            tokenizer_backend="huggingface",
            num_concurrent=1,
            max_length=180,
        )
        pairs = [("def wrap(text,", " width):"), ("x = (", "1 + 2)"), ("class A", ":\n    pass")]
        asked = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
        found = model.loglikelihood(asked, disable_tqdm=True)
    engine = open_engine(model_folder)
    for (context, continuation), (logprob, _) in zip(pairs, found, strict=True):
        before, whole = tokenizer.encode(context), tokenizer.encode(context + continuation)
        # The whole text's tokens, those past as many as the context has alone: lm-eval's own convention.
        assert logprob == pytest.approx(sum(engine.score(whole)[len(before) - 1 :]), abs=1e-3)
