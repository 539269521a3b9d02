"""The benchmark's structure: both peers train the same thing and are compared; no figure of time is asserted."""

import ast
import importlib
import io
import json
import math
import os
import subprocess
import sys
import sysconfig
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def throughput(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import train_throughput

    return train_throughput


@pytest.fixture
def comparing(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The comparison as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import compare

    return compare


def test_every_option_of_the_start_up_has_its_words() -> None:
    tree = ast.parse((BENCHMARKS / "startup.py").read_text(encoding="utf-8"))
    options = [
        node for node in ast.walk(tree) if isinstance(node, ast.Call) and "add_argument" in ast.unparse(node.func)
    ]
    assert len(options) >= 9
    assert [node.lineno for node in options if "help" not in {word.arg for word in node.keywords}] == []


def test_a_comparison_has_the_tolerance_of_the_coarser_precision(throughput: ModuleType) -> None:
    assert throughput.coarser("fp32", "bf16-mixed") == throughput.coarser("fp16-mixed", "fp32") == "bf16"
    assert throughput.coarser("bf16", "fp8") == "fp8"
    assert throughput.coarser("fp32", "fp32") == "fp32"


def test_what_an_ablation_leaves_out_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that has moved would be set beside the code that is meant, and the ablation would find nothing."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from peers.kajiya_train import _TRICKS

    for module, name, other in _TRICKS.values():
        assert callable(getattr(importlib.import_module(module), name))
        assert callable(other)


def made_result(peer: str, **changed: Any) -> Any:
    from measure import Result

    result = Result(
        peer=peer,
        tokens_per_second=100.0,
        first_step_s=4.0,
        peak_bytes=2**30,
        step_s=[1.0, 1.0],
        losses=[9.0, 8.0, 7.0],
        tokens_digest="a",
        initial_weights=1000.0,
        versions={},
        settings={},
        step_tokens=[100, 100, 100],
        before_s=0.0,
        before_cpu_s=0.0,
        tokens_per_cpu_second=50.0,
        own_order=None,
        load_before=0.0,
    )
    return replace(result, **changed)


def test_ratios_are_of_medians(comparing: ModuleType) -> None:
    ours = [made_result("a", tokens_per_second=speed) for speed in (300.0, 200.0, 900.0)]
    theirs = [made_result("b", tokens_per_second=speed) for speed in (100.0, 150.0, 300.0)]
    theirs = [replace(result, peak_bytes=2**31, first_step_s=16.0) for result in theirs]
    comparison = comparing.compare(ours, theirs, "fp32")
    assert comparison.tokens_per_second == 300.0 / 150.0
    assert comparison.tokens_per_second_rounds == [3.0, 200.0 / 150.0, 3.0]
    assert comparison.peak_memory == 0.5
    assert comparison.first_step == 0.25
    assert comparison.agreement.holds


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"tokens_digest": "b"}, "other tokens"),
        ({"initial_weights": 1001.0}, "other initial weights"),
        ({"losses": [9.0, 8.1, 7.0]}, "1.00e-01 nats apart at step 2"),
        ({"losses": [9.0, 8.0, math.nan]}, "inf nats apart at step 3"),
    ],
)
def test_a_disagreement_is_printed_as_one(
    throughput: ModuleType, capsys: pytest.CaptureFixture[str], changed: dict[str, Any], said: str
) -> None:
    from measure import Peer

    ours, theirs = [made_result("a")], [made_result("b", **changed)]
    comparison = throughput.compare(ours, theirs, "fp32")
    assert not comparison.agreement.holds
    order = throughput.WorkOrder("S", "", "", "", None, "", 2, 8, 2, 3, "fp32", False, 0)
    chosen = [Peer(name, name, {}) for name in ("a", "b")]
    throughput.print_table(order, chosen, {"a": ours, "b": theirs}, [comparison], {"fp32": 1e12})
    printed = capsys.readouterr().out
    assert "DISAGREEMENT with b" in printed
    assert said in printed


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory of other processes is read from /proc")
def test_memory_counts_descendants(throughput: ModuleType) -> None:
    import measure

    taken = 96 * 2**20
    # The child takes a block and its own child another one at the same time; each prints a line when it has it.
    hold = f"import os; block = bytearray({taken}); block[::4096] = b'x' * len(block[::4096]); os.write(1, b'held\\n'); input()"
    code = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {hold!r}]); {hold}; p.wait()"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    assert process.stdin is not None
    assert process.stdout is not None
    deadline = time.monotonic() + 60
    try:
        with measure.MemoryWatch(process.pid) as watch:
            assert [process.stdout.readline() for _ in range(2)] == ["held\n", "held\n"]
            alone = max(highest for _, highest in measure._family(process.pid))
            while (watch.peak_bytes or 0) < 2 * taken:
                assert process.poll() is None
                assert time.monotonic() < deadline, watch.peak_bytes
                time.sleep(0.01)
    finally:
        process.communicate("\n\n", timeout=60)
    assert alone < 2 * taken


def test_a_peer_of_its_own_order_is_compared_by_its_mean_loss(comparing: ModuleType) -> None:
    other = made_result("b", losses=[7.0, 8.1, 9.0], tokens_digest="b", own_order="it packs itself")
    agreement = comparing.compare([made_result("a")], [other], "fp32").agreement
    assert agreement.holds
    assert agreement.largest_loss_difference == pytest.approx(0.1 / 3)
    worse = replace(other, losses=[7.0, 8.0, 12.0])
    assert not comparing.compare([made_result("a")], [worse], "fp32").agreement.holds


def test_the_speed_is_of_real_tokens_and_charged_with_work_done_before(throughput: ModuleType) -> None:
    from measure import speed

    assert speed([100] * 4, [9.0, 1.0, 2.0], 0.0, warmup_steps=2) == 100 / 1.5
    assert speed([100] * 4, [1.0, 1.0, 1.0], 4.0, warmup_steps=1) == 100 / 2.0
    # Steps of other numbers of tokens: all tokens over all seconds.
    assert speed([50, 10, 30, 20], [7.0, 3.0, 2.0], 4.0, warmup_steps=2) == 50 / (5.0 + 2.0)


def test_a_peer_has_options_of_its_own(throughput: ModuleType) -> None:
    (peer,) = throughput.parse(["--peers", "trl_sft:packing=on,precision=bf16,micro_rows=2"]).peers
    order = throughput.WorkOrder("S", "", "", "", None, "", 8, 16, 8, 3, "fp32", False, 0).with_options(peer.options)
    assert (peer.script, order.precision, order.micro_rows, order.options) == ("trl_sft", "bf16", 2, {"packing": "on"})
    for wrong in ("none_such", "trl_sft:packing"):
        with pytest.raises(SystemExit):
            throughput.parse(["--peers", wrong])


def test_samples_come_back_as_they_lay_in_packed_rows(throughput: ModuleType, tmp_path: Path) -> None:
    import numpy as np
    import torch

    from kajiya.data.batch import NO_TARGET, Batch
    from samples import padded, read_samples, samples_of, save_samples

    # Two samples and what fills the row up: 5 6 7 | 8 9 | pad; the first token of each is its prompt.
    rows = torch.tensor([[5, 6, 7, 8, 9, 0]]), torch.tensor([[6, 7, NO_TARGET, 9, NO_TARGET, NO_TARGET]])
    batch = Batch(*rows, torch.tensor([[0, 1, 2, 0, 1, 0]]), torch.tensor([[0, 0, 0, 1, 1, 2]]), 3)
    save_samples([samples_of(batch), samples_of(batch)[:1]], tmp_path / "samples.npz")
    steps = read_samples(str(tmp_path / "samples.npz"))
    assert [[sample.ids.tolist() for sample in step] for step in steps] == [[[5, 6, 7], [8, 9]], [[5, 6, 7]]]
    assert [sample.labels.tolist() for sample in steps[0]] == [[NO_TARGET, 6, 7], [NO_TARGET, 9]]
    assert steps[0][0].prompt_length == 1
    ids, labels, is_token = padded(steps[0], pad_id=4)
    assert ids.tolist() == [[5, 6, 7], [8, 9, 4]]
    assert labels.tolist() == [[NO_TARGET, 6, 7], [NO_TARGET, 9, NO_TARGET]]
    assert np.array_equal(is_token, [[True, True, True], [True, True, False]])


def test_every_peer_is_offered(throughput: ModuleType) -> None:
    offered = ["bare_loop", "bare_samples", "hf_trainer", "kajiya_train", "litgpt_pretrain", "llamafactory_pt"]
    assert throughput.peers() == [
        *offered,
        "torchtitan_pretrain",
        "torchtune_full",
        "trl_dpo",
        "trl_sft",
        "unsloth_full",
        "unsloth_lora",
    ]
    assert [peer.name for peer in throughput.parse([]).peers] == ["kajiya_train", "hf_trainer"]


def arguments_of(store: Path, *more: str) -> list[str]:
    """The benchmark's arguments for one run of each peer, of a tiny model on the source of `email`."""
    text = Path(sysconfig.get_paths()["stdlib"]) / "email"
    return ["--json", "--model", "XS", "--repeats", "1", "--store", str(store), "--text", str(text), *more]


def report_of(throughput: ModuleType, store: Path, *more: str) -> dict[str, Any]:
    """What the benchmark prints in JSON, from this process; its peers have a process each."""
    printed, errors = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed), redirect_stderr(errors):
        patch.setenv("OMP_NUM_THREADS", "1")
        code = throughput.main(arguments_of(store, *more))
    assert code == 0, errors.getvalue()
    return json.loads(printed.getvalue())  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def tuning_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store for the rows that several methods are tuned on."""
    return tmp_path_factory.mktemp("tuning")


@pytest.mark.slow
def test_both_peers_do_the_same_work(tmp_path: Path) -> None:
    peers = ["kajiya_train", "hf_trainer", "bare_loop:chunks=2"]
    arguments = ["--rows", "4", "--micro-rows", "2", "--tokens", "32", "--steps", "4", "--precision", "fp32"]
    command = [sys.executable, str(BENCHMARKS / "train_throughput.py"), *arguments_of(tmp_path, *arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--peers", *peers], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert list(report["runs"]) == peers
    for runs in report["runs"].values():
        (result,) = runs
        assert len(result["losses"]) == 4
        assert len(result["step_s"]) == 3
        assert result["tokens_per_second"] > 0
        assert result["losses"][0] == pytest.approx(math.log(512), abs=0.2)
    assert [comparison["peer"] for comparison in report["comparisons"]] == peers[1:]
    for comparison in report["comparisons"]:
        agreement = comparison["agreement"]
        assert agreement["same_tokens"]
        assert agreement["same_weights"]
        assert agreement["same_losses"]
        assert agreement["largest_loss_difference"] < 1e-4
        speeds = [report["runs"][peer][0]["tokens_per_second"] for peer in ("kajiya_train", comparison["peer"])]
        assert comparison["tokens_per_second"] == pytest.approx(speeds[0] / speeds[1])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sft", "lora", "dpo"])
def test_tunings_learn_the_same_from_packed_and_padded_samples(
    throughput: ModuleType, tuning_store: Path, method: str
) -> None:
    words = ("--method", method, "--tokens", "512", "--steps", "3", "--precision", "fp32")
    report = report_of(throughput, tuning_store, *words)
    runs = {peer: results[0] for peer, results in report["runs"].items()}
    for comparison in report["comparisons"]:
        assert comparison["agreement"]["same_weights"]
        other = runs[comparison["peer"]]
        if other["own_order"] is None:
            assert comparison["agreement"]["same_tokens"]
            assert other["step_tokens"] == runs["kajiya_train"]["step_tokens"]
            # Adapters begin at other random values, which move nothing before the first update.
            assert other["losses"][0] == pytest.approx(runs["kajiya_train"]["losses"][0], abs=2e-4)
    assert runs["kajiya_train"]["before_s"] > 0 if method == "dpo" else runs["kajiya_train"]["before_s"] == 0
