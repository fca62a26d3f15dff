"""The rules of the house that a reader would have to check by eye: imports, host synchronisation, docstrings."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

MAY_IMPORT = {
    "io": set(),
    "model": {"io"},
    "data": {"io"},
    "pipeline": {"model", "io"},
    "evaluation": {"model", "io"},
    "serving": set(),  # a package of its own, in an environment of its own
}
"""Package of `utils` -> the other packages of `utils` that it may import."""

TRAVELS = sorted((ROOT / "utils/model").glob("*_mod.py"))
"""The modules that are copied into every saved checkpoint."""

HOST_SYNCHRONISATION = {"item", "tolist", "numpy"}
"""Methods that wait for the device; `cpu` and `to` may be needed to move a module."""


def python_files(*folders: str) -> list[Path]:
    """The Python files below folders of the repository."""
    return sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))


def name_of(file: Path) -> str:
    """Path from the root of the repository, as the name of a test case."""
    return file.relative_to(ROOT).as_posix()


def imported_modules(file: Path) -> set[str]:
    """Absolute dotted names of all that a file imports, anywhere in it, relative imports resolved."""
    package = file.relative_to(ROOT).with_suffix("").parts[:-1]
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*parent, *([node.module] if node.module else [])])
            # `from utils import data` imports a package as much as `from utils.data import x` does
            names.update(f"{base}.{alias.name}" for alias in node.names)
    return names


def test_there_is_something_to_check():
    assert {file.name for file in TRAVELS} >= {
        "configuration_mod.py",
        "routing_mod.py",
        "execution_mod.py",
        "modeling_mod.py",
    }


@pytest.mark.parametrize("file", python_files("utils"), ids=name_of)
def test_a_package_imports_only_those_below_it(file):
    parts = file.relative_to(ROOT / "utils").parts
    package = parts[0] if len(parts) > 1 else None
    allowed = MAY_IMPORT[package] | {package} if package else set()
    imported = {name.split(".")[1] for name in imported_modules(file) if name.startswith("utils.")}
    assert imported <= allowed, f"may import {sorted(allowed)} of utils, and imports {sorted(imported - allowed)}"


@pytest.mark.parametrize("file", python_files("utils"), ids=name_of)
def test_nothing_in_utils_imports_an_entrypoint_or_a_test(file):
    assert not {name.split(".")[0] for name in imported_modules(file)} & {"entrypoints", "tests", "conftest"}


@pytest.mark.parametrize("file", python_files("entrypoints"), ids=name_of)
def test_entrypoints_do_not_import_each_other(file):
    assert not [name for name in imported_modules(file) if name.split(".")[0] in ("entrypoints", "tests")]


@pytest.mark.parametrize("file", TRAVELS, ids=name_of)
def test_a_module_that_travels_imports_torch_transformers_and_its_siblings_only(file):
    """Siblings as `from .name_mod import x`: what transformers finds, copies and flattens."""
    siblings = {sibling.stem for sibling in TRAVELS}
    outside = {"torch", "transformers"} | sys.stdlib_module_names
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= outside, f"line {node.lineno}"
        elif isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1, f"line {node.lineno}"
            assert node.module in siblings, f"line {node.lineno}"
        elif isinstance(node, ast.ImportFrom):
            assert node.module.split(".")[0] in outside, f"line {node.lineno}"


@pytest.mark.parametrize("file", TRAVELS, ids=name_of)
def test_a_module_that_travels_never_asks_the_device_for_a_value(file):
    tree = ast.parse(file.read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    assert not [f"{node.func.attr}() in line {node.lineno}" for node in calls if node.func.attr in HOST_SYNCHRONISATION]


@pytest.mark.parametrize("file", TRAVELS, ids=name_of)
def test_a_module_that_travels_writes_no_state_to_modules_in_a_forward(file):
    """Attributes of `self` are set in `__init__` and `__post_init__` of modules, or in classes that are no modules."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        if function.name in ("forward", "route", "decide", "dense_forward", "sparse_forward"):
            targets = [
                target
                for node in ast.walk(function)
                if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign)
                for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
            ]
            written = [ast.unparse(t) for t in targets if isinstance(t, ast.Attribute)]
            assert not [name for name in written if name.split(".")[0] in ("self", "layer", "router")]


@pytest.mark.parametrize("file", python_files("utils", "entrypoints", "tests"), ids=name_of)
def test_every_module_says_what_it_is(file):
    assert ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
