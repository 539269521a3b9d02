"""Libraries in C++ that are built at first use."""

import tempfile
from typing import Any

import pytest

from kajiya.run.native.build import NativeBuildError, build_library, find_compiler


@pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler on this machine")
def test_a_cache_that_cannot_be_written_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks for a library has something slower to fall back to."""

    def refuses(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryDirectory", refuses)
    with pytest.raises(NativeBuildError, match="cannot be written: Permission denied"):
        build_library("never-built", "kajiya.serving.native", (), "decoder.cpp")
