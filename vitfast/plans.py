"""What the modules of timm hold, as records of tensors and options, without logic.

A function of `layers/reading` makes such a plan of a module; `blocks` and `engine` compute by it.
They know no timm, and this file knows no kernel.

Of plans of blocks, `drops` tells whether the call drops paths (stochastic depth), and `memo`, where
there is one, is the handle of what `engine.memo` keeps for the block; None in a plan made anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn


class Unfit(Exception):
    """This call has to run timm's forward; the message says why."""

    def __str__(self) -> str:  # torch.compile of torch 2.11 knows no method written in C here
        return self.args[0]


class Unsupported(Unfit):
    """As Unfit, by an option that the module was built with: no call of it can run fused."""


class Called(NamedTuple):
    """In a plan's place for something that is called as timm calls it instead of read; why.

    module: what to call. None in the plan of a block, which outlives its call and must not keep a
    child alive that may hold the block itself.
    """

    why: str
    module: Any = None


class Computed(NamedTuple):
    """In a tensor's place: what timm's forward computes in each call from a module's tensors."""

    function: Callable[..., torch.Tensor]
    tensors: tuple[torch.Tensor, ...]

    def value(self) -> torch.Tensor:
        return self.function(*self.tensors)


class Linear(NamedTuple):
    """weight [out, in] ([out, in, 1, 1] of a convolution) and bias [out].

    Of a packed qkv the bias may be `Computed`; see `Attention.computed`.
    """

    weight: torch.Tensor
    bias: Any  # a tensor, Computed or None


class Norm(NamedTuple):
    """kind "layer" or "rms"; weight and bias [C] or None; width: C."""

    kind: str
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    eps: float
    width: int

    def check_width(self, width: int) -> None:
        """That it norms vectors of this width, which without a weight nothing else would tell."""
        if self.width != width:
            raise Unfit(f"a norm over {self.width} channels of {width}")


class Grn(NamedTuple):
    """The weight and bias [C] of a global response norm."""

    weight: torch.Tensor
    bias: torch.Tensor
    eps: float


class GroupNorm(NamedTuple):
    """groups; weight and bias [C] or None; act "none" or "relu"."""

    groups: int
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    eps: float
    act: str


class DropRate(NamedTuple):
    """An active stochastic depth."""

    keep: float
    scale_by_keep: bool


class Attention(NamedTuple):
    """What an attention module holds.

    qkv: one packed projection [3 A, C], or three [A, C]; they and proj may be `Called` where there
    are no windows. q_norm, k_norm: norms over the head dim.
    prefix, rope_half: how a rotary embedding is applied. norm: over A, before proj. kv_groups: how
    many heads of q share one of k and v (grouped-query attention). head_first: whether a packed
    projection is [heads, 3, D, C] rather than [3, heads, D, C]. table, logit_scale: as
    `ops.window_attention` takes them.
    """

    heads: int
    qkv: tuple[Any, ...]  # of Linear or Called, as proj
    proj: Any
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    norm: Norm | None = None
    prefix: int = 0
    rope_half: bool = False
    kv_groups: int = 1
    head_first: bool = False
    table: torch.Tensor | None = None
    logit_scale: torch.Tensor | None = None

    def computed(self) -> Attention:
        """With tensors in place of all that is `Computed`."""
        bias = getattr(self.qkv[0], "bias", None)  # it may be Called
        if not isinstance(bias, Computed):
            return self
        return self._replace(qkv=(self.qkv[0]._replace(bias=bias.value()),))

    def padding(self, windows: Windows) -> torch.Tensor | None:
        """q, k and v of a zero token, [3, heads, D], where the map does not end with a window."""
        bias = self.qkv[0].bias
        if bias is None or not windows.padded:
            return None
        return split_packed(bias.view(1, -1), self)[0]


class Windows(NamedTuple):
    """That tokens are the rows of a map, and see only those of their window.

    size: rows and columns of the map; window, shift, grid: as `ops.window_attention` takes them.
    """

    size: tuple[int, int]
    window: tuple[int, int]
    shift: tuple[int, int] = (0, 0)
    grid: bool = False

    @property
    def padded(self) -> bool:
        return any(s % w for s, w in zip(self.size, self.window, strict=True))


class Sequences(NamedTuple):
    """That rows are the tokens of several sequences, as `ops.varlen_attention` takes them. offsets:
    cu_seqlens as numbers; longest: tokens of the longest sequence."""

    cu_seqlens: torch.Tensor
    offsets: tuple[int, ...]
    longest: int


class Mlp(NamedTuple):
    """What an MLP module holds: fc2(norm(h)), with h one of

    act(fc1(x)); gate None
    act(gate(x)) * fc1(x); two projections (SwiGLU)
    act(first half) * second half of fc1(x), or the halves the other way round (GluMlp)

    fc1, gate, fc2: Linear, or Called where the module's own forward asked.
    """

    fc1: Any
    act: str
    fc2: Any
    norm: Norm | None
    gate: Any = None
    packed: str | None = None  # which half of a packed fc1 goes through act: "first" or "last"
    grn: Grn | None = None  # instead of the norm
    act_module: nn.Module | None = None  # where a projection before it is called


class TransformerBlock(NamedTuple):
    """What a block of ViT, EVA, BEiT, RelPos, Hiera or Swin holds.

    gamma: LayerScale [C] or None; None where the norms come last.

    A half that cannot be read is called as timm would call it: `attn` or `mlp` says why, and the
    rest of the half is None.
    """

    norm1: Norm
    attn: Any  # Attention or Called
    gamma1: torch.Tensor | None
    drop1: DropRate | None
    norm2: Norm
    mlp: Any  # Mlp or Called
    gamma2: torch.Tensor | None
    drop2: DropRate | None
    norms_last: bool = False
    memo: Any = None

    @property
    def drops(self) -> bool:
        return self.drop1 is not None or self.drop2 is not None

    @property
    def attn_is_called(self) -> bool:
        return type(self.attn) is Called


class Projection(NamedTuple):
    """weight [C, Cin, P, P'] and bias [C] of a convolution without overlap."""

    weight: torch.Tensor
    bias: torch.Tensor | None


class HybridStem(NamedTuple):
    """A backbone's map to tokens: by this projection, or None for the map as it is."""

    projection: Projection | None


class Patches(NamedTuple):
    """A convolution of disjoint patches and a norm over channels."""

    projection: Projection
    norm: Norm
    norm_first: bool
    memo: Any = None


class PatchMerging(NamedTuple):
    """Swin's downsampling: reduction(norm(patches)), or the norm last."""

    reduction: Linear
    norm: Norm
    norm_last: bool
    memo: Any = None


class ConvNeXtBlock(NamedTuple):
    """What a block of ConvNeXt, EdgeNeXt, RDNet or MaxxViT holds.

    conv: weight [C, 1, k, k'] and bias [C]. gamma: [C] or None.

    norm: a function of [B, H, W, C] where vitfast has no such norm. conv: `Called` where it or the
    norm cannot be read, and both are called as timm would call them. mlp: the same of mlp, gamma
    and drop.
    """

    conv: Any  # Linear or Called
    norm: Norm | Callable[[torch.Tensor], torch.Tensor] | None
    mlp: Any  # Mlp or Called
    gamma: torch.Tensor | None
    drop: DropRate | None
    memo: Any = None

    @property
    def drops(self) -> bool:
        return self.drop is not None


class MlpResidual(NamedTuple):
    """The end of InceptionNeXt's block, x + drop_path(gamma * mlp(y)). gamma: [C] or None."""

    mlp: Mlp
    gamma: torch.Tensor | None
    drop: DropRate | None
    memo: Any = None

    @property
    def drops(self) -> bool:
        return self.drop is not None


class StarReLU(NamedTuple):
    """StarReLU after its ReLU: scale * a^2 + bias, [1] each."""

    scale: torch.Tensor
    bias: torch.Tensor


class SepConv(NamedTuple):
    """fc2(conv(act(fc1))). conv: weight [M, 1, k, k'] and bias [M]."""

    fc1: Linear
    act: str
    star: StarReLU | None
    conv: Linear
    fc2: Linear


class Pooling(NamedTuple):
    """module: of a map [B, C, H, W], without parameters; its result has its input's dtype."""

    module: Callable[[torch.Tensor], torch.Tensor]


class MetaFormerHalf(NamedTuple):
    """What a branch has around it. gamma, scale: [C] or None; factors of the branch and of x."""

    norm: Norm | GroupNorm
    gamma: torch.Tensor | None
    scale: torch.Tensor | None


class MetaFormerBlock(NamedTuple):
    """What a block of PoolFormer, ConvFormer or CAFormer holds. star: of the MLP's activation."""

    first: MetaFormerHalf
    mixer: SepConv | Pooling | Attention
    second: MetaFormerHalf
    mlp: Mlp
    star: StarReLU | None
    drop: DropRate | None
    memo: Any = None

    @property
    def drops(self) -> bool:
        return self.drop is not None


class BatchNorm(NamedTuple):
    """(y - mean) / sqrt(var + eps) * weight + bias, each [O] or for these two None."""

    weight: torch.Tensor | None
    bias: torch.Tensor | None
    mean: torch.Tensor
    var: torch.Tensor
    eps: float


class Conv(NamedTuple):
    """weight [O, C / groups, H, W] and bias [O] of a convolution of maps, and its options.

    eps: of the weight's standardisation; None without one. same: padding as TensorFlow has it, by
    the size of the input, besides `padding`. norm and act: what comes after it ("none", "relu" or
    "gelu"); a weight is not both standardised and normed.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    eps: float | None
    same: bool
    norm: BatchNorm | None = None
    act: str = "none"


Pads = tuple[int, int, int, int]
"""Left, right, top, bottom, as `torch.nn.functional.pad` takes them."""


ConvNorm = tuple[Conv, GroupNorm]
"""A weight-standardised convolution and the norm with activation beside it."""


class Bottleneck(NamedTuple):
    """What timm's `resnetv2.Bottleneck` holds.

    steps: three convolutions, each with the norm after it, the last without activation. shortcut:
    of a DownsampleConv. downsample: the module in the shortcut, of any kind, or None.
    """

    steps: tuple[ConvNorm, ConvNorm, ConvNorm]
    shortcut: ConvNorm | None
    downsample: nn.Module | None
    drop_path: DropRate | None
    memo: Any = None

    @property
    def drops(self) -> bool:
        return self.drop_path is not None


class PreActBottleneck(NamedTuple):
    """What timm's `resnetv2.PreActBottleneck` holds: three norms, each before its convolution."""

    steps: tuple[ConvNorm, ConvNorm, ConvNorm]
    downsample: nn.Module | None
    drop_path: DropRate | None


class BatchNormBottleneck(NamedTuple):
    """What timm's `resnet.Bottleneck` holds.

    convs: three convolutions, each with the BatchNorm after it. before, shortcut: the modules that
    the shortcut runs through before its own convolution.
    """

    convs: tuple[Conv, Conv, Conv]
    before: tuple[nn.Module, ...]
    shortcut: Conv | None


StemStep = Conv | BatchNormBottleneck | nn.Module
"""A step of a convolutional stem: read, or a module to call."""


def tensors_in(values: tuple) -> Iterator[torch.Tensor]:
    """Those among some values, and in the tuples among them, such as plans."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from tensors_in(value)


def split_heads(projected: list[torch.Tensor], plan: Attention) -> list[torch.Tensor]:
    """The packed [..., 3 A] as [..., 3, H, D]; or q, k and v [..., A] each as [..., H, D]."""
    if len(projected) == 1:
        return [split_packed(projected[0], plan)]
    dim = projected[0].shape[-1] // plan.heads
    split = [t.unflatten(-1, (t.shape[-1] // dim, dim)) for t in projected]
    if plan.kv_groups > 1:
        split[1:] = [t.repeat_interleave(plan.kv_groups, -2) for t in split[1:]]
    return split


def split_packed(projected: torch.Tensor, plan: Attention) -> torch.Tensor:
    """A packed [..., 3 A] as [..., 3, H, D]."""
    dim = projected.shape[-1] // (3 * plan.heads)
    if plan.head_first:
        return projected.unflatten(-1, (plan.heads, 3, dim)).transpose(-3, -2)
    return projected.unflatten(-1, (3, plan.heads, dim))


def prologue(plan: Attention, rope: torch.Tensor | None) -> dict[str, Any]:
    """The arguments of `ops.attention` for q/k norm and rotary embedding."""
    given: dict[str, Any] = {}
    if plan.q_norm is not None and plan.k_norm is not None:
        given |= dict(
            qk_norm=plan.q_norm.kind,
            q_norm_weight=plan.q_norm.weight,
            q_norm_bias=plan.q_norm.bias,
            k_norm_weight=plan.k_norm.weight,
            k_norm_bias=plan.k_norm.bias,
            qk_norm_eps=plan.q_norm.eps,
        )
    if rope is not None:
        given |= dict(rope=rope, rope_prefix=plan.prefix, rope_half=plan.rope_half)
    return given
