"""Counts as people write them: 6M, 1.3B, 512k."""

import math
import re

from kajiya.errors import ConfigError

_FACTORS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}


def parse_count(text: str, field: str) -> int:
    """`"6M"` → 6000000. Raises `ConfigError` naming `field` for anything else than a positive number and k, M, B or T."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKmMbBtT]?)\s*", text)
    count = float(found[1]) * _FACTORS[found[2].lower()] if found else 0.0
    if not 0.5 < count < math.inf:
        raise ConfigError(field, f"{text!r} is not a count", "Write it as 6000000, 6M or 1.3B.")
    return round(count)


def format_count(count: float) -> str:
    """6_012_345 → `"6.0M"`."""
    for factor, letter in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= factor:
            return f"{count / factor:.1f}{letter}"
    return f"{count:.0f}"


def format_bytes(count: float) -> str:
    """Bytes with a binary unit: 1_610_612_736 → `"1.5 GiB"`."""
    for factor, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count:.0f} B"


def format_seconds(seconds: float) -> str:
    """Seconds as `"48 s"`, `"3 min 20 s"` or `"2 h 5 min"`."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"
