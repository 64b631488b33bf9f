"""Which unit may see which feature: families of subsets, and the block layouts they induce."""

from maskmoe_kernels.layout.blocks import BlockLayout
from maskmoe_kernels.layout.subsets import SubsetFamily

__all__ = ["BlockLayout", "SubsetFamily"]
