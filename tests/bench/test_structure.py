"""The structure of bench: who imports whom, and how long files and functions may be."""

from __future__ import annotations

import ast
import graphlib
import inspect
import pkgutil
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

import bench
from bench import rivals
from bench.contender import Contender

ROOT = Path(bench.__file__).parent


def module_name(path: Path) -> str:
    name = ".".join(("bench", *path.relative_to(ROOT).with_suffix("").parts))
    return name.removesuffix(".__init__")


FILES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}
#: Package of bench to the other packages that it may import.
ALLOWED = {
    "rivals": set(),
    "layers": {"rivals"},
    "networks": {"rivals"},
    "gpu": {"rivals", "layers", "networks"},
}
#: These may import every package; no package imports them.
TOP = {"bench.__main__", "bench.command", "bench.arguments", "bench.test_bench"}


def imported(path: Path) -> Iterator[str]:
    """Modules that a file imports anywhere, in functions and under TYPE_CHECKING, too."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in FILES else node.module for name in names)


def package_of(module: str) -> str | None:
    name = module.split(".")[1] if module.count(".") else ""
    return name if name in ALLOWED else None


def test_there_are_no_import_cycles() -> None:
    graph = {module: {*imported(path)} & FILES.keys() for module, path in FILES.items()}
    assert [*graphlib.TopologicalSorter(graph).static_order()]  # raises CycleError


@pytest.mark.parametrize("module", FILES)
def test_packages_import_the_packages_below_them(module: str) -> None:
    package, names = package_of(module), {*imported(FILES[module])}
    if module not in TOP:
        assert not names & TOP
        others = {package_of(name) for name in names if name.startswith("bench.")}
        assert others <= {None, package} | ALLOWED.get(package or "", set())


@pytest.mark.parametrize("module", FILES)
def test_files_and_functions_are_short(module: str) -> None:
    text = FILES[module].read_text("utf-8")
    assert len(text.splitlines()) <= 500
    functions = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef))
    assert [f.name for f in functions if f.end_lineno - f.lineno >= 60] == []


def test_every_file_of_a_rival_registers_its_contenders() -> None:
    """A new rival is a new file; no other file names it."""
    for module in pkgutil.iter_modules(rivals.__path__, "bench.rivals."):
        for _, kind in inspect.getmembers(import_module(module.name), inspect.isclass):
            if issubclass(kind, Contender) and kind.__module__ == module.name:
                assert kind in rivals.GPU
    files = {kind.__module__ for kind in rivals.GPU}
    assert not {*imported(FILES["bench.rivals"])} & files


@pytest.mark.parametrize("module", FILES)
def test_nothing_imports_the_installed_command(module: str) -> None:
    assert not any(name.startswith("maskmoe_kernels.cli") for name in imported(FILES[module]))
