"""`kajiya train … --find-lr`: a rate to begin with, from a range test whose plot lies in the run's folder."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kajiya.config.schema import Config
from kajiya.data.progress import OnEvent, silent
from kajiya.flows.figure_files import LIGHT, Palette, draw_png, require_figures
from kajiya.flows.fitting import prepare
from kajiya.flows.stages import Stages
from kajiya.flows.train import prepare_data, training_key
from kajiya.run.files import write_json
from kajiya.run.folder import run_name
from kajiya.run.process import set_up_process
from kajiya.run.store import Store
from kajiya.training.find_lr import RangeTest, range_test

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STEPS = 100
_BELOW, _ABOVE = 1e-3, 30.0
"""The test's ends, as factors of the config's own rate."""


@dataclass(frozen=True)
class FoundLR:
    """A range test and where it is kept."""

    test: RangeTest
    plot: Path


def find_lr(config: Config, store: Store, on_event: OnEvent = silent, steps: int = _STEPS) -> FoundLR:
    """Range test of the config's optimizer; weights, generators and data are those of a fresh run, and nothing is trained.

    Writes `lr-range.json` and `lr-range.png` into the folder of the run that the config would be.
    """
    require_figures()
    set_up_process(config.seed, store.root, config.train.deterministic, fp32_matmul=config.train.fp32_matmul)
    data = prepare_data(config, store, Stages(on_event))
    setup = prepare(config, data, store, {}).setup
    on_event("stage", name="find-lr", state="begun", seconds=0.0, text="")
    test = range_test(setup, config.optim.lr * _BELOW, config.optim.lr * _ABOVE, steps)
    folder = store.runs / run_name(config.name, training_key(config, data))
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "lr-range.json", asdict(test))
    plot = folder / "lr-range.png"
    plot.write_bytes(draw_png(draw_range_test, test, LIGHT))
    words = f"optim.lr={test.suggestion:.2g} is where the loss falls fastest"
    on_event("stage", name="find-lr", state="done", seconds=0.0, text=words)
    return FoundLR(test, plot)


def draw_range_test(figure: "Figure", test: RangeTest, palette: Palette, is_narrow: bool) -> None:
    """Loss over the rate, which is drawn in factors; the suggestion is a line."""
    figure.set_size_inches(figure.get_figwidth(), 300 / 72)
    axes = figure.subplots()
    axes.plot(test.rates, test.losses, color=palette["neutral"], linewidth=1, label="each step")
    axes.plot(test.rates, test.smoothed, color=palette["series0"], linewidth=2, label="running mean")
    axes.axvline(test.suggestion, color=palette["series1"], linewidth=1.5, label=f"suggested: {test.suggestion:.2g}")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda rate, _place: f"{rate:g}")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("loss, nats per target")
    axes.legend(frameon=False)
