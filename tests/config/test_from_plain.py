"""A config written to a manifest and read back is the same config."""

import pytest

from kajiya.config.compose import compose, from_plain
from kajiya.config.digest import to_plain
from kajiya.errors import ConfigError


def test_there_and_back() -> None:
    config = compose("stdlib-pretrain", ["train.row_growth=[0.2,0.5]", "optim=adamw", "optim.options.beta1=0.8"])
    assert from_plain(to_plain(config)) == config


def test_a_config_of_another_schema_is_named() -> None:
    plain = to_plain(compose("stdlib-pretrain"))
    plain["train"]["warp"] = 9
    with pytest.raises(ConfigError, match="warp"):
        from_plain(plain)
