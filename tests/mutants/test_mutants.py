"""The tool itself: what its operators change, what survives a weak test, what the list matches."""

import shutil
import textwrap
from itertools import pairwise

import pytest

from tests.mutants import cpp_operators, python_operators, targets, trial
from tests.mutants.__main__ import Equivalents
from tests.mutants.mutant import apply, sample

PYTHON = '''\
"""A docstring with 1 < 2."""
def f(x: int = 3, *, dim=1):
    """Not 2 + 2 either."""
    if x < 10 and not dim:
        raise ValueError(f"x is {x + 1}")
    y = g(x, dim, keep=True).masked_fill(x == 0, 0).detach()
    y += h[1:]
    return max(y, x) if y is None else y
'''
CPP = """\
constexpr int kSize = 4 * 2;
template <int N>
int f(int a, int b) {
  static_assert(N < 4, "text");
  STD_TORCH_CHECK(a < b, "must be ", a + 1);
  if constexpr (N > 1) a += 1;
  if (a == b) return std::min<int>(a, 7);
  g<N + 1>(a);
  __builtin_prefetch(p + 64);
  return a * b;
}
"""


def becomes(mutants, operator):
    return [m.becomes for m in mutants if m.operator == operator]


def test_python_operators_change_what_is_computed_and_no_text():
    mutants = python_operators.mutants("f.py", PYTHON)
    for each in mutants:
        compile(apply(PYTHON, [each]), "f.py", "exec")
        assert "docstring" not in each.line
        assert "Not 2" not in each.line
        assert "x + 1" not in each.line or each.operator == "statement removed"
    assert "if x <= 10 and not dim:" in becomes(mutants, "comparison")
    assert "if x < 10 or not dim:" in becomes(mutants, "boolean")
    assert "if (x < 10):" in becomes(mutants, "operand dropped")
    assert {"if True:", "if False:"} <= set(becomes(mutants, "condition"))
    assert "pass" in becomes(mutants, "statement removed")
    assert "y -= h[1:]" in becomes(mutants, "arithmetic")
    assert "y += h[:]" in becomes(mutants, "slice bound dropped")
    assert "return min(y, x) if y is None else y" in becomes(mutants, "name confused")
    assert "return max(x, y) if y is None else y" in becomes(mutants, "arguments swapped")
    line = "y = g(x, dim{}).masked_fill(x == 0, {}).detach()"
    assert line.format("", 0) in becomes(mutants, "argument dropped")
    assert line.format(", keep=True", 1) in becomes(mutants, "constant")
    assert line.format(", keep=True", 0).removesuffix(".detach()") in becomes(
        mutants, "call removed"
    )


def test_cpp_operators_leave_alone_what_the_compiler_computes():
    pytest.importorskip("tree_sitter_cpp", reason="the C++ mutants need tree-sitter-cpp")
    mutants = cpp_operators.mutants("f.h", CPP)
    changed = {m.line for m in mutants}
    for fixed in ("constexpr int", "static_assert", "int f("):
        assert not any(line.startswith(fixed) for line in changed)
    assert 'STD_TORCH_CHECK(a <= b, "must be ", a + 1);' in becomes(mutants, "comparison")
    assert not any("a - 1" in m.becomes or "N - 1" in m.becomes for m in mutants)
    assert "if (true) return std::min<int>(a, 7);" in becomes(mutants, "condition")
    assert "if (a == b) return std::max<int>(a, 7);" in becomes(mutants, "name confused")
    assert not any("prefetch" in line for line in changed)
    assert {m.function for m in mutants} == {"f"}


def test_all_cpp_mutants_share_one_build(tmp_path):
    """Behind the switch each acts alone, and none does while it is 0."""
    pytest.importorskip("tree_sitter_cpp", reason="the C++ mutants need tree-sitter-cpp")
    compiler = shutil.which("c++") or pytest.skip("needs a C++ compiler")
    import ctypes
    import subprocess

    text = (
        'extern "C" int f(int a, int b) {\n  if (a < b) a += 5; else a += 0;\n  return a * b;\n}\n'
    )
    mutants = cpp_operators.mutants("f.cpp", text)
    (less,) = (m for m in mutants if m.new == "a <= b")
    (plus,) = (m for m in mutants if m.new == "a + b")
    gone = next(m for m in mutants if m.operator == "statement removed")
    source = tmp_path / "f.cpp"
    source.write_text(
        cpp_operators.DEFINITION + cpp_operators.switched(text, [(1, less), (2, plus), (3, gone)])
    )
    library = tmp_path / "f.so"
    subprocess.run([compiler, "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    switch = ctypes.c_int.in_dll(loaded, cpp_operators.SWITCH)
    results = {}
    for switch.value in range(4):
        results[switch.value] = (loaded.f(2, 3), loaded.f(3, 3))
    assert results == {0: (21, 9), 1: (21, 24), 2: (10, 6), 3: (6, 9)}


def test_a_run_tells_how_it_ended(tmp_path, monkeypatch):
    """In a forked child: passed, failed by a named test, crashed or hung in one."""
    monkeypatch.setattr(trial, "LIMIT", 4)  # starting takes 1 where others work, too
    (tmp_path / "pyproject.toml").write_text('[tool.pytest.ini_options]\nmarkers = ["slow"]\n')
    (tmp_path / "judged.py").write_text("")
    tests = tmp_path / "test_it.py"
    tests.write_text(
        textwrap.dedent(
            """
            import os
            def test_weak(): assert 1 < 2
            def test_sharp(): assert "BREAK" not in os.environ
            def test_crash(): "CRASH" in os.environ and os.abort()
            def test_hang():
                while "HANG" in os.environ: pass
            """
        )
    )

    def run(**environment):
        child = trial.Child(tmp_path, ["test_it.py"], environment=environment)
        while (outcome := child.outcome()) is None:
            pass
        return outcome

    assert run().passed
    assert run(BREAK="1").by == "test_it.py::test_sharp"
    assert run(CRASH="1").by == "SIGABRT in test_it.py::test_crash"
    assert run(HANG="1").by == "4 s of processor time are over in test_it.py::test_hang"


def test_a_weak_test_lets_its_mutant_survive_and_the_checkout_never_sees_it(tmp_path, monkeypatch):
    checkout, tree = tmp_path / "checkout", tmp_path / "tree"
    for folder in (checkout, tree):
        folder.mkdir()
        (folder / "judged.py").write_text("def less(a, b):\n    return a < b\n")
    for name, assertion in (("weak", "less(1, 2)"), ("sharp", "not less(2, 2)")):
        (tree / f"test_{name}.py").write_text(
            f"from judged import less\ndef test_{name}(): assert {assertion}\n"
        )
    (tree / "pyproject.toml").write_text(
        '[tool.pytest.ini_options]\nmarkers = ["slow"]\npythonpath = ["."]\n'
    )
    monkeypatch.setattr(trial, "ROOT", checkout)
    before = (checkout / "judged.py").read_text()
    (mutant,) = (m for m in python_operators.mutants("judged.py", before) if m.new == "<=")
    survived = {}
    for name in ("weak", "sharp"):
        child = trial.Child(tree, [f"test_{name}.py"], mutant)
        assert "<=" in (tree / "judged.py").read_text()
        while (outcome := child.outcome()) is None:
            pass
        survived[name] = outcome.passed
        assert (tree / "judged.py").read_text() == (checkout / "judged.py").read_text() == before
    assert survived == {"weak": True, "sharp": False}


def test_equivalents_are_matched_by_content():
    mutants = python_operators.mutants("f.py", PYTHON)
    moved = python_operators.mutants("f.py", "\n\n" + PYTHON)
    listed = Equivalents(
        [
            {"file": "f.py", "line": "y += h[1:]", "operator": "arithmetic", "reason": "so"},
            {"file": "f.py", "function": "gone", "reason": "matches nothing"},
        ]
    )
    for some in (mutants, moved):
        assert [m.becomes for m in some if listed.reason(m) == "so"] == ["y -= h[1:]"]
    assert [entry["reason"] for entry in listed.stale()] == ["matches nothing"]


def test_samples_are_seeded_and_touch_no_text_twice():
    mutants = python_operators.mutants("f.py", PYTHON)
    drawn = sample(mutants, 8, seed=1)
    assert drawn == sample(mutants, 8, seed=1) != sample(mutants, 8, seed=2)
    spans = sorted((m.start, m.end) for m in drawn)
    assert all(a[1] <= b[0] for a, b in pairwise(spans))
    less = [m for m in mutants if m != drawn[0]]
    assert set(drawn[1:]) <= set(sample(less, 9, seed=1))  # what is listed shifts nobody else
    every = sample(mutants, 10_000, seed=1)
    text = apply(PYTHON, every)
    compile(text, "f.py", "exec")


@pytest.mark.skipif(
    not (trial.ROOT / "maskmoe_kernels").is_dir(), reason="the suite runs against a wheel"
)
def test_every_target_has_tests_that_exist():
    for table in (targets.PYTHON, targets.CPP):
        for pattern, tests in table.items():
            assert list(trial.ROOT.glob(pattern)), pattern
            assert all((trial.ROOT / test).exists() for test in tests), tests
