"""Building and shipping: what a build makes, what it says when it cannot, what the result needs.

The builds run in copies of the project whose csrc is a few small files of the same shape.
"""

import email
import filecmp
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests import abi

ROOT = Path(__file__).resolve().parent.parent
LIBRARY, RECORD = "maskmoe_kernels/_C.abi3.so", "maskmoe_kernels/_build.json"

if not (ROOT / "setup.py").is_file():
    pytest.skip("not a checkout: this is the suite of an installed wheel", allow_module_level=True)
pytest.importorskip("setuptools", minversion="77", reason="needs setuptools 77 to build")

SOURCES = {
    "module.cpp": """
        #include <Python.h>
        PyMODINIT_FUNC PyInit__C() {
          static PyModuleDef_Slot slots[] = {{0, nullptr}};
          static PyModuleDef def = {PyModuleDef_HEAD_INIT, "_C", nullptr, 0, nullptr, slots};
          return PyModuleDef_Init(&def);
        }""",
    "registration.cpp": """
        #include <torch/csrc/stable/library.h>
        #include <torch/csrc/stable/ops.h>
        #include <torch/csrc/stable/tensor.h>
        #include "kernels.h"
        using torch::stable::Tensor;
        static Tensor twice(const Tensor& x) {
          STD_TORCH_CHECK(x.dim() == 1, "one dimension");
          Tensor y = torch::stable::empty_like(x);
          const float* from = static_cast<const float*>(x.const_data_ptr());
        #ifndef MASKMOE_NO_AVX2
          maskmoe::avx2::twice(from, static_cast<float*>(y.mutable_data_ptr()), x.numel());
        #endif
        #ifndef MASKMOE_NO_AMX
          maskmoe::amx::twice(from, static_cast<float*>(y.mutable_data_ptr()), x.numel());
        #endif
          return y;
        }
        STABLE_TORCH_LIBRARY(maskmoe_build_test, m) { m.def("twice(Tensor x) -> Tensor"); }
        STABLE_TORCH_LIBRARY_IMPL(maskmoe_build_test, CPU, m) {
          m.impl("twice", TORCH_BOX(&twice));
        }
        """,
    "kernels.h": """
        #pragma once
        #include <cstdint>
        namespace maskmoe::avx2 { void twice(const float*, float*, int64_t); }
        namespace maskmoe::amx { void twice(const float*, float*, int64_t); }
        """,
    "cpu/isa_avx2.cpp": """
        #include "kernels.h"
        namespace maskmoe::avx2 {
        void twice(const float* x, float* y, int64_t n) {
          for (int64_t i = 0; i < n; ++i) y[i] = 2 * x[i];
        }
        }""",
}

VARIABLES = (
    "MASKMOE_BUILD MASKMOE_EMULATE MASKMOE_EXTENSION CXX CXXFLAGS LDFLAGS CUDACXX CUDAFLAGS "
    "MAX_JOBS".split()
)
BUILD_FILES = ("setup.py", "CMakeLists.txt", "pyproject.toml", "MANIFEST.in")
IN_PLACE = ("setup.py", "-q", "build_ext", "--inplace")

PATH = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])

CAN_BUILD = (
    sys.platform == "linux"
    and platform.machine() == "x86_64"
    and all(shutil.which(name, path=PATH) for name in ("c++", "cmake", "ninja"))
    and Path(sysconfig.get_path("include"), "Python.h").is_file()
)
needs_compiler = pytest.mark.skipif(
    not CAN_BUILD,
    reason="needs a C++ compiler, cmake, ninja and Python's headers, on Linux and x86-64",
)
needs_tools = pytest.mark.skipif(not abi.HAS_TOOLS, reason="needs nm, readelf and c++filt")


def copy(folder: Path) -> Path:
    """The project with the small csrc."""
    shutil.copytree(
        ROOT / "maskmoe_kernels",
        folder / "maskmoe_kernels",
        ignore=shutil.ignore_patterns("__pycache__", "*.so", "_build.json"),
    )
    for name in (*BUILD_FILES, "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    write(folder, SOURCES)
    shutil.copy(ROOT / "csrc" / "exports.map", folder / "csrc")
    return folder


def set_flags(project: Path, name: str, flags: str) -> None:
    """Give ``flags_<name>`` of CMakeLists.txt another value."""
    path = project / "CMakeLists.txt"
    text, count = re.subn(
        rf"set\(flags_{name} .*\)", f"set(flags_{name} {flags})", path.read_text()
    )
    assert count == 1
    path.write_text(text)


def write(project: Path, sources: dict[str, str]) -> None:
    for name, text in sources.items():
        path = project / "csrc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def run(project: Path, *command: str, **environment: str) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    return subprocess.run(
        [sys.executable, *command],
        cwd=project,
        env={**kept, "PYTHONPATH": "", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def record_of(project: Path) -> dict:
    return json.loads((project / RECORD).read_text(encoding="utf-8"))


def wheel_of(project: Path, **environment: str) -> Path:
    done = run(project, "setup.py", "-q", "bdist_wheel", "-d", "out", **environment)
    assert done.returncode == 0, done.stderr
    (wheel,) = (project / "out").iterdir()
    return wheel


def declared(project: Path) -> dict[str, set]:
    """Name and versions of what each extra of pyproject.toml asks for; "" is no extra."""
    record = tomllib.loads((project / "pyproject.toml").read_text("utf-8"))["project"]
    extras = {"": record["dependencies"], **record["optional-dependencies"]}
    return {extra: {named(Requirement(r)) for r in lines} for extra, lines in extras.items()}


def required(metadata: Path) -> dict[str, set]:
    """The same of an installed package."""
    message = email.message_from_bytes(metadata.read_bytes())
    found: dict[str, set] = {extra: set() for extra in ("", *message.get_all("Provides-Extra"))}
    for line in message.get_all("Requires-Dist"):
        extra = re.search(r'extra == "([\w-]+)"', line)
        found[extra[1] if extra else ""].add(named(Requirement(line)))
    return found


def named(requirement: Requirement) -> tuple:
    extras = tuple(sorted(requirement.extras))
    return requirement.name, extras, requirement.specifier, "platform" in str(requirement.marker)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return copy(tmp_path)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy with its wheel in out/, made by a compiler."""
    project = copy(tmp_path_factory.mktemp("built"))
    wheel_of(project, MASKMOE_BUILD="cpu")
    return project


@pytest.fixture(scope="module")
def library(built: Path) -> Path:
    (wheel,) = (built / "out").iterdir()
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(LIBRARY, built / "unpacked"))


# --- What the environment asks for ------------------------------------------------------------


def test_without_the_extension_the_wheel_is_for_everyone_and_works(project):
    for name in (LIBRARY, RECORD):  # an earlier build in place stays where it is
        (project / name).write_text("stale")
    wheel = wheel_of(project, MASKMOE_BUILD="none")
    assert wheel.name.endswith("-py3-none-any.whl")
    site = project / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    assert not list(site.rglob("*.so"))
    assert "MASKMOE_BUILD=none" in record_of(site)["cpu"]
    (metadata,) = site.glob("*.dist-info/METADATA")
    assert required(metadata) == declared(project)
    code = """
import sys
# The finder of an editable install would add the extension of the checkout to this package.
sys.meta_path[:] = [f for f in sys.meta_path if "__editable__" not in getattr(f, "__module__", "")]
import torch, maskmoe_kernels as mk
layout = mk.BlockLayout([2, 2], [3, 3], torch.eye(2, dtype=torch.bool))
layer = mk.MaskedLinear.from_layout(layout)
worked = layer(torch.ones(5, 6)).sum().isfinite().item()
print(mk.__file__, worked, "maskmoe_kernels._C" in sys.modules)
"""
    done = run(site, "-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(site / "maskmoe_kernels/__init__.py"), "True", "False"]


def test_without_a_compiler_auto_says_why(project):
    done = run(project, *IN_PLACE, CXX="/nonexistent/c++")
    assert done.returncode == 0, done.stderr
    record = record_of(project)
    assert "/nonexistent/c++" in record["cpu"] == record["cuda"]
    assert record["cpu"] in done.stderr
    assert record["isas"] == []


def test_without_a_compiler_cpu_is_an_error(project):
    done = run(project, *IN_PLACE, CXX="/nonexistent/c++", MASKMOE_BUILD="cpu")
    assert done.returncode != 0
    assert "MASKMOE_BUILD=cpu: CXX names '/nonexistent/c++'" in done.stderr
    assert "Traceback" not in done.stderr


@needs_compiler
def test_cuda_is_an_error_while_there_are_no_cuda_kernels(built):
    done = run(built, *IN_PLACE, MASKMOE_BUILD="cuda")
    assert done.returncode != 0
    assert "MASKMOE_BUILD=cuda: this version has no CUDA kernels" in done.stderr


@needs_compiler
def test_without_cmake_auto_says_why(project):
    done = run(project, *IN_PLACE, CMAKE="/nonexistent/cmake")
    assert done.returncode == 0, done.stderr
    assert record_of(project)["cpu"].startswith("CMAKE names '/nonexistent/cmake'")


@needs_compiler
@pytest.mark.parametrize(
    ("version", "why"),
    [
        ("2.10.1", "torch 2.10.1 is too old to build with; install 2.11 or newer"),
        ("2.11.0", "torch 2.11.0 came without its C++ headers"),
    ],
)
def test_torch_that_cannot_be_built_with_is_named(project, version, why):
    torch = project / "outer" / "torch"
    torch.mkdir(parents=True)
    (torch / "__init__.py").touch()
    (torch / "version.py").write_text(f"__version__ = '{version}'\n")
    done = run(project, *IN_PLACE, PYTHONPATH=str(torch.parent))
    assert done.returncode == 0, done.stderr
    record = record_of(project)
    assert record["cpu"] == record["cuda"] == why


def test_unknown_value_names_the_known_ones(project):
    done = run(project, *IN_PLACE, MASKMOE_BUILD="gpu")
    assert done.returncode != 0
    assert "MASKMOE_BUILD must be one of auto, cpu, cuda, none, got 'gpu'" in done.stderr


@needs_compiler
@pytest.mark.parametrize("mode", ["none", "auto", "cpu"])
def test_nothing_stale_survives(project, mode):
    """A build that ends without a library leaves none behind, and no record of the old one."""
    for name in (LIBRARY, RECORD):
        (project / name).write_text("stale")
    write(project, {"cpu/isa_avx2.cpp": "this is not C++;"})
    done = run(project, *IN_PLACE, MASKMOE_BUILD=mode, CXXFLAGS="-O0")
    assert (done.returncode != 0) == (mode == "cpu")
    assert not (project / LIBRARY).exists()
    if mode == "cpu":
        assert "isa_avx2.cpp:1" in done.stderr
        assert not (project / RECORD).exists()
    else:
        assert record_of(project)["cpu"]


# --- What a compiler makes of it -----------------------------------------------------------------


@needs_compiler
def test_kernels_do_without_flags_that_the_assembler_refuses(project):
    set_flags(project, "kernels", "-Wa,-mnot-known-yet")
    done = run(project, *IN_PLACE, MASKMOE_BUILD="cpu", CXXFLAGS="-O0")
    assert done.returncode == 0, done.stderr
    record = record_of(project)
    assert record["isas"] == ["avx2"]
    assert not record["left_out"]


@needs_compiler
def test_unknown_instruction_set_is_left_out(project):
    """An old compiler: it does not know the flags of one instruction set."""
    set_flags(project, "amx", "-mnot-known-yet")
    write(project, {"cpu/isa_amx.cpp": SOURCES["cpu/isa_avx2.cpp"].replace("avx2", "amx")})
    done = run(project, *IN_PLACE, MASKMOE_BUILD="cpu", CXXFLAGS="-O0")
    assert done.returncode == 0, done.stderr
    record = record_of(project)
    assert record["isas"] == ["avx2"]
    assert list(record["left_out"]) == ["amx"]
    assert "-mnot-known-yet" in record["left_out"]["amx"]
    code = f"""
import torch
torch.ops.load_library({LIBRARY!r})
print(torch.ops.maskmoe_build_test.twice(torch.ones(9)))
"""
    done = run(project, "-c", code)
    assert done.returncode == 0, done.stderr
    assert "2., 2." in done.stdout


@needs_compiler
def test_emulated_kernels_need_the_flags_of_avx2_only(project):
    """With MASKMOE_EMULATE=1; without it, a build before or after is what it was."""
    found = (
        "#if defined(MASKMOE_EMULATE) == defined(__AVX512F__) || !defined(__AVX2__)\n#error\n#endif"
    )
    write(project, {"cpu/isa_avx512.cpp": found})
    for emulate in ("", "1", "0"):
        done = run(project, *IN_PLACE, MASKMOE_BUILD="cpu", CXXFLAGS="-O0", MASKMOE_EMULATE=emulate)
        assert done.returncode == 0, done.stderr
        assert record_of(project)["isas"] == ["avx2", "avx512"]


@needs_compiler
def test_auto_leaves_out_the_parts_that_fail(project):
    """An nvcc that does not work, and a file that is no good for its instruction set."""
    nvcc = project / "broken-nvcc"
    nvcc.write_text("#!/bin/sh\nexit 1\n")
    nvcc.chmod(0o755)
    write(project, {"cuda/twice.cu": "__global__ void twice() {}"})
    write(project, {"cpu/isa_amx.cpp": "this is not C++;"})
    done = run(project, *IN_PLACE, CUDACXX=str(nvcc), CXXFLAGS="-O0")
    assert done.returncode == 0, done.stderr
    record = record_of(project)
    assert record["cpu"] is None
    assert record["isas"] == ["avx2"]
    assert record["left_out"]["amx"].startswith("csrc/cpu/isa_amx.cpp:1:1: error")
    assert "broken-nvcc" in record["cuda"]
    assert (project / LIBRARY).is_file()
    done = run(project, *IN_PLACE, CUDACXX=str(nvcc), CXXFLAGS="-O0", MASKMOE_BUILD="cuda")
    assert done.returncode != 0
    assert "MASKMOE_BUILD=cuda: " in done.stderr
    assert not (project / LIBRARY).exists()


@needs_compiler
@pytest.mark.parametrize(
    ("says", "asked"),
    [("exit 9", False), ("echo No devices were found", False), ("echo 'GPU 0: H100'", True)],
)
def test_auto_asks_for_cuda_where_there_is_a_gpu(project, says, asked):
    """An nvcc alone does not: it takes minutes."""
    write(project, {"cuda/twice.cu": "__global__ void twice() {}"})
    (project / "bin").mkdir()
    for name, script in (("nvidia-smi", says), ("nvcc", "exit 1")):
        (project / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (project / "bin" / name).chmod(0o755)
    path = os.pathsep.join([str(project / "bin"), os.environ.get("PATH", os.defpath)])
    done = run(project, *IN_PLACE, CXXFLAGS="-O0", PATH=path)
    assert done.returncode == 0, done.stderr
    told = record_of(project)["cuda"]  # always a reason: that nvcc builds nothing
    assert told
    assert ("there was no GPU" in told and "MASKMOE_BUILD=cuda" in told) != asked


@pytest.mark.slow
@needs_compiler
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_cuda_file_that_does_not_compile_leaves_the_cpu_kernels(project):
    write(project, {"cuda/twice.cu": "this is not CUDA;"})
    done = run(project, *IN_PLACE, CXXFLAGS="-O0", CUDACXX="nvcc")
    assert done.returncode == 0, done.stderr
    assert record_of(project)["isas"] == ["avx2"]
    assert record_of(project)["cuda"].startswith("csrc/cuda/twice.cu(1): error")
    assert (project / LIBRARY).is_file()


@needs_compiler
def test_only_what_changed_is_made_again(built):
    def objects() -> dict[str, int]:
        made = (built / "build" / "cmake").glob("*/CMakeFiles/*.dir/**/*.o")
        return {path.name: path.stat().st_ctime_ns for path in made}

    def changed() -> set[str]:
        before = objects()
        assert run(built, *IN_PLACE).returncode == 0
        after = objects()
        return {name.split(".")[0] for name in after if after[name] != before.get(name)}

    assert changed() == set()
    (built / "csrc" / "module.cpp").touch()
    assert changed() == {"module"}
    (built / "csrc" / "kernels.h").touch()
    assert changed() == {"registration", "isa_avx2"}


@needs_compiler
def test_other_flags_make_other_objects(built):
    def times() -> dict[Path, int]:
        made = (built / "build" / "cmake").glob("*/_C.abi3.so")
        return {path: path.stat().st_mtime_ns for path in made}

    before = times()
    assert run(built, *IN_PLACE, CXXFLAGS="-O0").returncode == 0
    assert len(times()) == len(before) + 1
    assert run(built, *IN_PLACE).returncode == 0
    assert before.items() <= times().items()


@pytest.mark.slow
@needs_compiler
@needs_tools
def test_cmake_builds_the_same_by_hand(project):
    cmake = shutil.which("cmake", path=PATH)
    torch = Path(importlib.util.find_spec("torch").origin).parent
    folders = [f"-DTORCH={torch}", f"-DPYTHON_INCLUDE={sysconfig.get_path('include')}"]
    for step in (
        ["-S", ".", "-B", "build/cmake", "-G", "Unix Makefiles", *folders],
        ["--build", "build/cmake"],
        ["--install", "build/cmake"],
    ):
        done = subprocess.run([cmake, *step], cwd=project, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert abi.problems(project / LIBRARY) == []
    assert record_of(project)["isas"] == ["avx2"]
    assert set(record_of(project)) == {"cpu", "cuda", "isas", "left_out", "compiler", "torch"}


# --- What is shipped ---------------------------------------------------------------------------


@needs_compiler
def test_wheel_has_the_library_and_no_sources(built):
    (wheel,) = (built / "out").iterdir()
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        record = json.loads(archive.read(RECORD))
    with open(ROOT / "pyproject.toml", "rb") as file:
        version = tomllib.load(file)["project"]["version"]
    assert wheel.name == f"maskmoe_kernels-{version}-cp311-abi3-linux_x86_64.whl"
    assert {LIBRARY, RECORD, "maskmoe_kernels/py.typed"} <= names
    assert {name.split("/")[0] for name in names} == {
        "maskmoe_kernels",
        f"maskmoe_kernels-{version}.dist-info",
    }
    kinds = {Path(name).suffix for name in names if name.startswith("maskmoe_kernels/")}
    assert kinds == {".py", ".so", ".json", ".toml", ".typed"}
    assert record["cpu"] is None
    assert record["isas"] == ["avx2"]
    assert str(built) not in json.dumps(record)


def test_source_distribution_has_what_a_build_needs(project):
    (project / RECORD).write_text("stale")
    done = run(project, "setup.py", "-q", "sdist", "-d", "out")
    assert done.returncode == 0, done.stderr
    (archive,) = (project / "out").iterdir()
    shutil.unpack_archive(archive, project / "unpacked")
    (folder,) = (project / "unpacked").iterdir()
    assert {name for name in BUILD_FILES if not (folder / name).is_file()} == set()
    assert not (folder / RECORD).exists()
    assert {name for name in SOURCES if not (folder / "csrc" / name).is_file()} == set()
    assert (folder / "csrc" / "exports.map").is_file()


@needs_compiler
@needs_tools
def test_library_asks_for_stable_names_only(library):
    assert abi.problems(library) == []
    assert "PyInit__C" in abi.exported(library)


@needs_compiler
def test_library_names_no_path_of_this_machine(library):
    content = library.read_bytes()
    for path in {ROOT, Path(sys.prefix).resolve(), library.parents[2], Path.home()} - {
        Path("/usr")
    }:
        assert os.fsencode(path) not in content


@needs_tools
def test_audit_sees_what_a_stable_library_may_not_do():
    """The audit of torch's own Python module, which is tied to one Python and one torch."""
    import torch

    torch_python = Path(torch.__file__).parent / "lib" / "libtorch_python.so"
    if not torch_python.is_file():
        pytest.skip("this torch has no libtorch_python.so")
    found = abi.problems(torch_python)
    assert any(text.startswith("asks for _ZN3c10") for text in found)
    assert any(text.startswith("needs libtorch") for text in found)
    assert any(text.startswith("exports ") for text in found)


# --- The extension of this checkout -------------------------------------------------------------


@pytest.fixture(scope="module")
def here() -> dict:
    """The record of the extension that the suite runs with."""
    if not (ROOT / LIBRARY).is_file() or not (ROOT / RECORD).is_file():
        pytest.skip("the extension is not built in this checkout")
    return record_of(ROOT)


@needs_compiler
def test_extension_is_there_where_there_is_a_compiler():
    """`auto` forgives a source file that does not compile; this test does not."""
    if not (ROOT / RECORD).is_file():
        pytest.skip("setup.py was not run in this checkout")
    record = record_of(ROOT)
    if "MASKMOE_BUILD=none" in (record["cpu"] or ""):
        pytest.skip(record["cpu"])
    assert record["cpu"] is None
    assert record["left_out"] == {}
    assert (ROOT / LIBRARY).is_file()


@needs_tools
def test_this_library_asks_for_stable_names_only(here):
    assert abi.problems(ROOT / LIBRARY) == []


@needs_tools
def test_kernels_share_no_inline_function_with_other_processors(here):
    """What is compiled for one instruction set is only ever called for it."""
    made = (ROOT / "build" / "cmake").glob("*/_C.abi3.so")
    folders = [path.parent for path in made if filecmp.cmp(path, ROOT / LIBRARY, shallow=False)]
    if not folders:
        pytest.skip("the objects of this build are gone")
    for isa in here["isas"]:
        objects = list((folders[0] / "CMakeFiles" / f"{isa}.dir").rglob(f"isa_{isa}.cpp.o"))
        assert objects
        assert [name for obj in objects for name in abi.foreign_weak(obj, isa)] == []


@needs_compiler
@needs_tools
def test_audit_sees_a_shared_inline_function(tmp_path):
    source = tmp_path / "isa_avx2.cpp"
    source.write_text("""
        template <class T> [[gnu::noinline]] T next(T x) { return x + 1; }
        namespace maskmoe::avx2 {
        struct Lane {
          int n;
          Lane operator+(int k) const { return {n + k}; }
        };
        int both(Lane lane, int n) { return next(lane).n + next(n); }
        }""")
    obj = tmp_path / "isa_avx2.o"
    subprocess.run(["c++", "-O2", "-std=c++20", "-c", source, "-o", obj], check=True)
    assert abi.foreign_weak(obj, "avx2") == ["int next<int>(int)"]
