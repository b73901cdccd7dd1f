"""Which of SDPA's kernels torch may pick where a table or a user names one."""

from __future__ import annotations

import pytest
import torch

from vitfast.ops.attention import vendor


def enabled():
    """SDPA's kernels that torch may pick now."""
    now = {
        "cudnn": torch.backends.cuda.cudnn_sdp_enabled(),
        "flash": torch.backends.cuda.flash_sdp_enabled(),
        "efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
        "math": torch.backends.cuda.math_sdp_enabled(),
    }
    return {name for name, on in now.items() if on}


@pytest.mark.parametrize("name", vendor.KERNELS)
def test_a_kernel_from_a_table_may_be_replaced_one_that_is_forced_not(name):
    before = enabled()
    with vendor._choosing(name):
        assert enabled() == {name, "flash", "efficient", "math"}
    with vendor.forcing(name), vendor._choosing(name):
        assert enabled() == {name}
    assert enabled() == before


def test_masked_calls_never_reach_cudnn():
    with vendor._choosing("masked"):
        assert "cudnn" not in enabled() and {"efficient", "math"} <= enabled()
    with vendor.forcing("cudnn"), vendor._choosing("masked"):
        assert "cudnn" not in enabled()
