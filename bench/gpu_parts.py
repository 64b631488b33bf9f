"""What the GPU lab consists of: parts, each a few commands that also run alone."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CUDA_TESTS = "tests/ops/test_cuda.py"
#: Folders of tests; those that a GPU matters to come first, should time run out.
TESTS = (
    CUDA_TESTS,
    "tests/ops",
    "tests/objectives",
    "tests/nn",
    "tests/models",
    "tests/testing",
    "tests/layout",
    "tests/experiments",
    "tests/backends",
    "tests/bench",
)
MOST_SHARDS = 8


@dataclass(frozen=True)
class Lab:
    """Where and how the lab runs.

    Attributes:
        out: Where everything is written.
        rehearsal: On the CPU with tiny shapes?
        seconds: That the part has.
    """

    out: Path
    rehearsal: bool
    seconds: float

    @property
    def device(self) -> str:
        """For ``--device``."""
        return "cpu" if self.rehearsal else "cuda"


@dataclass(frozen=True)
class Command:
    """A process, begun in the checkout.

    Attributes:
        words: Its arguments; the first is a program.
        variables: Beside those of the environment.
        tries: How often it is begun, from the second time on with ``--resume``, where it ends as
            one that can go on: with the status ``LOST``, or by a signal.
    """

    words: Sequence[str]
    variables: Mapping[str, str] = field(default_factory=dict)
    tries: int = 1

    def line(self) -> str:
        """As it would be typed."""
        words = ["python3" if word == sys.executable else word for word in self.words]
        return " ".join([*(f"{k}={v}" for k, v in self.variables.items()), *map(_quoted, words)])


@dataclass(frozen=True)
class Part:
    """One part of the lab.

    Attributes:
        name: For ``--part``.
        text: What it does.
        share: Seconds of nine minutes.
        commands: What is run.
        together: All at once? Otherwise one after another, an equal share of the time each.
        obstacle: Why it cannot be run, in words; ``None`` where it can.
        optional: Does the lab call itself green without it?
        refusals: What a log says where the machine, not the code, is the reason of a failure.
    """

    name: str
    text: str
    share: float
    commands: Callable[[Lab], list[Command]]
    together: bool = False
    obstacle: Callable[[Lab], str | None] = lambda lab: None
    optional: bool = False
    refusals: Sequence[str] = ()


def _quoted(word: str) -> str:
    return f"'{word}'" if any(c in word for c in " *[]") else word


def _python(*words: str, variables: Mapping[str, str] | None = None, tries: int = 1) -> Command:
    return Command([sys.executable, *words], variables or {}, tries)


def _pytest(lab: Lab, *words: str, shard: str = "") -> Command:
    plugin = ["-p", "bench.gpu_lines", "-p", "no:cacheprovider", "-q", "--device", lab.device]
    variables = {"OMP_NUM_THREADS": "1"} | ({"MASKMOE_SHARD": shard} if shard else {})
    return _python("-m", "pytest", *plugin, *words, variables=variables)


# --- Parts -------------------------------------------------------------------------------


def _build(lab: Lab) -> list[Command]:
    return [_python("setup.py", "-q", "build_ext", "--inplace")]


def _no_build(lab: Lab) -> str | None:
    return "not rehearsed: it writes into the checkout" if lab.rehearsal else None


def _tests(lab: Lab) -> list[Command]:
    if lab.rehearsal:
        return [_pytest(lab, CUDA_TESTS, "-k", "seen", shard=f"{k}/2") for k in range(2)]
    count = min(MOST_SHARDS, max(1, (os.cpu_count() or 1) // 2))
    # The rest of the tests for GPUs are parts of their own.
    words = [*TESTS, "-m", "not slow", "-k", "not test_cuda.py or oracle or blind or seen"]
    return [_pytest(lab, *words, shard=f"{k}/{count}") for k in range(count)]


def _memory(lab: Lab) -> list[Command]:
    return [_pytest(lab, CUDA_TESTS, "-k", "big_offsets")]


def _graphs(lab: Lab) -> list[Command]:
    return [_pytest(lab, CUDA_TESTS, "-k", "graph or streams or devices or waits")]


def _determinism(lab: Lab) -> list[Command]:
    return [_pytest(lab, CUDA_TESTS, "-k", "same_bits")]


def _sanitizer(lab: Lab) -> list[Command]:
    shapes = ["-m", "tests.ops.tiny_shapes", "--device", lab.device]
    if lab.rehearsal:
        return [_python(*shapes)]
    # Every allocation is the driver's own, or the sanitizer would see one large block.
    variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "MASKMOE_TUNE": "0"}
    return [
        Command(
            [
                sanitizer() or "compute-sanitizer",
                *("--tool", tool, "--error-exitcode", "9", "--report-api-errors", "no"),
                sys.executable,
                *shapes,
            ],
            variables,
        )
        for tool in ("memcheck", "racecheck")
    ]


def sanitizer() -> str | None:
    """The path of compute-sanitizer, which may not be on ``PATH``."""
    folders = [os.environ.get("CUDA_HOME", "/usr/local/cuda"), "/usr/local/cuda"]
    more = os.pathsep.join(f"{folder}/bin" for folder in folders)
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=more)


def _no_sanitizer(lab: Lab) -> str | None:
    if lab.rehearsal or sanitizer() is not None:
        return None
    return "compute-sanitizer is neither on PATH nor in CUDA_HOME/bin"


def _overhead(lab: Lab) -> list[Command]:
    words = ["-m", "bench.overhead", "--device", lab.device, "--out", str(lab.out)]
    tiny = ["--rounds", "2", "--calls", "2", "--rows", "8", "--no-compile"]
    return [_python(*words, *(tiny if lab.rehearsal else []))]


def _bench(lab: Lab) -> list[Command]:
    words = ["-m", "bench", "--device", lab.device]
    if lab.rehearsal:
        words += "--families toy3 --widths 16 --batch 128 --dtypes float32".split()
        words += "--rounds 2 --budget 0 --within 60 --out".split()
        return [_python(*words, str(lab.out / "bench"))]
    # The last case that is begun may take some seconds, and so does the start.
    quick, compiled = (max(5, int(f * lab.seconds) - 20) for f in (0.7, 0.3))
    suite = ["--suite", "gpu-quick", "--within", str(quick)]
    few = "--families ncf4 powerset4 --widths 32 --batch 256 65536 --dtypes bfloat16".split()
    few += ["--compile", "--budget", "0.5", "--within", str(compiled)]
    return [
        _python(*words, *suite, "--out", str(lab.out / "bench"), tries=3),
        _python(*words, *few, "--out", str(lab.out / "bench-compiled"), tries=2),
    ]


def _networks(lab: Lab) -> list[Command]:
    words = ["-m", "bench", "train", "--model", "networks", "--device", lab.device]
    many = "--no-compile --batch 65536 --rounds 3".split()
    return [_python(*words, *(["--smoke"] if lab.rehearsal else many), "--out", str(lab.out))]


#: In order; the benchmark is last and takes what time the others leave.
PARTS = (
    Part("build", "the extension, in place", 90, _build, obstacle=_no_build, optional=True),
    Part("tests", "the suite with --device cuda", 110, _tests, together=True),
    Part("memory", "offsets past 2^31", 25, _memory),
    Part("graphs", "CUDA graphs, streams, devices, no host sync", 35, _graphs),
    Part("determinism", "the same bits 100 times under memory pressure", 30, _determinism),
    Part(
        "sanitizer",
        "compute-sanitizer memcheck and racecheck on 20 tiny shapes",
        60,
        _sanitizer,
        together=True,
        obstacle=_no_sanitizer,
        refusals=("Device not supported",),
    ),
    Part("overhead", "what a call costs, by how the op is registered", 20, _overhead),
    Part("networks", "training whole networks in one pass", 40, _networks),
    Part("bench", "every rival and floor", 120, _bench),
)
