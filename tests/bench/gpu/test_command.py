"""``python -m bench --device cuda`` as far as a machine without a GPU can tell."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from bench import command, results
from bench.arguments import parse
from bench.clock import cache_bytes
from bench.layers.overhead import ACTIVATION, Door, _check, doors, functions_of
from bench.lost import LOST
from bench.roofs import Roofs
from bench.shapes import Case
from maskmoe_kernels import masked_linear
from maskmoe_kernels.layout.families import FAMILIES
from tests.bench.made import result

TIMES = {"ours": 100.0, "exact": 200.0, "floor": 50.0}
TINY = "--families toy3 ncf4 --widths 8 --batch 16 --dtypes float32 --out".split()


@pytest.fixture(autouse=True)
def _quick_roofs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "measure_roofs", lambda *_: Roofs(100.0, 10.0))


def run(words: list[str]) -> tuple[int, str]:
    console = Console(width=200)
    with console.capture() as capture:
        code = command.main(words, "bench", console)
    return code, capture.get()


def families(path: Path) -> list[str]:
    return [r["family"] for r in results.load(path / results.NAME)["results"]]


def test_no_case_is_begun_when_the_time_is_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = types.SimpleNamespace(now=0.0)

    def measure(case: Case, *_: Any) -> dict[str, Any]:
        clock.now += 10
        return result(case, TIMES)

    monkeypatch.setattr(command, "measure", measure)
    monkeypatch.setattr(command.time, "perf_counter", lambda: clock.now)
    code, told = run([*TINY, str(tmp_path), "--within", "5"])
    assert code == 0
    assert families(tmp_path) == ["toy3"]
    assert "1 cases left out: 5 s have passed" in told


def test_a_lost_gpu_ends_the_run_and_the_next_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lost it is not tried again; what merely failed is."""
    lost: list[bool] = []

    def measure(case: Case, *_: Any) -> dict[str, Any]:
        if case.family == "toy3":
            lost.append(True)
            raise RuntimeError("an illegal memory access was encountered")
        return result(case, TIMES)

    monkeypatch.setattr(command, "measure", measure)
    monkeypatch.setattr(command, "is_lost", lambda device: bool(lost))
    code, told = run([*TINY, str(tmp_path)])
    assert code == LOST
    assert "go on with --resume" in told
    assert families(tmp_path) == []
    lost.clear()
    code, _ = run([*TINY, str(tmp_path), "--resume"])
    assert code == 0
    assert families(tmp_path) == ["ncf4"]
    assert not lost
    (reason,) = results.load(tmp_path / results.NAME)["skipped"].values()
    assert reason == "lost the GPU: an illegal memory access was encountered"


def test_a_cpu_is_never_lost() -> None:
    assert not command.is_lost("cpu")


@pytest.mark.parametrize(
    ("words", "expected"),
    [([], 25e9), (["--memory", "3"], 3e9), (["--device", "cpu"], 12e9)],
)
def test_memory_of_a_contender(
    words: list[str], expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (75_000_000_000, 0))
    _, arguments = parse(["--device", "cuda", *words], "bench")
    assert command._memory(arguments) == pytest.approx(expected)


def test_a_machine_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = types.SimpleNamespace(
        name="G1", major=9, minor=0, multi_processor_count=132, total_memory=10, L2_cache_size=7
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(results, "backend_on", lambda device: f"for {device}")
    here = results.machine("cuda")
    assert (here["gpu"], here["backend"], here["device"]) == ("G1", "for cuda", "cuda")
    assert here["gpu_properties"]["capability"] == "9.0"
    assert here["gpu_properties"]["l2"] == cache_bytes(torch.device("cuda")) == 7
    assert results.differences(here, here | {"gpu": "G2"}) == ["gpu: G1 / G2"]


# --- What a call costs -------------------------------------------------------------------


def tensors(rows: int = 8) -> tuple[Any, list[torch.Tensor]]:
    layout = FAMILIES["ncf4"]().hidden_layout(4, 4)
    generator = torch.Generator().manual_seed(0)
    shapes = [(rows, 16), (layout.num_weights,), (16,), (rows, 16)]
    drawn = [torch.randn(s, generator=generator) for s in shapes]
    return layout, [t.requires_grad_(k < 3) for k, t in enumerate(drawn)]


@pytest.mark.parametrize("step", [False, True])
@pytest.mark.parametrize("name", ["custom_op", "triton_op"])
def test_doors_lead_to_the_same(name: str, step: bool) -> None:
    layout, values = tensors(5 + step)
    true = masked_linear(*values[:3], layout, ACTIVATION, "torch")
    door = Door(name, doors("torch", layout)[name](), values, False, step)
    _check(door, true, layout, "torch", values)
    assert len(door.run()) == (4 if step else 1)


def test_a_door_that_leads_elsewhere_is_refused() -> None:
    layout, values = tensors()
    true = masked_linear(*values[:3], layout, ACTIVATION, "torch")
    door = Door("wrong", lambda x, w, b: 1.1 * masked_linear(x, w, b, layout), values, False, True)
    with pytest.raises(AssertionError):
        _check(door, true, layout, "torch", values)


def test_samples_of_a_door() -> None:
    layout, values = tensors()
    door = Door("plain", doors("torch", layout)["plain function"](), values, False, False)
    for _ in range(3):
        door.sample(4)
    report = door.report()
    assert 0 < report["host"]["us"] <= report["device"]["us"] * 1.5
    assert report["host"]["q25"] <= report["host"]["us"] <= report["host"]["q75"]
    door.host, door.device = [k * 1e-6 for k in (100, 1, 8, 2, 4)], [5e-6, 7e-6, 7e-6]
    report = door.report()
    assert report["host"] == pytest.approx({"us": 4, "q25": 2, "q75": 8})
    assert report["device"] == pytest.approx({"us": 7, "q25": 6, "q75": 7})


def test_the_functions_of_a_backend() -> None:
    assert functions_of("torch").__name__ == "maskmoe_kernels.ops.masked_linear.torch_impl"
    with pytest.raises(ModuleNotFoundError):
        functions_of("none")
