"""The ops. Each is a folder with the same rooms; adding one is a folder, a name and an import here.

The functions are imported eagerly, so that they, and not the packages of the same name, are what
`vitfast.ops.<name>` means; importing this package registers every op before anything is traced.
"""

from __future__ import annotations

import importlib

from vitfast.ops.add_norm.api import add_norm
from vitfast.ops.attention.api import attention
from vitfast.ops.dwconv_norm.api import dwconv_norm
from vitfast.ops.grn.api import grn
from vitfast.ops.group_norm_act.api import group_norm_act
from vitfast.ops.layer_norm.api import layer_norm
from vitfast.ops.linear_act.api import linear_act
from vitfast.ops.mlp.api import mlp
from vitfast.ops.norm_add.api import norm_add
from vitfast.ops.patch_embed.api import patch_embed
from vitfast.ops.patch_merge.api import patch_merge
from vitfast.ops.residual_add.api import residual_add
from vitfast.ops.rms_norm.api import rms_norm
from vitfast.ops.spec import OpSpec
from vitfast.ops.varlen_attention.api import varlen_attention
from vitfast.ops.window_attention.api import window_attention

NAMES = (
    "layer_norm",
    "rms_norm",
    "add_norm",
    "norm_add",
    "residual_add",
    "attention",
    "varlen_attention",
    "linear_act",
    "mlp",
    "patch_embed",
    "patch_merge",
    "window_attention",
    "dwconv_norm",
    "grn",
    "group_norm_act",
)

__all__ = [
    "add_norm",
    "attention",
    "dwconv_norm",
    "grn",
    "group_norm_act",
    "layer_norm",
    "linear_act",
    "mlp",
    "norm_add",
    "patch_embed",
    "patch_merge",
    "residual_add",
    "rms_norm",
    "spec_of",
    "specs",
    "varlen_attention",
    "window_attention",
]


def spec_of(name: str) -> OpSpec:
    """The OpSpec of one op."""
    return importlib.import_module(f"vitfast.ops.{name}.spec").SPEC


def specs() -> list[OpSpec]:
    """Every OpSpec, in the order of `NAMES`."""
    return [spec_of(name) for name in NAMES]
