"""Marks of tests that only a CUDA device can run."""

from typing import Any

import pytest
import torch

on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def gpu(test: Any) -> Any:
    """A test that only a CUDA device can run."""
    for mark in on_gpu:
        test = mark(test)
    return test
