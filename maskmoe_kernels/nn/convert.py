"""``convert_``: masked layers of zuko, nflows and pyro become ours, in place. ``revert_``: back."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from maskmoe_kernels.errors import BackendError
from maskmoe_kernels.layout.aligned import Aligned, aligned_layouts
from maskmoe_kernels.layout.arguments import check_integer, check_kind
from maskmoe_kernels.layout.blocks import BlockLayout
from maskmoe_kernels.nn.converted import ConvertedLinear
from maskmoe_kernels.nn.converted_class import restore_class_
from maskmoe_kernels.nn.converted_networks import as_before, hand_on_, networks
from maskmoe_kernels.nn.converted_splines import make_splines_, restore_splines_
from maskmoe_kernels.nn.foreign import ForeignLayer, foreign_layers, why_not_plain
from maskmoe_kernels.nn.gain import why_no_gain
from maskmoe_kernels.nn.interception import interceptor_of_instance
from maskmoe_kernels.nn.optimizers import Replacement, carry_over, check_optimizers
from maskmoe_kernels.ops.dispatch import check_backend

# Wrappers that have looked at the parameters already, and know those only.
_WRAPPERS = {"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"}


@dataclass(frozen=True)
class ConversionRecord:
    """What became of one layer.

    Attributes:
        name: Of the layer in the model, as in ``model.named_modules()``.
        kind: The package that it is of: ``"zuko"``, ``"nflows"`` or ``"pyro"``.
        converted: Was it replaced?
        reason: Why not, in words; ``None`` if it was.
        density: Share of its weights that its mask leaves, in [0, 1]; NaN for a mask that cannot
            be read.
    """

    name: str
    kind: str
    converted: bool
    reason: str | None
    density: float


class ConversionReport(Sequence[ConversionRecord]):
    """A sequence of one :class:`ConversionRecord` for each layer; printed, a line each.

    Attributes:
        networks: Names of the networks that compute activations with the products, and pass units
            from layer to layer in the order of their blocks; ``""`` is the model itself. They are
            those of zuko's ``MaskedMLP`` (or any ``nn.Sequential`` of such layers and activations),
            pyro's ``(Conditional)AutoRegressiveNN`` and nflows' residual ``MADE`` whose layers are
            all replaced, with an activation of :func:`masked_linear`'s. A network stays the same
            object; its class becomes a subclass of the one that it had (``ConvertedMaskedMLP``,
            say). If a hook wants to see a layer or an activation, or one was changed, the layers
            are called one by one, as before.
        splines: Names of the modules whose rational-quadratic splines are computed in one pass
            forward, one backward and one to sample, for float32 on a CPU. Of zuko's ``NSF`` and
            ``NCSF``, they hold another constructor as ``univariate``; what it makes are instances
            of zuko's class. Of nflows (autoregressive and coupling transforms with linear tails),
            their class becomes a subclass of the one that they had. Under ``torch.func``, and in an
            export, the package's own operations run.
    """

    def __init__(
        self,
        records: Iterable[ConversionRecord],
        networks: Iterable[str] = (),
        splines: Iterable[str] = (),
    ) -> None:
        self.records = tuple(records)
        self.networks = tuple(networks)
        self.splines = tuple(splines)

    def __getitem__(self, index: Any) -> Any:
        return self.records[index]

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[ConversionRecord]:
        return iter(self.records)

    def __repr__(self) -> str:
        lines = [f"{sum(r.converted for r in self.records)} of {len(self)} layers converted"]
        if not self.records:
            lines = ["no MaskedLinear of zuko, nflows or pyro found"]
        width = max((len(r.name) for r in self.records), default=0)
        for r in self.records:
            what = "converted" if r.converted else f"kept: {r.reason}"
            lines.append(f"  {r.name:<{width}}  {r.kind:<6}  density {r.density:.2f}  {what}")
        if self.networks:
            names = ", ".join(name or "the model" for name in self.networks)
            lines.append(f"activations run within the layers of {names}")
        if self.splines:
            names = ", ".join(name or "the model" for name in self.splines)
            lines.append(f"splines run in one pass in {names}")
        return "\n".join(lines)


def convert_(
    model: nn.Module,
    *,
    batch: int | None = None,
    force: bool = False,
    backend: str | None = None,
    optimizers: Optimizer | Iterable[Optimizer] = (),
) -> ConversionReport:
    """Replace, in place, each masked linear layer of zuko, nflows and pyro that ours beats.

    ``nflows.transforms.made.MaskedLinear``, ``pyro.nn.auto_reg_nn.MaskedLinear``,
    ``zuko.nn.MaskedLinear`` and their subclasses are found by name: none of the packages has to be
    installed. Outputs and gradients stay the same up to rounding; as before, the gradient flows
    back through every weight that the mask leaves. What is shared, what state dicts hold, and what
    becomes of optimizers: see :class:`ConvertedLinear`.

    What stands between the layers gains, too: activations, and splines
    (:class:`ConversionReport` says which).

    Args:
        model: Changed in place. Layers that are referred to from outside of it are not replaced
            there.
        batch: Rows of a typical call, for the choice of layers; ``None``: a layer has to gain from
            256 rows to 4096.
        force: Replace layers that do not gain, too.
        backend: Of the new layers; see :func:`masked_linear`. Splines have one, ``"native"``.
        optimizers: One, or several, of torch's elementwise ones (SGD, Adam, AdamW, ...).

    Returns:
        Was each layer replaced, and why not? One record for each.

    Raises:
        LayoutError: ``model`` is no module; ``batch``, ``force`` or ``backend`` is none.
        BackendError: An optimizer holds a weight that would be replaced and was not passed, or
            cannot follow; or the model is wrapped for distributed training, so convert it before.
    """
    _check_model(model, "convert_")
    if batch is not None:
        check_integer("batch", batch, 1)
    check_kind(bool, force=force)
    check_backend(backend)
    records, made, first_layers = _planned(model, batch, force, backend)
    replacements = [
        Replacement(old.weight, new.weight, new.layout.pack)  # type: ignore[arg-type]
        for old, new in made.items()
    ]
    held = check_optimizers(optimizers, [one.old for one in replacements], "convert_")
    _replace_children(model, made)
    handing_on = {n for n, first in first_layers.items() if _hand_on(n, made[first])}
    carry_over(held, replacements)
    names = [name for name, module in model.named_modules() if module in handing_on]
    may = backend in (None, "native")
    splines = [name for name, module in model.named_modules() if may and make_splines_(module)]
    return ConversionReport(records, names, splines)


def revert_(model: nn.Module, *, optimizers: Optimizer | Iterable[Optimizer] = ()) -> list[str]:
    """Undo :func:`convert_` in place: the original layers come back, with today's weights.

    Weights that the mask leaves out are as they were. The layers follow the model: they have its
    device, dtype, training mode and ``requires_grad``. The weight is the parameter that it was
    before ``convert_``. Networks have their class again, and splines their constructor.

    Args:
        model: Changed in place.
        optimizers: Those that hold weights of converted layers; they follow, with their state
            (zeros where the mask leaves a weight out).

    Returns:
        The names of the layers.

    Raises:
        LayoutError: ``model`` is no module.
        BackendError: As for ``convert_``; or something sees or changes the call of a converted
            layer (a hook, say), and would be lost: remove it first.
    """
    _check_model(model, "revert_")
    found = {m: name for name, m in model.named_modules() if isinstance(m, ConvertedLinear)}
    for layer, name in found.items():
        reason = interceptor_of_instance(layer)
        if type(layer) is not ConvertedLinear:
            reason = f"its class was changed to {type(layer).__name__}"
        if reason is not None or layer is model:
            reason = reason or "it is the model itself: take layer.restored()"
            raise BackendError(f"cannot revert {name!r}: {reason}")
    held = check_optimizers(optimizers, [layer.weight for layer in found], "revert_")
    back = {layer: layer.restored() for layer in found}
    for module in model.modules():
        restore_class_(module)
        restore_splines_(module)
    _replace_children(model, back)
    carry_over(
        held,
        [
            Replacement(new.weight, old.weight, new.layout.unpack)  # type: ignore[arg-type]
            for new, old in back.items()
        ],
    )
    return list(found.values())


class _Plan(NamedTuple):
    """What is to become of a model."""

    records: list[ConversionRecord]
    made: dict[nn.Module, ConvertedLinear]
    first_layers: dict[nn.Module, nn.Module]  # of each network that is to hand units on


def _planned(model: nn.Module, batch: int | None, force: bool, backend: str | None) -> _Plan:
    layers, tied = foreign_layers(model), _tied_parameters(model)
    reasons = {layer.module: _reason_to_keep(layer, model, tied) for layer in layers}
    members, aligned = _networks(model, {m for m, reason in reasons.items() if reason is None})
    made: dict[nn.Module, ConvertedLinear] = {}
    gaining = {
        module
        for of in members.values()
        if force or _network_gains(of, aligned, batch, backend)
        for module in of
    }
    records: list[ConversionRecord] = []
    for name, kind, module, _ in layers:
        reason = reasons[module]
        if reason is None:
            layout, inner = aligned.get(module) or Aligned(_layout_of(module), None)
            if not force and module not in gaining:
                reason = why_no_gain([layout], module.weight, batch, backend)  # type: ignore[arg-type]
        if reason is None:
            new = ConvertedLinear.of(module, layout, backend, inner)
            reason = _difference(module, new)
            if reason is None:
                made[module] = new
        records.append(ConversionRecord(name, kind, reason is None, reason, _density(module)))
    whole = {n: of[0] for n, of in members.items() if all(m in made for m in of)}
    return _Plan(records, made, whole)


def _networks(
    model: nn.Module, plain: set[nn.Module]
) -> tuple[dict[nn.Module, list[nn.Module]], dict[nn.Module, Aligned]]:
    """The networks of ``plain`` layers that can hand units on; and their layers' layouts."""
    members: dict[nn.Module, list[nn.Module]] = {}
    aligned: dict[nn.Module, Aligned] = {}
    for network, steps in networks(model):
        of = [step.layer for step in steps]
        if len({*of}) < len(of) or not plain.issuperset(of) or not aligned.keys().isdisjoint(of):
            continue
        masks: list[Any] = [module.mask for module in of]
        found = aligned_layouts(masks, [step.place for step in steps])
        if found is not None:
            members[network] = of
            aligned.update(zip(of, found, strict=True))
    return members, aligned


def _network_gains(
    of: list[nn.Module],
    aligned: dict[nn.Module, Aligned],
    batch: int | None,
    backend: str | None,
) -> bool:
    weight: Any = of[0].weight
    layouts = [inner.layout for _, inner in (aligned[module] for module in of) if inner is not None]
    return why_no_gain(layouts, weight, batch, backend) is None


@torch.no_grad()
def _hand_on(network: nn.Module, first: ConvertedLinear) -> bool:
    """Have ``network`` hand units on, if it then computes the same on a small batch. Does it?"""
    hand_on_(network)
    x = _small_batch(first.in_features, first.weight)
    with torch.autocast(x.device.type, enabled=False):
        actual, expected = as_before(network, x)
    tolerance = torch.finfo(x.dtype).eps ** 0.5
    for y, wanted in zip(actual, expected, strict=True):
        size = tolerance * float(wanted.abs().nan_to_num(0, 0, 0).max())
        if not torch.allclose(y, wanted, tolerance, size, equal_nan=True):
            restore_class_(network)  # another version of the package
            return False
    return True


def _check_model(model: nn.Module, function: str) -> None:
    check_kind(nn.Module, model=model)
    for name, module in model.named_modules():
        for cls in type(module).__mro__:
            if cls.__name__ in _WRAPPERS and cls.__module__.startswith("torch."):
                raise BackendError(
                    f"{name or 'the model'} is a {cls.__name__}, which knows the parameters that "
                    f"it was given: call {function} on the model before you wrap it"
                )


def _tied_parameters(model: nn.Module) -> set[int]:
    """The ids of parameters that the modules of ``model`` hold more than once."""
    seen: set[int] = set()
    tied: set[int] = set()
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                (tied if id(parameter) in seen else seen).add(id(parameter))
    return tied


def _reason_to_keep(layer: ForeignLayer, model: nn.Module, tied: set[int]) -> str | None:
    if layer.module is model:
        return "it is the model itself; take MaskedLinear.from_linear(layer, layer.mask)"
    reason = why_not_plain(layer)
    if reason is None and id(layer.module.weight) in tied:
        reason = "another module holds its weight, too"
    return reason


def _layout_of(module: nn.Module) -> BlockLayout:
    mask: Any = module.mask
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the report says what does not gain
        return BlockLayout.from_mask(mask.detach())


def _density(module: nn.Module) -> float:
    mask = module._buffers.get("mask")
    if not isinstance(mask, Tensor) or mask.is_meta or mask.numel() == 0:
        return math.nan
    return float(mask.detach().double().mean())


def _small_batch(features: int, like: Tensor) -> Tensor:
    numbers = torch.arange(1, 3 * features + 1, device="cpu", dtype=torch.float64)
    return torch.sin(numbers).view(3, -1).to(like)


@torch.no_grad()
def _difference(module: nn.Module, new: ConvertedLinear) -> str | None:
    """Why the two layers do not compute the same on a small batch; None if they do."""
    weight: Any = module.weight
    x = _small_batch(new.in_features, weight)
    with torch.autocast(x.device.type, enabled=False):
        expected, actual = module(x), new(x)
        size = F.linear(x.abs(), weight.abs() * module.mask, None)
    if not isinstance(expected, Tensor) or expected.shape != actual.shape:
        return "its forward does not return a tensor (*, out_features)"
    eps = torch.finfo(x.dtype).eps
    if x.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        eps = 2**-8  # products of bfloat16, at worst
    same = (expected - actual).abs() <= 8 * eps * (size + expected.abs())
    if bool((same | ~size.isfinite()).all()):
        return None
    return "it computes something else than F.linear(x, weight * mask, bias)"


def _replace_children(model: nn.Module, by: dict[Any, Any]) -> None:
    for module in [*model.modules()]:
        for name, child in module._modules.items():
            if child in by:
                module._modules[name] = by[child]
