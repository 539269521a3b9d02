"""The house: rooms import leftward only, no loop of imports anywhere, nothing heavy when the command line wakes up."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import kajiya

PACKAGE = Path(kajiya.__file__).parent
ROOMS = [
    "errors",
    "config",
    "run",
    "data",
    "models",
    "serving",
    "evals",
    "training",
    "exporting",
    "preflight",
    "flows",
    "api",
    "listings",
    "screen",
    "verbs",
    "cli",
    "__main__",
]
HEAVY = {
    "accelerate", "bitsandbytes", "datasets", "fastapi", "hydra", "lm_eval", "matplotlib", "mlflow", "numpy", "omegaconf",
    "optuna", "pandas", "peft", "pyarrow", "ray", "safetensors", "scipy", "seaborn", "sklearn", "tokenizers", "torch",
    "torchao", "torchmetrics", "transformers", "uvicorn", "wandb",
}  # fmt: skip


def _modules() -> dict[str, Path]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(("kajiya", *(part for part in parts if part != "__init__")))
        found[name] = path
    return found


def _imports(path: Path, modules: dict[str, Path], *, only_top: bool = False) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = list(ast.iter_child_nodes(tree)) if only_top else list(ast.walk(tree))
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name for name in inner if name in modules} or {node.module or ""}
    return {name for name in found if name.split(".")[0] == "kajiya"}


def _room(module: str) -> str:
    return module.split(".")[1] if "." in module else "api"


def test_every_room_is_known() -> None:
    modules = _modules()
    assert len(modules) > 50
    assert {_room(name) for name in modules if name != "kajiya"} - {"conf"} <= set(ROOMS)


def test_rooms_import_leftward_only() -> None:
    modules = _modules()
    wrong = [
        f"{name} imports {target}"
        for name, path in modules.items()
        if name != "kajiya"
        for target in _imports(path, modules)
        if target != "kajiya" and ROOMS.index(_room(target)) > ROOMS.index(_room(name))
    ]
    assert wrong == []


def test_no_loop_of_imports() -> None:
    """Lazy imports inside functions count too: a loop is a loop."""
    modules = _modules()
    graph = {name: _imports(path, modules) & set(modules) for name, path in modules.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " → ".join((*trail[trail.index(name) :], name))
        if name not in done:
            for target in graph[name]:
                visit(target, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())
    assert len(done) == len(modules)


def test_the_environment_is_written_in_one_place() -> None:
    writers = [
        name
        for name, path in _modules().items()
        if any(
            sign in path.read_text(encoding="utf-8") for sign in ("os.environ[", "os.environ.setdefault", "os.putenv")
        )
    ]
    assert writers == ["kajiya.run.process"]


def test_the_command_line_wakes_up_light() -> None:
    script = "import kajiya.cli, sys, json; print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    loaded = json.loads(
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    )
    assert "typer" in loaded
    assert set(loaded) & HEAVY == set()


def test_nothing_is_pickled() -> None:
    signs = ("import pickle", "torch.load(", "torch.save(", "allow_pickle=True", "joblib.load")
    found = [
        f"{name}: {sign}" for name, path in _modules().items() for sign in signs if sign in path.read_text("utf-8")
    ]
    assert found == []
