"""What the kernels take; known without Triton."""

import torch

#: Types of matrices and logits; sums are float32, and float64 goes to PyTorch.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Confidences that the kernels know; others are functions and PyTorch's.
CONFIDENCES = ("abs", "square", "smooth", "rare")
#: A program holds whole rows in registers.
MAX_EXPERTS = 1024
