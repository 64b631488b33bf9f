"""One file a contender: a class with ``name``, ``note``, ``parameters`` and ``dense_grad()``.

It is built from ``(layout, dense, bias)`` and called with x; the harness walks the autograd graph
of the result. Weight preparation belongs inside the call.
"""

from bench.rivals.best_dense import BestDense
from bench.rivals.masked_dense import MaskedDense
from bench.rivals.ours import Ours
from bench.rivals.paper_style import PaperStyle

ALL = (Ours, PaperStyle, MaskedDense, BestDense)
