"""What inference of a model has to hold at once, beside which `bench models` shows what it holds.

Its weights, its input, and the residual stream of its largest block twice, as the input and the
result of a block; with attention over all tokens also q, k and v of them. Less is possible (a block
may write into its input), and a model that keeps intermediate results needs more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vitfast.bench import zoo
from vitfast.bench.peers import Setting
from vitfast.families import layer_table
from vitfast.ops.spec import tensor_bytes

_STREAMS = 2


def memory_floor_mb(
    module: nn.Module, inputs: tuple[torch.Tensor, ...], setting: Setting
) -> float | None:
    """MB (10^6 bytes), by a forward on the meta device, where nothing is computed.

    Args:
        module: a model of timm's own classes.

    Returns:
        None in training, and for a model of which no block is known or that cannot run there.
    """
    if setting.train:
        return None
    most = 0.0

    def look(block: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        nonlocal most
        if isinstance(result, torch.Tensor):
            wide = result.numel() * setting.dtype.itemsize
            qkv = 3 if "attention" in layer_table()[type(block)].ops else 0
            most = max(most, _STREAMS * tensor_bytes(result) + qkv * wide)

    handles = [
        m.register_forward_hook(look)
        for m in module.modules()
        if (layer := layer_table().get(type(m))) is not None and layer.role == "block"
    ]
    try:
        zoo.run_on_meta(module, inputs)
    except zoo.UNFIT:
        return None
    finally:
        for handle in handles:
            handle.remove()
    held = tensor_bytes(*module.parameters(), *module.buffers(), *inputs)
    return (held + most) / 1e6 if most else None
