"""What ``torch.compile`` should not trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def constant_in_trace(function: Function) -> Function:
    """A trace calls ``function`` while it is made, and takes its result for a constant.

    As ``torch.compiler.assume_constant_result``, which would import the compiler, and Triton.
    """
    marked: Any = function
    marked._dynamo_marked_constant = True
    return function
