"""The decode step of a rollout on fused kernels: one token for each row of a batch, close to the memory's bandwidth."""

import os

# Triton 3.9 warns where this is not said: the kernels were measured with products and sums fused.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
