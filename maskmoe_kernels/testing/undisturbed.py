"""Calling somebody else's model without leaving a trace: state, random numbers, gradients."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def modules_of(function: Callable[..., Any]) -> list[nn.Module]:
    """All modules that a call of ``function`` is known to reach.

    A module and its children; what a bound method belongs to; what a ``functools.partial`` holds;
    what a lambda or an inner function refers to.
    """
    found: dict[int, nn.Module] = {}
    seen: set[int] = set()
    waiting: list[Any] = [function]
    while waiting:
        each = waiting.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, nn.Module):
            found.update((id(module), module) for module in each.modules())
        elif isinstance(each, partial):
            waiting += [each.func, *each.args, *each.keywords.values()]
        elif isinstance(each, (list, tuple)):
            waiting += each
        elif callable(each):
            waiting.append(getattr(each, "__self__", None))
            waiting += _referred_to(each)
    return list(found.values())


def _referred_to(function: Any) -> list[Any]:
    """What a Python function finds outside itself: enclosing variables, and globals by name."""
    code = getattr(function, "__code__", None)
    if code is None:
        return []
    cells = getattr(function, "__closure__", None) or ()
    enclosed = [cell.cell_contents for cell in cells if _is_filled(cell)]
    named = [function.__globals__.get(name) for name in code.co_names]
    return enclosed + [each for each in named if isinstance(each, nn.Module)]


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # a variable that has no value yet
        return False


class Undisturbed:
    """The state that calls of a model may change, and its restoration.

    Parameters and buffers keep their values and gradients, modules their mode (train or eval) and
    the generators they own; torch, numpy and ``random`` go on with the random numbers that they
    would have drawn.

    Args:
        function: What is called; see :func:`modules_of`.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.modules = modules_of(function)
        self._modes = [module.training for module in self.modules]
        self._registered = [dict(module._buffers) for module in self.modules]
        tensors = {
            id(tensor): tensor
            for module in self.modules
            for tensor in (*module._parameters.values(), *module._buffers.values())
            if tensor is not None
        }
        self._values = [
            (tensor, tensor.detach().clone(), tensor.grad) for tensor in tensors.values()
        ]
        self._grads = [None if grad is None else grad.clone() for *_, grad in self._values]
        self._generators = [
            (generator, generator.get_state())
            for module in self.modules
            for generator in vars(module).values()
            if isinstance(generator, torch.Generator)
        ]
        # What a model draws from numpy is numpy's global state, if it has no generator of its own.
        self._torch = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        self._numpy, self._python = np.random.get_state(), random.getstate()  # noqa: NPY002

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back as it was when this object was made."""
        for module, mode, buffers in zip(self.modules, self._modes, self._registered, strict=True):
            module.training = mode
            module._buffers.update(buffers)
        for (tensor, value, grad), held in zip(self._values, self._grads, strict=True):
            # Through data: a graph that holds the tensor finds it unchanged, for so it is.
            if not _same_bits(tensor.data, value):
                tensor.data.copy_(value)
            tensor.grad = grad
            if grad is not None and held is not None and not _same_bits(grad.data, held.data):
                grad.data.copy_(held)
        for generator, state in self._generators:
            generator.set_state(state)
        torch.set_rng_state(self._torch)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)
        np.random.set_state(self._numpy)  # noqa: NPY002
        random.setstate(self._python)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.layout == torch.strided and a.is_contiguous() and a.shape == b.shape and a.dim():
        a, b = a.view(torch.uint8), b.contiguous().view(torch.uint8)
    return torch.equal(a, b)  # not so where there is a NaN: then it is written again


@contextmanager
def undisturbed(function: Callable[..., Any]) -> Iterator[Undisturbed]:
    """Inside, calls may change what they like; afterwards all is as before."""
    state = Undisturbed(function)
    try:
        yield state
    finally:
        state.restore()
