"""`kajiya shift`: a shift that was made is found, one that was not is not; runs, answers and files are sides alike."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from tests.conftest import Finished
from typer.testing import CliRunner

from kajiya.cli import app
from kajiya.errors import ConfigError
from kajiya.evals.shift import map_embeddings
from kajiya.flows.shift import ShiftAsked, compare_samples
from kajiya.run.store import Store


def _file(path: Path, seed: int, more: float = 0.0) -> tuple[Path, np.ndarray]:
    random = np.random.default_rng(seed)
    price = random.normal(10 + more, 2, size=300)
    words = ["ore", "iron", "hammer", "anvil"]
    rows = [{"text": " ".join(random.choice(words, 12)), "price": float(each)} for each in price]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path, price


def test_a_shift_is_found_where_there_is_one(tmp_path: Path) -> None:
    (a, price_a), (b, price_b), (c, _) = (_file(tmp_path / f"{i}.jsonl", i, more) for i, more in enumerate((0, 4, 0)))
    store = Store(tmp_path / "store")
    far = compare_samples(ShiftAsked(str(a), str(b)), store, tmp_path / "far")
    found = far["quantities"]["column price"]
    assert next(iter(far["quantities"])) == "column price"
    assert found["wasserstein"] == pytest.approx(stats.wasserstein_distance(price_a, price_b))
    assert found["ks"] == pytest.approx(stats.ks_2samp(price_a, price_b).statistic)
    assert found["words"].startswith("a large shift")
    near = compare_samples(ShiftAsked(str(a), str(c)), store, tmp_path / "near")
    assert near["quantities"]["column price"]["words"].startswith("no shift")
    page = Path(far["report"]).read_text(encoding="utf-8")
    assert "The largest shift from A to B is in column price" in page
    assert "<svg" in page
    assert "http" not in page.replace("http://www.w3.org", "")


def test_runs_and_their_embeddings(own_finished: Finished, tmp_path: Path) -> None:
    run = own_finished.trained.run.id
    # The small corpus holds out fewer documents than a side needs, so the training text stands on both sides.
    words = ["shift", run, f"{run}:train", "--model", run, "--limit", "12", "--out", str(tmp_path / "out"), "--json"]
    done = CliRunner().invoke(app, [*words, "--store", str(own_finished.store.root)])
    assert done.exit_code == 0, done.output
    facts: dict[str, Any] = json.loads(done.stdout)
    assert facts["rows"] == [12, 12]
    assert all(each["psi"] == 0 and each["ks"] == 0 for each in facts["quantities"].values())
    assert len(facts["embedding_directions"]) == 8
    assert all(each["wasserstein"] == pytest.approx(0, abs=1e-6) for each in facts["embedding_directions"])
    assert "Map of embeddings" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_what_is_no_side_is_said(own_finished: Finished, tmp_path: Path) -> None:
    for what, problem in (
        ("nothing", "is no file of a known kind"),
        (f"{own_finished.trained.run.id}:tset", "has no 'tset'"),
    ):
        with pytest.raises(ConfigError, match=problem):
            compare_samples(ShiftAsked(what, what), own_finished.store, tmp_path)


@pytest.mark.slow
def test_a_umap_map_keeps_neighbours_together(own_finished: Finished, tmp_path: Path) -> None:
    pytest.importorskip("umap", reason="umap-learn is not installed (the test extra brings it)")
    random = np.random.default_rng(0)
    centres = 20 * np.eye(3, 16)
    vectors = np.concatenate([centre + random.normal(size=(40, 16)) for centre in centres])
    group = np.repeat(np.arange(3), 40)
    places = map_embeddings(vectors, "umap")
    assert places.shape == (120, 2)
    gaps = np.linalg.norm(places[:, None] - places[None], axis=-1) + np.where(np.eye(120), np.inf, 0.0)
    assert (group[gaps.argmin(axis=1)] == group).all()
    assert (map_embeddings(vectors, "umap") == places).all()
    run = own_finished.trained.run.id
    asked = ShiftAsked(run, f"{run}:train", model=run, map="umap", limit=12)
    facts = compare_samples(asked, own_finished.store, tmp_path / "out")
    page = Path(facts["report"]).read_text(encoding="utf-8")
    assert "UMAP, which keeps neighbours together" in page
    assert 'id="figure-map"' in page
