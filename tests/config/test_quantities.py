import pytest

from kajiya.config.quantities import format_bytes, format_count, format_seconds, parse_count
from kajiya.errors import ConfigError


@pytest.mark.parametrize(("text", "count"), [("6M", 6_000_000), ("1.3B", 1_300_000_000), ("512k", 512_000), ("7", 7)])
def test_counts_are_read(text: str, count: int) -> None:
    assert parse_count(text, "f") == count


@pytest.mark.parametrize("text", ["", "M", "-3M", "6 apples", "0", "9" * 400])
def test_what_is_no_count_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"model\.n_params"):
        parse_count(text, "model.n_params")


def test_figures_carry_units() -> None:
    assert format_count(6_012_345) == "6.0M"
    assert format_bytes(1_610_612_736) == "1.5 GiB"
    assert [format_seconds(s) for s in (2.345, 48, 200, 7500)] == ["2.3 s", "48 s", "3 min 20 s", "2 h 5 min"]
