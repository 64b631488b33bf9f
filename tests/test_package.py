"""The package itself: its layers, its public names, its version, what importing it needs."""

import ast
import json
import re
import shutil
import subprocess
import sys
import tomllib
from functools import reduce
from pathlib import Path

import pytest

import maskmoe_kernels as mk

ROOT = Path(__file__).resolve().parent.parent

NAMES = """
    SubsetFamily SubsetFamily.powerset BlockLayout BlockLayout.between BlockLayout.from_mask
    masked_linear MaskedLinear MaskedLinear.from_layout MaskedLinear.from_linear
    MaskedLinear.dense_weight MaskedLinear.to_linear
    convert_ revert_
    InterpretableMLP mixture selection gem_loss info sufficient shapley interactions moebius
    testing testing.dense_oracle testing.assert_blind testing.assert_gradient_isolated
    testing.strategies.families testing.strategies.layouts testing.strategies.masks
""".split()
FAMILY = """
    num_groups num_experts in_features membership inclusion strict
    hasse_edges input_layout hidden_layout with_top
""".split()
LAYOUT = "in_features out_features num_weights density mask grad_mask pack unpack".split()


@pytest.fixture(scope="module")
def project() -> dict:
    with open(ROOT / "pyproject.toml", "rb") as file:
        return tomllib.load(file)["project"]


@pytest.mark.parametrize("name", NAMES)
def test_public_name(name):
    reduce(getattr, name.split("."), mk)


def test_listed_names_exist():
    assert [name for name in mk.__all__ if not hasattr(mk, name)] == []
    assert {name for name in NAMES if "." not in name} <= set(mk.__all__)


def test_family_and_layout_keep_their_names():
    family = mk.SubsetFamily(groups={"a": 2, "b": 1}, subsets={"a": ["a"], "both": ["a", "b"]})
    layout = family.hidden_layout(2, 3)
    assert [name for name in FAMILY if not hasattr(family, name)] == []
    assert [name for name in LAYOUT if not hasattr(layout, name)] == []


def test_version_is_the_same_everywhere(project):
    assert mk.__version__ == project["version"]
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^version: (\S+)$", citation, re.MULTILINE)[1] == project["version"]
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{project['version']}]" in changelog


def test_layers_import_lower_layers_only():
    pytest.importorskip("importlinter", reason="import-linter is not installed")
    command = shutil.which("lint-imports", path=str(Path(sys.executable).parent))
    command = command or shutil.which("lint-imports")
    if command is None:
        pytest.skip("lint-imports is not on the path")
    done = subprocess.run(
        [command, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_module_imports_itself_by_others():
    """Imports under ``TYPE_CHECKING`` included."""
    grimp = pytest.importorskip("grimp", reason="import-linter is not installed")
    graph = grimp.build_graph("maskmoe_kernels", cache_dir=None)
    imports = {m: graph.find_modules_directly_imported_by(m) for m in sorted(graph.modules)}
    done, path = set(), []

    def visit(module):
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            path.append(module)
            for other in sorted(imports[module]):
                visit(other)
            done.add(path.pop())

    for module in imports:
        visit(module)


SOURCES = sorted(
    path.relative_to(ROOT)
    for folder in ("maskmoe_kernels", "csrc")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".h", ".cpp", ".cu", ".cc")
)


@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_files_and_functions_stay_short(source):
    text = (ROOT / source).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 500
    if source.suffix != ".py":
        return
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            kernel = any("triton.jit" in ast.unparse(by) for by in node.decorator_list)
            most = 80 if kernel else 60
            assert node.end_lineno - node.lineno < most, node.name


@pytest.mark.skipif(
    not (ROOT / "maskmoe_kernels").is_dir(), reason="the suite runs against a wheel"
)
def test_private_names_of_torch_stand_in_one_module():
    private = re.compile(
        r"\btorch\._(?!_)|\bimport _\w+ as|torch\.(utils|nn|fx)(\.\w+)*\._|_functorch"
    )
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in sorted((ROOT / "maskmoe_kernels").rglob("*.py"))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if private.search(line.split("#")[0]) and "``" not in line and '"torch._utils' not in line
    ]
    assert {place.rpartition(":")[0] for place in found} == {"maskmoe_kernels/_compat.py"}, found


IMPORT = """
import json, sys
extras = "duckdb hypothesis matplotlib narwhals pandas pyarrow pytest safetensors sklearn zuko"
sys.modules.update(dict.fromkeys(extras.split()))
import torch
before = set(sys.modules)
import maskmoe_kernels
added = {name.partition(".")[0] for name in set(sys.modules) - before}
heavy = [name for name in ("rich", "torch._dynamo", "torch._inductor") if name in sys.modules]
from torch.utils.flop_counter import flop_registry
ops = [str(op) for op in flop_registry if "maskmoe" in str(op)]
print(json.dumps({"added": sorted(added - sys.stdlib_module_names), "heavy": heavy, "ops": ops}))
"""


def test_import_needs_no_extra_and_brings_no_package_along():
    """Beyond torch, it imports the standard library alone: it takes a tenth of torch's time."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORT], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["added"], found["heavy"]) == (["maskmoe_kernels"], [])
    assert len(found["ops"]) == 7  # torch's FLOP counter, which imports Triton, knows them all
