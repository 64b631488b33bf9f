"""What the GPU lab's three commands consist of: tasks, each a process that also runs alone."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.cases import Case
from bench.layers.suites import SUITES
from bench.networks import mlp_training as network_training

ROOT = Path(__file__).resolve().parents[2]
CUDA_TESTS = "tests/ops/test_cuda.py"
NETWORK_TESTS = tuple(f"tests/ops/test_cuda_{name}.py" for name in ("mlp", "mixture", "tf32"))
FAULTS = "tests/bench/gpu/faults.py"
#: Seconds that a phase of a test may take before its process ends and another goes on after it.
TEST_SECONDS = 60.0
REHEARSED_SECONDS = 3.0


@dataclass(frozen=True)
class Lab:
    """Where and how the lab runs.

    Attributes:
        work: Where everything is written.
        rehearsal: On the CPU with tiny shapes, and planted faults?
        seconds: That all tasks have together.
    """

    work: Path
    rehearsal: bool
    seconds: float

    @property
    def device(self) -> str:
        """For ``--device``."""
        return "cpu" if self.rehearsal else "cuda"

    @property
    def lines(self) -> Path:
        """A json line for each test and process."""
        return self.work / "lab.jsonl"

    @property
    def spare(self) -> Path:
        """Where lines go that ``lines`` does not take: in memory, where there is such a place."""
        memory = Path("/dev/shm")
        folder = memory if memory.is_dir() else Path(tempfile.gettempdir())
        return folder / f"maskmoe-lab-{os.getpid()}.jsonl"


@dataclass(frozen=True)
class Task:
    """A process, begun in the checkout.

    Attributes:
        name: Unique in its command.
        words: Its arguments; the first is a program.
        variables: Beside those of the environment.
        seconds: After which it is ended; ``None``: with the lab.
        until: Seconds from the lab's begin after which it is ended, or not begun.
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
    until: float | None = None
    tries: int = 1
    again: Sequence[str] = ()
    alone: bool = False
    refusals: Sequence[str] = ()

    def line(self) -> str:
        """As it would be typed."""
        words = ["python3" if word == sys.executable else word for word in self.words]
        return " ".join([*(f"{k}={v}" for k, v in self.variables.items()), *map(_quoted, words)])


def _quoted(word: str) -> str:
    return f"'{word}'" if any(c in word for c in " *[]|^$()") else word


def _python(name: str, *words: str, **options: object) -> Task:
    return Task(name, [sys.executable, *words], **options)  # type: ignore[arg-type]


def _pytest(lab: Lab, name: str, *words: str, shards: int = 1, **variables: str) -> list[Task]:
    plugin = [
        "-p",
        "bench.gpu.pytest_plugin",
        "-p",
        "no:cacheprovider",
        "-q",
        "--device",
        lab.device,
    ]
    tasks = []
    for k in range(shards):
        shown = name if shards == 1 else f"{name} {k + 1}/{shards}"
        seconds = REHEARSED_SECONDS if words[0] == FAULTS else TEST_SECONDS
        given = {
            "OMP_NUM_THREADS": "1",
            "HYPOTHESIS_PROFILE": "lab",
            "MASKMOE_TUNE": "0",
            "MASKMOE_SHARD": f"{k}/{shards}",
            "MASKMOE_TEST_SECONDS": f"{seconds:g}",
            **variables,
        }
        call = ["-m", "pytest", *plugin, *words]
        tasks.append(_python(shown, *call, variables=given, tries=8, seconds=0.9 * lab.seconds))
    return tasks


# --- Prove -------------------------------------------------------------------------------


def prove(lab: Lab) -> list[Task]:
    """Is everything right? Tests, graphs, streams, determinism, offsets, the sanitizer.

    Only what runs on the GPU: tests of the CPU alone have their own machines.
    """
    if lab.rehearsal:
        return [
            *_pytest(lab, "faults", FAULTS),
            *_pytest(lab, "full disk", FAULTS, "-k", "green", MASKMOE_LINES="/dev/full"),
            *_pytest(lab, "seen", CUDA_TESTS, "-k", "seen"),
            *_sanitizer(lab),
        ]
    not_slow = ("-m", "not slow")
    objectives = [f"tests/ops/selection/test_{name}.py" for name in ("gem", "selection", "triton")]
    modules = [
        "tests/nn/test_linear.py",
        "tests/nn/test_checkpoints.py",
        "tests/models/test_mlp.py",
    ]
    contract = [f"tests/ops/test_{name}.py" for name in ("masked_linear", "contract", "needs")]
    return [
        *_pytest(lab, "layers", CUDA_TESTS, "-k", "oracle or blind or waits", shards=3),
        *_pytest(lab, "networks", *NETWORK_TESTS, "-m", "cuda", shards=2),
        # A new kernel or two for each layout that a test draws: it compiles for a minute.
        *_pytest(lab, "contract", *contract, *not_slow, shards=3, MASKMOE_TEST_SECONDS="150"),
        *_pytest(lab, "objectives", *objectives, *not_slow, shards=2),
        *_sanitizer(lab),
        *_pytest(lab, "graphs", CUDA_TESTS, "-k", "graph or streams or several", shards=2),
        *_pytest(lab, "offsets", CUDA_TESTS, "-k", "big_offsets"),
        *_pytest(lab, "modules", *modules, *not_slow),
        *_pytest(lab, "bits", CUDA_TESTS, "-k", "same_bits or seen"),
        *_first_contact(lab),
    ]  # fmt: skip


def _sanitizer(lab: Lab) -> list[Task]:
    shapes = ["-m", "tests.ops.masked_linear.tiny_shapes", "--device", lab.device]
    if lab.rehearsal:
        return [_python("sanitizer", *shapes)]
    # Every allocation is the driver's own, or the sanitizer would see one large block.
    variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "MASKMOE_TUNE": "0"}
    tool = nvidia("compute-sanitizer")
    if tool is None:
        return []
    options = ("--error-exitcode", "9", "--report-api-errors", "no", "--print-limit", "20")
    return [
        Task(
            kind,
            [tool, "--tool", kind, *options, sys.executable, *shapes],
            variables,
            seconds=0.9 * lab.seconds,
            refusals=("Device not supported",),
        )
        for kind in ("memcheck", "racecheck")
    ]


def nvidia(tool: str) -> str | None:
    """The path of a tool of the CUDA toolkit, which may not be on ``PATH``."""
    folders = [os.environ.get("CUDA_HOME", "/usr/local/cuda"), "/usr/local/cuda"]
    more = os.pathsep.join(f"{folder}/bin" for folder in folders)
    return shutil.which(tool) or shutil.which(tool, path=more)


def _first_contact(lab: Lab) -> list[Task]:
    """Does what ``measure`` needs run at all, and an experiment? No time of these is kept."""
    out, on = f"{lab.work}/try", ["--device", lab.device]
    case = "--families ncf4 --widths 32 --batch 4096 --dtypes bfloat16 float32".split()
    return [
        _python("try bench", "-m", "bench", *on, *case, "--budget", "0.1", "--out", out,
                variables={"MASKMOE_TUNE": "0"}, seconds=0.9 * lab.seconds),
        _python("try networks", "-m", "bench", "train", "--model", "networks", "--smoke", *on,
                "--out", out, seconds=0.9 * lab.seconds),
        _python("try overhead", "-m", "bench.layers.overhead", *on, "--rounds", "2", "--calls", "2",
                "--rows", "64", "--out", out, seconds=0.9 * lab.seconds),
        _python("try toy", "-m", "maskmoe_kernels", "toy", "--epochs", "2", *on,
                "--out", f"{out}/toy", seconds=0.9 * lab.seconds),
    ]  # fmt: skip


# --- Measure -----------------------------------------------------------------------------

#: Rows from which a case is not compiled beforehand: it fills the memory, and its kernels are
#: those of fewer rows.
HUGE = 1 << 20
#: Rivals whose own kernels are compiled at their first call.
COMPILING = ("QuACK", "stk", "BSR")
DTYPES_BY_PRIORITY = ("bfloat16", "float32")
#: By how much compiling alone takes.
NETWORKS_BY_PRIORITY = ("movielens", "powerset4", "spotify8", "toy")


def measure(lab: Lab) -> list[Task]:
    """Every rival and floor; what is timed has the machine for itself.

    All kernels are compiled first, by a process for each case and network, all at once.
    """
    out, on = str(lab.work), ["--device", lab.device]
    bench = ["-m", "bench", *on]
    networks = [*bench[:2], "train", "--model", "networks", *on, "--no-compile"]
    if lab.rehearsal:
        tiny = "--families toy3 --widths 16 --batch 128 --dtypes float32 --rounds 2 --budget 0"
        few = "--networks toy --dtypes float32 --batch 64 --rounds 1 --seconds 0"
        return [
            _compile_case(0, Case("toy3", 16, 128), lab),
            _python("bench", *bench, *tiny.split(), "--out", f"{out}/bench", alone=True),
            _python("networks", *networks, *few.split(), "--out", f"{out}/bench", alone=True),
            _python("overhead", "-m", "bench.layers.overhead", *on, "--rounds", "2", "--calls", "2",
                    "--rows", "8", "--no-compile", "--out", f"{out}/bench", alone=True),
        ]  # fmt: skip
    few_rows = [case for case in SUITES["gpu-quick"].cases() if case.batch < HUGE]
    rows = ["--batch", "65536"]
    return [
        *(_compile_network(n, d, lab) for n in NETWORKS_BY_PRIORITY for d in DTYPES_BY_PRIORITY),
        _compile_rivals(lab),
        *(_compile_case(k, case, lab) for k, case in enumerate(few_rows)),
        _python("bench", *bench, "--suite", "gpu-quick", "--out", f"{out}/bench",
                tries=4, again=["--resume"], seconds=0.48 * lab.seconds, alone=True),
        _python("networks", *networks, *rows, "--rounds", "5", "--seconds", "0.1",
                "--networks", *network_training.NAMES, "--dtypes", *DTYPES_BY_PRIORITY,
                "--out", f"{out}/bench", seconds=0.18 * lab.seconds, alone=True),
        _python("overhead", "-m", "bench.layers.overhead", *on, "--out", f"{out}/bench",
                alone=True),
    ]  # fmt: skip


def _compiling(lab: Lab, name: str, folder: str, *words: str) -> Task:
    """Fills the caches of compiled kernels; what it measures, beside others, is not kept."""
    out = f"{lab.work}/compiled/{folder}"
    return _python(
        f"compile {name}", "-m", "bench", *words, "--device", lab.device, "--out", out,
        variables={"OMP_NUM_THREADS": "1", "MASKMOE_CACHE": out}, until=0.27 * lab.seconds,
    )  # fmt: skip


def _compile_case(number: int, case: Case, lab: Lab) -> Task:
    words = f"--families {case.family} --widths {case.width} --batch {case.batch}".split()
    words += f"--dtypes {case.dtype} --rounds 1 --budget 0 --memory 8 --contenders ours".split()
    return _compiling(lab, str(case), str(number), *words)


def _compile_rivals(lab: Lab) -> Task:
    words = "--families ncf4 powerset6 --widths 16 64 --batch 4096 --dtypes bfloat16".split()
    words += ["--rounds", "1", "--budget", "0", "--memory", "8", "--contenders", *COMPILING]
    return _compiling(lab, "rivals", "rivals", *words)


def _compile_network(network: str, dtype: str, lab: Lab) -> Task:
    words = f"train --model networks --networks {network} --dtypes {dtype} --batch 65536".split()
    words += "--rounds 1 --seconds 0 --no-compile".split()
    return _compiling(lab, f"{network} {dtype}", f"{network}-{dtype}", *words)


# --- Tune --------------------------------------------------------------------------------

TUNED = (
    "powerset6:16:65536:bfloat16",
    "ncf4:64:65536:bfloat16",
    "powerset4:32:65536:bfloat16",
    "chain16:64:65536:bfloat16",
    "powerset6:64:65536:bfloat16",
    "pairs22:16:65536:bfloat16",
    "powerset6:32:65536:tf32",
)


def tune(lab: Lab) -> list[Task]:
    """Every way to cut named cases, hot and cold; counters of three kernels."""
    call, on = ["-m", "bench.gpu.tune"], ["--device", lab.device]
    out = ["--out", f"{lab.work}/ways.jsonl"]
    if lab.rehearsal:
        words = [*call, "toy3:16:32:float32", "--parts", "forward", "--ways", "own", *on, *out]
        return [_python("tune", *words, variables={"TRITON_INTERPRET": "1"}, alone=True)]
    parts = ("forward", "xw")
    compiled = ["--compile", "--out", f"{lab.work}/compiled.jsonl"]
    return [
        *(
            _python(f"compile {case} {part}", *call, case, "--parts", part, *on, *compiled,
                    variables={"OMP_NUM_THREADS": "1"}, until=0.45 * lab.seconds)
            for case in TUNED for part in parts
        ),
        _python("tune", *call, *TUNED, "--parts", *parts, *on, *out, tries=4, alone=True,
                until=0.88 * lab.seconds),
        *_counters([*call, TUNED[1], "--parts", "forward", "x", "w", "--ways", "first",
                    "--compile", *on, "--out", f"{lab.work}/counted.jsonl"]),
    ]  # fmt: skip


def _counters(words: Sequence[str]) -> list[Task]:
    """One section of Nsight Compute for three kernels; the clock stays as it is."""
    tool = nvidia("ncu")
    if tool is None:
        return []
    options = ["--clock-control", "none", "--section", "SpeedOfLight", "-c", "3"]
    options += ["-k", "regex:^(forward|backward|_grad_weight)$"]
    refusals = ("ERR_NVGPUCTRPERM", "No kernels were profiled")
    return [
        Task("counters", [tool, *options, sys.executable, *words], alone=True, refusals=refusals)
    ]


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
    "tune": Part("every way to cut some layers", 220.0, tune),
}
