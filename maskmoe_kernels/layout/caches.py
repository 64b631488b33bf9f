"""What is computed once from a layout or a family, and kept with it.

Everything of the package that is kept per layout is kept here: its tables on each device, the
serialized form among them; how calls on it are dispatched; what implementations derive from it, a
schedule or Triton's tiles and jobs. It all goes when the layout goes. (Beside it stand
``serialized._known``, which holds layouts weakly, and the extension's compiled layouts, which
``serialized`` has it forget.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from maskmoe_kernels._compat import outside_of_modes

T = TypeVar("T")


class Caches:
    """Of one layout or family. No value may refer to the owner: it would never be freed.

    Attributes:
        tables: (name, device) to tensor; see :meth:`table`.
        dispatch: (backend, dtype, device) of a call to what serves such calls; the ops fill it.
        derived: Name to what an implementation made; see :meth:`derive`.
    """

    def __init__(self) -> None:
        self.tables: dict[tuple[str, torch.device], Tensor] = {}
        self.dispatch: dict[tuple[str | None, torch.dtype, torch.device], Any] = {}
        self.derived: dict[str, Any] = {}

    def table(self, name: str, device: torch.device, build: Callable[[], Tensor]) -> Tensor:
        """The table ``name`` on ``device``, from ``build()`` if it is not there yet."""
        key = (name, device)
        if key not in self.tables:
            if torch.compiler.is_dynamo_compiling():  # a trace holds it in its graph
                return build().to(device)
            with outside_of_modes():  # it outlives the call that needs it first
                self.tables[key] = build().to(device, copy=True)
        return self.tables[key]

    def derive(self, name: str, make: Callable[[], T]) -> T:
        """What ``make()`` returned when ``name`` was first asked for."""
        found: T | None = self.derived.get(name)
        if found is None:
            with outside_of_modes():  # it outlives the call that needs it first
                found = self.derived[name] = make()
        return found
