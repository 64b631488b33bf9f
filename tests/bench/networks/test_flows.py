"""The benchmark of flows measures the same function before and after ``convert_``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from bench.command import main
from bench.networks import flows
from maskmoe_kernels import BackendError
from maskmoe_kernels.ops import native


def run(words: str, out: Path) -> dict:
    assert main([*words.split(), "--out", str(out)], Console(quiet=True)) == 0
    return json.loads((out / flows.FILE).read_text("utf-8"))


@pytest.mark.parametrize(
    ("name", "package"),
    [("zuko MAF", "zuko"), ("zuko NSF", "zuko"), ("nflows MAF", "nflows"), ("pyro ARN", "pyro")],
)
def test_both_models_are_the_same_function(name: str, package: str) -> None:
    pytest.importorskip(package)
    case = {"network": name, "features": 6, "hidden": 12, "batch": 9}
    record = flows.measure(case, flows.Grid(rounds=2, budget=0.0, force=True))
    done, layers = record["converted"].split("/")
    assert done == layers != "0"
    assert record["difference"] < 1e-4
    for phase in ("forward", "step"):
        times = record[phase]
        assert times["times_as_fast"] == times["times_as_fast_rounds"][1] > 0
        assert times["bound"] > 1


def test_a_phase_tells_what_is_outside_of_layers_and_how_rounds_differ() -> None:
    def took(*seconds: float) -> list[flows.Sample]:
        return [flows.Sample(s, page_faults) for page_faults, s in enumerate(seconds)]

    found = flows._found(
        {
            ("step", flows.BEFORE): took(5.0, 4.0, 6.0),
            ("step", flows.AFTER): took(2.0, 4.0, 3.0),
            ("step", flows.LAYERS): took(4.0, 4.0, 4.0),
        },
        "step",
        absent=0.5,
    )
    assert found["times_as_fast"] == pytest.approx(2.0)
    assert found["times_as_fast_rounds"] == pytest.approx([1.5, 2.0, 2.25])
    assert found["page_faults"] == {flows.BEFORE: 1, flows.AFTER: 1}
    assert found["outside"] == pytest.approx(1 / 5)
    assert found["bound"] == pytest.approx(5 / (1 + 0.5 * 4))


def test_page_faults_are_counted() -> None:
    size = 64 << 20
    taken = flows._timed(lambda: bytearray(size), 2)
    assert taken.page_faults >= 16  # at most 4 MiB a page
    assert taken.seconds > 0
    assert flows._timed(lambda: None, 10).page_faults < 1


def test_the_bound_counts_what_the_masks_leave_out() -> None:
    zuko = pytest.importorskip("zuko")
    layers = [zuko.nn.MaskedLinear(torch.rand(4, 6) < 2), zuko.nn.MaskedLinear(torch.eye(6) > 0)]
    densities = [1.0, 1 / 6]
    assert flows._absent(dict(zip(layers, densities, strict=True))) == pytest.approx(30 / 60)


def test_layers_alone_get_what_the_model_gives_them() -> None:
    zuko = pytest.importorskip("zuko")
    flow = zuko.flows.MAF(4, 0, transforms=1, hidden_features=(8,))
    layers = [m for m in flow.modules() if isinstance(m, zuko.nn.MaskedLinear)]
    x = torch.randn(5, 4)
    calls = flows._layers_alone(layers, lambda: flow().log_prob(x))
    assert not any(layer._forward_hooks for layer in layers)
    calls["forward", flows.LAYERS]()
    assert all(p.grad is None for p in flow.parameters())
    for _ in range(2):
        calls["step", flows.LAYERS]()
        grads = [layer.weight.grad.clone() for layer in layers]
    calls["step", flows.LAYERS]()
    for layer, grad in zip(layers, grads, strict=True):
        assert torch.equal(layer.weight.grad, grad)
        assert grad.any()


def test_smoke(tmp_path: Path) -> None:
    pytest.importorskip("zuko")
    document = run("flows --smoke", tmp_path)
    measured = [r for r in document["results"] if "step" in r]
    assert {r["network"] for r in document["results"]} == set(flows.NETWORKS)
    assert document["summary"]["step"]["cases"] == len(measured) >= 2
    assert document["summary"]["step"]["worst"] == min(r["step"]["times_as_fast"] for r in measured)
    assert "step, hidden >= 512" not in document["summary"]


def test_what_is_not_measured_says_why() -> None:
    pytest.importorskip("zuko")
    case = {"network": "zuko MAF", "features": 4, "hidden": 8, "batch": 16}
    assert flows.measure(case, flows.Grid())["unavailable"] == "nothing gains, as before"
    slow = flows.measure(case, flows.Grid(longest=0.0, force=True))
    assert slow["unavailable"] == "a call takes more than 0 s"


@pytest.mark.skipif(native.UNSUPPORTED_REASON is not None, reason=str(native.UNSUPPORTED_REASON))
def test_splines_alone_are_measured() -> None:
    pytest.importorskip("zuko")
    case = {"network": "zuko NSF", "features": 4, "hidden": 8, "batch": 16}
    record = flows.measure(case, flows.Grid(rounds=2, budget=0.0))
    assert (record["converted"], record["splines"]) == ("0/9", 3)
    assert record["difference"] < 1e-4
    assert record["step"]["times_as_fast"] > 0
    assert "bound" not in record["step"]  # no layer was replaced
    _, fields = flows._in_words(record)
    assert (fields["converted"], fields["splines"]) == ("0/9", "3")


def test_an_uninstalled_package_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(features: int, hidden: int) -> torch.nn.Module:
        raise ImportError("no", name="zuko")

    monkeypatch.setitem(flows.NETWORKS, "zuko MAF", (missing, flows.NETWORKS["zuko MAF"][1]))
    case = {"network": "zuko MAF", "features": 4, "hidden": 8, "batch": 16}
    assert flows.measure(case, flows.Grid())["unavailable"] == "zuko is not installed"


def test_another_device_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="flows are measured on the CPU"):
        run("flows --device cuda", tmp_path)
