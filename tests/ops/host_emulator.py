"""The host emulator of the CUDA kernels: compiled with g++, loaded as ops.

The ops ``maskmoe_host_emulator`` run the kernels on CPU tensors, the warps of a thread block taking
turns; see ``csrc/cuda/host_emulator.cc``.
"""

import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
TORCH = Path(torch.__file__).parent
SOURCES = (
    "common/layout.cpp",
    "common/names.cpp",
    "common/serialized_layout.cpp",
    "cuda/execution_plan.cpp",
    "cuda/smem_layout.cpp",
    "cuda/host_emulator.cc",
)
SHARED = 227 * 1024  # bytes a block may have on an H200


def command():
    """What compiles the emulator, without its output. CXX and CXXFLAGS are honoured."""
    return [
        os.environ.get("CXX", "g++"), "-std=c++20", "-O1", "-fPIC", "-shared", "-w",
        "-DTORCH_TARGET_VERSION=0x020b000000000000", f"-I{CSRC}",
        "-isystem", str(TORCH / "include"), *shlex.split(os.environ.get("CXXFLAGS", "")),
        *(str(CSRC / name) for name in SOURCES),
        f"-L{TORCH / 'lib'}", "-ltorch_cpu",
    ]  # fmt: skip


@functools.cache
def unsupported_reason():
    """Why there is no emulator, or None; compiles it if its sources have changed."""
    call = command()
    if shutil.which(call[0]) is None:
        return f"no {call[0]} to compile the host emulator with"
    if not CSRC.is_dir():
        return f"no sources in {CSRC}: the suite runs against an installed wheel"
    sources = [path for name in ("common", "cuda") for path in (CSRC / name).rglob("*")]
    key = hashlib.sha256(repr((call, torch.__version__)).encode())
    for source in sorted(filter(Path.is_file, sources)):
        key.update(source.read_bytes())
    folder = Path(tempfile.gettempdir()) / f"maskmoe-host-emulator-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        return f"{folder} belongs to somebody else"
    library = folder / f"emulator-{key.hexdigest()[:16]}.so"
    if not library.exists():
        draft = library.with_suffix(f".{os.getpid()}")
        done = subprocess.run(
            [*call, "-o", str(draft)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"the host emulator does not compile:\n{done.stderr[:4000]}")
        draft.replace(library)
    torch.ops.load_library(str(library))
    return None


def configure(blocks=3, multiprocessors=1, shared=SHARED, alone=False, reverse=False):
    """Chooses how the emulator runs.

    Args:
        blocks: Thread blocks that the device runs at a time.
        multiprocessors: With more of them, tiles have fewer rows.
        shared: Bytes of shared memory that a block may have.
        alone: Has a multiprocessor room for one block only? A backward's has more warps then, and
            no sums of gradients in shared memory.
        reverse: Do blocks, warps and lanes run from the last to the first?
    """
    torch.ops.maskmoe_host_emulator.configure(blocks, multiprocessors, shared, alone, reverse)


def shared_memory_limits_set():
    """How often a kernel was allowed more shared memory than every kernel may have."""
    return torch.ops.maskmoe_host_emulator.shared_memory_limits_set()
