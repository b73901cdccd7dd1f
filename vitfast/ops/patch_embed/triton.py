"""patch_embed on the Triton kernel of triton_kernels.py.

The backward is made of two products of the vendor's and sums, on the gathered patches.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from vitfast.ops.patch_embed.reference import normalise
from vitfast.ops.patch_embed.triton_kernels import forward_kernel
from vitfast.runtime.launches import Arch, Launch, Variant, arch_of, launch_of
from vitfast.runtime.triton import NAMES, guard, precision

_TL = {
    torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16,
    torch.float64: tl.float64,
}  # fmt: skip


def launch_heuristic(arch: Arch, key: dict[str, Any]) -> Launch:
    if arch.name == "interpreter":
        return Launch({"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 32}, 4, 1)
    if key["dtype"] == "float32":
        return Launch({"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 16}, 4, 2)
    return Launch({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}, 4, 2)


def _launch(dtype: torch.dtype, arch: Arch, n: int, k: int) -> Launch:
    key = {"dtype": str(dtype).removeprefix("torch."), "n": n, "k": k}
    return launch_of("patch_embed.forward", arch, key, launch_heuristic)


def forward(image, weight, bias, pos_embed, prefix, mean, std, dtype, out_dtype):
    batch, _, height, width = image.shape
    c, cin, p, q = weight.shape
    columns = width // q
    n = height // p * columns
    p0 = 0 if prefix is None else prefix.shape[1]
    out = image.new_empty((batch, p0 + n, c), dtype=out_dtype)
    if not out.numel():
        return out
    pos = None
    if pos_embed is not None:
        pos_embed = pos_embed if pos_embed.stride(2) == 1 else pos_embed.contiguous()
        whole = pos_embed.shape[1] == p0 + n
        pos = pos_embed[:, p0:] if whole else pos_embed
    if prefix is not None:
        head = prefix.expand(batch, -1, -1)
        out[:, :p0] = head + pos_embed[:, :p0] if pos is not None and whole else head
    if not n:
        return out
    tokens = out[:, p0:]
    flat = weight.reshape(c, cin * p * q)
    bias, mean, std = (t if t is None else t.contiguous() for t in (bias, mean, std))
    launch = _launch(dtype, arch_of(image.device), c, flat.shape[1])
    rows = batch * n
    grid = (triton.cdiv(rows, launch.blocks["BLOCK_M"]) * triton.cdiv(c, launch.blocks["BLOCK_N"]),)
    if image.dtype != torch.uint8 and mean is None and std is None and image.dtype != dtype:
        image = image.to(dtype)
    with guard(image):
        forward_kernel[grid](
            image, flat, bias, pos, mean, std, tokens, rows, c, n, columns, *image.stride(),
            flat.stride(0), *tokens.stride()[:2],
            0 if pos is None or pos.shape[0] == 1 else pos.stride(0),
            0 if pos is None else pos.stride(1),
            DEPTH=cin * p * q, P=p, Q=q, ACC=tl.float64 if dtype == torch.float64 else tl.float32,
            DTYPE=_TL[dtype], BYTES=image.dtype == torch.uint8, PRECISION=precision(dtype),
            **launch.blocks, **launch.options(),
        )  # fmt: skip
    return out


def backward(grad, image, weight, bias, pos_embed, prefix, mean, std, dtype, out_dtype, wanted):
    inputs = (image, weight, bias, pos_embed, prefix)
    found = [grad.new_empty(0) for _ in inputs]
    batch, cin, height, width = image.shape
    c, _, p, q = weight.shape
    h, w = height // p, width // q
    p0 = grad.shape[1] - h * w
    wide = torch.promote_types(grad.dtype, torch.float32)
    if wanted[3]:
        found[3] = _over_images(grad[:, grad.shape[1] - pos_embed.shape[1] :], pos_embed, wide)
    if wanted[4]:
        found[4] = _over_images(grad[:, :p0], prefix, wide)
    dz = grad[:, p0:].reshape(batch * h * w, c)
    if wanted[2]:
        found[2] = dz.sum(0, dtype=wide).to(bias.dtype)
    dz = dz.to(dtype)
    if wanted[1]:
        ready = normalise(image, mean, std, dtype)
        patches = ready.reshape(batch, cin, h, p, w, q).permute(0, 2, 4, 1, 3, 5)
        patches = patches.reshape(batch * h * w, cin * p * q)
        found[1] = (dz.mT @ patches).view(weight.shape).to(weight.dtype)
    if wanted[0]:
        dx = (dz @ weight.reshape(c, cin * p * q).to(dtype)).view(batch, h, w, cin, p, q)
        dx = dx.permute(0, 3, 1, 4, 2, 5).reshape(image.shape)
        if std is not None:
            dx = dx.to(wide) / std.to(wide).view(-1, 1, 1)
        found[0] = dx.to(image.dtype).contiguous()
    return tuple(found)


def _over_images(grad, like, wide):
    """The gradient of an embedding: summed over the images that share it."""
    if like.shape[0] == grad.shape[0]:
        return grad.to(like.dtype, copy=True).contiguous()
    return grad.sum(0, keepdim=True, dtype=wide).to(like.dtype)


def variants(arch: Arch) -> list[Variant]:
    """Patches of 16 and 14 in each dtype, from floats, and from bytes with mean and std."""
    found = []
    for patch in (14, 16):
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            for from_bytes in (False, True):
                launch = _launch(dtype, arch, 768, 3 * patch * patch)
                constants: dict[str, Any] = {
                    "DEPTH": 3 * patch * patch, "P": patch, "Q": patch, "ACC": tl.float32,
                    "DTYPE": _TL[dtype], "BYTES": from_bytes, "PRECISION": "ieee",
                    "image_w": 1, **launch.blocks,
                }  # fmt: skip
                if not from_bytes:
                    constants |= {"mean_ptr": None, "std_ptr": None}
                signature = {}
                for name in forward_kernel.arg_names:
                    if name in ("mean_ptr", "std_ptr"):
                        signature[name] = "*fp32"
                    elif name.endswith("_ptr"):
                        bytes_in = from_bytes and name == "image_ptr"
                        signature[name] = "*u8" if bytes_in else f"*{NAMES[dtype]}"
                    else:
                        signature[name] = "i32"
                name = f"forward-p{patch}-{NAMES[dtype]}{'-bytes' if from_bytes else ''}"
                found.append(
                    Variant(
                        name,
                        forward_kernel,
                        signature,
                        constants,
                        launch,
                        dots=dtype != torch.float32,
                    )  # fmt: skip
                )
    return found
