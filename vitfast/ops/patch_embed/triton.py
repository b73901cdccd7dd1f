"""patch_embed on the Triton kernel of triton_kernels.py.

The backward is made of two products of the vendor's and sums, on the gathered patches.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl

from vitfast.ops.patch_embed.reference import INPUTS, Call, normalise
from vitfast.ops.patch_embed.triton_kernels import forward_kernel
from vitfast.runtime import kernel_calls
from vitfast.runtime.kernel_calls import cdiv
from vitfast.runtime.launches import Arch, Launch, Variant, arch_of, launch_of
from vitfast.runtime.triton import NAMES, guard, precision

_TL = {
    torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16,
    torch.float64: tl.float64,
}  # fmt: skip


def launch_heuristic(arch: Arch, key: dict[str, Any]) -> Launch:
    """Tiles by dtype, which spill nothing but on sm_75 and, for bytes, gfx1100.

    See tests/gpu/resources.json. In float32 larger ones spilled eight bytes on sm_86 and sm_89. Of
    the tiles for which that is so these were chosen; none has been timed yet.
    """
    if arch.name == "interpreter":
        return Launch({"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 32}, 4, 1)
    if key["dtype"] == "float32":
        return Launch({"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32}, 4, 2)
    return Launch({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}, 4, 2)


def _launch(dtype: torch.dtype, arch: Arch, n: int, k: int) -> Launch:
    key: dict[str, int | str] = {"dtype": str(dtype).removeprefix("torch."), "n": n, "k": k}
    return launch_of("patch_embed.forward", arch, key, launch_heuristic)


def forward(call: Call) -> torch.Tensor:
    image, prefix, pos_embed, dtype = call.image, call.prefix, call.pos_embed, call.dtype
    batch, c, p0 = image.shape[0], call.weight.shape[0], call.prefix_tokens
    _, cin, p, q = call.weight.shape
    columns, n = call.grid[1], call.tokens - p0
    out = image.new_empty((batch, p0 + n, c), dtype=call.out_dtype)
    if not out.numel():
        return out
    head = None
    if pos_embed is not None:
        pos_embed = pos_embed if pos_embed.stride(2) == 1 else pos_embed.contiguous()
        if pos_embed.shape[1] == p0 + n:  # it covers the prefix, too
            head, pos_embed = pos_embed[:, :p0], pos_embed[:, p0:]
    if prefix is not None:
        expanded = prefix.expand(batch, -1, -1)
        out[:, :p0] = expanded if head is None else expanded + head
    if not n:
        return out
    tokens = out[:, p0:]
    flat = call.weight.reshape(c, cin * p * q)
    bias, mean, std = (t if t is None else t.contiguous() for t in (call.bias, call.mean, call.std))
    arch = arch_of(image.device)
    config = _launch(dtype, arch, c, flat.shape[1])
    rows = batch * n
    programs = cdiv(rows, config.blocks["BLOCK_M"]) * cdiv(c, config.blocks["BLOCK_N"])
    if image.dtype != torch.uint8 and mean is None and std is None and image.dtype != dtype:
        image = image.to(dtype)
    pos_b, pos_t = (0, 0) if pos_embed is None else pos_embed.stride()[:2]
    if pos_embed is not None and pos_embed.shape[0] == 1:
        pos_b = 0
    args = (
        image, flat, bias, pos_embed, mean, std, tokens, rows, c, n, columns, *image.stride(),
        flat.stride(0), *tokens.stride()[:2], pos_b, pos_t,
    )  # fmt: skip
    constants = {
        "DEPTH": cin * p * q, "P": p, "Q": q,
        "ACC": tl.float64 if dtype == torch.float64 else tl.float32, "DTYPE": _TL[dtype],
        "BYTES": image.dtype == torch.uint8, "PRECISION": precision(dtype, arch),
    }  # fmt: skip
    with guard(image):
        kernel_calls.launch(forward_kernel, programs, args, constants, config)
    return out


def backward(grad: torch.Tensor, call: Call, wanted: list[bool]) -> tuple[torch.Tensor, ...]:
    is_wanted = dict(zip(INPUTS, wanted, strict=True))
    found = {name: grad.new_empty(0) for name in INPUTS}
    weight, std = call.weight, call.std
    batch, cin = call.image.shape[:2]
    c, _, p, q = weight.shape
    h, w = call.grid
    p0 = grad.shape[1] - h * w
    wide = torch.promote_types(grad.dtype, torch.float32)
    if call.pos_embed is not None and is_wanted["pos_embed"]:
        covered = grad[:, grad.shape[1] - call.pos_embed.shape[1] :]
        found["pos_embed"] = _over_images(covered, call.pos_embed, wide)
    if call.prefix is not None and is_wanted["prefix"]:
        found["prefix"] = _over_images(grad[:, :p0], call.prefix, wide)
    dz = grad[:, p0:].reshape(batch * h * w, c)
    if call.bias is not None and is_wanted["bias"]:
        found["bias"] = dz.sum(0, dtype=wide).to(call.bias.dtype)
    dz = dz.to(call.dtype)
    if is_wanted["weight"]:
        ready = normalise(call.image, call.mean, std, call.dtype)
        patches = ready.reshape(batch, cin, h, p, w, q).permute(0, 2, 4, 1, 3, 5)
        patches = patches.reshape(batch * h * w, cin * p * q)
        found["weight"] = (dz.mT @ patches).view(weight.shape).to(weight.dtype)
    if is_wanted["image"]:
        dx = (dz @ weight.reshape(c, cin * p * q).to(call.dtype)).view(batch, h, w, cin, p, q)
        dx = dx.permute(0, 3, 1, 4, 2, 5).reshape(call.image.shape)
        if std is not None:
            dx = dx.to(wide) / std.to(wide).view(-1, 1, 1)
        found["image"] = dx.to(call.image.dtype).contiguous()
    return tuple(found.values())


def _over_images(grad: torch.Tensor, like: torch.Tensor, wide: torch.dtype) -> torch.Tensor:
    """The gradient of an embedding: summed over the images that share it, in the dtype `wide`."""
    if like.shape[0] == grad.shape[0]:
        return grad.to(like.dtype, copy=True).contiguous()
    return grad.sum(0, keepdim=True, dtype=wide).to(like.dtype)


def variants(arch: Arch) -> list[Variant]:
    """Patches of 16 and 14 in each dtype, from floats, and from bytes with mean and std.

    And in half precision with float32 weights, as autocast leaves them.
    """
    return [
        _variant(arch, patch, dtype, form)
        for patch in (14, 16)
        for dtype in (torch.float16, torch.bfloat16, torch.float32)
        for form in ("", "bytes", "autocast")
        if form != "autocast" or dtype != torch.float32
    ]


def _variant(arch: Arch, patch: int, dtype: torch.dtype, form: str) -> Variant:
    launch = _launch(dtype, arch, 768, 3 * patch * patch)
    constants: dict[str, Any] = {
        "DEPTH": 3 * patch * patch, "P": patch, "Q": patch, "ACC": tl.float32,
        "DTYPE": _TL[dtype], "BYTES": form == "bytes", "PRECISION": "ieee", "image_w": 1,
        **launch.blocks,
    }  # fmt: skip
    types = {name: f"*{NAMES[dtype]}" for name in ("image_ptr", "w_ptr", "bias_ptr", "pos_ptr")}
    types |= {"out_ptr": types["image_ptr"], "mean_ptr": "*fp32", "std_ptr": "*fp32"}
    if form == "bytes":
        types["image_ptr"] = "*u8"
    else:
        constants |= {"mean_ptr": None, "std_ptr": None}
    if form == "autocast":  # the position embedding is added outside of it, in float32
        types |= dict.fromkeys(("w_ptr", "bias_ptr", "pos_ptr", "out_ptr"), "*fp32")
    signature = {name: types.get(name, "i32") for name in forward_kernel.arg_names}
    name = f"forward-p{patch}-{NAMES[dtype]}{f'-{form}' if form else ''}"
    dots = dtype != torch.float32
    return Variant(name, forward_kernel, signature, constants, launch, dots=dots)
