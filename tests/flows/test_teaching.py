"""A student and its teacher read the same tokens, and no more of these are kept than there are."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import Finished
from transformers import PreTrainedTokenizerFast

from kajiya.config.compose import compose
from kajiya.config.schema import Config
from kajiya.data.tokenizer import load_tokenizer, train_bpe
from kajiya.errors import ConfigError
from kajiya.flows.feeding import Data
from kajiya.flows.teaching import load_run_loss
from kajiya.models.load import load_model
from kajiya.models.save import save_model
from kajiya.training.losses import read_beside


def _config(teacher: Path, *more: str) -> Config:
    return compose("stdlib-pretrain", ["train.loss.name=distill", f"train.loss.options.teacher={teacher}", *more])


@pytest.fixture
def data(finished: Finished) -> Data:
    """Of a student that reads the tokens of the finished run's model."""
    model = finished.trained.model
    return Data(corpus=model, tokenizer=model, shards=model)


def _loss(config: Config, data: Data, finished: Finished) -> Any:
    return load_run_loss(config, data, torch.device("cpu"), finished.store)[0]


def test_the_tokens_that_both_know_are_counted(data: Data, finished: Finished) -> None:
    folder = finished.trained.model.path
    bound = read_beside(_loss(_config(folder), data, finished))
    assert bound["n_tokens"] == len(load_tokenizer(folder)) == 512
    with pytest.raises(ConfigError, match=r"options\.top_k: is 600, and the teacher knows 512 tokens"):
        _loss(_config(folder, "train.loss.options.top_k=600"), data, finished)


def test_a_teacher_of_other_tokens_is_refused_though_their_number_is_the_same(
    data: Data, finished: Finished, tmp_path: Path
) -> None:
    texts = ["zz qq ww vv\n", "the quick brown fox\n"] * 40
    other = PreTrainedTokenizerFast(
        tokenizer_object=train_bpe(iter(texts), 512, 2), bos_token="<|bos|>", eos_token="<|eos|>", pad_token="<|pad|>"
    )
    save_model(load_model(finished.trained.model.path), other, tmp_path)
    with pytest.raises(
        ConfigError, match=r"reads other tokens than the student: '.*' is number [0-9]+ for one of them"
    ):
        _loss(_config(tmp_path), data, finished)


def test_a_teacher_without_a_tokenizer_is_taken_at_its_size(data: Data, finished: Finished, tmp_path: Path) -> None:
    load_model(finished.trained.model.path).save_pretrained(tmp_path)
    assert read_beside(_loss(_config(tmp_path), data, finished))["n_tokens"] is None
