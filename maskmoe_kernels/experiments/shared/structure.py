"""Checks of the structure of data from a file: nested keys and types, against a description."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from maskmoe_kernels.errors import DataError

#: A type (``float``: any finite number; ``object``: anything); ``{key: spec}``: a dict with at
#: least these keys; ``{type: spec}``: a dict with keys of one type, all of whose values are alike;
#: ``[spec]``: a list of such; ``(spec, ...)``: one of several; ``None``.
Spec = Any


def check(value: object, spec: Spec, fail: Callable[[str], DataError], name: str = "") -> None:
    """Check that ``value`` has the structure that ``spec`` describes.

    Args:
        value: The data as read.
        spec: See :data:`Spec`.
        fail: Makes the error from what is wrong; it adds the file and the remedy.
        name: Keys on the way to ``value``, joined by dots.

    Raises:
        DataError: It has not; the message names the key, what was expected and what was found.
    """
    if isinstance(spec, tuple):
        fitting = [one for one in spec if _is_kind(value, one)]
        if not fitting:
            raise _wrong(value, spec, fail, name)
        spec = fitting[0]
    if not _is_kind(value, spec):
        raise _wrong(value, spec, fail, name)
    if isinstance(spec, list) and isinstance(value, list):
        for i, one in enumerate(value):
            check(one, spec[0], fail, f"{name}[{i}]")
    if isinstance(spec, dict) and isinstance(value, dict):
        for key, inner in spec.items():
            _check_key(value, key, inner, fail, name)


def _check_key(
    value: dict[Any, Any], key: Any, spec: Spec, fail: Callable[[str], DataError], name: str
) -> None:
    prefix = f"{name}." if name else ""
    if not isinstance(key, type):
        if key not in value:
            raise fail(f"expected {prefix}{key}, got {_shown(list(value))} there")
        check(value[key], spec, fail, f"{prefix}{key}")
        return
    for own, inner in value.items():
        if not _is_kind(own, key):
            raise fail(f"expected keys of {name} to be {key.__name__}, got {_shown(own)}")
        check(inner, spec, fail, f"{prefix}{own}")


def _is_kind(value: object, spec: Spec) -> bool:
    """Is it of the right type, regardless of its content?"""
    if spec is None:
        return value is None
    if isinstance(spec, dict | list):
        return isinstance(value, type(spec))
    if spec is float:
        number = isinstance(value, float | int) and not isinstance(value, bool)
        return number and math.isfinite(value)  # type: ignore[arg-type]
    if spec is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, spec)


def _wrong(value: object, spec: Spec, fail: Callable[[str], DataError], name: str) -> DataError:
    kinds = " or ".join(_kind_name(one) for one in (spec if isinstance(spec, tuple) else (spec,)))
    return fail(f"expected {name or 'the content'} to be {kinds}, got {_shown(value)}")


def _kind_name(spec: Spec) -> str:
    if spec is None:
        return "None"
    if spec is float:
        return "a finite number"
    return f"{(spec if isinstance(spec, type) else type(spec)).__name__}"


def _shown(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)}"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:60] + '...'}"
