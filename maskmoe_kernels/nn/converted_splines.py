"""Splines of zuko's and nflows' flows in one pass.

A spline flow's layers give each feature some 23 parameters, and its package computes the spline by
operations that pass over all of them many times: most of a training step where layers are small
(``outside`` in what ``python -m bench flows`` writes). For float32 on a CPU, the extension does it
in one pass. Else, and for whoever traces or transforms the call, the package's own code runs.

*zuko* makes a transform of the parameters: ``convert_`` puts a :class:`SplineMaker` into the place
of the constructor that a module holds as ``univariate``. *nflows* has a method that computes: the
module's class becomes a subclass with another one (``converted_class.py``).
"""

from __future__ import annotations

import functools
import math
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Transform

from maskmoe_kernels._compat import needs_torch_operators
from maskmoe_kernels.nn.converted_class import Rewritten, restore_class_, rewrite_
from maskmoe_kernels.ops.checks import PLAIN
from maskmoe_kernels.ops.splines import (
    SplineForm,
    rational_quadratic,
    rational_quadratic_inverse,
    takes,
)

_ORIGIN = ("zuko.transforms", "MonotonicRQSTransform")
_CIRCULAR = ("zuko.flows.spline", "CircularRQSTransform")  # a function, which uses that class
_DEFAULTS = {"bound": 5.0, "slope": 1e-3}  # zuko's


def make_splines_(module: Any) -> bool:
    """Have ``module`` compute its splines by ours from now on, if it has some. Has it?"""
    if not _on_cpu(module):
        return False
    origin = vars(module).get("univariate")
    if _is_known(origin):
        if not _same_transforms(origin):
            return False
        module.univariate = SplineMaker(origin)
        return True
    if not rewrite_(module, _NFLOWS):
        return False
    if module._same():
        return True
    restore_class_(module)
    return False


def restore_splines_(module: Any) -> None:
    """Give ``module`` its own constructor again, if it has ours."""
    maker = vars(module).get("univariate")
    if isinstance(maker, SplineMaker):
        module.univariate = maker.origin


# --- zuko ----------------------------------------------------------------------------------------


class SplineMaker:
    """Makes zuko's transforms from their parameters, as ``origin`` does.

    Attributes:
        origin: The constructor in whose place it is: the class, the function that composes it with
            a circular shift, or a ``functools.partial`` of either with ``bound`` or ``slope``.
    """

    def __init__(self, origin: Any) -> None:
        self.origin = origin
        self._options = _DEFAULTS | getattr(origin, "keywords", {})
        function = _function_of(origin)
        self._circular: Any = None
        if isinstance(function, FunctionType):
            of = function.__globals__
            shift, compose = of["CircularShiftTransform"], of["ComposedTransform"]
            self._circular = compose, shift, SplineMaker(of[_ORIGIN[1]])
        else:
            self._class, self._replaced = _made_class(function), _methods(function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A transform; ours if that can be, and nobody has changed the class."""
        options = self._options | kwargs
        if self._circular is not None:
            compose, shift, spline = self._circular
            options["bound"] = math.pi
            return compose(shift(bound=math.pi), spline(*args, **options))
        if (
            _methods(self._class.origin) != self._replaced
            or not _are_known(options)
            or not _fit(args)
            or not takes(args[0].shape[-1], form := SplineForm(**options))
        ):
            return self.origin(*args, **kwargs)
        return self._class(args, form)

    def __reduce__(self) -> Any:
        return SplineMaker, (self.origin,)

    def __repr__(self) -> str:
        return repr(self.origin)


class _OnePass:
    """The first base of a converted transform's class; the second is zuko's.

    What zuko makes of the parameters when it is constructed (knots and slopes) is made when it is
    asked for.
    """

    origin: Any

    def __init__(self, parameters: tuple[Tensor, Tensor, Tensor], form: SplineForm) -> None:
        Transform.__init__(self)  # type: ignore[arg-type]
        self._given, self._form = parameters, form

    def __getattr__(self, name: str) -> Any:
        own = vars(self)
        if "_made" in own or "_given" not in own or name.startswith("__"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        self._made = True
        made = self.origin(*self._given, bound=self._form.bound, slope=self._form.slope)
        for key, value in vars(made).items():
            own.setdefault(key, value)
        return getattr(self, name)

    def _call(self, x: Any) -> Any:
        if not self._takes(x):
            return super()._call(x)  # type: ignore[misc]
        return rational_quadratic(x, *self._given, self._form)[0]

    def _inverse(self, y: Any) -> Any:
        if not self._takes(y):
            return super()._inverse(y)  # type: ignore[misc]
        return rational_quadratic_inverse(y, *self._given, self._form)[0]

    def call_and_ladj(self, x: Any) -> Any:
        """As zuko's: the values, and the logarithms of the slopes."""
        if not self._takes(x):
            return super().call_and_ladj(x)  # type: ignore[misc]
        return rational_quadratic(x, *self._given, self._form)

    def _takes(self, x: Any) -> bool:
        return _plain(x) and x.shape == self._given[0].shape[:-1] and not needs_torch_operators()


@functools.cache
def _made_class(cls: Any) -> Any:
    """The class of transforms that take the place of ``cls``'s."""
    own = {"origin": cls, "__module__": cls.__module__, "__doc__": cls.__doc__}
    return type(f"Converted{cls.__name__}", (_OnePass, cls), own)


def _function_of(origin: Any) -> Any:
    return origin.func if type(origin) is functools.partial else origin


def _is_known(origin: Any) -> bool:
    """Does ``origin`` make zuko's splines, with no other options than are known?"""
    if type(origin) is functools.partial and (origin.args or not _are_known(origin.keywords)):
        return False
    function = _function_of(origin)
    name = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    if isinstance(function, FunctionType):
        of: Any = function.__globals__.get(_ORIGIN[1])
        return name == _CIRCULAR and isinstance(of, type) and _is_known(of)
    return isinstance(function, type) and name == _ORIGIN


def _are_known(options: dict[str, Any]) -> bool:
    plain = all(type(value) in (int, float) for value in options.values())
    return plain and options.keys() <= _DEFAULTS.keys()


def _methods(cls: Any) -> tuple[Any, ...]:
    """What ours replace; it may be patched later."""
    return cls.__init__, cls._call, cls._inverse, cls.call_and_ladj


def _fit(args: tuple[Any, ...]) -> bool:
    """Are these all the parameters of splines that the kernels take?"""
    if len(args) != 3 or not all(_plain(u) and u.dim() > 1 for u in args):
        return False
    widths, heights, derivatives = (tuple(u.shape) for u in args)
    return widths == heights and derivatives == (*widths[:-1], widths[-1] - 1)


@torch.no_grad()
def _same_transforms(origin: Any) -> bool:
    """Do ours compute what zuko's do, on a few elements? Another version of it may not."""
    numbers = torch.arange(1, 81, device="cpu", dtype=torch.float32).sin()
    parameters = (4 * numbers[:72].view(9, 8)).split([3, 3, 2], -1)
    try:
        maker = SplineMaker(origin)
        x = 1.5 * maker._options["bound"] * numbers[70:79]
        ours, theirs = maker(*parameters), origin(*parameters)
        if not any(isinstance(t, _OnePass) for t in (ours, *getattr(ours, "transforms", ()))):
            return False
        found, wanted = ((*t.call_and_ladj(x), t.inv(x)) for t in (ours, theirs))
        return _close(found, wanted)
    except (AttributeError, KeyError, TypeError):
        return False


# --- nflows --------------------------------------------------------------------------------------


class _NflowsSpline(Rewritten):
    num_bins: int

    def _form(self) -> SplineForm | None:
        """What splines of these options are to the kernels; None: they do not compute them."""
        this: Any = self
        if this.tails != "linear":
            return None
        bound, slope = float(this.tail_bound), float(this.min_derivative)
        width, height = float(this.min_bin_width), float(this.min_bin_height)
        form = SplineForm(bound, slope, width, height, squashed=False)
        return form if takes(self.num_bins, form) else None

    def _one_pass(self, inputs: Any, parameters: Any, scale: Any, inverse: bool) -> Any:
        """Values and logarithms of slopes, both as ``inputs``; None: nflows has to compute them.

        Args:
            inputs: ``(*,)``.
            parameters: ``(*, 3 bins - 1)``.
            scale: The parameters of widths and heights are divided by its square root; or None.
            inverse: Both of the inverse.
        """
        form, bins = self._form(), self.num_bins
        if (
            form is None
            or not self._is_as_before()
            or needs_torch_operators()
            or not _plain(inputs)
            or not _plain(parameters)
            or parameters.shape != (*inputs.shape, 3 * bins - 1)
        ):
            return None
        widths, heights, derivatives = parameters.split([bins, bins, bins - 1], -1)
        if scale is not None:
            widths, heights = widths / math.sqrt(scale), heights / math.sqrt(scale)
        function = rational_quadratic_inverse if inverse else rational_quadratic
        outputs, log_slope = function(inputs, widths, heights, derivatives, form)
        return outputs, -log_slope if inverse else log_slope

    @torch.no_grad()
    def _same(self) -> bool:
        """Do ours compute what nflows' do, on a few elements? Another version of it may not."""
        form, each = self._form(), 3 * self.num_bins - 1
        if form is None:
            return False
        numbers = torch.arange(1, 1 + 9 * each, device="cpu", dtype=torch.float32).sin()
        x, parameters = 1.5 * form.bound * numbers[-9:].view(9, 1), 4 * numbers.view(9, 1, each)
        ours, theirs = getattr(self, self.replaces), functools.partial(self.replaced, self)
        try:
            return all(
                _close(ours(x, parameters.clone(), way), theirs(x, parameters.clone(), way))
                for way in (False, True)
            )
        except (AttributeError, TypeError):
            return False


class _AutoregressiveSpline(_NflowsSpline):
    replaces = "_elementwise"

    def _elementwise(self, inputs: Any, autoregressive_params: Any, inverse: bool = False) -> Any:
        this: Any = self
        found = None
        if isinstance(inputs, Tensor) and inputs.dim() == 2:
            parameters = autoregressive_params.view(*inputs.shape, this._output_dim_multiplier())
            scale = getattr(this.autoregressive_net, "hidden_features", None)
            found = self._one_pass(inputs, parameters, scale, inverse)
        if found is None:
            return super()._elementwise(inputs, autoregressive_params, inverse)  # type: ignore[misc]
        outputs, log_slope = found
        return outputs, log_slope.sum(1)


class _CouplingSpline(_NflowsSpline):
    replaces = "_piecewise_cdf"

    def _piecewise_cdf(self, inputs: Any, transform_params: Any, inverse: bool = False) -> Any:
        this: Any = self
        net = this.transform_net
        scale = getattr(net, "hidden_features", getattr(net, "hidden_channels", None))
        # Without a scale, nflows warns.
        found = None if scale is None else self._one_pass(inputs, transform_params, scale, inverse)
        if found is None:
            return super()._piecewise_cdf(inputs, transform_params, inverse)  # type: ignore[misc]
        return found


#: Module and name of each class to what it becomes.
_NFLOWS: dict[tuple[str, str], type[_NflowsSpline]] = {
    (
        "nflows.transforms.autoregressive",
        "MaskedPiecewiseRationalQuadraticAutoregressiveTransform",
    ): _AutoregressiveSpline,
    (
        "nflows.transforms.coupling",
        "PiecewiseRationalQuadraticCouplingTransform",
    ): _CouplingSpline,
}


# --- Both ----------------------------------------------------------------------------------------


def _close(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> bool:
    return all(
        torch.allclose(y, wanted, 1e-4, 1e-4) for y, wanted in zip(ours, theirs, strict=True)
    )


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
