"""Passes over whole sequences, as scoring and training make them: the layers' own results in less time and memory."""

import os

from torch import nn

from rlhf_pipeline.passes.eight_bit import lean_eight_bit
from rlhf_pipeline.passes.four_bit import lean_four_bit
from rlhf_pipeline.passes.rotary import fuse_rotary

# Triton 3.9 warns where this is not said.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")


def fuse(model: nn.Module) -> None:
    """Let a frozen causal model compute the same with less memory and, on a GPU, in fewer kernels."""
    lean_eight_bit(model)
    if next(model.parameters()).is_cuda:
        lean_four_bit(model)
        fuse_rotary(model)
