"""One file a contender: ``NAME``, ``NOTE`` and ``build(layout, dense, bias)``.

``build`` returns a function of x whose autograd graph the harness walks; parameters are its
attribute ``parameters``. Weight preparation belongs inside the call.
"""

from bench.rivals import best_dense, masked_dense, ours, paper_style

ALL = (ours, paper_style, masked_dense, best_dense)
