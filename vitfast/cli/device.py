"""Where a command computes."""

from __future__ import annotations

from vitfast.errors import InputValueError


def chosen_device(asked: str | None) -> str:
    """What `--device` asked for; by default "cuda" where there is one, else "cpu".

    Raises:
        InputValueError: cuda was asked for, and torch sees none.
    """
    import torch

    if asked == "cuda" and not torch.cuda.is_available():
        raise InputValueError("--device cuda: torch sees no GPU here")
    return asked or ("cuda" if torch.cuda.is_available() else "cpu")
