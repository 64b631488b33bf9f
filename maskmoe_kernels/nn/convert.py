"""``convert_``: masked layers of zuko, nflows and pyro become ours, in place. ``revert_``: back."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from maskmoe_kernels.errors import BackendError
from maskmoe_kernels.layout.arguments import check_integer, check_kind
from maskmoe_kernels.layout.blocks import BlockLayout
from maskmoe_kernels.nn.foreign import ForeignLayer, foreign_layers, why_not_plain
from maskmoe_kernels.nn.gain import why_no_gain
from maskmoe_kernels.nn.interception import interceptor_of_instance
from maskmoe_kernels.nn.linear import MaskedLinear
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
    """A sequence of one :class:`ConversionRecord` for each layer; printed, a line each."""

    def __init__(self, records: Iterable[ConversionRecord]) -> None:
        self.records = tuple(records)

    def __getitem__(self, index: Any) -> Any:
        return self.records[index]

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[ConversionRecord]:
        return iter(self.records)

    def __repr__(self) -> str:
        if not self.records:
            return "no MaskedLinear of zuko, nflows or pyro found"
        lines = [f"{sum(r.converted for r in self.records)} of {len(self)} layers converted"]
        width = max(len(r.name) for r in self.records)
        for r in self.records:
            what = "converted" if r.converted else f"kept: {r.reason}"
            lines.append(f"  {r.name:<{width}}  {r.kind:<6}  density {r.density:.2f}  {what}")
        return "\n".join(lines)


class ConvertedLinear(MaskedLinear):
    """A :class:`MaskedLinear` in the place of another package's layer, which it keeps aside.

    *The function* is the same, but that a NaN or infinity in an input or weight that the mask
    leaves out no longer reaches a unit. The second derivative needs ``backend="reference"``, which
    is slow.

    *What is shared*: the bias is the same parameter. ``weight`` holds copies of the visible
    weights, packed; the dense weight stays aside with the rest of the original layer, for
    :func:`revert_`. ``.grad``, ``requires_grad`` and the training mode are carried over.

    *State dicts* have the same names ``weight`` (packed, ``(num_weights,)``) and ``bias``; ``mask``
    and ``degrees`` are gone, ``_extra_state`` says how the weight is packed. Checkpoints of the
    original model load, except for weights that the mask leaves out. To save one that the original
    model can load, call :func:`revert_` first.

    *Optimizers* that hold a replaced weight have to be passed to ``convert_`` and ``revert_``: they
    follow, with their state. One that is created afterwards needs nothing.

    Attributes:
        original: The layer that it replaced, in a tuple, so that it is no submodule.
    """

    original: tuple[nn.Module]

    @classmethod
    def of(cls, module: nn.Module, layout: BlockLayout, backend: str | None) -> Self:
        """What replaces ``module``; the bias is shared, visible weights are gathered."""
        weight: Any = module.weight
        # On "meta": no memory, and no draw from a random generator.
        layer = cls.__new__(cls)
        layer._build(layout, False, None, backend, "meta", None)
        with torch.inference_mode(False):
            layer.weight = nn.Parameter(layout.pack(weight.detach()), weight.requires_grad)
            if weight.grad is not None:
                layer.weight.grad = layout.pack(weight.grad.detach())
        layer.register_parameter("bias", module._parameters["bias"])
        layer.__dict__["original"] = (module,)
        layer._make_handle()
        layer.train(module.training)
        return layer

    @property
    def mask(self) -> Tensor:
        """The original's mask, ``(out_features, in_features)``."""
        mask: Tensor = self.original[0].mask  # type: ignore[assignment]
        return mask

    @property
    def degrees(self) -> Tensor:
        """The original's degrees, ``(out_features,)``, if it is a layer of nflows."""
        degrees: Tensor = self.original[0].degrees  # type: ignore[assignment]
        return degrees

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ConvertedLinear:
        original = self.original[0]
        original._parameters["bias"] = None  # it is moved with this layer
        original._apply(fn, recurse)
        super()._apply(fn, recurse)
        original._parameters["bias"] = self.bias
        return self

    @torch.no_grad()
    def restored(self) -> nn.Module:
        """The original with this layer's weights; those that the mask leaves out are as before."""
        module = self.original[0]
        dense: Any = module._parameters["weight"]
        if dense.dtype != self.weight.dtype or dense.device != self.weight.device:
            dense.data = dense.data.to(self.weight)  # a checkpoint was loaded with assign=True
        index = self.layout.weight_index(dense.device)
        values = dense.data.reshape(-1).index_copy(0, index, self.weight.detach())
        dense.copy_(values.view(dense.shape))
        dense.grad = None if self.weight.grad is None else self.layout.unpack(self.weight.grad)
        dense.requires_grad_(self.weight.requires_grad)
        module._parameters["bias"] = self._parameters["bias"]
        return module.train(self.training)


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

    Args:
        model: Changed in place. Layers that are referred to from outside of it are not replaced
            there.
        batch: Rows of a typical call, for the choice of layers; ``None``: a layer has to gain from
            256 rows to 4096.
        force: Replace layers that do not gain, too.
        backend: Of the new layers; see :func:`masked_linear`.
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
    records, made = _replacements(model, batch, force, backend)
    replacements = [
        Replacement(old.weight, new.weight, new.layout.pack)  # type: ignore[arg-type]
        for old, new in made.items()
    ]
    held = check_optimizers(optimizers, [one.old for one in replacements], "convert_")
    _replace_children(model, made)
    carry_over(held, replacements)
    return ConversionReport(records)


def revert_(model: nn.Module, *, optimizers: Optimizer | Iterable[Optimizer] = ()) -> list[str]:
    """Undo :func:`convert_` in place: the original layers come back, with today's weights.

    Weights that the mask leaves out are as they were. The layers follow the model: they have its
    device, dtype, training mode and ``requires_grad``. The weight is the parameter that it was
    before ``convert_``.

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
    _replace_children(model, back)
    carry_over(
        held,
        [
            Replacement(new.weight, old.weight, new.layout.unpack)  # type: ignore[arg-type]
            for new, old in back.items()
        ],
    )
    return list(found.values())


def _replacements(
    model: nn.Module, batch: int | None, force: bool, backend: str | None
) -> tuple[list[ConversionRecord], dict[nn.Module, ConvertedLinear]]:
    """The records of all layers, and what is to replace some of them."""
    tied = _tied_parameters(model)
    records: list[ConversionRecord] = []
    made: dict[nn.Module, ConvertedLinear] = {}
    for layer in foreign_layers(model):
        reason, layout = _reason_to_keep(layer, model, tied), None
        if reason is None:
            layout = _layout_of(layer.module)
            reason = None if force else why_no_gain(layout, layer.module.weight, batch, backend)  # type: ignore[arg-type]
        if reason is None and layout is not None:
            new = ConvertedLinear.of(layer.module, layout, backend)
            reason = _difference(layer.module, new)
            if reason is None:
                made[layer.module] = new
        density = _density(layer.module)
        records.append(ConversionRecord(layer.name, layer.kind, reason is None, reason, density))
    return records, made


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


@torch.no_grad()
def _difference(module: nn.Module, new: ConvertedLinear) -> str | None:
    """Why the two layers do not compute the same on a small batch; None if they do."""
    weight: Any = module.weight
    count = 3 * new.in_features
    x = torch.sin(torch.arange(1, count + 1, device="cpu", dtype=torch.float64)).view(3, -1)
    x = x.to(weight)
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
