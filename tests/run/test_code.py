"""The code revision follows what a module imports, and only in this package."""

import ast
from pathlib import Path

import pytest

import kajiya
from kajiya.run import code
from kajiya.run.code import code_revision, imported_modules, module_path


def test_imports_are_found_also_inside_functions() -> None:
    source = b"import os\nfrom kajiya.data import shards\ndef f():\n    import kajiya.models.build\n"
    found = set(imported_modules(source))
    assert found == {"kajiya.data", "kajiya.data.shards", "kajiya.models.build"}


def test_the_lines_say_what_the_parsed_sources_say() -> None:
    paths = sorted(Path(kajiya.__file__).parent.rglob("*.py"))
    assert len(paths) > 300
    n_imports = 0
    for path in paths:
        expected = set()
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Import):
                expected |= {alias.name for alias in node.names if alias.name.startswith("kajiya")}
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kajiya"):
                expected |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
        assert set(imported_modules(path.read_bytes())) == expected, path
        n_imports += len(expected)
    assert n_imports > 3000


def test_module_paths() -> None:
    store = module_path("kajiya.run.store")
    assert store is not None
    assert store.name == "store.py"
    package = module_path("kajiya.run")
    assert package is not None
    assert package.name == "__init__.py"
    assert module_path("kajiya.run.store.produce") is None
    assert module_path("json") is None


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "data").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "data" / "__init__.py").write_text("")
    (tmp_path / "data" / "a.py").write_text(
        "def f():\n    from kajiya.data.b import g\n    from kajiya.run.files import h\n"
    )
    (tmp_path / "data" / "b.py").write_text("g = 1\n")
    (tmp_path / "data" / "c.py").write_text("c = 1\n")
    (tmp_path / "run" / "files.py").write_text("h = 1\n")
    monkeypatch.setattr(code, "_PACKAGE", tmp_path)
    return tmp_path


def revision(*modules: str) -> str:
    code_revision.cache_clear()
    return code_revision(*modules)


def test_the_revision_changes_with_what_is_imported_and_nothing_else(package: Path) -> None:
    before = revision("kajiya.data.a")
    assert len(before) == 16
    (package / "data" / "c.py").write_text("c = 2\n")
    (package / "run" / "files.py").write_text("h = 2\n")
    assert revision("kajiya.data.a") == before
    (package / "data" / "b.py").write_text("g = 2\n")
    second = revision("kajiya.data.a")
    assert second != before
    (package / "data" / "kernel.cpp").write_text("int k = 1;")
    third = revision("kajiya.data.a")
    assert third != second
    (package / "data" / "kernel.cpp").write_text("int k = 2;")
    assert revision("kajiya.data.a") not in (second, third)
    code_revision.cache_clear()


def test_a_name_without_source_is_a_mistake_of_ours(package: Path) -> None:
    with pytest.raises(AssertionError, match="no source found"):
        revision("kajiya.data.none")
