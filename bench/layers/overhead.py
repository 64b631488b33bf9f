"""What a call costs beside its kernels: ``python -m bench overhead``.

The same functions of one backend, called in five ways: plainly; as the registered op (define and
impl, as the library registers it); as a ``torch.library.custom_op``; as a
``torch.library.triton_op``, which torch.compile may look into; and through ``masked_linear``.
Each runs eagerly, and as three layers in one function under ``torch.compile(fullgraph=True)``.
"""

from __future__ import annotations

import importlib
import itertools
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from bench.clock import clock_of
from bench.machine import machine
from bench.statistics import quartiles
from maskmoe_kernels import BlockLayout, masked_linear
from maskmoe_kernels.experiments.shared.output import Column, print_line, print_table
from maskmoe_kernels.experiments.shared.report import write_json
from maskmoe_kernels.layout.families import FAMILIES

NAME = "overhead.json"
#: Backend to its module with ``forward`` and ``backward``, in ``maskmoe_kernels.ops.masked_linear``
MODULES = {"torch": "torch_impl", "triton": "triton.launch"}
ACTIVATION = "relu"  # its derivative needs the output only
LAYERS = 3

Layer = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        rows: Rows of x.
        rounds: Samples of each call.
        calls: Calls a sample.
        compile: Whether to measure ``torch.compile`` too.
    """

    rows: int = 256
    rounds: int = 20
    calls: int = 50
    compile: bool = True


def default_backend(device: str) -> str:
    """Triton on a GPU, PyTorch elsewhere."""
    return "triton" if torch.device(device).type == "cuda" else "torch"


def ways_to_call(backend: str, layout: BlockLayout) -> dict[str, Callable[[], Layer]]:
    """Name to a function that makes the layer; each may raise."""
    functions = functions_of(backend)

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y: Tensor = functions.forward(x, weight, bias, layout, ACTIVATION, True)[0]
        return y

    def front(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return masked_linear(x, weight, bias, layout, ACTIVATION, backend)

    return {
        "plain function": lambda: plain,
        "define/impl": lambda: _registered(backend, layout),
        "custom_op": lambda: _wrapped("custom_op", functions, layout),
        "triton_op": lambda: _wrapped("triton_op", functions, layout),
        "front end": lambda: front,
    }


def functions_of(backend: str) -> Any:
    """The module with the backend's ``forward`` and ``backward``."""
    module = MODULES.get(backend, backend)
    return importlib.import_module(f"maskmoe_kernels.ops.masked_linear.{module}")


def _registered(backend: str, layout: BlockLayout) -> Layer:
    """The library's own op, without the front end's checks."""

    def layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        result: Tensor = run.forward(x, weight, bias, *run.of_forward, ACTIVATION, False)[0]
        return result

    key = next(key for key in layout.caches.dispatch if key[0] == backend)
    run, _ = layout.caches.dispatch[key]
    return layer


def _wrapped(kind: str, functions: Any, layout: BlockLayout) -> Layer:
    """``functions`` as an op of ``torch.library``, with its gradient."""
    define: Any = getattr(torch.library, kind)
    name = f"maskmoe_bench::{kind}_{functions.__name__.replace('.', '_')}_{layout.id}"

    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        pair: tuple[Tensor, Tensor] = functions.forward(x, weight, bias, layout, ACTIVATION, True)
        return pair

    def backward(
        grad_y: Tensor, x: Tensor, weight: Tensor, saved: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        needs = (True, True, True)
        three: tuple[Tensor, Tensor, Tensor] = functions.backward(
            grad_y, x, weight, saved, layout, ACTIVATION, needs
        )
        return three

    op = define(name, forward, mutates_args=())
    op_backward = define(f"{name}_backward", backward, mutates_args=())
    if kind == "custom_op":  # a triton_op is traced instead
        op.register_fake(
            lambda x, weight, bias: (x.new_empty(len(x), layout.out_features), x.new_empty(0))
        )
        op_backward.register_fake(
            lambda grad_y, x, weight, saved: (
                torch.empty_like(x),
                torch.empty_like(weight),
                grad_y.new_empty(layout.out_features),
            )
        )

    def setup(ctx: Any, inputs: Sequence[Tensor], output: Sequence[Tensor]) -> None:
        ctx.save_for_backward(inputs[0], inputs[1], output[0])

    def gradient(ctx: Any, grad_y: Tensor, _: Tensor) -> Any:
        return op_backward(grad_y, *ctx.saved_tensors)

    op.register_autograd(gradient, setup_context=setup)
    return lambda x, weight, bias: op(x, weight, bias)[0]


# --- Measuring ---------------------------------------------------------------------------


class Call:
    """One way to call, eager or compiled, forward alone or a step."""

    def __init__(
        self, name: str, layer: Layer, tensors: Sequence[Tensor], compiled: bool, step: bool
    ) -> None:
        self.record = {"way": name, "compiled": compiled, "step": step}
        self.tensors, self.step = tensors[:3], step
        self.grad = tensors[3]
        self.call: Callable[..., Tensor] = layer
        if compiled:
            self.call = torch.compile(partial(_layers, layer), fullgraph=True)
        self.host: list[float] = []
        self.device: list[float] = []

    def run(self) -> list[Tensor]:
        """The output, and for a step the gradients."""
        if not self.step:
            with torch.no_grad():
                return [self.call(*self.tensors)]
        y = self.call(*self.tensors)
        return [y.detach(), *torch.autograd.grad(y, self.tensors, self.grad)]

    def sample(self, calls: int) -> None:
        """Take a sample: seconds a call for the host to return, and for the device to finish."""

        def run() -> None:
            start = time.perf_counter()
            for _ in range(calls):
                self.run()
            self.host.append((time.perf_counter() - start) / calls)

        self.device.append(clock_of(self.tensors[0].device).seconds(run) / calls)

    def report(self) -> dict[str, Any]:
        """Medians and quartiles, in microseconds a call."""
        record: dict[str, Any] = dict(self.record)
        for name, samples in (("host", self.host), ("device", self.device)):
            low, median, high = quartiles(samples)
            record[name] = {"us": 1e6 * median, "q25": 1e6 * low, "q75": 1e6 * high}
        return record


def _layers(layer: Layer, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    for _ in range(LAYERS):
        x = layer(x, weight, bias)
    return x


def measure(backend: str, device: str, effort: Effort) -> list[dict[str, Any]]:
    """Every way to call, in interleaved rounds; one that cannot be taken has its reason instead."""
    layout, tensors = _problem(device, effort.rows)
    expected = masked_linear(*tensors[:3], layout, ACTIVATION, backend)  # fills the dispatch cache
    records: list[dict[str, Any]] = []
    ready: list[tuple[int, Call]] = []
    for name, make in ways_to_call(backend, layout).items():
        try:
            layer = make()
        except Exception as error:  # a missing backend, for example
            records.append({"way": name, "unavailable": _words(error)})
            continue
        for compiled, step in itertools.product((False, True)[: 1 + effort.compile], (False, True)):
            records.append({"way": name, "compiled": compiled, "step": step})
            if step and name in ("plain function", "define/impl"):
                records[-1]["unavailable"] = "has no gradient without the front end"
                continue
            try:
                call = Call(name, layer, tensors, compiled, step)
                _check(call, expected, layout, backend, tensors)
                ready.append((len(records) - 1, call))
            except Exception as error:
                records[-1]["unavailable"] = _words(error)
    order = random.Random(0)
    for _ in range(effort.rounds):
        for _, call in order.sample(ready, len(ready)):
            call.sample(effort.calls)
    for k, call in ready:
        records[k] = call.report()
    return records


def _problem(device: str, rows: int) -> tuple[BlockLayout, list[Tensor]]:
    """A layout, and x, weight, bias and grad_y."""
    layout = FAMILIES["ncf4"]().hidden_layout(16, 16)
    generator = torch.Generator().manual_seed(0)
    shapes = [(rows, layout.in_features), (layout.num_weights,), (layout.out_features,)]
    shapes.append((rows, layout.out_features))
    tensors = [(torch.randn(s, generator=generator) / 4).to(device) for s in shapes]
    for leaf in tensors[:3]:
        leaf.requires_grad_()
    return layout, tensors


def _check(
    call: Call, expected: Tensor, layout: BlockLayout, backend: str, tensors: Sequence[Tensor]
) -> None:
    """Raise AssertionError if the call computes something else: then it is not timed."""

    def front(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return masked_linear(x, weight, bias, layout, ACTIVATION, backend)

    y = _layers(front, *tensors[:3]) if call.record["compiled"] else expected
    results = [y.detach()]
    if call.step:
        results += torch.autograd.grad(y, tensors[:3], tensors[3], retain_graph=True)
    for _ in range(3):
        found = call.run()
    torch.testing.assert_close(found, results, rtol=1e-3, atol=1e-3)


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def show(records: Sequence[dict[str, Any]], console: Console) -> None:
    """Print a table, with the reason where there is no time."""
    columns = [Column(name, text=True) for name in ("way", "how", "what")]
    columns += [Column("caller waits"), Column("until it is done")]
    rows, reasons = [], {}
    for r in records:
        how = "compiled" if r.get("compiled") else "eager"
        cells = [r["way"], how, "step" if r.get("step") else "forward"]
        if "host" in r:
            rows.append([*cells, f"{r['host']['us']:.1f}", f"{r['device']['us']:.1f}"])
        else:
            rows.append([*cells, "-", "-"])
            reasons[", ".join(cells)] = r["unavailable"]
    print_table(console, f"Microseconds a call (compiled: of {LAYERS} layers)", columns, rows)
    for what, reason in reasons.items():
        print_line(console, f"{what}: not measured: {reason}", "yellow")


def run(backend: str, device: str, effort: Effort, out: Path, console: Console) -> dict[str, Any]:
    """Measure, print, and write ``overhead.json`` into ``out``."""
    text = "eager and compiled, which takes minutes" if effort.compile else "eager"
    print_line(console, f"{backend}, {effort.rows} rows: {text}")
    records = measure(backend, device, effort)
    document = {"machine": machine(device), "backend": backend, "rows": effort.rows}
    document |= {"results": records}
    write_json(out / NAME, document)
    show(records, console)
    print_line(console, f"results: {out / NAME}")
    return document
