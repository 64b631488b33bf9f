"""One file a rival, as its author would write it to be fast.

A new rival is a new file here, with a :class:`~bench.contender.Contender` under ``@register``.
"""

import importlib
import pkgutil

import torch

from bench.contender import Contender
from bench.rivals.registry import REGISTERED

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(_module.name)


def _rank(kind: type[Contender]) -> tuple[bool, int]:
    """Ours, then the rivals by number, then the floors."""
    return kind.floor, int(kind.number) if kind.number.isdigit() else 0


#: All contenders on a GPU.
GPU: tuple[type[Contender], ...] = tuple(sorted(REGISTERED, key=_rank))
#: All contenders on a CPU.
ALL: tuple[type[Contender], ...] = tuple(kind for kind in GPU if not kind.gpu_only)


def contenders(device: str) -> tuple[type[Contender], ...]:
    """The contenders on ``device``."""
    return GPU if torch.device(device).type == "cuda" else ALL
