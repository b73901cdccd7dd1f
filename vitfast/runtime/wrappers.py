"""Modules of torch around a model."""

from __future__ import annotations

from typing import Any

from torch import nn

from vitfast.errors import InputTypeError


def unwrapped(model: Any) -> nn.Module:
    """The model inside torch.compile's, DataParallel's and DistributedDataParallel's wrappers.

    Raises:
        InputTypeError: it is no torch.nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise InputTypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    while True:
        if "_orig_mod" in model._modules:  # OptimizedModule; asking for its class loads Dynamo
            model = model._orig_mod
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        else:
            return model
