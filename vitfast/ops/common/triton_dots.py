"""Products of tiles in Triton that add up over blocks."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl


@triton.jit
def add_dot(acc: tl.tensor, a: tl.tensor, b: tl.tensor, PRECISION: tl.constexpr) -> Any:
    """acc + a b, for tiles a [M, K], b [K, N] and acc [M, N].

    In full float32 a product is one chain of multiply-adds over K on the GPU. Were each begun from
    acc, the chain would go on over all blocks, and its error grow with their whole length: 3072
    terms miss the error criterion by 2 to 4 times. So each block has a sum of its own, which is
    added to acc. A limit for imprecise sums, of no other use in float32, is what keeps Triton from
    merging that addition into the product.
    """
    if a.dtype == tl.float32 and PRECISION == "ieee":
        found = tl.dot(
            a, b, out_dtype=acc.dtype, input_precision=PRECISION, max_num_imprecise_acc=a.shape[1]
        )
        return acc + found
    return tl.dot(a, b, acc=acc, out_dtype=acc.dtype, input_precision=PRECISION)
