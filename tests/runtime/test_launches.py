"""Launch configs as data: exact, nearest, heuristic; and what is picked by them."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from vitfast.runtime import launches, triton_backend, trust
from vitfast.runtime import triton as triton_runtime
from vitfast.runtime.dispatch import Backend, Dispatcher
from vitfast.runtime.launches import Arch, Launch, choice_of, launch_of
from vitfast.settings import cache_folder

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
                "kernels": {
                    "k": [entry(64, 16), entry(4096, 128), entry(4096, 64, "float32")],
                    "vendor": [{"key": {"n": 64}, "choice": "flash"}],
                    "linear_act.backend": [
                        {"key": {"n": 64}, "choice": "triton"},
                        {"key": {"n": 4096}, "choice": "reference"},
                    ],
                },
            }
        )
    )
    monkeypatch.setattr(launches, "LAUNCHES", tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    launches.reread_tables()
    yield Arch("sm_90")
    launches.reread_tables()


@pytest.mark.parametrize(
    ("key", "block"),
    [
        ({"n": 64, "dtype": "float16"}, 16),
        ({"n": 100, "dtype": "float16"}, 16),
        ({"n": 3000, "dtype": "float16"}, 128),
        ({"n": 8192, "dtype": "float16"}, 128),
        ({"n": 2048, "dtype": "float32"}, 64),
        ({"n": 64, "dtype": "bfloat16"}, 1),
        ({"n": 64}, 1),
    ],
)
def test_exact_then_nearest_then_heuristic(device, key, block):
    assert launch_of("k", device, key, lambda *_: HEURISTIC).blocks["BLOCK"] == block


@pytest.mark.parametrize("far", [{"n": 129}, {"n": 31}, {"n": 0}, {"flag": 1}])
def test_an_entry_never_serves_another_width_or_flag(device, tmp_path, far):
    """A block for head dim 64 may want more shared memory at 256 than there is."""
    near = {"n": 64, "m": 10, "flag": 0}
    known = {"key": near, "blocks": {"BLOCK": 16}, "num_warps": 4, "num_stages": 2}
    launches.write_table(device, {"w": [known]})
    for key in (near, near | {"n": 128}, near | {"n": 32}, near | {"m": 10**6}):
        assert launch_of("w", device, key, lambda *_: HEURISTIC).blocks["BLOCK"] == 16
    assert launch_of("w", device, near | far, lambda *_: HEURISTIC).blocks["BLOCK"] == 1


def test_without_a_table_the_heuristic_sees_the_problem(device):
    def heuristic(arch, key):
        return Launch({"BLOCK": key["n"] * arch.capability})

    assert launch_of("k", Arch("sm_80"), {"n": 2}, heuristic).blocks == {"BLOCK": 160}


def test_choices(device):
    assert choice_of("vendor", device, {"n": 70}) == "flash"
    assert choice_of("vendor", Arch("sm_80"), {"n": 70}) == ""


@pytest.mark.parametrize(
    ("name", "warp", "dot", "tf32"),
    [
        ("sm_70", 32, False, False), ("sm_75", 32, False, False), ("sm_80", 32, True, True),
        ("sm_90", 32, True, True), ("sm_120", 32, True, True), ("gfx90a", 64, True, False),
        ("gfx942", 64, True, True), ("gfx950", 64, True, False), ("gfx1030", 32, False, False),
        ("gfx1100", 32, True, False), ("interpreter", 32, True, True),
    ],
)  # fmt: skip
def test_architectures(name, warp, dot, tf32):
    arch = Arch(name)
    assert (arch.warp_size, arch.has_dot, arch.is_amd) == (warp, dot, name.startswith("gfx"))
    assert arch.shared_bytes >= 65_536
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for matmul.fp32_precision in ("tf32", "ieee"):
            wanted = "tf32" if tf32 and matmul.fp32_precision == "tf32" else "ieee"
            assert triton_runtime.precision(torch.float32, arch) == wanted
            assert triton_runtime.precision(torch.float16, arch) == "ieee"
    finally:
        matmul.fp32_precision = before


@pytest.mark.parametrize(
    ("op", "n", "why"),
    [
        ("layer_norm", 64, ""),
        ("rms_norm", 64, "not tested"),
        ("linear_act", 100, ""),
        ("linear_act", 3000, "fastest"),
        ("patch_embed", 64, "fastest"),
        ("attention", 64, "not tested"),
    ],
)
def test_only_what_is_known_to_be_good_is_picked_unasked(device, monkeypatch, op, n, why):
    """Right by a verdict; and where a vendor's kernel may be faster, measured to be the fastest."""
    right = ("layer_norm", "linear_act", "patch_embed")
    monkeypatch.setattr(triton_backend, "arch_of", lambda where: device)
    monkeypatch.setattr(trust, "doubt", lambda op, *_: "" if op in right else "not tested")
    measured = op in ("linear_act", "patch_embed", "attention")
    triton = triton_backend.lazy(
        f"vitfast.ops.{op}.triton", lambda x: [],
        key=(lambda x: {"n": x.numel()}) if measured else None,
    )  # fmt: skip
    dispatcher = Dispatcher(op, [triton, Backend("reference", lambda x: x, lambda x: [])])
    x = torch.zeros(n)
    assert dispatcher.pick("auto", x).name == ("reference" if why else "triton")
    assert dispatcher.pick("triton", x).name == "triton"
    assert not why or why in dispatcher.explain([x])


def _vendor(choice, n=64):
    return {"vendor": [{"key": {"n": n}, "choice": choice}]}


def test_measurements_are_kept_in_the_user_s_folder(device, tmp_path):
    """Not in the package, which may be another user's; its own table is where they begin."""
    packaged = {path: path.read_text() for path in tmp_path.iterdir()}
    new = Arch("sm_100")
    assert choice_of("vendor", new, {"n": 64}) == ""
    path = launches.write_table(new, _vendor("efficient"))
    assert path == tmp_path / "cache/vitfast/launches/sm_100.json"
    assert choice_of("vendor", new, {"n": 64}) == "efficient"
    assert choice_of("vendor", device, {"n": 70}) == "flash"
    launches.write_table(device, _vendor("cudnn"))
    assert choice_of("vendor", device, {"n": 70}) == "cudnn"
    assert launch_of("k", device, {"n": 64, "dtype": "float16"}, None).blocks["BLOCK"] == 16
    assert packaged == {path: path.read_text() for path in tmp_path.glob("*.json")}


@pytest.mark.parametrize("part", ["vitfast", "torch", "triton", "kernels"])
def test_measurements_of_other_versions_are_left_out(device, part, caplog):
    path = launches.write_table(device, _vendor("cudnn"))
    found = json.loads(path.read_text())
    assert list(found["made_with"]) == ["vitfast", "torch", "triton", "kernels"]
    found["made_with"][part] = "0"
    path.write_text(json.dumps(found))
    launches.reread_tables()
    assert choice_of("vendor", device, {"n": 64}) == "flash"
    assert f"another version of: {part};" in caplog.text
    launches.write_table(device, _vendor("cudnn"))
    assert choice_of("vendor", device, {"n": 64}) == "cudnn"


def test_the_sources_of_the_kernels_and_our_table_count(device, tmp_path, monkeypatch):
    (tmp_path / "ops/op").mkdir(parents=True)
    source = tmp_path / "ops/op/triton_kernels.py"
    monkeypatch.setattr(launches, "_KERNELS", tmp_path / "ops")
    for path in (source, tmp_path / "sm_90.json"):
        launches.write_table(device, _vendor("cudnn"))
        assert choice_of("vendor", device, {"n": 64}) == "cudnn"
        with path.open("a") as file:
            file.write(" ")
        launches.reread_tables()
        assert choice_of("vendor", device, {"n": 64}) == "flash"


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "7"])
def test_a_file_that_cannot_be_read_is_left_out(device, text, caplog):
    launches.path_of(device).write_text(text)
    assert choice_of("vendor", device, {"n": 64}) == "flash"
    assert "cannot be read" in caplog.text


def test_where_the_user_s_folder_is(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.delenv("LOCALAPPDATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache_folder() == tmp_path / "x/vitfast"
    for ignored in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        for platform, folder in (
            ("linux", ".cache"), ("darwin", "Library/Caches"), ("win32", "AppData/Local")
        ):  # fmt: skip
            monkeypatch.setattr(sys, "platform", platform)
            assert cache_folder() == tmp_path / folder / "vitfast"
