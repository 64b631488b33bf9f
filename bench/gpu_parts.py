"""What the GPU lab's three commands consist of: tasks, each a process that also runs alone."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.shapes import SUITES, Case

ROOT = Path(__file__).resolve().parent.parent
CUDA_TESTS = "tests/ops/test_cuda.py"
NETWORK_TESTS = tuple(f"tests/ops/test_cuda_{name}.py" for name in ("mlp", "mixture", "tf32"))
#: Seconds that one test may take before its process ends and another goes on after it.
TEST_SECONDS = 60


@dataclass(frozen=True)
class Lab:
    """Where and how the lab runs.

    Attributes:
        out: Where everything is written.
        rehearsal: On the CPU with tiny shapes?
        seconds: That all tasks have together.
    """

    out: Path
    rehearsal: bool
    seconds: float

    @property
    def device(self) -> str:
        """For ``--device``."""
        return "cpu" if self.rehearsal else "cuda"


@dataclass(frozen=True)
class Task:
    """A process, begun in the checkout.

    Attributes:
        name: Unique in its command.
        words: Its arguments; the first is a program.
        variables: Beside those of the environment.
        seconds: After which it is ended; ``None``: with the lab.
        tries: How often it may be begun: again where it was lost, ended by a signal, or by its own
            watch in the middle of a test.
        again: What is added to ``words`` from the second time on.
        alone: Does it have the machine for itself? For what is timed.
        refusals: What a log says where the machine, not the code, is the reason of a failure.
    """

    name: str
    words: Sequence[str]
    variables: Mapping[str, str] = field(default_factory=dict)
    seconds: float | None = None
    tries: int = 1
    again: Sequence[str] = ()
    alone: bool = False
    refusals: Sequence[str] = ()

    def line(self) -> str:
        """As it would be typed."""
        words = ["python3" if word == sys.executable else word for word in self.words]
        return " ".join([*(f"{k}={v}" for k, v in self.variables.items()), *map(_quoted, words)])


def _quoted(word: str) -> str:
    return f"'{word}'" if any(c in word for c in " *[]|") else word


def _python(name: str, *words: str, **options: object) -> Task:
    return Task(name, [sys.executable, *words], **options)  # type: ignore[arg-type]


def _pytest(lab: Lab, name: str, *words: str, shards: int = 1) -> list[Task]:
    plugin = ["-p", "bench.gpu_lines", "-p", "no:cacheprovider", "-q", "--device", lab.device]
    watch = ["--timeout", str(TEST_SECONDS), "--timeout-method", "thread"]
    tasks = []
    for k in range(shards):
        shown = name if shards == 1 else f"{name} {k + 1}/{shards}"
        variables = {
            "OMP_NUM_THREADS": "1",
            "HYPOTHESIS_PROFILE": "lab",
            "MASKMOE_TUNE": "0",
            "MASKMOE_SHARD": f"{k}/{shards}",
        }
        call = ["-m", "pytest", *plugin, *watch, *words]
        tasks.append(_python(shown, *call, variables=variables, tries=8))
    return tasks


# --- Prove -------------------------------------------------------------------------------


def prove(lab: Lab) -> list[Task]:
    """Is everything right? Tests, graphs, streams, determinism, offsets, the sanitizer."""
    if lab.rehearsal:
        return [
            *_pytest(lab, "seen", CUDA_TESTS, "-k", "seen"),
            *_pytest(lab, "objectives", "tests/objectives/test_gem.py", "-k", "loss"),
            *_sanitizer(lab),
        ]
    not_slow = ("-m", "not slow")
    return [
        *_pytest(lab, "layers", CUDA_TESTS, "-k", "oracle or blind or waits", shards=3),
        *_pytest(lab, "networks", *NETWORK_TESTS, "-m", "cuda", shards=2),
        *_pytest(lab, "objectives", "tests/objectives", *not_slow, shards=2),
        *_sanitizer(lab),
        *_pytest(lab, "graphs", CUDA_TESTS, "-k", "graph or streams", shards=2),
        *_pytest(lab, "offsets", CUDA_TESTS, "-k", "big_offsets"),
        *_pytest(lab, "nn", "tests/nn", *not_slow),
        *_pytest(lab, "models", "tests/models", *not_slow),
        *_pytest(
            lab, "contract", "tests/ops/test_contract.py", "tests/ops/test_masked_linear.py",
            "tests/ops/test_needs.py", *not_slow,
        ),
        *_pytest(lab, "bits", CUDA_TESTS, "-k", "same_bits"),
        *_first_contact(lab),
        *_pytest(
            lab, "the rest", "tests/testing", "tests/layout", "tests/experiments",
            "tests/backends", "tests/ops/test_networks.py", *not_slow,
        ),
    ]  # fmt: skip


def _sanitizer(lab: Lab) -> list[Task]:
    shapes = ["-m", "tests.ops.tiny_shapes", "--device", lab.device]
    if lab.rehearsal:
        return [_python("sanitizer", *shapes)]
    # Every allocation is the driver's own, or the sanitizer would see one large block.
    variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "MASKMOE_TUNE": "0"}
    tool = sanitizer()
    if tool is None:
        return []
    options = ("--error-exitcode", "9", "--report-api-errors", "no", "--print-limit", "20")
    return [
        Task(
            kind,
            [tool, "--tool", kind, *options, sys.executable, *shapes],
            variables,
            refusals=("Device not supported",),
        )
        for kind in ("memcheck", "racecheck")
    ]


def sanitizer() -> str | None:
    """The path of compute-sanitizer, which may not be on ``PATH``."""
    folders = [os.environ.get("CUDA_HOME", "/usr/local/cuda"), "/usr/local/cuda"]
    more = os.pathsep.join(f"{folder}/bin" for folder in folders)
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=more)


def _first_contact(lab: Lab) -> list[Task]:
    """Does what ``measure`` needs run at all? No time of these is kept."""
    out, on = str(lab.out), ["--device", lab.device]
    case = "--families ncf4 --widths 32 --batch 4096 --dtypes bfloat16 float32".split()
    return [
        _python("try bench", "-m", "bench", *on, *case, "--budget", "0.1", "--out", f"{out}/try",
                variables={"MASKMOE_TUNE": "0"}),
        _python("try networks", "-m", "bench", "train", "--model", "networks", "--smoke", *on,
                "--out", f"{out}/try"),
        _python("try overhead", "-m", "bench.overhead", *on, "--rounds", "2", "--calls", "2",
                "--rows", "64", "--out", f"{out}/try"),
    ]  # fmt: skip


# --- Measure -----------------------------------------------------------------------------

#: Rows from which a case is not compiled beforehand: it fills the memory, and its kernels are
#: those of fewer rows.
HUGE = 1 << 20


def measure(lab: Lab) -> list[Task]:
    """Every rival and floor; what is timed has the machine for itself.

    All kernels are compiled first, by a process for each case, all at once.
    """
    out = str(lab.out)
    on = ["--device", lab.device]
    bench = ["-m", "bench", *on]
    if lab.rehearsal:
        tiny = "--families toy3 --widths 16 --batch 128 --dtypes float32 --rounds 2 --budget 0"
        return [
            _python("bench", *bench, *tiny.split(), "--out", f"{out}/bench", alone=True),
            _python("overhead", "-m", "bench.overhead", *on, "--rounds", "2", "--calls", "2",
                    "--rows", "8", "--no-compile", "--out", out, alone=True),
        ]  # fmt: skip
    suite = SUITES["gpu-quick"]
    few = [case for case in suite.cases() if case.batch < HUGE]
    return [
        *(_warm(k, case, lab) for k, case in enumerate(few)),
        _python("bench", *bench, "--suite", "gpu-quick", "--out", f"{out}/bench",
                tries=4, again=["--resume"], seconds=0.5 * lab.seconds, alone=True),
        _python("networks", "-m", "bench", "train", "--model", "networks", *on, "--no-compile",
                "--batch", "65536", "--rounds", "3", "--out", out, seconds=0.2 * lab.seconds,
                alone=True),
        _python("overhead", "-m", "bench.overhead", *on, "--out", out, alone=True),
    ]  # fmt: skip


def _warm(number: int, case: Case, lab: Lab) -> Task:
    """Compiles what a case needs into Triton's cache; what it measures is not kept."""
    words = f"--families {case.family} --widths {case.width} --batch {case.batch}".split()
    words += f"--dtypes {case.dtype} --rounds 1 --budget 0".split()
    return _python(
        f"compile {case}", "-m", "bench", "--device", lab.device, *words,
        "--memory", "8", "--out", f"{lab.out}/compiled/{number}",
        variables={"OMP_NUM_THREADS": "1", "MASKMOE_CACHE": f"{lab.out}/compiled/{number}"},
        seconds=0.35 * lab.seconds,
    )  # fmt: skip


@dataclass(frozen=True)
class Part:
    """One command of the lab.

    Attributes:
        text: What it does.
        seconds: That it has.
        tasks: What is run.
        slots: Processes at once.
    """

    text: str
    seconds: float
    tasks: Callable[[Lab], list[Task]]
    slots: int = 20


PARTS = {
    "prove": Part("is everything right?", 200.0, prove),
    "measure": Part("every rival and floor", 230.0, measure),
}
