"""Splines of zuko's flows in one pass.

A spline flow's layers give zuko's ``MonotonicRQSTransform`` some 23 parameters a feature, and zuko
computes it by operations that pass over all of them many times: most of a training step where
layers are small (``outside`` in what ``python -m bench flows`` writes). ``convert_`` puts a
:class:`SplineMaker` into the place of the constructor that a module of zuko's holds as
``univariate``. For float32 on a CPU it makes transforms that the extension computes; else, and for
whoever traces or transforms the call, it calls the original.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Transform

from maskmoe_kernels._compat import needs_torch_operators
from maskmoe_kernels.ops.checks import PLAIN
from maskmoe_kernels.ops.splines import rational_quadratic, rational_quadratic_inverse, takes

_ORIGIN = ("zuko.transforms", "MonotonicRQSTransform")
_BOUND, _SLOPE = 5.0, 1e-3  # zuko's defaults


class SplineMaker:
    """Makes zuko's transforms from their parameters, as ``origin`` does.

    Attributes:
        origin: The constructor in whose place it is: the class, or a ``functools.partial`` of it
            with ``bound`` or ``slope``.
    """

    def __init__(self, origin: Any) -> None:
        cls = _class_of(origin)
        self.origin = origin
        self._class, self._options = _made_class(cls), _options(origin)
        self._replaced = _methods(cls)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A transform; ours if that can be, and nobody has changed the class."""
        changed = _methods(self._class.origin) != self._replaced
        if changed or kwargs or not _fit(args) or not takes(args[0].shape[-1], *self._options):
            return self.origin(*args, **kwargs)
        return self._class(args, *self._options)

    def __reduce__(self) -> Any:
        return SplineMaker, (self.origin,)

    def __repr__(self) -> str:
        return repr(self.origin)


def make_splines_(module: Any) -> bool:
    """Have ``module`` make its transforms by ours from now on, if they are splines. Are they?"""
    origin = vars(module).get("univariate")
    if _class_of(origin) is None or not _on_cpu(module) or not _same(origin):
        return False
    module.univariate = SplineMaker(origin)
    return True


def restore_splines_(module: Any) -> None:
    """Give ``module`` its own constructor again, if it has ours."""
    maker = vars(module).get("univariate")
    if isinstance(maker, SplineMaker):
        module.univariate = maker.origin


class _OnePass:
    """The first base of a converted transform's class; the second is zuko's.

    What zuko makes of the parameters when it is constructed (knots and slopes) is made when it is
    asked for.
    """

    origin: Any

    def __init__(
        self, parameters: tuple[Tensor, Tensor, Tensor], bound: float, slope: float
    ) -> None:
        Transform.__init__(self)  # type: ignore[arg-type]
        self._given, self._bound, self._slope = parameters, bound, slope

    def __getattr__(self, name: str) -> Any:
        own = vars(self)
        if "_made" in own or "_given" not in own or name.startswith("__"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        self._made = True
        made = self.origin(*self._given, bound=self._bound, slope=self._slope)
        for key, value in vars(made).items():
            own.setdefault(key, value)
        return getattr(self, name)

    def _call(self, x: Any) -> Any:
        if not self._takes(x):
            return super()._call(x)  # type: ignore[misc]
        return rational_quadratic(x, *self._given, self._bound, self._slope)[0]

    def _inverse(self, y: Any) -> Any:
        if not self._takes(y):
            return super()._inverse(y)  # type: ignore[misc]
        return rational_quadratic_inverse(y, *self._given, self._bound, self._slope)

    def call_and_ladj(self, x: Any) -> Any:
        """As zuko's: the values, and the logarithms of the slopes."""
        if not self._takes(x):
            return super().call_and_ladj(x)  # type: ignore[misc]
        return rational_quadratic(x, *self._given, self._bound, self._slope)

    def _takes(self, x: Any) -> bool:
        return _plain(x) and x.shape == self._given[0].shape[:-1] and not needs_torch_operators()


@functools.cache
def _made_class(cls: Any) -> Any:
    """The class of transforms that take the place of ``cls``'s."""
    own = {"origin": cls, "__module__": cls.__module__, "__doc__": cls.__doc__}
    return type(f"Converted{cls.__name__}", (_OnePass, cls), own)


def _class_of(origin: Any) -> Any:
    """zuko's class, if ``origin`` constructs it with no other options than are known; else None."""
    if type(origin) is functools.partial:
        options = origin.keywords
        plain = all(type(value) in (int, float) for value in options.values())
        if origin.args or not plain or not {"bound", "slope"}.issuperset(options):
            return None
        origin = origin.func
    known = isinstance(origin, type) and (origin.__module__, origin.__qualname__) == _ORIGIN
    return origin if known else None


def _options(origin: Any) -> tuple[float, float]:
    """``bound`` and ``slope``."""
    given = getattr(origin, "keywords", {})
    return float(given.get("bound", _BOUND)), float(given.get("slope", _SLOPE))


def _methods(cls: Any) -> tuple[Any, ...]:
    """What ours replace; it may be patched later."""
    return cls.__init__, cls._call, cls._inverse, cls.call_and_ladj


def _fit(args: tuple[Any, ...]) -> bool:
    """Are these all the parameters of splines that the kernels take?"""
    if len(args) != 3 or not all(_plain(u) and u.dim() > 1 for u in args):
        return False
    widths, heights, derivatives = (tuple(u.shape) for u in args)
    return widths == heights and derivatives == (*widths[:-1], widths[-1] - 1)


def _plain(x: Any) -> bool:
    return (
        type(x) in PLAIN
        and x is not None
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and x.layout == torch.strided
    )


def _on_cpu(module: nn.Module) -> bool:
    """Are there parameters, all of them such as the kernels take?"""
    parameters = [*module.parameters()]
    return bool(parameters) and all(_plain(p) for p in parameters)


@torch.no_grad()
def _same(origin: Any) -> bool:
    """Do ours compute what zuko's do, on a few elements? Another version of it may not."""
    numbers = torch.arange(1, 81, device="cpu", dtype=torch.float32).sin()
    parameters = (4 * numbers[:72].view(9, 8)).split([3, 3, 2], -1)
    bound = _options(origin)[0]
    x = 1.5 * bound * numbers[70:79]
    try:
        ours, theirs = SplineMaker(origin)(*parameters), origin(*parameters)
        if not isinstance(ours, _OnePass):
            return False
        pairs = zip(
            (*ours.call_and_ladj(x), ours.inv(x)), (*theirs.call_and_ladj(x), theirs.inv(x)),
            strict=True,
        )  # fmt: skip
        return all(torch.allclose(y, wanted, 1e-4, 1e-4) for y, wanted in pairs)
    except (AttributeError, TypeError):
        return False
