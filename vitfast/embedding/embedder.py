"""Embedder: images in, vectors out, decoding overlapped with computing."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from timm.data import create_transform
from torch import nn

from vitfast.embedding.building import built, data_config, device_of, name_of, pooled, source_of
from vitfast.embedding.images import said
from vitfast.embedding.provenance import FORMAT, difference, versions
from vitfast.embedding.shards import Written, write
from vitfast.errors import InputTypeError, InputValueError, first_line
from vitfast.loading import weights_sha256
from vitfast.pictures import decode
from vitfast.swap import swap as swap_layers

DTYPES = ("float16", "float32")
POOLS = (None, "token", "avg")
MAX_WORKERS = 8
"""More threads than this rarely decode faster: they share Python's lock between images."""

Pool = str | Callable[[torch.Tensor], torch.Tensor] | None


class Embedded(NamedTuple):
    """What became of one image: a vector [D], or the reason why there is none."""

    id: str
    vector: np.ndarray | None
    error: str | None


class Embedder:
    """Turns images into vectors with a timm model whose layers run vitfast's kernels.

        embedder = vitfast.Embedder("vit_small_patch14_dinov2", pretrained=True)
        vectors = embedder.embed(["a.jpg", "b.png"])         # float16 [2, 384], of unit length
        embedder.write({"a": "a.jpg", "b": "b.png"}, "out")   # sharded Parquet, resumable

    Images are anything that `vitfast.pictures.decode` takes: paths, bytes, PIL images, and arrays
    [H, W(, 3 or 4)]. They are preprocessed as timm does for the model. A vector depends on what
    else is in its batch by rounding only.

    Args:
        model: a timm model name, or a model that was made by timm. The latter is put into eval
            mode, moved if a device is given, and swapped, all in place.
        pool: None for what the model's own head reads; "token" for the class token and "avg" for
            the mean over patches (positions, in a convolutional model), both of
            `forward_features`; or a function of the features that returns [B, D].
        dtype: "float16" or "float32", of the vectors; the model computes in its own.
        normalize: whether vectors get unit length.
        batch_size: images a forward.
        workers: threads that decode; by default one for each core, eight at most.
        device: by default CUDA where there is one, or where the given model lies.
        pretrained: load timm's trained weights, from the network or the cache. For a name.
        checkpoint: load weights from this file, see `vitfast.loading.load_backbone`. For a name.
        seed: of the random weights of a name given without trained ones.
        model_kwargs: for `timm.create_model`, such as {"img_size": 448}. For a name. An `img_size`
            is also the size that images are brought to.
        swap: False leaves timm's own layers.
        transform: from a PIL image to a tensor [C, H, W], in place of timm's preprocessing.

    Raises:
        InputValueError: an unknown model, weights that cannot be had or do not fit, an argument
            out of range, or a model that gives no vector for an image of its size.
        InputTypeError: the model is neither a name nor a module.
    """

    def __init__(
        self,
        model: str | nn.Module,
        *,
        pool: Pool = None,
        dtype: str = "float16",
        normalize: bool = True,
        batch_size: int = 32,
        workers: int | None = None,
        device: str | torch.device | None = None,
        pretrained: bool = False,
        checkpoint: str | os.PathLike[str] | None = None,
        seed: int = 0,
        model_kwargs: Mapping[str, Any] | None = None,
        swap: bool = True,
        transform: Callable[[Any], torch.Tensor] | None = None,
    ) -> None:
        if dtype not in DTYPES:
            raise InputValueError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
        if not (pool in POOLS or callable(pool)):
            raise InputValueError(f"pool {pool!r}: expected None, 'token', 'avg' or a function")
        if workers is None:
            workers = min(len(_cores()), MAX_WORKERS)
        if batch_size < 1 or workers < 1:
            raise InputValueError(
                f"batch_size {batch_size}, workers {workers}: expected at least 1 of each"
            )
        self.pool, self.dtype, self.normalize = pool, dtype, normalize
        self.batch_size, self.workers = batch_size, workers
        kwargs = dict(model_kwargs or {})
        if isinstance(model, str):
            self.source = source_of(pretrained, checkpoint, seed)
            self.model = built(model, self.source, kwargs)
            device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        elif isinstance(model, nn.Module):
            if pretrained or checkpoint or kwargs:
                raise InputValueError(
                    "pretrained, checkpoint and model_kwargs go with a model's name: this model "
                    "has its weights"
                )
            self.source, self.model = {"from": "module"}, model
        else:
            raise InputTypeError(f"expected a model's name or a module, got {type(model).__name__}")
        self.name = model if isinstance(model, str) else name_of(model)
        self.model_kwargs = kwargs
        if device is not None:
            self.model.to(device_of(device))
        self.model.eval()
        self.swapped = swap_layers(self.model) if swap else None
        self._config = data_config(self.model, kwargs)
        self.channels = int(self._config["input_size"][0])
        if self.channels not in (1, 3):
            raise InputValueError(f"{self.name} takes {self.channels} channels: expected 1 or 3")
        self._given = transform
        self.transform = transform or create_transform(**self._config)

    @classmethod
    def like(cls, metadata: Mapping[str, Any], **options: Any) -> Embedder:
        """The embedder that vectors came from, made anew from the facts kept beside them.

        Args:
            metadata: `Embedder.metadata` or `Archive.metadata`.
            options: replace what was recorded, such as checkpoint, device or batch_size.

        Raises:
            InputValueError: it was made of a module, a function or a transform, which no file
                records; or the weights, or anything else that must agree, came out another.
        """
        source = dict(metadata.get("source", {}))
        if options.get("checkpoint"):
            source = {"from": "checkpoint"}
        custom = metadata.get("preprocessing", {}).get("transform")
        pool = metadata["pool"]
        if source.get("from") == "module" or custom or pool not in POOLS:
            what = "a module" if source.get("from") == "module" else "a function"
            raise InputValueError(
                f"the vectors are of {what} that was made in Python: build that Embedder again and "
                "search with vitfast.embedding.Archive"
            )
        recorded = {
            "pretrained": source.get("from") == "pretrained",
            "checkpoint": source.get("checkpoint"),
            "seed": source.get("seed", 0),
            "model_kwargs": metadata["model_kwargs"],
            "pool": pool,
            "dtype": metadata["dtype"],
            "normalize": metadata["normalized"],
        }
        made = cls(metadata["model"], **{**recorded, **options})
        why = difference(metadata, made.metadata)
        if why:
            raise InputValueError(f"the model cannot be made again as it was: {why}")
        return made

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self._like().device

    @cached_property
    def dim(self) -> int:
        """D, the length of a vector, found by embedding one grey image.

        Raises:
            InputValueError: the model gives no vector for it; the message says what it gives.
        """
        try:
            shape = self._config["input_size"]
            grey = np.full((*shape[1:], 3), 128, np.uint8)
            x = self.transform(decode(grey, self.channels))
            return int(self._compute([x]).shape[1])
        except InputValueError:
            raise
        except (RuntimeError, ValueError, AssertionError, TypeError, AttributeError) as error:
            raise InputValueError(f"{self.name} embeds no image: {first_line(error)}") from error

    @property
    def metadata(self) -> dict[str, Any]:
        """The facts that are kept beside vectors, as JSON has them.

        model, model_kwargs, source (of the weights), weights_sha256, preprocessing, pool, dtype,
        normalized, dim, swapped, versions (with vitfast's commit), format. The weights are hashed
        at each call.
        """
        preprocessing = dict(self._config)
        if self._given is not None:
            preprocessing = {
                "input_size": self._config["input_size"],
                "transform": repr(self._given),
            }
        pool = self.pool
        facts = {
            "format": FORMAT,
            "model": self.name,
            "model_kwargs": self.model_kwargs,
            "source": self.source,
            "weights_sha256": weights_sha256(self.model),
            "preprocessing": preprocessing,
            "pool": pool if pool in POOLS else getattr(pool, "__qualname__", repr(pool)),
            "dtype": self.dtype,
            "normalized": self.normalize,
            "dim": self.dim,
            "swapped": self.swapped is not None,
            "versions": versions(),
        }
        return json.loads(json.dumps(facts, default=repr))

    def embed(self, images: Sequence[Any]) -> np.ndarray:
        """The vectors of some images, [N, D] of `dtype`, in their order.

        Raises:
            InputValueError, InputTypeError: for the first image that has no vector, with the
                reason. `stream` goes on instead.
        """
        if isinstance(images, (str, bytes, os.PathLike)):
            raise InputTypeError(f"expected a list of images, got {type(images).__name__}")
        images = list(images)
        rows = []
        for one in self.stream((str(i), image) for i, image in enumerate(images)):
            if one.vector is None:
                place = int(one.id)
                raise InputValueError(f"{said(images[place], place)}: {one.error}")
            rows.append(one.vector)
        return np.stack(rows) if rows else np.empty((0, self.dim), self.dtype)

    def stream(self, items: Iterable[tuple[str, Any]]) -> Generator[Embedded, None, None]:
        """Embed (id, image) pairs as they come; yields an Embedded for each, in their order.

        Threads decode the next two batches while one is computed; no more of `items` is taken than
        that. An image that cannot be embedded yields its reason, and nothing is raised for it.

        Raises:
            InputValueError: a transform gives tensors of several shapes, or the model something
                else than a vector for an image.
        """
        source = iter(items)
        ahead: deque[tuple[str, Future[torch.Tensor]]] = deque()
        most = 2 * self.batch_size + self.workers
        threads = ThreadPoolExecutor(self.workers, thread_name_prefix="vitfast-decode")
        try:
            ended = False
            batch: list[tuple[str, torch.Tensor | str]] = []
            good = 0
            while True:
                while not ended and len(ahead) < most:
                    item = next(source, None)
                    if item is None:
                        ended = True
                    else:
                        ahead.append((item[0], threads.submit(self._prepared, item[1])))
                if ahead:
                    one, future = ahead.popleft()
                    try:
                        batch.append((one, future.result()))
                        good += 1
                    except Exception as error:  # whatever it was, the other images go on
                        batch.append((one, _reason(error)))
                # Broken ones leave the batch full, but a run of them is told before it ends.
                if good == self.batch_size or len(batch) >= most or (ended and not ahead):
                    yield from self._embedded(batch)
                    batch, good = [], 0
                    if ended and not ahead:
                        return
        finally:
            threads.shutdown(wait=True, cancel_futures=True)

    def write(
        self,
        items: Mapping[str, Any] | Iterable[tuple[str, Any]],
        out: str | os.PathLike[str],
        *,
        shard_rows: int = 8192,
        place: tuple[int, int] | None = None,
        progress: Callable[[int, int, int], None] | None = None,
    ) -> Written:
        """Embed images into a folder of Parquet files; ids that are there already are left out.

        A shard `part-00000.parquet` has the columns id (string) and vector (fixed_size_list of
        halffloat or float, D), and `metadata` as JSON under the key "vitfast" of its schema. It
        appears whole or not at all: a run that was killed goes on after its last whole shard, and
        no id is written twice. Images that cannot be embedded are listed in `errors.jsonl` and are
        tried again by the next run. What is known of an image is its id: a file that changed since
        is not embedded anew.

        Under torchrun, or with `place`, process `rank` of `world` takes every world-th item from
        its rank on; shards and lists of errors then have the rank in their names. The processes
        need no connection, only the same items in the same order and the same folder.

        Args:
            items: id -> image, or pairs of them in an order that does not change; ids are unique.
            out: the folder, made if missing.
            shard_rows: vectors a file, which is what a killed run may have to compute again.
            place: (rank, world); as torchrun says by default, (0, 1) outside it.
            progress: called after each image with the numbers of those embedded, of those broken
                and of those that were there before.

        Returns:
            Written.

        Raises:
            InputValueError: an id is there twice, the folder holds vectors of another kind, or
                another process is writing there.
            BackendUnavailableError: pyarrow is missing.
        """
        return write(self, items, out, shard_rows, place, progress)

    def _like(self) -> torch.Tensor:
        """A tensor as the model's are; of a model without any, one on the CPU."""
        tensors = (*self.model.parameters(), *self.model.buffers())
        return next((t for t in tensors if t.is_floating_point()), torch.empty(0, device="cpu"))

    def _prepared(self, image: Any) -> torch.Tensor:
        """What a thread does: [C, H, W] of one image."""
        x = self.transform(decode(image, self.channels))
        if not torch.is_tensor(x) or x.ndim != 3:
            raise InputTypeError("the transform gave no tensor [C, H, W]")
        return x

    def _embedded(self, batch: list[tuple[str, torch.Tensor | str]]) -> Iterator[Embedded]:
        tensors = [x for _, x in batch if not isinstance(x, str)]
        rows = iter(self._finished(self._compute(tensors)) if tensors else ())
        for one, x in batch:
            if isinstance(x, str):
                yield Embedded(one, None, x)
            else:
                vector, error = next(rows)
                yield Embedded(one, vector, error)

    @torch.inference_mode()
    def _compute(self, tensors: list[torch.Tensor]) -> np.ndarray:
        """float32 [B, D], neither normalised nor rounded."""
        like = self._like()
        shapes = {tuple(t.shape) for t in tensors}
        if len(shapes) > 1:
            raise InputValueError(f"the transform gave several shapes: {sorted(shapes)}")
        x = torch.stack(tensors).to(like.device, like.dtype, non_blocking=True)
        model: Any = self.model
        if self.pool is not None:
            out = pooled(model, model.forward_features(x), self.pool)
        elif getattr(model, "num_classes", None) == 0 or not hasattr(model, "forward_head"):
            out = model(x)
        else:
            out = model.forward_head(model.forward_features(x), pre_logits=True)
        if not torch.is_tensor(out) or out.ndim != 2 or out.shape[0] != len(tensors):
            got = f"of shape {list(out.shape)}" if torch.is_tensor(out) else type(out).__name__
            raise InputValueError(
                f"{self.name} gave {got} for {len(tensors)} images: expected [B, D]; choose a pool"
            )
        return out.float().cpu().numpy()

    def _finished(self, rows: np.ndarray) -> Iterator[tuple[np.ndarray | None, str | None]]:
        """(vector, error), one of them None, for each row."""
        for row in rows:
            if not np.isfinite(row).all():
                yield None, "its vector has values that are not finite"
                continue
            if self.normalize:
                length = float(np.linalg.norm(row.astype(np.float64)))
                if length == 0.0:
                    yield None, "its vector is zero and has no direction"
                    continue
                row = row / np.float32(length)
            elif self.dtype == "float16" and np.abs(row).max() > np.finfo(np.float16).max:
                yield None, "its vector is beyond float16: use dtype float32"
                continue
            yield row.astype(self.dtype), None


def _cores() -> Sequence[int] | set[int]:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return range(os.cpu_count() or 1)


def _reason(error: Exception) -> str:
    text = first_line(error)
    return text if isinstance(error, (InputValueError, InputTypeError)) else f"broken: {text}"
