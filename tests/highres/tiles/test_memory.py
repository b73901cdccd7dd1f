"""An image of 16,384 x 16,384 pixels stays far below what its pixels as floats would take."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

RUN = """
import resource, sys
import numpy as np
import vitfast

model = vitfast.create_model("test_vit", dynamic_img_size=True).eval()
image = np.load(sys.argv[1], mmap_mode="r") if sys.argv[1].endswith(".npy") else sys.argv[1]
out = vitfast.highres.tiled(
    model, image, tile=int(sys.argv[3]), output="features", out=sys.argv[2] or None
)
assert tuple(out.shape) == (64, 1024, 1024) and np.isfinite(np.asarray(out[:, ::64])).all()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["memmap to file", "tiff to tensor"])
def test_a_large_image_takes_less_than_3_gb(tmp_path, kind, record_property):
    side, noise = 16384, np.random.default_rng(0).integers(0, 256, (512, 16384, 3), dtype=np.uint8)
    if kind == "memmap to file":
        source, out = tmp_path / "x.npy", str(tmp_path / "out.npy")
        pixels = np.lib.format.open_memmap(str(source), "w+", np.uint8, (side, side, 3))
        for top in range(0, side, len(noise)):
            pixels[top : top + len(noise)] = noise
        pixels.flush()
    else:
        tifffile = pytest.importorskip("tifffile")
        source, out = tmp_path / "x.tif", ""
        tiles = (noise[:, x : x + 512] for _ in range(0, side, 512) for x in range(0, side, 512))
        options = dict(shape=(side, side, 3), dtype=np.uint8, tile=(512, 512), photometric="rgb")
        tifffile.imwrite(source, tiles, **options)
    command = [sys.executable, "-c", RUN, str(source), out, "512"]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout)
    record_property("peak_bytes", peak)
    print(f"{kind}: {peak / 1e9:.2f} GB")
    assert peak < 3e9
