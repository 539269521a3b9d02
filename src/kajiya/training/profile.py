"""A few steps under torch's profiler: a trace that chrome://tracing and Perfetto open, and a table of where the time went."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from kajiya.config.quantities import format_bytes
from kajiya.run.files import write_json
from kajiya.training.state import TrainState
from kajiya.training.timing import time_words

_FROM, _UNTIL = 2, 4
"""Steps of this attempt before the profile, and before its end: the first ones warm caches up and compile."""
_ROWS = 40


class Profile:
    """Called after every step; profiles two steps of an attempt, and then writes into `folder`.

    trace.json, table.txt (modules, operations, memory), time.json, memory.json (bytes at hand over the two steps); on a GPU
    memory.pickle too, a snapshot of its allocator for pytorch.org/memory_viz.
    """

    def __init__(self, model: nn.Module, device: torch.device, folder: Path, compiled: bool) -> None:
        self._model = model
        self._device = device
        self._folder = folder
        self._marks_modules = not compiled
        self._steps = 0
        self._open = ExitStack()
        self._profile: Any = None
        self._before: dict[str, float] = {}

    def after_step(self, state: TrainState) -> Path | None:
        """Begin or end where it is time; the folder when it was written now."""
        self._steps += 1
        if self._steps == _FROM:
            self._begin(state)
        elif self._steps == _UNTIL:
            return self._end(state)
        return None

    def close(self) -> str | None:
        """No more steps come; why there is no profile, in words, where the attempt was too short for one."""
        if self._steps >= _UNTIL:
            return None
        self._open.close()
        if self._device.type == "cuda":
            torch.cuda.memory._record_memory_history(enabled=None)
        return f"no profile: this attempt took {self._steps} steps, and one is of steps {_FROM + 1} and {_UNTIL}"

    def _begin(self, state: TrainState) -> None:
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if self._device.type == "cuda" else [])
        if self._marks_modules:
            self._open.enter_context(modules_marked(self._model))
        if self._device.type == "cuda":
            torch.cuda.memory._record_memory_history()
        self._profile = self._open.enter_context(
            profile(activities=activities, record_shapes=True, profile_memory=True)
        )
        self._before = dict(state.spent)

    def _end(self, state: TrainState) -> Path:
        self._open.close()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._profile.export_chrome_trace(str(self._folder / "trace.json"))
        spent = {name: seconds - self._before.get(name, 0.0) for name, seconds in state.spent.items()}
        table = self._profile.key_averages(group_by_input_shape=True).table(
            sort_by=f"self_{'cuda' if self._device.type == 'cuda' else 'cpu'}_time_total", row_limit=_ROWS
        )
        modules = sorted((each for each in self._profile.key_averages() if each.key.startswith("module: ")), key=_total)
        lines = [f"{each.key:<60} {_total(each) / 1000:>12.2f} ms" for each in reversed(modules)]
        timeline = memory_timeline(self._folder / "trace.json", self._device)
        text = f"Two steps: {time_words(spent)}\n{_memory_words(timeline, self._device)}\n\n"
        inside = (
            "a module's holds those inside it" if self._marks_modules else "not told apart where blocks are compiled"
        )
        text += f"Forward pass by module ({inside})\n"
        (self._folder / "table.txt").write_text(
            text + "\n".join(lines) + f"\n\nOperations\n{table}\n", encoding="utf-8"
        )
        write_json(self._folder / "time.json", spent)
        write_json(self._folder / "memory.json", {"ms": [t for t, _ in timeline], "bytes": [b for _, b in timeline]})
        if self._device.type == "cuda":
            torch.cuda.memory._dump_snapshot(str(self._folder / "memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        return self._folder


_POINTS = 2000


def memory_timeline(trace: Path, device: torch.device) -> list[tuple[float, int]]:
    """Milliseconds since the first allocation and bytes at hand then, of the profile's trace; thinned to its highest points."""
    number = 1 if device.type == "cuda" else 0  # as c10 counts its kinds of device
    found = sorted(
        (event["ts"], event["args"]["Total Allocated"])
        for event in json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
        if event.get("name") == "[memory]" and event["args"]["Device Type"] == number
    )
    if not found:
        return []
    stride = -(-len(found) // _POINTS)
    parts = [found[at : at + stride] for at in range(0, len(found), stride)]
    first = found[0][0]
    return [((t - first) / 1000, size) for t, size in (max(part, key=lambda point: point[1]) for part in parts)]


def _memory_words(timeline: list[tuple[float, int]], device: torch.device) -> str:
    if not timeline:
        return "Memory: the profiler saw no allocation"
    at, most = max(timeline, key=lambda point: point[1])
    least = min(size for _, size in timeline)
    # The profiler counts a GPU's memory from the start of the process, and the host's from its own.
    what = "Memory" if device.type == "cuda" else "Memory beyond what was held before"
    return f"{what}: from {format_bytes(least)} to {format_bytes(most)}, which is reached after {at:.1f} ms"


def _total(row: Any) -> float:
    """Microseconds on the CPU, or on the GPU where there is one."""
    return float(max(row.cpu_time_total, row.device_time_total))


@contextmanager
def modules_marked(model: nn.Module) -> Iterator[None]:
    """Within, the forward pass of every module is a named range of the profile."""
    ranges: list[Any] = []
    with ExitStack() as handles:
        for name, module in model.named_modules():

            def enter(_module: nn.Module, _inputs: Any, name: str = name or type(model).__name__) -> None:
                ranges.append(record_function(f"module: {name}"))
                ranges[-1].__enter__()

            def leave(_module: nn.Module, _inputs: Any, _result: Any) -> None:
                ranges.pop().__exit__(None, None, None)

            handles.callback(module.register_forward_pre_hook(enter).remove)
            handles.callback(module.register_forward_hook(leave, always_call=True).remove)
        yield
