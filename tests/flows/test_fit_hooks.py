"""What a run's log holds of its steps beside the loss."""

from collections.abc import Callable
from pathlib import Path

from kajiya.config.schema import Config
from kajiya.flows.train import train
from kajiya.run.events import read_events
from kajiya.run.store import Store


def test_the_scale_of_fp16_is_logged_and_a_profile_that_could_not_be_is_told(
    small_config: Callable[..., Config], tmp_path: Path
) -> None:
    settings = (
        "train.steps=3",
        "train.log_every=1",
        "train.precision=fp16-mixed",
        "train.profile=true",
        "eval.samples=0",
    )
    trained = train(small_config(*settings), Store(tmp_path))
    events = list(read_events(trained.run.folder))
    logged = [event["values"] for event in events if event["kind"] == "metrics" and "train/lr" in event["values"]]
    assert len(logged) == 3
    # Halved at each overflow, from 2^16.
    assert all(each["train/loss_scale"] == 65_536 / 2 ** each["train/overflows"] for each in logged)
    notes = [event["text"] for event in events if event["kind"] == "note"]
    assert "no profile: this attempt took 3 steps, and one is of steps 3 and 4" in notes
    assert not (trained.run.folder / "profile").exists()
