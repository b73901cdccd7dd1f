"""Timm models by name, trained weights, checkpoint files, and whether weights are the same."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import is_model
from torch import nn

from vitfast.errors import InputValueError, first_line


def check_name(name: str) -> None:
    """Raises InputValueError, with the nearest names, for a model that timm does not have."""
    if is_model(name):
        return
    near = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=3, cutoff=0.6)
    hint = f"; did you mean {', '.join(near)}?" if near else "; see timm.list_models()"
    raise InputValueError(f"timm has no model {name!r}{hint}")


def create(name: str, pretrained: bool, kwargs: Mapping[str, Any]) -> nn.Module:
    """timm's `create_model`; `img_size` is left out for a model that takes no such argument, as
    ResNet, which takes images of any size."""
    try:
        return timm.create_model(name, pretrained=pretrained, **kwargs)
    except TypeError as error:
        if "img_size" not in kwargs or "img_size" not in str(error):
            raise
        rest = {key: value for key, value in kwargs.items() if key != "img_size"}
        return timm.create_model(name, pretrained=pretrained, **rest)


def stay_offline_without_network() -> None:
    """Where the hub is out of reach, use its cache only: its own retries take a minute a file."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # requests or httpx, by the hub's version; either way there is no way out
        constants.HF_HUB_OFFLINE = True


def no_weights(name: str, error: BaseException) -> str:
    """What to say where the pretrained weights of a model could not be had."""
    return (
        f"the pretrained weights of {name} cannot be fetched (no network?): "
        f"{type(error).__name__}: {first_line(error)}"
    )


def load_backbone(model: nn.Module, path: str | Path) -> None:
    """Load a checkpoint file into a timm model that was made without its classifier.

    The file holds a state dict (.pth, .safetensors), as a model's own, as timm's training script
    saves it (of its EMA weights where it kept some), or as the weights' authors publish it, where
    timm has a filter for those; or it is an .npz that the model itself can read. Nothing in the
    file is executed. The classifier's weights are left out; all others have to be there and fit.

    Raises:
        InputValueError: no such file, one that cannot be read, or weights of another model.
    """
    path = Path(path)
    if not path.is_file():
        raise InputValueError(
            f"checkpoint {path}: {'a folder' if path.is_dir() else 'no such file'}"
        )
    try:
        if path.suffix.lower() in (".npz", ".npy"):
            timm.models.load_checkpoint(model, str(path))
            return
        state = timm.models.load_state_dict(str(path))
        if not isinstance(state, dict) or not any(torch.is_tensor(v) for v in state.values()):
            raise ValueError("no state dict of tensors")
    except Exception as error:  # pickle, zipfile and safetensors each have errors of their own
        raise InputValueError(f"checkpoint {path} cannot be read: {first_line(error)}") from error
    why = _loaded(model, state)
    publisher = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if why and publisher is not None:
        # It may be a filter for other files than this: what was wrong before then still is.
        with contextlib.suppress(Exception):
            why = _loaded(model, publisher(state, model)) and why
    if why:
        raise InputValueError(f"checkpoint {path} does not fit the model: {why}")


def _loaded(model: nn.Module, state: dict[str, torch.Tensor]) -> str:
    """Load the state but for a classifier; or say why not, and change nothing."""
    heads = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    own = model.state_dict()
    state = {
        k: v
        for k, v in state.items()
        if k in own or not k.startswith(tuple(f"{h}." for h in heads))
    }
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or unknown:
        what = [f"it lacks {name}" for name in missing[:1]] + [f"it has {n}" for n in unknown[:1]]
        return f"{' and '.join(what)} ({len(missing)} missing, {len(unknown)} unknown)"
    for name, value in own.items():
        if value.shape != state[name].shape:
            return f"{name} has shape {list(state[name].shape)}, the model's {list(value.shape)}"
    model.load_state_dict(state)
    return ""


def weights_sha256(model: nn.Module) -> str:
    """The SHA-256 of a state dict: names, dtypes, shapes and bytes, in the order of the names.

    Swapping, the device and the file that weights came in do not change it.
    """
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if torch.is_tensor(value):
            digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
            flat = value.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data)
        else:  # what a module keeps through get_extra_state
            digest.update(f"{name} {value!r}\n".encode())
    return digest.hexdigest()
