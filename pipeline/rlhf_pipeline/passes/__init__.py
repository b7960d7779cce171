"""Passes over whole sequences, as scoring and training make them: what transformers' layers do, in fewer kernels."""

import os

from torch import nn

from rlhf_pipeline.passes.four_bit import lean_four_bit
from rlhf_pipeline.passes.rotary import fuse_rotary

# Triton 3.9 warns where this is not said.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")


def fuse(model: nn.Module) -> None:
    """Let a frozen causal model on a GPU compute the same in fewer kernels; on a CPU nothing changes."""
    if next(model.parameters()).is_cuda:
        lean_four_bit(model)
        fuse_rotary(model)
