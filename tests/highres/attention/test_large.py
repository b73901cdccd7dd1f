"""Maps at thousands of tokens: right beside dense matrices, and small where there can be none."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import vitfast
from vitfast.highres import attention_map

SMALL = dict(embed_dim=96, num_heads=3)
MODELS = {
    "vit_tiny_patch16_224": {},
    "vit_small_patch16_dinov3": SMALL,
    "eva02_tiny_patch14_224": dict(SMALL, patch_size=16),
    "beit_base_patch16_224": dict(embed_dim=64, num_heads=2),
}


@pytest.mark.parametrize("name", MODELS)
def test_at_4097_tokens(name, zoo):
    model, image = zoo.make(name, (1024, 1024), **MODELS[name]), zoo.noise(1, (1024, 1024))
    queries = [0, 1, 2500, 4096]
    expected = zoo.dense(model, image, lambda attention: attention[:, :, queries].clone())
    assert expected[1].shape[-1] == 4096 + model.num_prefix_tokens
    vitfast.swap(model)
    for layer in (0, 1):
        found = attention_map(model, image, layer, queries, "each")
        torch.testing.assert_close(zoo.joined(found), expected[layer], rtol=0, atol=1e-5)


CODE = """
import timm, torch
from vitfast.highres import attention_map, attention_rollout
from vitfast.highres.attention import attention_maps

def status(name):
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(name)) / 1e3

def reached(*args):
    "The model has come to the attention: from here on, what is added is the map's."
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts anew
    before.append(status("VmRSS"))

def some(qk, index, pick, mean=attention_maps.averaged_row):
    return mean(qk, index[:600], pick)  # of 32,400, which take no more memory

before = []
attention_maps.averaged_row = some
torch.set_num_threads(2)
model = timm.create_model({name!r}, img_size=(2160, 3840), depth=1).eval()
model.blocks[0].register_forward_pre_hook(reached)
found = {call}
assert abs(float(found.patches.sum() + found.prefix.sum()) - 1) < 1e-3
assert found.patches.shape[-2:] == (135, 240)
print(status("VmHWM") - before[0])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "name, call, limit",
    [
        ("vit_tiny_patch16_224", "attention_map(model, image)", 60),
        *(
            pytest.param(*case, 200, marks=pytest.mark.slow)
            for case in (
                ("vit_base_patch16_224", "attention_map(model, image)"),
                ("vit_base_patch16_224", "attention_map(model, image, query='mean')"),
                ("vit_base_patch16_224", "attention_rollout(model, image)"),
                ("vit_small_patch16_dinov3", "attention_map(model, image)"),
            )
        ),
    ],
)
def test_memory_at_32400_patches(name, call, limit):
    call = call.replace("image", "torch.randn(1, 3, 2160, 3840)")
    code = CODE.format(name=name, call=call)
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    megabytes = float(out.stdout)
    print(f"{name}, {call}: {megabytes:.0f} MB")
    assert 0.1 < megabytes < limit
