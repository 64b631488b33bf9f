"""What a built extension asks of the outside, and what it lets out.

One library is to serve every Python from 3.11 and every torch from 2.11. So it may ask for Python's
limited API, torch's C functions and the C and C++ runtimes; of torch's C++ names, which change from
version to version, for none. ``python -m tests.abi FILE...`` checks libraries and wheels.
"""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PYTHON = (3, 11)
LIBRARIES = re.compile(
    r"(libtorch_cpu|libstdc\+\+|libgcc_s|libc|libm|libdl|librt|libpthread|ld-linux-x86-64|libgomp"
    r"|libasan|libubsan)\.so(\.\d+)*$"
)
RUNTIMES = re.compile(r"@@?(GLIBC|GLIBCXX|CXXABI|GCC|GOMP|LIBASAN|LIBUBSAN)_")
TORCH = re.compile(r"(aoti_)?torch_[a-z]\w*$")
OPTIONAL = {"__gmon_start__", "_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable"}
PRIVATE = re.compile(r"_Py_(Dealloc|IncRef|DecRef|\w+Struct)$")  # of those, the limited API's own

HAS_TOOLS = all(shutil.which(tool) for tool in ("nm", "readelf", "c++filt"))


def tool(*command: str | Path) -> list[str]:
    """The lines that a program of binutils prints."""
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


def undefined(library: Path) -> list[str]:
    """The names that a library takes from others, with their versions."""
    return [line.split()[-1] for line in tool("nm", "-D", "--undefined-only", library)]


def exported(library: Path) -> list[str]:
    """The names that others may take from a library."""
    return [line.split()[-1] for line in tool("nm", "-D", "--defined-only", library)]


def dynamic(library: Path, kind: str) -> list[str]:
    """The entries of one kind in the dynamic section: NEEDED, RPATH, RUNPATH."""
    lines = tool("readelf", "-d", "-W", library)
    return [re.search(r"\[(.*)\]", line)[1] for line in lines if f"({kind})" in line]


def in_limited_api(name: str) -> bool:
    """Is a name of Python's part of the stable ABI of the oldest Python we build for?"""
    if importlib.util.find_spec("abi3info") is None:
        return not name.startswith("_") or PRIVATE.match(name) is not None
    from abi3info import DATAS, FUNCTIONS
    from abi3info.models import Symbol

    entry = FUNCTIONS.get(Symbol(name)) or DATAS.get(Symbol(name))
    return entry is not None and (entry.added.major, entry.added.minor) <= PYTHON


def allowed(name: str) -> bool:
    """May the library ask for a name?"""
    if re.match(r"_?Py", name):
        return in_limited_api(name)
    return bool(RUNTIMES.search(name) or TORCH.match(name)) or name in OPTIONAL


def paths(library: Path) -> list[str]:
    """The absolute paths that a library carries: those of the machine that built it."""
    texts = map(bytes.decode, re.findall(rb"[\x20-\x7e]{6,}", library.read_bytes()))
    return [
        text for text in texts if re.match(r"/(?!dev/|proc/|sys/)\w[\w.+-]*/\w[\w./+-]+$", text)
    ]


def problems(library: Path) -> list[str]:
    """What is wrong with a built extension, in words."""
    found = [f"asks for {name}" for name in undefined(library) if not allowed(name)]
    found += [f"needs {name}" for name in dynamic(library, "NEEDED") if not LIBRARIES.match(name)]
    found += [f"looks in {p}" for kind in ("RPATH", "RUNPATH") for p in dynamic(library, kind)]
    found += [f"exports {name}" for name in exported(library) if name != "PyInit__C"]
    return found + [f"carries the path {path}" for path in paths(library)]


def foreign_weak(obj: Path, isa: str) -> list[str]:
    """The inline functions in an object that another object may have, too.

    The linker keeps one copy of each. If it kept the one that was compiled for ``isa``, code for
    every processor would run it. Those that name a type of ``maskmoe::<isa>`` are its own.
    """
    lines = tool("nm", "--demangle", "--defined-only", obj)
    rows = [re.match(r"[0-9a-f]* *([a-zA-Z]) (.*)", line) for line in lines]
    names = [row[2] for row in rows if row and row[1] in "WwVvu"]
    return [name for name in names if f"maskmoe::{isa}::" not in name]


def check(path: Path) -> list[str]:
    """The problems of a library, or of the library in a wheel."""
    if path.suffix != ".whl":
        return problems(path)
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(path) as wheel:
        members = [name for name in wheel.namelist() if name.endswith(".so")]
        if not members:
            record = json.loads(wheel.read("maskmoe_kernels/_build.json"))
            print(f"{path}: it has no extension: {record['cpu']}")
        return [text for name in members for text in problems(Path(wheel.extract(name, folder)))]


def main(files: list[str]) -> int:
    """Print what is wrong with each file; 1 if anything is."""
    if not HAS_TOOLS:
        print("not checked: nm, readelf and c++filt come with binutils", file=sys.stderr)
        return 0
    results = {file: check(Path(file)) for file in files}
    for file, found in results.items():
        print("\n  ".join([f"{file}: {len(found)} problems", *found]))
    return int(any(results.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
