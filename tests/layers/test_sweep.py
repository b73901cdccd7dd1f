"""Whatever timm's forward reads from a module or calls in it, the drop-in honours.

For every drop-in: what timm's forward touches is recorded, then each of it is changed, one thing at
a time, in a module that has run before: attributes, parameters and buffers get other values,
methods are replaced on the instance, children get hooks of every kind or give way to look-alikes
that compute something else. The swapped module has to give timm's result or raise where timm does.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import timm.layers as tl
import torch
import torch.nn.functional as F
from timm.models import (
    beit,
    convnext,
    davit,
    edgenext,
    eva,
    hiera,
    inception_next,
    maxxvit,
    metaformer,
    rdnet,
    resnet,
    resnetv2,
    swin_transformer,
    swin_transformer_v2,
    swin_transformer_v2_cr,
    vision_transformer_relpos,
)
from timm.models.vision_transformer import Block
from torch import nn

from vitfast.families import layer_table
from vitfast.swap import swap

C, HEADS, N = 24, 2, 10
Case = tuple[Callable[[], nn.Module], Callable[[], tuple], dict[str, Any]]


def tokens(n: int = N) -> tuple:
    return (torch.randn(2, n, C),)


def rows(*size: int) -> tuple:
    return (torch.randn(2, *size, C),)


def planes(*size: int, channels: int = C) -> tuple:
    return (torch.randn(2, channels, *size).contiguous(memory_format=torch.channels_last),)


def rope(prefix: int = 1) -> dict[str, Any]:
    angles = torch.randn(N - prefix, C // HEADS // 2).repeat_interleave(2, -1)
    return {"rope": torch.cat([angles.sin(), angles.cos()], -1)}


def partition(kind: str, rel_pos: str, **options: Any) -> nn.Module:
    options = dict(rel_pos_type=rel_pos, rel_pos_dim=8) | options
    config = maxxvit.MaxxVitTransformerCfg(
        dim_head=12, window_size=(4, 3), grid_size=(4, 3), **options
    )
    return maxxvit.PartitionAttentionCl(C, kind, config, 0.3)


def maxvit_convnext(**options: Any) -> nn.Module:
    config = maxxvit.MaxxVitConvCfg(
        block_type="convnext", norm_layer="layernorm2d", act_layer="gelu", init_values=0.1
    )
    return maxxvit.ConvNeXtBlock(C, cfg=config, drop_path=0.3, **options)


def attention_cl() -> nn.Module:
    return partition("block", "bias").attn


group_norm = partial(tl.GroupNormAct, num_groups=4)
pre_norm = dict(conv_layer=partial(tl.StdConv2dSame, eps=1e-8), norm_layer=group_norm)
LAYER_NORM = dict(norm_layer=tl.LayerNorm)
SHIFTED = dict(input_resolution=(8, 12), window_size=4, shift_size=2, drop_path=0.3)
SWIN = swin_transformer.SwinTransformerBlock
SWIN_V2 = swin_transformer_v2.SwinTransformerV2Block
SWIN_CR = partial(swin_transformer_v2_cr.SwinTransformerV2CrBlock, C, HEADS, (8, 12), (4, 4))
ATTENDS = dict(
    token_mixer=partial(metaformer.Attention, head_dim=12, bias=True),
    norm_layer=metaformer.LayerNormNoBias,
    use_nchw=False,
    drop_path=0.3,
    res_scale_init_value=1.0,
)
CONVOLVES = dict(token_mixer=metaformer.SepConv, norm_layer=metaformer.LayerNorm2dNoBias)
EVA_BLOCK = partial(eva.EvaBlock, C, HEADS, drop_path=0.3)

# Name -> timm's module, its positional arguments and its keywords.
CASES: dict[str, Case] = {
    "norm": (lambda: tl.LayerNorm(C), tokens, {}),
    "torch norm": (lambda: nn.LayerNorm(C), tokens, {}),
    "rms norm": (lambda: tl.RmsNorm(C), tokens, {}),
    "norm 2d": (lambda: tl.LayerNorm2d(C), lambda: planes(5, 4), {}),
    "rms norm 2d": (lambda: tl.RmsNorm2d(C), lambda: planes(5, 4), {}),
    "grn": (lambda: tl.grn.GlobalResponseNorm(C), lambda: rows(5, 4), {}),
    "layer scale": (lambda: tl.LayerScale(C), tokens, {}),
    "mlp": (lambda: tl.Mlp(C, norm_layer=tl.LayerNorm, drop=0.2), tokens, {}),
    "glu mlp": (lambda: tl.GluMlp(C, 2 * C, norm_layer=tl.LayerNorm), tokens, {}),
    "swiglu": (lambda: tl.SwiGLU(C, 2 * C, norm_layer=tl.LayerNorm), tokens, {}),
    "grn mlp": (lambda: tl.GlobalResponseNormMlp(C), lambda: rows(5, 4), {}),
    "grn mlp conv": (
        lambda: tl.GlobalResponseNormMlp(C, use_conv=True),
        lambda: planes(5, 4),
        {},
    ),
    "patch embed": (
        lambda: tl.PatchEmbed(16, 4, 3, C, norm_layer=tl.LayerNorm),
        lambda: (torch.randn(2, 3, 16, 16),),
        {},
    ),
    "patch embed of any size": (
        lambda: tl.PatchEmbed(None, 4, 3, C, strict_img_size=False, output_fmt="NHWC"),
        lambda: (torch.randn(2, 3, 8, 20),),
        {},
    ),
    "stem": (
        lambda: nn.Sequential(nn.Conv2d(3, C, 4, 4), tl.LayerNorm2d(C)),
        lambda: planes(8, 12, channels=3),
        {},
    ),
    "downsampling": (
        lambda: nn.Sequential(tl.LayerNorm2d(C), nn.Conv2d(C, 32, 2, 2)),
        lambda: planes(6, 4),
        {},
    ),
    "attention": (
        lambda: tl.Attention(C, HEADS, qkv_bias=True, qk_norm=True, scale_norm=True, **LAYER_NORM),
        tokens,
        {},
    ),
    "attention rope": (
        lambda: tl.AttentionRope(C, HEADS, qkv_bias=True, qk_norm=True, **LAYER_NORM),
        tokens,
        rope(),
    ),
    "attention rope split": (
        lambda: tl.AttentionRope(C, HEADS, qkv_fused=False, rotate_half=True),
        tokens,
        rope(),
    ),
    "eva attention": (lambda: eva.EvaAttention(C, HEADS, scale_norm=False), tokens, rope()),
    "eva attention split": (
        lambda: eva.EvaAttention(C, HEADS, qkv_fused=False, **LAYER_NORM),
        tokens,
        rope(),
    ),
    "beit attention": (
        lambda: beit.Attention(C, HEADS, qkv_bias=True, window_size=(3, 3)),
        tokens,
        {},
    ),
    "relpos attention": (
        lambda: vision_transformer_relpos.RelPosAttention(
            C,
            HEADS,
            qkv_bias=True,
            rel_pos_cls=partial(tl.RelPosBias, window_size=(3, 3), prefix_tokens=1),
        ),
        tokens,
        {},
    ),
    "block": (
        lambda: Block(C, HEADS, qkv_bias=True, qk_norm=True, init_values=0.1, drop_path=0.3),
        tokens,
        {},
    ),
    "eva block": (lambda: EVA_BLOCK(init_values=0.1, swiglu_mlp=True), tokens, rope()),
    "eva block rope": (
        lambda: EVA_BLOCK(attn_type="rope", scale_mlp=True, norm_layer=tl.LayerNorm),
        tokens,
        rope(),
    ),
    "beit block": (
        lambda: beit.Block(
            C, HEADS, qkv_bias=True, init_values=0.1, window_size=(3, 3), drop_path=0.3
        ),
        tokens,
        {},
    ),
    "relpos block": (
        lambda: vision_transformer_relpos.RelPosBlock(
            C,
            HEADS,
            init_values=0.1,
            drop_path=0.3,
            rel_pos_cls=partial(tl.RelPosMlp, window_size=(3, 3), prefix_tokens=1, hidden_dim=8),
        ),
        tokens,
        {},
    ),
    "swin attention": (
        lambda: swin_transformer.WindowAttention(C, HEADS, window_size=(4, 4)),
        lambda: (torch.randn(3, 16, C),),
        {},
    ),
    "swin block": (lambda: SWIN(C, num_heads=HEADS, **SHIFTED), lambda: rows(8, 12), {}),
    "swin block unfused": (
        lambda: unfused(SWIN(C, num_heads=HEADS, **SHIFTED)),
        lambda: rows(8, 12),
        {},
    ),
    "swin block of any size": (
        lambda: SWIN(C, num_heads=HEADS, dynamic_mask=True, **SHIFTED),
        lambda: rows(9, 7),
        {},
    ),
    "swin merging": (lambda: swin_transformer.PatchMerging(C), lambda: rows(6, 4), {}),
    "swin v2 attention": (
        lambda: swin_transformer_v2.WindowAttention(C, (4, 4), HEADS),
        lambda: (torch.randn(3, 16, C),),
        {},
    ),
    "swin v2 block": (lambda: SWIN_V2(C, num_heads=HEADS, **SHIFTED), lambda: rows(8, 12), {}),
    "swin v2 block of any size": (
        lambda: SWIN_V2(C, num_heads=HEADS, dynamic_mask=True, **SHIFTED),
        lambda: rows(9, 7),
        {},
    ),
    "swin v2 merging": (lambda: swin_transformer_v2.PatchMerging(C), lambda: rows(6, 4), {}),
    "swin cr attention": (
        lambda: swin_transformer_v2_cr.WindowMultiHeadAttention(C, HEADS, (4, 4)),
        lambda: (torch.randn(3, 16, C),),
        {},
    ),
    "swin cr block": (
        lambda: SWIN_CR(shift_size=(2, 2), drop_path=0.3, extra_norm=True),
        lambda: rows(8, 12),
        {},
    ),
    "swin cr merging": (lambda: swin_transformer_v2_cr.PatchMerging(C), lambda: rows(6, 4), {}),
    "davit attention": (
        lambda: davit.WindowAttention(C, (4, 4), HEADS),
        lambda: (torch.randn(3, 16, C),),
        {},
    ),
    "davit block": (
        lambda: davit.SpatialBlock(C, HEADS, window_size=4, drop_path=0.3),
        lambda: planes(9, 8),
        {},
    ),
    "davit attention unfused": (
        lambda: unfused(davit.WindowAttention(C, (4, 4), HEADS)),
        lambda: (torch.randn(3, 16, C),),
        {},
    ),
    "maxvit attention unfused": (
        lambda: unfused(attention_cl()),
        lambda: (torch.randn(3, 4, 3, C),),
        {},
    ),
    "hiera attention unfused": (
        lambda: unfused(hiera.MaskUnitAttention(C, C, HEADS, 1, 4, True)),
        lambda: tokens(16),
        {},
    ),
    "maxvit attention": (attention_cl, lambda: (torch.randn(3, 4, 3, C),), {}),
    "maxvit block": (lambda: partition("block", "bias", init_values=0.1), lambda: rows(8, 6), {}),
    "maxvit grid": (lambda: partition("grid", "bias_tf", head_first=False), lambda: rows(8, 6), {}),
    "maxvit mlp": (lambda: partition("block", "mlp"), lambda: rows(8, 6), {}),
    "maxvit convnext": (maxvit_convnext, lambda: planes(5, 6), {}),
    "hiera attention": (
        lambda: hiera.MaskUnitAttention(C, C, HEADS, window_size=4, use_mask_unit_attn=True),
        lambda: tokens(16),
        {},
    ),
    "hiera block": (
        lambda: hiera.HieraBlock(
            C, C, HEADS, window_size=4, use_mask_unit_attn=True, init_values=0.1, drop_path=0.3
        ),
        lambda: tokens(16),
        {},
    ),
    "convnext": (
        lambda: convnext.ConvNeXtBlock(C, drop_path=0.3, ls_init_value=0.1),
        lambda: planes(5, 6),
        {},
    ),
    "convnext conv": (
        lambda: convnext.ConvNeXtBlock(C, conv_mlp=True, norm_layer=tl.LayerNorm2d),
        lambda: planes(5, 6),
        {},
    ),
    "convnext v2": (
        lambda: convnext.ConvNeXtBlock(C, use_grn=True, ls_init_value=None),
        lambda: planes(5, 6),
        {},
    ),
    "edgenext": (lambda: edgenext.ConvBlock(C, drop_path=0.3), lambda: planes(5, 6), {}),
    "rdnet": (
        lambda: rdnet.Block(C, 32, 16, norm_layer=tl.LayerNorm2d, act_layer=nn.GELU),
        lambda: planes(5, 6),
        {},
    ),
    "rdnet ese": (
        lambda: rdnet.BlockESE(C, 32, 16, norm_layer=tl.LayerNorm2d, act_layer=nn.GELU),
        lambda: planes(5, 6),
        {},
    ),
    "inception next": (
        lambda: inception_next.MetaNeXtBlock(C, drop_path=0.3),
        lambda: planes(5, 6),
        {},
    ),
    "metaformer attention": (
        lambda: metaformer.Attention(C, head_dim=12, bias=True, proj_bias=True),
        tokens,
        {},
    ),
    "metaformer attends": (lambda: metaformer.MetaFormerBlock(C, **ATTENDS), tokens, {}),
    "metaformer convolves": (
        lambda: metaformer.MetaFormerBlock(C, layer_scale_init_value=0.1, **CONVOLVES),
        lambda: planes(5, 6),
        {},
    ),
    "metaformer pools": (
        lambda: metaformer.MetaFormerBlock(C, norm_layer=tl.GroupNorm1),
        lambda: planes(5, 6),
        {},
    ),
    "metaformer downsampling": (
        lambda: metaformer.Downsampling(
            C, 32, 3, stride=2, padding=1, norm_layer=metaformer.LayerNorm2dNoBias
        ),
        lambda: planes(7, 6),
        {},
    ),
    "metaformer norm": (lambda: metaformer.LayerNormNoBias(C), tokens, {}),
    "metaformer norm 2d": (lambda: metaformer.LayerNorm2dNoBias(C), lambda: planes(5, 4), {}),
    "std conv": (lambda: tl.StdConv2d(C, 16, 3, padding=1), lambda: planes(5, 6), {}),
    "std conv same": (lambda: tl.StdConv2dSame(C, 16, 3, stride=2), lambda: planes(5, 6), {}),
    "group norm act": (lambda: group_norm(C), lambda: planes(5, 6), {}),
    "group norm 1 act": (lambda: tl.GroupNorm1Act(C), lambda: planes(5, 6), {}),
    "bottleneck": (
        lambda: resnetv2.Bottleneck(
            C, 32, proj_layer=resnetv2.DownsampleConv, drop_path_rate=0.3, **pre_norm
        ),
        lambda: planes(5, 6),
        {},
    ),
    "pre-act bottleneck": (
        lambda: resnetv2.PreActBottleneck(C, C, drop_path_rate=0.3, **pre_norm),
        lambda: planes(5, 6),
        {},
    ),
    "hybrid embed": (
        lambda: tl.HybridEmbed(
            nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU()), img_size=16, embed_dim=C
        ),
        lambda: (torch.randn(2, 3, 16, 16),),
        {},
    ),
    "folded stem": (
        lambda: tl.HybridEmbed(folded_stem(), img_size=(32, 32), embed_dim=C),
        lambda: (torch.randn(2, 3, 32, 32),),
        {},
    ),
}


def unfused(module: nn.Module) -> nn.Module:
    """A module whose attention computes in timm's plain steps."""
    for part in module.modules():
        if hasattr(part, "fused_attn"):
            part.fused_attn = False
    return module


def folded_stem() -> nn.Module:
    return timm_resnet(
        block=resnet.Bottleneck, layers=(1, 1), channels=(8, 12), stem_width=8, stem_type="deep",
        avg_down=True, features_only=True, out_indices=(-1,),
    )  # fmt: skip


def timm_resnet(**options: Any) -> nn.Module:
    from timm.models import build_model_with_cfg

    return build_model_with_cfg(resnet.ResNet, "test_sweep", False, **options)


@functools.cache
def own_methods(kind: type) -> frozenset[str]:
    """Names of the functions that a module class adds to nn.Module's."""
    bases = kind.__mro__[: kind.__mro__.index(nn.Module)]
    return frozenset(
        name
        for base in bases
        for name, value in vars(base).items()
        if callable(value) and not name.startswith("__") and not isinstance(value, type)
    ) - {"forward", "extra_repr"}


@contextlib.contextmanager
def recording(root: nn.Module, seen: set[tuple[str, str]]) -> Iterator[None]:
    """What is asked of the modules in `root`, as (path, name); "()" where a module is called."""
    kinds = {path: type(module) for path, module in root.named_modules()}

    def spy(path: str, kind: type) -> type:
        def getattribute(self: nn.Module, name: str) -> Any:
            state = object.__getattribute__(self, "__dict__")
            held = (state, state["_parameters"], state["_buffers"], state["_modules"])
            if any(name in names for names in held) or name in own_methods(kind):
                seen.add((path, name))
            return kind.__getattribute__(self, name)

        def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            seen.add((path, "()"))
            return kind.__call__(self, *args, **kwargs)

        return type(kind.__name__, (kind,), {"__getattribute__": getattribute, "__call__": call})

    for path, module in root.named_modules():
        module.__class__ = spy(path, kinds[path])
    try:
        yield
    finally:
        for path, module in root.named_modules():
            module.__class__ = kinds[path]


Change = Callable[[nn.Module], None]
WORDS = {"none": "tanh", "tanh": "none", "zeros": "reflect", "first": "last"}


def other_value(value: Any) -> Any:
    """A value unlike this one that timm might take as well; None where there is none."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value * 1.5 + 0.05
    if isinstance(value, str):
        return WORDS.get(value)
    if isinstance(value, tuple) and value and all(type(v) is int for v in value):
        return tuple(v + 1 for v in value)
    return None


def scaled(result: Any) -> Any:
    return result * 1.5 if isinstance(result, torch.Tensor) else result


def noised(t: torch.Tensor) -> torch.Tensor:
    if t.dtype == torch.bool:
        return ~t
    if not t.is_floating_point():
        return t.flip(0)
    return t + torch.randn(t.shape, generator=torch.Generator().manual_seed(5)) * 0.3


def set_tensor(module: nn.Module, name: str, of: str) -> None:
    old = getattr(module, of)[name]
    new = noised(old.detach())
    getattr(module, of)[name] = nn.Parameter(new) if of == "_parameters" else new


@torch.no_grad()
def edit_tensor(module: nn.Module, name: str, of: str) -> None:
    old = getattr(module, of)[name]
    old.copy_(noised(old))


def without(module: nn.Module, name: str) -> None:
    module._parameters[name] = None


def replace_method(module: nn.Module, name: str) -> None:
    found = getattr(module, name)
    setattr(module, name, lambda *args, **kwargs: scaled(found(*args, **kwargs)))


def changes_of(module: nn.Module, name: str) -> Iterator[tuple[str, Change]]:
    """The changes to one thing that timm's forward asks of a module."""
    for of in ("_parameters", "_buffers"):
        held = getattr(module, of)
        if name in held and held[name] is not None:
            yield "other", partial(set_tensor, name=name, of=of)
            if held[name].is_floating_point():
                yield "edited", partial(edit_tensor, name=name, of=of)
            if of == "_parameters":
                yield "None", partial(without, name=name)
    state = module.__dict__
    if name in own_methods(type(module)):
        yield "method", partial(replace_method, name=name)
    elif name in state and not name.startswith("_"):
        if callable(state[name]):
            yield "function", partial(replace_method, name=name)
        other = other_value(state[name])
        if other is not None:
            yield f"= {other}", lambda m: setattr(m, name, other)


def look_alike(parent: nn.Module, name: str) -> None:
    child = parent._modules[name]
    kind = type(child)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return scaled(kind.forward(self, *args, **kwargs))

    twin = copy.copy(child)
    twin.__class__ = type(f"My{kind.__name__}", (kind,), {"forward": forward})
    parent._modules[name] = twin


def instance_forward(child: nn.Module) -> None:
    found = child.forward
    child.forward = lambda *args, **kwargs: scaled(found(*args, **kwargs))


HOOKS: dict[str, Change] = {
    "forward hook": lambda m: m.register_forward_hook(lambda _, args, out: scaled(out)),
    "pre-hook": lambda m: m.register_forward_pre_hook(lambda _, args: tuple(map(scaled, args))),
    "backward hook": lambda m: m.register_full_backward_hook(
        lambda _, inputs, outputs: tuple(g if g is None else g * 1.5 for g in inputs)
    ),
    "backward pre-hook": lambda m: m.register_full_backward_pre_hook(
        lambda _, outputs: tuple(g if g is None else g * 1.5 for g in outputs)
    ),
    "own forward": instance_forward,
}


def changes(root: nn.Module, seen: set[tuple[str, str]]) -> Iterator[tuple[str, Change]]:
    """Every single change to what was seen, with a name; each takes the root."""
    for path, name in sorted(seen):
        module = root.get_submodule(path)
        if name == "()":
            if not path:
                continue
            above, _, last = path.rpartition(".")
            for kind, hook in HOOKS.items():
                yield f"{kind} on {path}", lambda r, p=path, h=hook: h(r.get_submodule(p))
            yield (
                f"another {path}",
                lambda r, a=above, n=last: look_alike(r.get_submodule(a), n),
            )
            continue
        for kind, change in changes_of(module, name):
            where = f"{path}.{name}".lstrip(".")
            yield f"{where} {kind}", lambda r, p=path, c=change: c(r.get_submodule(p))


def outcome(
    module: nn.Module, args: tuple, kwargs: dict[str, Any], training: bool, grad: bool
) -> dict[str, torch.Tensor] | None:
    """Output and gradients by name; None where the call raises."""
    args = tuple(a.detach().requires_grad_(grad) for a in args)
    torch.default_generator.manual_seed(7)  # stochastic depth; torch.manual_seed takes longer
    try:
        with torch.set_grad_enabled(grad):
            out = module(*args, **kwargs)
            found = {"output": out}
            if grad:
                wanted = dict(module.named_parameters()) | {"input": args[0]}
                loss = (out * torch.linspace(-1, 2, out.numel()).view(out.shape)).sum()
                grads = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
                named = zip(wanted, grads, strict=True)
                found |= {f"gradient of {n}": g for n, g in named if g is not None}
    except Exception:
        return None
    return {n: t.detach() for n, t in found.items()}


def difference(got: dict[str, torch.Tensor] | None, want: dict[str, torch.Tensor] | None) -> str:
    """What is wrong with what the drop-in gave; "" if nothing."""
    if got is None or want is None:
        return "" if got is want else "raises" if got is None else "does not raise"
    if got.keys() != want.keys():
        return f"has {sorted(got.keys() ^ want.keys())} too much or too little"
    scale = max((t.abs().max().item() for t in want.values()), default=1.0)
    for name, t in want.items():
        if got[name].shape != t.shape or got[name].dtype != t.dtype:
            return f"{name}: {got[name].shape} {got[name].dtype}, not {t.shape} {t.dtype}"
        bar = 1e-4 * max(t.abs().max().item(), 1e-3 * scale) + 1e-6
        off = (got[name] - t).abs().max().item()
        if not off <= bar and not torch.equal(got[name].isnan(), t.isnan()):
            return f"{name}: NaN"
        if off > bar:
            return f"{name}: off by {off:.2g} of {t.abs().max().item():.2g}"
    return ""


def built(case: str, lively: Callable[[nn.Module], nn.Module]) -> tuple[nn.Module, tuple, dict]:
    torch.manual_seed(0)
    make, inputs, kwargs = CASES[case]
    module = lively(make())
    for name, buffer in module.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    return module, inputs(), kwargs


MODES = {"inference": (False, False), "training": (True, True)}


def refused() -> tuple[str, ...]:
    """How changes end that torch refuses in training and we need not: a ReLU in place; and, in
    torch 2.11, the backward of a group norm with a bias and no weight."""
    try:
        bias = torch.ones(2, requires_grad=True)
        F.group_norm(torch.ones(1, 2, 3), 2, None, bias).sum().backward()
    except RuntimeError:
        return "inplace = True", "weight None"
    return ("inplace = True",)


REFUSED = refused()


@pytest.mark.parametrize("case", CASES)
def test_every_change_is_honoured(lively, case):
    theirs, args, kwargs = built(case, lively)
    seen: set[tuple[str, str]] = set()
    spied = copy.deepcopy(theirs)
    with recording(spied, seen):
        for training, grad in MODES.values():
            assert outcome(spied.train(training), args, kwargs, training, grad) is not None
    before = {
        mode: outcome(theirs.train(training), args, kwargs, training, grad)
        for mode, (training, grad) in MODES.items()
    }
    wrong, told = [], 0
    for what, change in changes(theirs, seen):
        for mode, (training, grad) in MODES.items():
            changed, ours = (copy.deepcopy(theirs).train(training) for _ in range(2))
            swap(ours)
            for _ in range(1 if grad else 3):
                outcome(ours, args, kwargs, training, grad)
            changed.load_state_dict(ours.state_dict())  # statistics of batches
            change(changed)
            change(ours)
            want = outcome(changed, args, kwargs, training, grad)
            told += bool(difference(want, before[mode]))
            for call in range(1 if grad else 3):
                why = difference(outcome(ours, args, kwargs, training, grad), want)
                if why and not (what.endswith(REFUSED) and why == "does not raise"):
                    wrong.append(f"{what} ({mode}, call {call + 1}): {why}")
                    break
    assert told >= 3  # the changes do change something
    assert not wrong, "\n".join(wrong)


def test_every_drop_in_is_swept():
    swept = {type(m) for make, *_ in CASES.values() for m in make().modules()}
    assert {kind.__name__ for kind in layer_table()} <= {kind.__name__ for kind in swept}
    assert set(layer_table()) <= swept
