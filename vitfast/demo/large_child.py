"""One way through a large photograph, in a process of its own: its time, memory and features.

The process prints one line of JSON, and leaves the features in a file.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np
import torch

from vitfast.bench import memory, peers, zoo
from vitfast.highres import tiled
from vitfast.loading import weights_sha256
from vitfast.swap import swap

WAYS = ("timm", "vitfast", "tiles")
"""One shot by timm's own layers, one shot by a swapped model, and tiles by a swapped model."""
MOST_CALLS = 5
"""Of a way, where they are short."""


def main() -> int:
    """What the child runs; its argument is that of `measure`, as JSON."""
    print(json.dumps(measure(json.loads(sys.argv[1]))))
    return 0


def measure(arguments: dict[str, Any]) -> dict[str, Any]:
    """Time and memory of one way, with the weights, the photograph and the result.

    Args:
        arguments: way (of `WAYS`), model, pixels (the path of an .npy file of uint8 [H, W, 3]),
            tile, overlap, dtype, device, threads, pretrained, budget (calls are repeated until they
            took so many seconds), out (where the features go, float32 [C, h, w], as .npy).

    Returns:
        seconds of each call; peak_mb, beyond what the process took before it had a model and a
        photograph, None where this system cannot tell; weights, their SHA-256.

    Raises:
        InputValueError: the model cannot be had, or cannot take this size.
    """
    torch.set_num_threads(arguments["threads"])
    way, device = arguments["way"], arguments["device"]
    setting = peers.Setting(getattr(torch, arguments["dtype"]), device)
    memory.reset_peak(device)
    before = memory.in_use_mb(device)
    pixels = np.load(arguments["pixels"])
    height, width = pixels.shape[:2]
    sides = arguments["tile"] if way == "tiles" else (height, width)
    # One tile that covers the photograph is one shot: the same pixels, normalised in one place.
    model = zoo.build(
        arguments["model"],
        (sides, sides) if isinstance(sides, int) else sides,
        device=device,
        pretrained=arguments["pretrained"],
    )
    if way != "timm":
        swap(model)
    fresh = memory.reset_peak(device)
    seconds: list[float] = []
    features = None
    while len(seconds) < MOST_CALLS and sum(seconds) < arguments["budget"]:
        features = None  # or two would be in memory
        start = time.perf_counter()
        with torch.inference_mode(), setting.autocast():
            features = tiled(model, pixels, sides, arguments["overlap"], batch=1, output="features")
        seconds.append(time.perf_counter() - start)
    peak = memory.peak_mb(device) if fresh else None
    assert features is not None  # there is a call at least
    np.save(arguments["out"], features.float().numpy())
    return {
        "seconds": seconds,
        "peak_mb": None if peak is None or before is None else peak - before,
        "weights": weights_sha256(model),
    }
