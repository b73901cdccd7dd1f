"""What a ViT attends to in the demo's photograph, as a picture."""

from __future__ import annotations

import time
from typing import NamedTuple

from PIL import Image

from vitfast.bench import zoo
from vitfast.bench.peers import Setting
from vitfast.demo.photo import Photograph, enlarged
from vitfast.highres import attention_map
from vitfast.highres.attention.overlay import overlay
from vitfast.highres.pictures import picture_input
from vitfast.swap import swap

MODEL = "vit_small_patch14_dinov2"
SIZE = (532, 952)
"""Height and width in pixels: 38 x 68 patches of 14."""
ALPHA = 0.55


class Attention(NamedTuple):
    """A map laid over the photograph.

    Args:
        how: in words, what the photograph is and how it came to its size.
        seconds: for the model's own forward and the map.
        rows, columns: patches.
        top: share of the attention to patches that the tenth of them with the most gets.
        pretrained: whether the weights are trained.
    """

    model: str
    size: tuple[int, int]
    how: str
    picture: Image.Image
    seconds: float
    rows: int
    columns: int
    top: float
    pretrained: bool

    def sentence(self) -> str:
        """What is seen, and whether it means anything."""
        text = (
            f"The class token's attention in the last layer of {self.model}, mean of its heads, at "
            f"{self.size[1]} x {self.size[0]} pixels: {self.rows} x {self.columns} patches in "
            f"{self.seconds:.2f} s, without a matrix of all tokens by all tokens; the tenth of the "
            f"patches with the most attention gets {100 * self.top:.0f} % of it."
        )
        if not self.pretrained:
            text += (
                " The weights are random: this shows that the map can be had, not what a trained "
                "model looks at (--pretrained does)."
            )
        return text


def run(
    photo: Photograph, name: str, size: tuple[int, int], setting: Setting, pretrained: bool
) -> Attention:
    """Compute one map.

    Args:
        name: of a timm model whose attention `vitfast.highres.attention_map` knows.
        size: (height, width) that the photograph is cropped and resized to.

    Raises:
        InputValueError: the model cannot be had, or cannot take this size.
        UnsupportedInputError: an attention that is not known.
    """
    image, how = enlarged(photo, *size)
    model = zoo.build(name, size, device=setting.device, pretrained=pretrained)
    swap(model)
    pixels = picture_input(model, image, None)
    start = time.perf_counter()
    with setting.autocast():
        found = attention_map(model, pixels)
    patches = found.patches[0, 0, 0].float().cpu()
    seconds = time.perf_counter() - start
    from matplotlib import colormaps

    most = patches.flatten().sort(descending=True).values
    top = float(most[: max(1, len(most) // 10)].sum() / most.sum())
    picture = overlay(image, found, colormaps["viridis"], ALPHA)
    rows, columns = patches.shape
    return Attention(name, size, how, picture, seconds, rows, columns, top, pretrained)
