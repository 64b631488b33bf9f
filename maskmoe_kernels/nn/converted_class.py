"""Modules that stay the same objects while their class becomes one that computes otherwise.

As ``torch.nn.utils.parametrize`` does it: the new class is a subclass of the one that the module
had, with the same submodules and hooks.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import nn

from maskmoe_kernels.nn.interception import interceptor_of_class


class Rewritten(nn.Module):
    """The first base of such a module's class; the second is the class that it had."""

    origin: type[nn.Module]
    #: The name of the method that it replaces, and that method.
    replaces = "forward"
    replaced: Any

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        state = self.__getstate__()  # type: ignore[no-untyped-call]
        return _made_again, (type(self).__bases__[0], self.origin), state

    def _is_as_before(self) -> bool:
        """Has nobody changed the method of the class since?"""
        return getattr(self.origin, self.replaces) is self.replaced


def kind_for(module: nn.Module, kinds: dict[tuple[str, str], type[Any]]) -> Any:
    """Which of ``kinds``, by module and name of a class, can ``module`` become?

    None where the method is not the known one, or nobody knows how to copy the module.
    """
    cls: Any = type(module)
    if issubclass(cls, Rewritten):
        return None
    copied = cls.__reduce_ex__ is object.__reduce_ex__ and cls.__reduce__ is object.__reduce__
    for base in cls.__mro__:
        kind = kinds.get((base.__module__, base.__qualname__))
        if kind is None:
            continue
        same = getattr(cls, kind.replaces) is getattr(base, kind.replaces)
        called = interceptor_of_class(cls, cls.forward) is None
        own = kind.replaces in vars(module)
        return kind if same and called and copied and not own else None
    return None


def rewrite_(module: nn.Module, kinds: dict[tuple[str, str], type[Any]]) -> bool:
    """Make ``module`` one of ``kinds`` from now on, if it can become one. Can it?"""
    kind = kind_for(module, kinds)
    if kind is None:
        return False
    cls: Any = type(module)
    module.__class__ = _made_class(kind, cls, getattr(cls, kind.replaces))
    return True


def restore_class_(module: nn.Module) -> None:
    """Give ``module`` the class back that it had, if it was rewritten."""
    if isinstance(module, Rewritten):
        module.__class__ = module.origin  # type: ignore[assignment]


@cache
def _made_class(kind: Any, cls: Any, replaced: Any) -> Any:
    own = {
        "origin": cls,
        "replaced": staticmethod(replaced),
        "__module__": cls.__module__,
        "__doc__": cls.__doc__,
    }
    return type(f"Converted{cls.__name__}", (kind, cls), own)


def _made_again(kind: Any, origin: Any) -> Any:
    """An instance without a state, for copies and pickles: the class has no name to be found by."""
    cls = _made_class(kind, origin, getattr(origin, kind.replaces))
    return cls.__new__(cls)
