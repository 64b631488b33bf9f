"""The pages: their code runs, their commands, links and pictures exist, no name is left out."""

import doctest
import importlib
import re
import shlex
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.optim import Adam

import maskmoe_kernels as mk
from bench import arguments as bench_arguments
from bench.gpu import check as bench_gpu
from maskmoe_kernels import cli
from tests.test_package import NAMES

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"

if not DOCS.is_dir():
    pytest.skip("not a checkout: there are no docs", allow_module_level=True)

PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
#: Tests of their own run their code: it needs several processes, other packages or data, or does
#: what a test looks at.
ELSEWHERE = {"distributed.md", "estimators.md", "other_libraries.md", "sessions.md"}
#: Of the extras that a page may need.
EXTRAS = {"hypothesis", "matplotlib", "narwhals", "pandas", "polars", "pyarrow", "sklearn", "zuko"}

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def fenced(page, *languages):
    """The code of the blocks in one of these languages, each with the line that it begins in."""
    text = page.read_text(encoding="utf-8")
    for block in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S):
        if block[1] in languages:
            yield text[: block.start(2)].count("\n"), block[2]


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@every_page
def test_code_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    if page.name in ELSEWHERE:
        others = [path for path in (ROOT / "tests").rglob("test_*.py") if path != Path(__file__)]
        assert any(f"docs/{page.name}" in path.read_text("utf-8")[:500] for path in others)
        return
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {"__name__": page.stem}
    try:
        for line, code in fenced(page, "python"):
            exec(compile("\n" * line + code, str(page), "exec"), names)
    except ModuleNotFoundError as error:
        if error.name.partition(".")[0] not in EXTRAS:
            raise
        pytest.skip(f"{error.name} is not installed")


def commands_of(page):
    """Commands of the package and of a checkout, each as its words."""
    for _, code in fenced(page, "", "bash", "console", "sh"):
        for line in code.replace("\\\n", " ").splitlines():
            if command := re.match(r"(?:[A-Z_]+=\S+ )*((?:maskmoe|make|python3? -m) .*)", line):
                yield shlex.split(command[1], comments=True)


EXAMPLES = [
    path for path in (ROOT / "maskmoe_kernels").rglob("*.py") if ">>> " in path.read_text("utf-8")
]


class Model(nn.Module):
    """As an example has it that wraps a network."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def loss(self, x, target):
        return self.net.gem_loss(x, target)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: str(path.relative_to(ROOT)))
def test_examples_of_docstrings_run(path):
    """With the names of the package, and those that a reader has before the example."""
    source = path.read_text("utf-8")
    if "captum" in source:
        pytest.importorskip("captum", reason="captum is not installed")
    if path.parent.name == "estimators":
        pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    torch.manual_seed(0)
    family = mk.SubsetFamily.powerset({"a": 2, "b": 3})
    dense = nn.Linear(5, 4)
    checkpoint = {"model": dense.state_dict(), "optimizer": Adam(dense.parameters()).state_dict()}
    layer = mk.MaskedLinear.from_linear(dense, torch.rand(4, 5) < 0.5)
    net = mk.InterpretableMLP(family, [4])
    before = {
        **vars(mk), "torch": torch, "nn": nn, "family": family, "layer": layer, "net": net,
        "model": Model(net) if "fully_shard" in source else layer, "checkpoint": checkpoint,
        "x": torch.randn(7, 5), "target": torch.rand(7).round(), "expert": 2,
        "fully_shard": fully_shard,
        "register_fsdp_forward_method": register_fsdp_forward_method,
    }  # fmt: skip
    module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    done = doctest.testmod(module, extraglobs=before)
    assert done.attempted > 0
    assert done.failed == 0


@every_page
def test_commands_are_understood(page, capsys):
    targets = (ROOT / "Makefile").read_text(encoding="utf-8")
    for words in commands_of(page):
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", targets, re.M), words
        elif "ID" in words or "-m" in words[3:]:
            continue  # a placeholder; torchrun's own
        elif words[0] == "maskmoe":
            cli._parser().parse_args(words[1:])
        elif words[2] == "bench":
            bench_arguments.parse(words[3:])
        elif words[2] == "bench.gpu.check":
            bench_gpu._parser().parse_args(words[3:])
        else:
            assert words[2] in ("bench.gpu.static", "build", "pip", "pytest"), words


@every_page
def test_links_and_pictures_are_there(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    shipped = (ROOT / "bench" / "results").is_dir()  # not with the sources alone
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"https?:|#", target) and (shipped or "bench/results" not in target):
            assert (page.parent / target.partition("#")[0]).exists(), target


def test_the_reference_has_every_public_name():
    documented = set()
    for page in (DOCS / "api").glob("*.md"):
        module = "maskmoe_kernels"
        for kind, name in re.findall(r"^\.\. (\w+):: ([\w.]+)$", page.read_text("utf-8"), re.M):
            if kind == "currentmodule":
                module = name
            else:
                documented.add(f"{module}.{name}".removeprefix("maskmoe_kernels."))
    assert {name for name in mk.__all__ if name != "testing"} <= documented
    of_modules = {name for name in NAMES if name.startswith("testing.")}
    assert of_modules <= documented


def test_pictures_are_those_that_the_script_draws(tmp_path, monkeypatch):
    image = pytest.importorskip("matplotlib.image")
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    script = {"__name__": "pictures", "__file__": str(DOCS / "pictures.py")}
    exec(compile((DOCS / "pictures.py").read_text("utf-8"), "pictures.py", "exec"), script)
    script["PICTURES"] = tmp_path
    script["main"]()
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {path.name for path in (DOCS / "pictures").iterdir()}
    shown = "".join(page.read_text("utf-8") for page in PAGES)
    for name in sorted(drawn):
        assert f"](pictures/{name})" in shown
        ours, theirs = (image.imread(folder / name) for folder in (tmp_path, DOCS / "pictures"))
        assert ours.shape == theirs.shape
        assert abs(ours - theirs).mean() < 0.02  # another version draws other edges
