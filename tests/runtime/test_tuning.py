"""Launch configs as data: exact, nearest, heuristic; and what proves a kernel on a device."""

from __future__ import annotations

import json

import pytest
import torch

from vitfast.runtime import tuning
from vitfast.runtime.dispatch import Backend, Dispatcher
from vitfast.runtime.tuning import Arch, Launch, choice_of, has_run, launch_of

HEURISTIC = Launch({"BLOCK": 1}, 1, 1)


@pytest.fixture
def device(tmp_path, monkeypatch):
    """An architecture with a table."""

    def entry(n, block, dtype="float16"):
        return {"key": {"n": n, "dtype": dtype}, "blocks": {"BLOCK": block}, "num_warps": 4,
                "num_stages": 2}  # fmt: skip

    (tmp_path / "sm_90.json").write_text(
        json.dumps(
            {
                "verified": ["layer_norm"],
                "kernels": {
                    "k": [entry(64, 16), entry(4096, 128), entry(4096, 64, "float32")],
                    "vendor": [{"key": {"n": 64}, "choice": "flash"}],
                },
            }
        )
    )
    monkeypatch.setattr(tuning, "LAUNCHES", tmp_path)
    for cached in (tuning.table, tuning._launch_of, tuning._choice_of):
        cached.cache_clear()
    yield Arch("sm_90")
    for cached in (tuning.table, tuning._launch_of, tuning._choice_of):
        cached.cache_clear()


@pytest.mark.parametrize(
    ("key", "block"),
    [
        ({"n": 64, "dtype": "float16"}, 16),
        ({"n": 100, "dtype": "float16"}, 16),
        ({"n": 3000, "dtype": "float16"}, 128),
        ({"n": 10**6, "dtype": "float16"}, 128),
        ({"n": 1, "dtype": "float32"}, 64),
        ({"n": 64, "dtype": "bfloat16"}, 1),
        ({"n": 64}, 1),
    ],
)
def test_exact_then_nearest_then_heuristic(device, key, block):
    assert launch_of("k", device, key, lambda *_: HEURISTIC).blocks["BLOCK"] == block


def test_without_a_table_the_heuristic_sees_the_problem(device):
    def heuristic(arch, key):
        return Launch({"BLOCK": key["n"] * arch.capability})

    assert launch_of("k", Arch("sm_80"), {"n": 2}, heuristic).blocks == {"BLOCK": 160}


def test_choices(device):
    assert choice_of("vendor", device, {"n": 70}) == "flash"
    assert choice_of("vendor", Arch("sm_80"), {"n": 70}) == ""


@pytest.mark.parametrize(
    ("name", "warp", "dot"),
    [("sm_75", 32, False), ("sm_90", 32, True), ("gfx942", 64, True), ("gfx1100", 32, True)],
)
def test_architectures(name, warp, dot):
    arch = Arch(name)
    assert (arch.warp_size, arch.has_dot, arch.is_amd) == (warp, dot, name.startswith("gfx"))
    assert arch.shared_bytes >= 65_536


def test_only_what_a_record_shows_is_picked_unasked(device):
    """An unproven backend runs by name, and is named in the explanation."""
    proven = {"layer_norm": True, "attention": False}
    for op, expected in proven.items():
        assert has_run(op, device) is expected

        def unproven(x, op=op):
            return "" if has_run(op, device) else "no record"

        dispatcher = Dispatcher(
            op,
            [
                Backend("triton", lambda x: x, lambda x: [], unproven=unproven),
                Backend("reference", lambda x: x, lambda x: []),
            ],
        )
        picked = dispatcher.pick("auto", torch.zeros(1)).name
        assert picked == ("triton" if expected else "reference")
        assert dispatcher.pick("triton", torch.zeros(1)).name == "triton"
        assert ("no record" in dispatcher.explain([torch.zeros(1)])) is not expected
