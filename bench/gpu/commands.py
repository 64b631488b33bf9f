"""The three commands of the GPU lab, ``prove``, ``measure`` and ``tune``: which tasks they run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.cases import Case
from bench.gpu.tasks import FAULTS, Lab, Task, nvidia, pytest, python
from bench.layers.suites import SUITES
from bench.networks import mlp_training

CUDA_TESTS = "tests/ops/test_cuda.py"
MLP_TESTS = tuple(f"tests/ops/test_cuda_{name}.py" for name in ("mlp", "mixture", "tf32"))

# --- Prove -------------------------------------------------------------------------------


def prove(lab: Lab) -> list[Task]:
    """Tests, graphs, streams, determinism, offsets, the sanitizer: is everything right?

    Tests that run on the CPU only are left out.
    """
    if lab.rehearsal:
        return [
            *pytest(lab, "faults", FAULTS),
            *pytest(lab, "full disk", FAULTS, "-k", "green", MASKMOE_LINES="/dev/full"),
            *pytest(lab, "seen", CUDA_TESTS, "-k", "seen"),
            *_sanitizer(lab),
        ]
    not_slow = ("-m", "not slow")
    objectives = [f"tests/ops/selection/test_{name}.py" for name in ("gem", "selection", "triton")]
    modules = [
        "tests/nn/test_linear.py",
        "tests/nn/test_checkpoints.py",
        "tests/models/test_mlp.py",
        "tests/models/test_cuda_networks.py",
    ]
    contract = [
        f"tests/ops/masked_linear/test_{name}.py" for name in ("masked_linear", "contract", "needs")
    ]
    return [
        # Each layout that a test draws compiles a new kernel or two, and one test all that would be
        # measured: for up to two minutes.
        *pytest(lab, "layers", CUDA_TESTS, "-k", "oracle or blind or waits", shards=6,
                MASKMOE_TEST_SECONDS="150"),
        *pytest(lab, "mlp", *MLP_TESTS, "-m", "cuda", shards=2),
        *pytest(lab, "contract", *contract, *not_slow, shards=3, MASKMOE_TEST_SECONDS="150"),
        *pytest(lab, "objectives", *objectives, *not_slow, shards=2),
        *_sanitizer(lab),
        *pytest(lab, "graphs", CUDA_TESTS, "-k", "graph or streams or several", shards=2),
        *pytest(lab, "offsets", CUDA_TESTS, "-k", "big_offsets"),
        *pytest(lab, "modules", *modules, *not_slow),
        *pytest(lab, "bits", CUDA_TESTS, "-k", "same_bits or seen"),
        *_first_contact(lab),
    ]  # fmt: skip


def _sanitizer(lab: Lab) -> list[Task]:
    shapes = ["-m", "tests.ops.masked_linear.tiny_shapes", "--device", lab.device]
    if lab.rehearsal:
        return [python("sanitizer", *shapes)]
    # Without caching, the sanitizer sees each allocation, not one large block.
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


def _first_contact(lab: Lab) -> list[Task]:
    """Do the benchmarks that ``measure`` times run at all, and an experiment?"""
    out, on = f"{lab.work}/try", ["--device", lab.device]
    case = "--families ncf4 --widths 32 --batch 4096 --dtypes bfloat16 float32".split()
    return [
        python("try bench", "-m", "bench", *on, *case, "--budget", "0.1", "--out", out,
                variables={"MASKMOE_TUNE": "0"}, seconds=0.9 * lab.seconds),
        python("try networks", "-m", "bench", "train", "--model", "mlp", "--smoke", *on,
                "--out", out, seconds=0.9 * lab.seconds),
        python("try overhead", "-m", "bench", "overhead", *on, "--rounds", "2", "--calls", "2",
                "--rows", "64", "--out", out, seconds=0.9 * lab.seconds),
        python("try toy", "-m", "maskmoe_kernels", "toy", "--epochs", "2", *on,
                "--out", f"{out}/toy", seconds=0.9 * lab.seconds),
    ]  # fmt: skip


# --- Measure -----------------------------------------------------------------------------

#: Cases of so many rows are not compiled beforehand: they fill the memory, and use the kernels of
#: cases with fewer rows.
HUGE = 1 << 20
#: Rivals whose own kernels are compiled at their first call.
COMPILING = ("QuACK", "stk", "BSR")
DTYPES_BY_PRIORITY = ("bfloat16", "float32")
#: Those that compile longest first.
NETWORKS_BY_PRIORITY = ("movielens", "powerset4", "spotify8", "toy")


def measure(lab: Lab) -> list[Task]:
    """Every rival and floor; a timed process runs alone.

    All kernels are compiled before, by one process for each case and network, all at once.
    """
    out, on = str(lab.work), ["--device", lab.device]
    bench = ["-m", "bench", *on]
    networks = [*bench[:2], "train", "--model", "mlp", *on, "--no-compile"]
    if lab.rehearsal:
        tiny = "--families toy3 --widths 16 --batch 128 --dtypes float32 --rounds 2 --budget 0"
        few = "--networks toy --dtypes float32 --batch 64 --rounds 1 --seconds 0"
        return [
            _compile_case(0, Case("toy3", 16, 128), lab),
            python("bench", *bench, *tiny.split(), "--out", f"{out}/bench", alone=True),
            python("networks", *networks, *few.split(), "--out", f"{out}/bench", alone=True),
            python("overhead", "-m", "bench", "overhead", *on, "--rounds", "2", "--calls", "2",
                    "--rows", "8", "--no-compile", "--out", f"{out}/bench", alone=True),
        ]  # fmt: skip
    few_rows = [case for case in SUITES["gpu-quick"].cases() if case.batch < HUGE]
    rows = ["--batch", "65536"]
    return [
        *(_compile_network(n, d, lab) for n in NETWORKS_BY_PRIORITY for d in DTYPES_BY_PRIORITY),
        _compile_rivals(lab),
        *(_compile_case(k, case, lab) for k, case in enumerate(few_rows)),
        python("bench", *bench, "--suite", "gpu-quick", "--out", f"{out}/bench",
                tries=4, again=["--resume"], seconds=0.48 * lab.seconds, alone=True),
        python("networks", *networks, *rows, "--rounds", "5", "--seconds", "0.1",
                "--networks", *mlp_training.NAMES, "--dtypes", *DTYPES_BY_PRIORITY,
                "--out", f"{out}/bench", seconds=0.18 * lab.seconds, alone=True),
        python("overhead", "-m", "bench", "overhead", *on, "--out", f"{out}/bench",
                alone=True),
    ]  # fmt: skip


def _compiling(lab: Lab, name: str, folder: str, *words: str) -> Task:
    """A task that fills the caches of compiled kernels; its times are not kept."""
    out = f"{lab.work}/compiled/{folder}"
    return python(
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
    words = f"train --model mlp --networks {network} --dtypes {dtype} --batch 65536".split()
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
    """Every tile configuration of named cases, hot and cold; hardware counters of three kernels."""
    call, on = ["-m", "bench.gpu.tune"], ["--device", lab.device]
    out = ["--out", f"{lab.work}/configs.jsonl"]
    if lab.rehearsal:
        words = [*call, "toy3:16:32:float32", "--parts", "forward", "--configs", "own", *on, *out]
        return [python("tune", *words, variables={"TRITON_INTERPRET": "1"}, alone=True)]
    parts = ("forward", "xw")
    compiled = ["--compile", "--out", f"{lab.work}/compiled.jsonl"]
    return [
        *(
            python(f"compile {case} {part}", *call, case, "--parts", part, *on, *compiled,
                    variables={"OMP_NUM_THREADS": "1"}, until=0.45 * lab.seconds)
            for case in TUNED for part in parts
        ),
        python("tune", *call, *TUNED, "--parts", *parts, *on, *out, tries=4, alone=True,
                until=0.88 * lab.seconds),
        *_counters([*call, TUNED[1], "--parts", "forward", "x", "w", "--configs", "first",
                    "--compile", *on, "--out", f"{lab.work}/counted.jsonl"]),
    ]  # fmt: skip


def _counters(words: Sequence[str]) -> list[Task]:
    """One section of Nsight Compute for three kernels, without changing the clock."""
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
class Command:
    """One command of the lab.

    Attributes:
        text: Its help.
        seconds: The time limit of all its tasks together.
        tasks: Its tasks.
        slots: Number of processes that run at once.
    """

    text: str
    seconds: float
    tasks: Callable[[Lab], list[Task]]
    slots: int = 20


COMMANDS = {
    "prove": Command("is everything right?", 230.0, prove),
    "measure": Command("every rival and floor", 230.0, measure),
    "tune": Command("every tile configuration of some layers", 220.0, tune),
}
