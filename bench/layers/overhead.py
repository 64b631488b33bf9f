"""``python -m bench.layers.overhead``: what a call costs beside its kernels.

The same functions of one backend behind five doors: called plainly; as the registered op (define
and impl, which is what the library has); as a ``torch.library.custom_op``; as a
``torch.library.triton_op``, whose kernels torch.compile may look into; and through the front end
``masked_linear``. Eager, and three layers in one function under ``torch.compile(fullgraph=True)``.
"""

from __future__ import annotations

import argparse
import importlib
import random
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench import results
from bench.clock import clock_of
from bench.layers.ratios import quartiles
from maskmoe_kernels import BlockLayout, masked_linear
from maskmoe_kernels.experiments.shared.report import write_json
from maskmoe_kernels.layout.families import FAMILIES

NAME = "overhead.json"
ACTIVATION = "relu"  # whose derivative needs the output alone
LAYERS = 3

Layer = Callable[[Tensor, Tensor, Tensor], Tensor]


def doors(backend: str, layout: BlockLayout) -> dict[str, Callable[[], Layer]]:
    """Name to what makes the layer; each may raise."""
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
    module = importlib.import_module(f"maskmoe_kernels.ops.{backend}")
    if hasattr(module, "forward"):
        return module
    return importlib.import_module(f"{module.__name__}.launch")  # which imports Triton


def _registered(backend: str, layout: BlockLayout) -> Layer:
    """The library's own op, without the front end's checks."""

    def layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        result: Tensor = run.forward(x, weight, bias, *run.of_forward, ACTIVATION, False)[0]
        return result

    key = next(key for key in layout.caches.dispatch if key[0] == backend)
    run, _ = layout.caches.dispatch[key]
    return layer


def _wrapped(door: str, functions: Any, layout: BlockLayout) -> Layer:
    """``functions`` as an op of ``torch.library``, with its gradient."""
    define: Any = getattr(torch.library, door)
    name = f"maskmoe_bench::{door}_{functions.__name__.replace('.', '_')}_{layout.id}"

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
    if door == "custom_op":  # the other is traced instead
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


class Door:
    """One way in, eager or compiled, forward alone or a step."""

    def __init__(
        self, name: str, layer: Layer, tensors: Sequence[Tensor], compiled: bool, step: bool
    ) -> None:
        self.record = {"door": name, "compiled": compiled, "step": step}
        self.tensors, self.step = tensors[:3], step
        self.grad = tensors[3]
        self.call: Callable[..., Tensor] = layer
        if compiled:
            self.call = torch.compile(partial(_layers, layer), fullgraph=True)
        self.host: list[float] = []
        self.device: list[float] = []

    def run(self) -> list[Tensor]:
        """The output; of a step, the gradients, too."""
        if not self.step:
            with torch.no_grad():
                return [self.call(*self.tensors)]
        y = self.call(*self.tensors)
        return [y.detach(), *torch.autograd.grad(y, self.tensors, self.grad)]

    def sample(self, calls: int) -> None:
        """Seconds a call that the caller waits, and until the device has done it."""

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


def measure(
    backend: str, device: str, rows: int, rounds: int, calls: int, compiled: bool
) -> list[dict[str, Any]]:
    """Every door in interleaved rounds; one that cannot be taken gives its reason instead."""
    layout = FAMILIES["ncf4"]().hidden_layout(16, 16)
    generator = torch.Generator().manual_seed(0)
    shapes = [(rows, layout.in_features), (layout.num_weights,), (layout.out_features,)]
    shapes.append((rows, layout.out_features))
    tensors = [(torch.randn(s, generator=generator) / 4).to(device) for s in shapes]
    for leaf in tensors[:3]:
        leaf.requires_grad_()
    true = masked_linear(*tensors[:3], layout, ACTIVATION, backend)  # fills layout.caches.dispatch
    records: list[dict[str, Any]] = []
    ready: list[tuple[int, Door]] = []
    for name, make in doors(backend, layout).items():
        try:
            layer = make()
        except Exception as error:  # a backend that is not there says so, and so on
            records.append({"door": name, "unavailable": _words(error)})
            continue
        for how in (False, True) if compiled else (False,):
            for step in (False, True):
                records.append({"door": name, "compiled": how, "step": step})
                if step and name in ("plain function", "define/impl"):
                    records[-1]["unavailable"] = "has no gradient without the front end"
                    continue
                try:
                    door = Door(name, layer, tensors, how, step)
                    _check(door, true, layout, backend, tensors)
                    ready.append((len(records) - 1, door))
                except Exception as error:
                    records[-1]["unavailable"] = _words(error)
    order = random.Random(0)
    for _ in range(rounds):
        for _, door in order.sample(ready, len(ready)):
            door.sample(calls)
    for k, door in ready:
        records[k] = door.report()
    return records


def _check(
    door: Door, true: Tensor, layout: BlockLayout, backend: str, tensors: Sequence[Tensor]
) -> None:
    """A door that leads elsewhere is not timed."""

    def front(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return masked_linear(x, weight, bias, layout, ACTIVATION, backend)

    y = _layers(front, *tensors[:3]) if door.record["compiled"] else true
    expected = [y.detach()]
    if door.step:
        expected += torch.autograd.grad(y, tensors[:3], tensors[3], retain_graph=True)
    for _ in range(3):
        found = door.run()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def show(records: Sequence[dict[str, Any]], console: Console) -> None:
    """As a table; a reason where there is no time."""
    table = Table(title=f"Microseconds a call (compiled: of {LAYERS} layers)")
    for column in ("door", "how", "what", "caller waits", "until it is done"):
        table.add_column(column, justify="right" if column.endswith(("waits", "done")) else "left")
    for r in records:
        how = "compiled" if r.get("compiled") else "eager"
        cells = [r["door"], how, "step" if r.get("step") else "forward"]
        if "host" in r:
            table.add_row(*cells, f"{r['host']['us']:.1f}", f"{r['device']['us']:.1f}")
        else:
            reason = r["unavailable"].replace("[", r"\[")
            table.add_row(*cells, "-", reason[:90])
    console.print(table)


def main(words: Sequence[str]) -> int:
    """Measure, print, write ``overhead.json`` into ``--out``."""
    parser = argparse.ArgumentParser(prog="python -m bench.layers.overhead", description=__doc__)
    add = parser.add_argument
    add("--device", default="cpu", help="default: %(default)s")
    add("--backend", help="default: triton on a GPU, else torch")
    add("--rows", type=int, default=256, help="default: %(default)s")
    add("--rounds", type=int, default=20, help="default: %(default)s")
    add("--calls", type=int, default=50, help="of a sample; default: %(default)s")
    add("--no-compile", action="store_true", help="leave torch.compile out")
    add("--out", type=Path, default=Path("runs/bench"), help="default: %(default)s")
    a = parser.parse_args(words)
    on_gpu = torch.device(a.device).type == "cuda"
    backend = a.backend or ("triton" if on_gpu else "torch")
    records = measure(backend, a.device, a.rows, a.rounds, a.calls, not a.no_compile)
    document = {"machine": results.machine(a.device), "backend": backend, "rows": a.rows}
    write_json(a.out / NAME, document | {"results": records})
    show(records, Console())
    return 0 if any("host" in r for r in records) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
