"""Where in a model attention is computed, and what reaches it in one run of the model.

A site is watched by a forward pre-hook that is taken off before the call returns. Where the block
around the attention is one of timm's (or vitfast's drop-in of it), the hook sits on the block: a
drop-in runs as fused with it as without. Else, or where somebody's own hooks change what the
attention is given, it sits on the attention module.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from timm import layers as timm_layers
from timm.models import beit, eva, swin_transformer, swin_transformer_v2, vision_transformer
from timm.models import vision_transformer_relpos as relpos
from torch import nn

from vitfast.engine import memo
from vitfast.errors import (
    InputTypeError,
    InputValueError,
    UnsupportedInputError,
    VitfastError,
    first_line,
)
from vitfast.families import gap_table
from vitfast.layers.reading.children import timm_class

GLOBAL = (
    timm_layers.Attention,
    timm_layers.AttentionRope,
    eva.EvaAttention,
    beit.Attention,
    relpos.RelPosAttention,
)
"""Attentions in which every token sees every other, by timm class."""
PARALLEL = vision_transformer.ParallelScalingBlock
"""A block that is its own attention."""
WINDOWED = (swin_transformer.WindowAttention, swin_transformer_v2.WindowAttention)
POOL = timm_layers.AttentionPoolLatent

_NORM_FIRST = {
    vision_transformer.Block,
    eva.EvaBlock,
    beit.Block,
    relpos.RelPosBlock,
    swin_transformer.SwinTransformerBlock,
}
"""Blocks that compute attn(norm1(x), ...); what else they are given goes to attn under its name."""
_NORM_LAST = {
    vision_transformer.ResPostBlock,
    eva.EvaBlockPostNorm,
    relpos.ResPostRelPosBlock,
    swin_transformer_v2.SwinTransformerV2Block,
}
"""Blocks that compute attn(x, ...)."""


@dataclass(frozen=True)
class Site:
    """One attention of a model.

    attn: the attention module. watched: the module whose inputs are looked at, it or its block.
    norm: what the block applies to its input before the attention; None for nothing, or where the
    attention itself is watched. owner: the model that it is part of, which knows its prefix tokens;
    None for windows.
    """

    name: str
    attn: nn.Module
    watched: nn.Module
    norm: nn.Module | None
    owner: Any

    @property
    def windowed(self) -> bool:
        return timm_class(self.attn) in WINDOWED


class _Enough(BaseException):
    """Ends a forward of which no more is needed. No Exception, which a model might catch."""


def find_sites(model: nn.Module) -> list[Site]:
    """The attentions of a model's blocks in their order, without those that only pool.

    Raises:
        InputTypeError: it is no module.
        UnsupportedInputError: it has none, or also such as are not known: their layers would be
            missing from the count.
    """
    if not isinstance(model, nn.Module):
        raise InputTypeError(f"expected a model, got {type(model).__name__}")
    found, unknown = [], []
    for name, module in model.named_modules():
        kind = timm_class(module)
        if kind in GLOBAL or kind in WINDOWED or kind is PARALLEL:
            found.append(_site(model, name, module))
        elif _is_attention(kind):
            unknown.append(kind.__name__)
    if unknown:
        known = ", ".join(sorted({cls.__name__ for cls in (*GLOBAL, *WINDOWED)}))
        raise UnsupportedInputError(
            f"{type(model).__name__} attends by {unknown[0]}, of which there are no maps yet "
            f"(there are of {known})"
        )
    if not found:
        raise UnsupportedInputError(f"{type(model).__name__} has no attention that is known")
    return found


def find_pool(model: nn.Module) -> Site:
    """The attention that pools a model's tokens.

    Raises:
        UnsupportedInputError: it has none, or one of another kind than timm's AttentionPoolLatent.
    """
    for name, module in model.named_modules():
        if timm_class(module) is POOL:
            return _site(model, name, module)
    raise UnsupportedInputError(f"{type(model).__name__} has no AttentionPoolLatent")


def _is_attention(kind: type[nn.Module]) -> bool:
    gap = gap_table().get(kind)
    if gap is not None and gap.role == "attention":
        return "Pool" not in kind.__name__
    name = kind.__name__.lower()
    return name.endswith(("attention", "attn", "diffparallelscalingblock"))


def _site(model: nn.Module, name: str, attn: nn.Module) -> Site:
    path = [model]
    for part in name.split(".") if name else ():
        path.append(path[-1]._modules[part])  # type: ignore[arg-type]
    if "forward" in attn.__dict__:
        raise UnsupportedInputError(f"the forward of {name} was replaced, and may do anything")
    owner = None
    for module in path[:-1]:
        if isinstance(getattr(module, "num_prefix_tokens", None), int):
            owner = module
            break
    if timm_class(attn) is PARALLEL:
        return Site(name, attn, attn, attn._modules["in_norm"], owner)
    block = path[-2] if len(path) > 1 else attn
    kind = timm_class(block)
    windowed = timm_class(attn) in WINDOWED
    known = kind in _NORM_FIRST or kind in _NORM_LAST
    changed = "forward" in block.__dict__ or "_attn" in block.__dict__ or attn._forward_pre_hooks
    if windowed and (not known or changed):
        raise UnsupportedInputError(f"the block around {name} is not as timm built it")
    if not known or changed or block._modules.get("attn") is not attn:
        return Site(name, attn, attn, None, owner)
    norm = block._modules["norm1"] if kind in _NORM_FIRST else None
    return Site(name, attn, block, norm, owner)


Saw = Callable[[Site, torch.Tensor, dict[str, Any]], None]
"""Gets a site, its input, and what else it was given, by name."""


def _named(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a module is called with, by the names of its forward's parameters."""
    return dict(inspect.signature(module.forward).bind(*args, **kwargs).arguments)


def watch(model: nn.Module, image: torch.Tensor, sites: Sequence[Site], saw: Saw) -> None:
    """Run a model on an image up to the last of some sites, and tell what reaches each.

    The run computes what the model computes in evaluation mode, nothing is recorded by autograd,
    and what torch.compile made of the model is left out. Afterwards the model is as it was.

    Raises:
        InputValueError: the model cannot take the image.
        UnsupportedInputError: a site was not reached.
    """
    missing = {id(site.watched): site for site in sites}

    def hook_of(site: Site) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = _named(module, args, kwargs)
            saw(site, given.pop("x"), given)
            missing.pop(id(module), None)
            if not missing:
                raise _Enough

        return hook

    model = getattr(model, "_orig_mod", model)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(_evaluating(model, [site.watched for site in sites]))
        for site in sites:
            handle = site.watched.register_forward_pre_hook(hook_of(site), with_kwargs=True)
            stack.callback(handle.remove)
        try:
            model(image)
        except _Enough:
            return
        except (VitfastError, torch.OutOfMemoryError):
            raise
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            shape = "x".join(map(str, image.shape))
            raise InputValueError(
                f"{type(model).__name__} cannot take an image of shape {shape}: {first_line(error)}"
            ) from error
    names = ", ".join(site.name for site in missing.values())
    raise UnsupportedInputError(f"the forward of {type(model).__name__} did not call {names}")


@contextmanager
def _evaluating(model: nn.Module, watched: Sequence[nn.Module]) -> Iterator[None]:
    """The model in evaluation mode; what is kept of its modules outlasts the hooks and the mode."""
    training = [module for module in model.modules() if module.training]
    changed = {id(module) for module in (*training, *watched)}
    within = [m for m in model.modules() if any(id(child) in changed for child in m.modules())]
    with memo.set_aside(within):
        try:
            # Not through `train`, which modules override to do more, such as merging weights.
            for module in training:
                module.training = False
            yield
        finally:
            for module in training:
                module.training = True


def grid_of(site: Site, images: torch.Tensor, x: torch.Tensor) -> tuple[int, int, int]:
    """(prefix tokens, rows, columns) of x [B, N, C], which reaches a site with global attention.

    Raises:
        UnsupportedInputError: x is not all tokens of each image, or the model does not tell.
    """
    if x.ndim != 3 or len(x) != len(images):
        raise UnsupportedInputError(
            f"{site.name} gets {tuple(x.shape)} of {len(images)} images, not all tokens of each"
        )
    owner, tokens, (height, width) = site.owner, x.shape[1], images.shape[-2:]
    if owner is None:
        raise UnsupportedInputError(
            f"the model does not tell which of its tokens are patches, at {site.name}"
        )
    prefixes: list[int] = [owner.num_prefix_tokens]
    if timm_class(site.attn) is POOL:
        prefixes.append(0)  # models pool with or without them
    embed: Any = getattr(owner, "patch_embed", None)
    sizes = []
    if hasattr(embed, "dynamic_feat_size"):
        sizes.append(tuple(embed.dynamic_feat_size((height, width))))
    if getattr(embed, "grid_size", None) is not None:
        sizes.append(tuple(embed.grid_size))
    patch = getattr(getattr(owner, "embeds", None), "patch_size", None)
    if patch is not None:  # NaFlexViT pads
        sizes.append((-(-height // patch[0]), -(-width // patch[1])))
    for prefix in prefixes:
        for rows, columns in sizes:
            if rows * columns + prefix == tokens:
                return prefix, rows, columns
    raise UnsupportedInputError(
        f"{tokens} tokens at {site.name} are not {prefixes[0]} and those of a grid of patches"
    )
