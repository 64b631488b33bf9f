"""Builds csrc/ into maskmoe_kernels/_C.abi3.so where it can, and says why where it cannot.

Torch is found but not imported: a stable-ABI extension needs its headers only, and one build serves
every later version of torch and Python. Without the extension the package works, with less speed.
What was built, and why the rest was not, is written to maskmoe_kernels/_build.json.

Environment: MASKMOE_BUILD=auto|cpu|cuda|none (auto builds what it can; with another value a failed
build is an error), CXX, CXXFLAGS, LDFLAGS, CUDACXX, CUDAFLAGS, MAX_JOBS.
"""

import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.machinery import PathFinder
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError

ROOT = Path(__file__).resolve().parent
CSRC = Path("csrc")  # relative: the compilers run in ROOT, and no path of this machine gets in
MODES = ("auto", "cpu", "cuda", "none")
FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
LIBRARY, RECORD = "maskmoe_kernels/_C.abi3.so", "maskmoe_kernels/_build.json"


class CannotBuild(BaseError):
    """Why something is not built, in words for the user."""


def lines(path: Path) -> list[str]:
    """The lines of a text file."""
    return path.read_text(encoding="utf-8", errors="replace").splitlines()


def words(variable: str) -> list[str]:
    """The words of an environment variable."""
    return shlex.split(os.environ.get(variable, ""))


def isa_of(source: Path) -> str | None:
    """The instruction set that a source file is for; None: every processor."""
    return source.stem.removeprefix("isa_") if source.stem.startswith("isa_") else None


def find_torch() -> tuple[Path, str]:
    """The folder and the version of the torch that the package will run with."""
    # pip's isolated build hides the packages of the environment: ask for their folders by name.
    sites = [sysconfig.get_path(kind) for kind in ("purelib", "platlib")]
    lent = [line for site in sites for path in Path(site).glob("*.pth") for line in lines(path)]
    spec = PathFinder.find_spec("torch", [*sys.path, *sites, *filter(os.path.isdir, lent)])
    if spec is None or spec.origin is None:
        raise CannotBuild("torch was not found; install it first, then maskmoe_kernels again")
    folder = Path(spec.origin).parent
    text = (folder / "version.py").read_text()
    found = re.search(r"__version__ = ['\"]((\d+)\.(\d+).*)['\"]", text)
    version = found[1] if found else "of an unknown version"
    if not found or (int(found[2]), int(found[3])) < (2, 11):
        raise CannotBuild(f"torch {version} is too old to build with; install 2.11 or newer")
    if not (folder / "include/torch/csrc/stable").is_dir():
        raise CannotBuild(f"torch {version} came without its C++ headers")
    return folder, version


def find_python() -> str:
    """The folder of Python's headers."""
    if FREE_THREADED:
        raise CannotBuild("a free-threaded Python does not load stable-ABI extensions")
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        raise CannotBuild("Python.h was not found; install Python's headers (python3-dev)")
    return sysconfig.get_path("include")


def find_program(variable: str, *names: str) -> list[str]:
    """The command in an environment variable, else the first of the names that is installed."""
    command = words(variable) or [name for name in names if shutil.which(name)][:1]
    if not command:
        raise CannotBuild(f"no {' or '.join(names)} found; install one or name it in {variable}")
    if shutil.which(command[0]) is None:
        raise CannotBuild(f"{variable} names {command[0]!r}, which is not a program here")
    return command


class Workshop:
    """The compilers with their settings, and the objects made with them.

    An object carries a hash of its command in its name, so other flags or another compiler have
    objects of their own, and it is made again when a file that went into it has changed since.
    """

    def __init__(self) -> None:
        if not sys.platform.startswith("linux"):
            raise CannotBuild("the extension is built on Linux only, so far")
        self.cxx = find_program("CXX", "c++", "g++", "clang++")
        self.compiler = self.call([*self.cxx, "--version"]).splitlines()[0]
        self.torch, self.torch_version = find_torch()
        self.headers = ["-isystem", str(self.torch / "include"), "-isystem", find_python()]
        self.mapped = [f"-ffile-prefix-map={self.torch}=torch", f"-ffile-prefix-map={ROOT}=."]
        rows = [line.partition(":") for line in lines(ROOT / CSRC / "flags.txt")]
        self.table = {name: row.split() for name, colon, row in rows if colon and name[0] != "#"}
        self.objects = ROOT / "build" / "objects"
        more = self.table.pop("kernels")
        self.for_kernels = more if self.takes(more) else []

    def call(self, command: list[str]) -> str:
        """Run a compiler and return what it prints."""
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.stderr.write(f"{shlex.join(command)}\n{done.stderr}")
            said = [*done.stderr.splitlines(), f"{command[0]} failed"]
            raise CannotBuild(next((line for line in said if "error" in line), said[0]))
        return done.stdout

    def nvcc(self) -> list[str]:
        """The CUDA compiler, on top of the C++ compiler."""
        host = next(word for word in reversed(self.cxx) if word[0] != "-")
        return [*find_program("CUDACXX", "nvcc"), "-ccbin", host]

    def command(self, source: Path, defines: list[str]) -> list[str]:
        """What compiles a source file."""
        common = [*self.table["common"], f"-I{CSRC}"]
        if source.suffix == ".cu":
            mapped = [f"-Xcompiler={flag}" for flag in self.mapped]
            device = [*self.nvcc(), *common, *self.table["cuda"], *mapped, *self.headers]
            return [*device, *words("CUDAFLAGS"), "-c", str(source)]
        isa = isa_of(source)
        if isa and isa not in self.table:
            raise CannotBuild(f"{source} has no line in {CSRC}/flags.txt")
        # Files of an instruction set see no torch and no Python: an inline function of theirs,
        # compiled with AVX-512, could be the copy that the linker keeps for every processor.
        own = self.table[isa] + self.for_kernels if isa else [*defines, *self.headers]
        host = [*self.cxx, *common, *self.table["host"], *self.mapped, *own]
        return [*host, *words("CXXFLAGS"), "-c", str(source)]

    def target(self, command: list[str]) -> Path:
        """Where the object made by a command lies."""
        key = hashlib.sha256(repr((self.compiler, command)).encode()).hexdigest()
        return self.objects / f"{Path(command[-1]).stem}-{key[:12]}.o"

    def compile(self, source: Path, defines: list[str]) -> Path:
        """The object of a source file, made now if it has to be."""
        command = self.command(source, defines)
        target = self.target(command)
        depends = target.with_suffix(".d")
        with suppress(OSError):
            made = target.stat().st_mtime_ns
            parts = depends.read_text().replace("\\\n", " ").partition(": ")[2].split()
            if all((ROOT / part).stat().st_mtime_ns < made for part in parts):
                return target
        self.objects.mkdir(parents=True, exist_ok=True)
        draft, start = target.with_suffix(f".{os.getpid()}"), time.time_ns()
        self.call([*command, "-MMD", "-MF", str(depends), "-o", str(draft)])
        os.utime(draft, ns=(start, start))  # an edit during the compilation is newer
        return draft.replace(target)

    def compile_all(
        self, sources: list[Path], defines: list[str]
    ) -> tuple[list[Path], dict[Path, CannotBuild]]:
        """The objects that could be made, and what is wrong with the others."""
        objects, errors = [], {}
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
            tasks = {source: pool.submit(self.compile, source, defines) for source in sources}
        for source, task in tasks.items():
            try:
                objects.append(task.result())
            except CannotBuild as error:
                errors[source] = error
        return objects, errors

    def require(self, sources: list[Path], defines: list[str]) -> list[Path]:
        """The objects of all sources."""
        objects, errors = self.compile_all(sources, defines)
        for error in errors.values():
            raise error
        return objects

    def cpu(self, record: dict, strict: bool) -> list[Path]:
        """The host's objects; an instruction set that the compiler does not know is left out."""
        if (machine := platform.machine()) not in ("x86_64", "AMD64"):
            raise CannotBuild(f"there are no kernels for this processor ({machine}) yet")
        found = sorted(path.relative_to(ROOT) for path in (ROOT / CSRC).glob("**/*.cpp"))
        kernels, errors = self.compile_all([path for path in found if isa_of(path)], [])
        for source, error in errors.items():
            if strict and self.takes(self.table.get(isa_of(source), [])):
                raise error  # not an old compiler, then
            record["left_out"][isa_of(source)] = str(error)
        made = {isa_of(path) for path in found} - set(record["left_out"])
        record["isas"] = [isa for isa in self.table if isa in made]
        if not kernels:
            said = dict.fromkeys(map(str, errors.values()))
            raise CannotBuild("; ".join(said) or f"{CSRC} has no kernels")
        absent = set(self.table) - {"common", "host", "cuda"} - made
        defines = [f"-DMASKMOE_NO_{isa.upper()}" for isa in sorted(absent)]
        return self.require([path for path in found if not isa_of(path)], defines) + kernels

    def takes(self, flags: list[str]) -> bool:
        """Do compiler and assembler know these flags?"""
        command = [*self.cxx, *flags, "-c", "-xc++", os.devnull, "-o", os.devnull]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    def cuda(self) -> list[Path]:
        """The device's objects."""
        found = sorted(path.relative_to(ROOT) for path in (ROOT / CSRC / "cuda").glob("*.cu"))
        if not found:
            raise CannotBuild("this version has no CUDA kernels")
        return self.require(found, [])

    def link(self, objects: list[Path], cuda: bool) -> Path:
        """The library. It names no folder: `import torch` has loaded libtorch_cpu by then."""
        draft = self.objects / f"_C.{os.getpid()}.so"
        rules = f"--as-needed,-z,now,--version-script={CSRC}/exports.map"
        flags = [*words("CXXFLAGS"), *words("LDFLAGS")]
        driver = [*self.cxx, f"-Wl,{rules}", *flags]
        if cuda:  # nvcc adds its own runtime, as a static library
            escaped = [flag.replace(",", r"\,") for flag in flags]
            driver = [*self.nvcc(), f"-Xlinker={rules}", *(f"-Xcompiler={f}" for f in escaped)]
        libraries = [f"-L{self.torch}/lib", "-ltorch_cpu"]
        self.call([*driver, "-shared", "-o", str(draft), *map(str, objects), *libraries])
        return draft


def build(mode: str) -> tuple[dict, Path | None]:
    """What was built, with the reasons for what was not, and the library.

    Raises:
        CannotBuild: Something that ``mode`` asks for cannot be built.
    """
    if mode not in MODES:
        raise CannotBuild(f"MASKMOE_BUILD must be one of {', '.join(MODES)}, got {mode!r}")
    record = {"cpu": None, "cuda": None, "isas": [], "left_out": {}, "compiler": "", "torch": ""}
    try:
        if mode == "none":
            raise CannotBuild("MASKMOE_BUILD=none was set when it was installed")
        shop = Workshop()
        record |= {"compiler": shop.compiler, "torch": shop.torch_version}
        objects = shop.cpu(record, strict=mode != "auto")
        try:
            if mode == "cpu":
                raise CannotBuild("MASKMOE_BUILD=cpu was set when it was installed")
            objects += shop.cuda()
        except CannotBuild as error:
            if mode == "cuda":
                raise
            record["cuda"] = str(error)
        return record, shop.link(objects, cuda=record["cuda"] is None)
    except CannotBuild as error:
        if mode in ("cpu", "cuda"):
            raise CannotBuild(f"MASKMOE_BUILD={mode}: {error}") from None
        return {**record, "cpu": str(error), "cuda": str(error), "isas": []}, None


class BuildExtension(build_ext):
    """Puts the library, if there is one, and the record into the package."""

    def run(self) -> None:
        base = ROOT if self.inplace else Path(self.build_lib)
        try:
            record, library = build(os.environ.get("MASKMOE_BUILD") or "auto")
        except BaseException:
            for name in (LIBRARY, RECORD):  # older than what was asked for
                (base / name).unlink(missing_ok=True)
            raise
        (base / RECORD).parent.mkdir(parents=True, exist_ok=True)
        if library is None:
            (base / LIBRARY).unlink(missing_ok=True)
            said = f"without the extension: {record['cpu']}"
        else:
            draft = shutil.move(library, (base / LIBRARY).with_suffix(f".{os.getpid()}"))
            os.replace(draft, base / LIBRARY)  # at once: a running process keeps the old file
            said = f"for {', '.join(record['isas'])}; CUDA: {record['cuda'] or 'yes'}"
        (base / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        sys.stderr.write(f"maskmoe_kernels is built {said}\n")
        if library is None and not self.inplace:  # then the wheel is for every machine
            self.distribution.ext_modules = None
            if wheel := self.distribution.get_command_obj("bdist_wheel", create=False):
                wheel.root_is_pure = True

    def get_source_files(self) -> list[str]:
        return []  # MANIFEST.in names them

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
