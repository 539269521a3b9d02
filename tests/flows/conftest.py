"""Fixtures of the searches' tests."""

from typing import TYPE_CHECKING

import pytest

from kajiya.flows import tune_confirm, tune_jobs

if TYPE_CHECKING:
    from tests.flows.test_tune import Trials


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> "Trials":
    """Trials that cost nothing in the place of processes."""
    from tests.flows.test_tune import Trials

    found = Trials()
    monkeypatch.setattr(tune_jobs, "execute", found.execute)
    monkeypatch.setattr(tune_confirm, "execute", found.execute)
    return found
