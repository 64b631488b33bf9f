"""Runs CMakeLists.txt to make maskmoe_kernels/_C.abi3.so, and says why where it cannot.

Torch is found but not imported: a stable-ABI extension needs its headers only, and one build serves
every later version of torch and Python. Without the extension the package works, with less speed.
What was built, and why the rest was not, is written to maskmoe_kernels/_build.json.

Environment: MASKMOE_BUILD=auto|cpu|cuda|none (auto builds what it can; with another value a failed
build is an error), MASKMOE_EMULATE=1 (all but AVX2 in plain C++, for tests), CXX,
CXXFLAGS, LDFLAGS, CUDACXX, CUDAFLAGS, CMAKE, NINJA, MAX_JOBS.

CUDA takes minutes, so auto leaves it out unless there is an NVIDIA GPU or CUDACXX names a compiler.
"""

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from importlib.machinery import PathFinder
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError

ROOT = Path(__file__).resolve().parent
MODES = ("auto", "cpu", "cuda", "none")
FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
LIBRARY, RECORD = "maskmoe_kernels/_C.abi3.so", "maskmoe_kernels/_build.json"
PATH = os.environ.get("PATH", os.defpath)


class CannotBuild(BaseError):
    """Why something is not built, in words for the user."""


def find_torch() -> Path:
    """The folder of the torch that the package will run with."""
    # pip's isolated build hides the packages of the environment: ask for their folders by name.
    sites = [sysconfig.get_path(kind) for kind in ("purelib", "platlib")]
    files = [file for site in sites for file in Path(site).glob("*.pth")]
    lent = [line for file in files for line in file.read_text(errors="replace").splitlines()]
    spec = PathFinder.find_spec("torch", [*sys.path, *sites, *filter(os.path.isdir, lent)])
    if spec is None or spec.origin is None:
        raise CannotBuild("torch was not found; install it first, then maskmoe_kernels again")
    return Path(spec.origin).parent


def find_program(variable: str, *names: str, path: str = PATH) -> list[str]:
    """The command in an environment variable, else the first of the names that is installed."""
    given = shlex.split(os.environ.get(variable, ""))
    for name in given[:1] or names:
        if program := shutil.which(name, path=path):
            return [program, *given[1:]]
    if given:
        raise CannotBuild(f"{variable} names {given[0]!r}, which is not a program here")
    raise CannotBuild(f"no {' or '.join(names)} found; install one or name it in {variable}")


def has_gpu() -> bool:
    """Does NVIDIA's driver name a GPU?"""
    program = shutil.which("nvidia-smi", path=PATH)
    if program is None:
        return False
    try:
        done = subprocess.run([program, "-L"], capture_output=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0 and done.stdout.startswith(b"GPU ")


def left_out(mode: str) -> dict[str, str]:
    """Parts that ``mode`` does not ask for, and why."""
    if mode == "cpu":
        return {"cuda": "MASKMOE_BUILD=cpu was set when it was installed"}
    if mode == "auto" and not os.environ.get("CUDACXX") and not has_gpu():
        return {"cuda": "there was no GPU when it was installed; install with MASKMOE_BUILD=cuda"}
    return {}


def reason(said: str) -> str:
    """What is wrong, in the words of a compiler or CMake."""
    line = re.search(r"^.*\b(?:error|fatal) *:(?! ld returned).*", said, re.M)
    message = re.search(r"^CMake Error(?: at .*|):((?:\n?.+|\n\n(?=  ))*)", said, re.M)
    text = line[0] if line else message[1] if message else said.partition("\n")[0]
    return " ".join(text.replace(f"{ROOT}/", "").split())


def call(environment: dict[str, str], *command: str | Path) -> dict[str, str]:
    """Run cmake. Where it fails, print what it said, and return the reasons by target."""
    to = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run(command, env=environment, text=True, errors="replace", check=False, **to)
    if done.returncode == 0:
        return {}
    sys.stderr.write(done.stdout)
    targets: dict[str, str] = {}
    for failed in re.split(r"^FAILED: (?:\[.*?\] )?", done.stdout, flags=re.M)[1:]:
        output, _, said = failed.split("\n", 2)  # the command stands between them
        target = re.match(r"CMakeFiles/(\w+)\.dir/", output)
        targets.setdefault(target[1] if target else "_C", reason(said))
    return targets or {"_C": reason(done.stdout)}


def make(mode: str, record: dict) -> Path:
    """Build what ``mode`` asks for, and write into the record what the library has.

    With auto, a target that fails is left out, and so is CUDA if anything else fails.
    """
    if mode == "none":
        raise CannotBuild("MASKMOE_BUILD=none was set when it was installed")
    if FREE_THREADED:
        raise CannotBuild("a free-threaded Python does not load stable-ABI extensions")
    cxx = find_program("CXX", "c++", "g++", "clang++")
    tools = f"{sysconfig.get_path('scripts')}{os.pathsep}{PATH}"  # cmake of PyPI first
    cmake = find_program("CMAKE", "cmake", path=tools)[0]
    ninja = find_program("NINJA", "ninja", path=tools)[0]
    torch, include = find_torch(), sysconfig.get_path("include")
    # Another compiler, another torch or other flags have a folder of their own.
    key = [ROOT, torch, *(file.read_text() for file in torch.glob("version.py")), include, cxx]
    key += [os.environ.get(name) for name in ("CXXFLAGS", "LDFLAGS", "CUDACXX", "CUDAFLAGS")]
    emulate = os.environ.get("MASKMOE_EMULATE") or "OFF"
    key += [emulate]
    key += [subprocess.run([*cxx, "--version"], capture_output=True, check=False).stdout]
    key += [shutil.which("nvcc")]
    folder = ROOT / "build/cmake" / hashlib.sha256(repr(key).encode()).hexdigest()[:12]
    environment = {**os.environ, "LC_ALL": "C", "CXX": shlex.join(cxx)}
    options = ["-S", ROOT, "-B", folder, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    options += [f"-DTORCH={torch}", f"-DPYTHON_INCLUDE={include}", "-UWITHOUT_*"]
    options += [f"-DMASKMOE_EMULATE={emulate}"]
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    without = left_out(mode)
    while True:
        left = [f"-DWITHOUT_{part}:STRING={why}" for part, why in without.items()]
        failed = call(environment, cmake, *options, *left)
        if not failed:
            record |= json.loads((folder / "_build.json").read_text(), strict=False)
            if mode == "cuda" and record["cuda"]:
                raise CannotBuild(record["cuda"])
            failed = call(environment, cmake, "--build", folder, "-j", jobs, "--", "-k", "0")
        if not failed:
            return folder / "_C.abi3.so"
        parts = {name: why for name, why in failed.items() if name != "_C"}
        parts = parts or {"cuda": failed["_C"]}
        if mode != "auto" or parts.keys() <= without.keys():
            raise CannotBuild("; ".join(dict.fromkeys(failed.values())))
        without |= parts


def build(mode: str) -> tuple[dict, Path | None]:
    """What was built, with the reasons for what was not, and the library.

    Raises:
        CannotBuild: Something that ``mode`` asks for cannot be built.
    """
    if mode not in MODES:
        raise CannotBuild(f"MASKMOE_BUILD must be one of {', '.join(MODES)}, got {mode!r}")
    record = {"cpu": None, "cuda": None, "isas": [], "left_out": {}, "compiler": "", "torch": ""}
    try:
        return record, make(mode, record)
    except CannotBuild as error:
        if mode in ("cpu", "cuda"):
            raise CannotBuild(f"MASKMOE_BUILD={mode}: {error}") from None
        return {**record, "cpu": str(error), "cuda": str(error), "isas": []}, None


class BuildExtension(build_ext):
    """Puts the library, if there is one, and the record into the package."""

    def run(self) -> None:
        base = ROOT if self.inplace else Path(self.build_lib)
        library, record = base / LIBRARY, base / RECORD
        try:
            what, made = build(os.environ.get("MASKMOE_BUILD") or "auto")
        except BaseException:
            for path in (library, record):  # older than what was asked for
                path.unlink(missing_ok=True)
            raise
        record.parent.mkdir(parents=True, exist_ok=True)
        if made:
            draft = shutil.copy(made, library.with_suffix(f".{os.getpid()}"))
            os.replace(draft, library)  # at once: a running process keeps the old file
            said = f"for {', '.join(what['isas'])}; CUDA: {what['cuda'] or 'yes'}"
        else:
            library.unlink(missing_ok=True)
            said = f"without the extension: {what['cpu']}"
        record.write_text(json.dumps(what, indent=2) + "\n", encoding="utf-8")
        sys.stderr.write(f"maskmoe_kernels is built {said}\n")
        if not made and not self.inplace:  # then the wheel is for every machine
            self.distribution.ext_modules = None
            if wheel := self.distribution.get_command_obj("bdist_wheel", create=False):
                wheel.root_is_pure = True

    def get_outputs(self) -> list[str]:
        return [] if self.inplace else list(self.places(Path(self.build_lib)))

    def get_output_mapping(self) -> dict[str, str]:
        return self.places(ROOT) if self.inplace else {}

    def places(self, base: Path) -> dict[str, str]:
        """Where a build puts its files: in ``build_lib``, and in place."""
        made = [name for name in (LIBRARY, RECORD) if (base / name).is_file()]
        return {str(Path(self.build_lib, name)): name for name in made}


if __name__ == "__main__":
    setup(
        ext_modules=[Extension("maskmoe_kernels._C", sources=[], py_limited_api=True)],
        cmdclass={"build_ext": BuildExtension},
        options={} if FREE_THREADED else {"bdist_wheel": {"py_limited_api": "cp311"}},
    )
