"""Drop-in for NaFlexVit: images of different sizes in one batch, without their padding."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import repeat
from typing import Any, NamedTuple

import torch
from timm.models import eva, naflexvit, vision_transformer
from torch import nn

from vitfast.blocks.packing import Packing
from vitfast.blocks.parts import apply_norm
from vitfast.blocks.transformer import run_packed_block
from vitfast.engine import memo
from vitfast.engine.eligibility import PLAIN, records_grad
from vitfast.layers.base import BLOCK, Layer
from vitfast.layers.block import Block
from vitfast.layers.eva import EvaBlock
from vitfast.layers.reading.children import check_bare, describe_called, timm_class
from vitfast.layers.reading.norm import read_norm
from vitfast.ops.varlen_attention.api import has_kernel
from vitfast.plans import Norm, Unfit, Unsupported
from vitfast.runtime.library import autocast_dtype
from vitfast.settings import settings


class Plan(NamedTuple):
    """What a NaFlexVit holds beside its embedding, its blocks and its head.

    norm: after the last block, or None. prefix: class and register tokens before each image's
    patches. mixed: whether each block has a rotary embedding of its own.
    """

    norm: Norm | None
    prefix: int
    mixed: bool


def plan_naflex(module: Any) -> Plan:
    """How timm's `NaFlexVit` computes between its embedding and its head."""
    blocks = module._modules["blocks"]
    if timm_class(blocks) is not nn.Sequential:
        raise Unsupported(f"blocks is a {type(blocks).__name__}, not torch.nn.Sequential")
    for i, block in enumerate(blocks):
        if timm_class(block) not in (vision_transformer.Block, eva.EvaBlock):
            raise Unsupported(f"blocks.{i} is a {type(block).__name__}, not timm's (Eva)Block")
        check_bare(block, f"blocks.{i}")
    if module.attn_pool is None and not module.global_pool:
        raise Unfit("it does not pool: padded tokens come out")
    if module.grad_checkpointing:
        raise Unfit("it checkpoints gradients")
    if module.patch_drop is not None and module.training:
        raise Unfit("it drops patches while training")
    norm = None
    if type(module._modules["norm"]) is not nn.Identity:
        norm = read_norm(module._modules, "norm")
        norm.check_width(module.embed_dim)
    else:
        check_bare(module._modules["norm"], "norm")
    return Plan(norm, module.num_prefix_tokens, bool(module.rope_is_mixed))


class NaFlexVit(Layer, naflexvit.NaFlexVit):
    """`timm.models.naflexvit.NaFlexVit` whose blocks compute no padding.

    A call with `patch_coord` and `patch_valid` packs the valid tokens of all images once after the
    embedding, runs the blocks on them with `vitfast.ops.varlen_attention`, and unpacks them for
    the pooling, which timm does, and which leaves padding out. No mask is made. Where all patches
    are valid the blocks run on the batch as it is, without a mask.

    Calls of `forward_features` and `forward_intermediates` run timm's own, with its padding masks:
    their callers see the padded tokens, which hold there what timm computes for them. So do models
    that do not pool; calls with an `attn_mask`, or in which an image has no valid patch; blocks
    with hooks, with children that cannot be read, or that are not swapped; patch dropout,
    stochastic depth and gradient checkpointing in training; torch.compile; and devices and dtypes
    without kernels.
    """

    ops = ("varlen_attention", *BLOCK)
    plan = staticmethod(plan_naflex)

    def forward(
        self,
        x: torch.Tensor | dict[str, torch.Tensor],
        patch_coord: torch.Tensor | None = None,
        patch_valid: torch.Tensor | None = None,
        attn_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        batch = _batch_of(x, patch_coord, patch_valid, attn_mask)
        found = None if batch is None else _read(self, batch)
        out = None if batch is None or found is None else _run(self, batch, *found)
        if out is None:
            return self._as_timm(
                x, patch_coord=patch_coord, patch_valid=patch_valid, attn_mask=attn_mask
            )
        return out


class _Batch(NamedTuple):
    """patches [B, N, ...], where they lie [B, N, 2], and which are no padding [B, N]."""

    patches: torch.Tensor
    coord: torch.Tensor
    valid: torch.Tensor


def _batch_of(x: object, coord: object, valid: object, mask: object) -> _Batch | None:
    """The batch that `NaFlexVit.forward` was given; None for images, or with a mask."""
    patches = x
    if isinstance(x, dict):
        patches, coord = x.get("patches"), x.get("patch_coord", coord)
        valid, mask = x.get("patch_valid", valid), x.get("attn_mask", mask)
    if mask is not None or type(patches) not in PLAIN:
        return None
    if type(coord) not in PLAIN or type(valid) not in PLAIN or torch.compiler.is_compiling():
        return None
    batch = _Batch(patches, coord, valid)  # type: ignore[arg-type]
    fits = batch.valid.dtype == torch.bool and batch.valid.shape == batch.patches.shape[:2]
    return batch if fits and batch.valid.device == batch.patches.device else None


def _read(model: Any, batch: _Batch) -> tuple[Plan, list[Any]] | None:
    """The plans of the model and of its blocks; None where timm's forward has to run."""
    if settings.backend not in ("auto", "cpu") or batch.valid.numel() == 0:
        return None
    found = model._plan_call(*batch)
    if found is None:
        return None
    rope = model.rope
    if rope is not None and records_grad(tuple(rope.parameters())):
        return None  # there are no kernels for its gradient
    blocks, widths = [], set()
    for block in model.blocks:
        if type(block) not in (Block, EvaBlock) or (rope is not None and type(block) is Block):
            return None
        plan = memo.recall_plan(type(block).plan, block, batch.patches)
        if plan is None or plan.drops or any(map(_calls, (plan, plan.attn, plan.mlp))):
            return None
        if rope is not None and plan.attn.prefix != found.prefix:
            return None
        widths.add((plan.attn.heads, plan.attn.proj.weight.shape[-1] // plan.attn.heads))
        blocks.append(plan)
    operand = autocast_dtype(batch.patches.device) or batch.patches.dtype
    like = (batch.patches.new_empty(0, 3, *width, dtype=operand) for width in widths)
    return (found, blocks) if all(map(has_kernel, like)) else None


def _calls(plan: Any) -> bool:
    """Whether something of a plan is called instead of read."""
    return any(True for _ in describe_called(plan))


def _run(model: Any, batch: _Batch, plan: Plan, blocks: list[Any]) -> torch.Tensor | None:
    """The model's output; None where timm's forward has to run."""
    lengths = batch.valid.sum(1).tolist()
    if min(lengths) == 0:
        return None
    # Any mask keeps timm from making one of all pairs of tokens; this one goes nowhere.
    embedded = model._forward_embeds(*batch, attn_mask=batch.valid)
    x, rope = embedded["patches"], embedded["rope_embeds"]
    if type(x) not in PLAIN or x.shape[1] != plan.prefix + batch.valid.shape[1]:
        return None
    if min(lengths) == batch.valid.shape[1]:
        for block, own in zip(model.blocks, _ropes(plan, rope), strict=False):
            x = block(x) if own is None else block(x, rope=own)
        x = model.norm(x)
    else:
        packing = Packing(batch.valid, lengths, plan.prefix)
        rows = packing.pack(x)
        if rope is not None and not plan.mixed:
            rope = packing.pack_rope(rope)
        for block, own in zip(blocks, _ropes(plan, rope), strict=False):
            if own is not None and plan.mixed:
                own = packing.pack_rope(own)
            rows = run_packed_block(rows, block, packing.sequences, own)
        if plan.norm is not None:
            rows = apply_norm(rows, plan.norm)
        x = packing.unpack(rows)
    return model.forward_head(patches=x, patch_valid=batch.valid)


def _ropes(plan: Plan, rope: Any) -> Iterable[torch.Tensor | None]:
    """The rotary embedding of each block, of the model's: one for all, or by block."""
    return rope if plan.mixed and rope is not None else repeat(rope)
