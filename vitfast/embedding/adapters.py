"""Embedder inside Daft and Ray Data, for archives that outgrow one machine.

Scheduling, retries and storage are theirs. Neither is imported before it is used.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vitfast.embedding.embedder import Embedder


def daft_embedder(model: Any, *, gpus: float = 0, **options: Any) -> Any:
    """A Daft function from a column of images to a column of structs {vector, error}.

        import daft
        from vitfast.embedding import daft_embedder

        embed = daft_embedder("vit_small_patch14_dinov2", pretrained=True)
        files = daft.from_glob_path("s3://bucket/**/*.jpg")
        found = files.select("path", embed(files["path"].download()).alias("embedded"))
        found.write_parquet("out")

    Each worker makes one Embedder and keeps it; the program is the same on one machine and on a
    Ray cluster (`daft.set_runner_ray()`). `vector` is a list of float32, equal to what
    `Embedder.stream` gives rounded to `dtype`; it is null where `error` says why. An image is a
    path that the worker can read, the bytes of a file, or an array in a Python column.

    Args:
        model: as of Embedder; a module is pickled to each worker.
        gpus: that each worker takes, and on which it computes.
        options: as of Embedder.
    """
    import daft

    many = options.get("batch_size", 32) * 8  # several forwards, so that decoding overlaps them
    vector = daft.DataType.list(daft.DataType.float32())
    result = daft.DataType.struct({"vector": vector, "error": daft.DataType.string()})

    @daft.cls(gpus=gpus)
    class Embed:
        def __init__(self) -> None:
            self.embedder = Embedder(model, **options)

        @daft.method.batch(return_dtype=result, batch_size=many)
        def embed(self, images: daft.Series) -> list[dict[str, Any]]:
            rows = zip(*_embedded(self.embedder, images.to_pylist()), strict=True)
            return [{"vector": vector, "error": error} for vector, error in rows]

    return Embed().embed


class RayEmbedder:
    """A class for `ray.data.Dataset.map_batches`, with a batch_format of "pyarrow".

        import ray
        from vitfast.embedding import RayEmbedder

        files = ray.data.read_binary_files("s3://bucket/images", include_paths=True)
        found = files.map_batches(
            RayEmbedder, fn_constructor_args=("vit_small_patch14_dinov2",),
            fn_constructor_kwargs={"pretrained": True}, batch_format="pyarrow", batch_size=256,
            compute=ray.data.ActorPoolStrategy(size=2),
        )
        found.write_parquet("out")

    It adds the columns `vector`, a list of float32 equal to what `Embedder.stream` gives rounded to
    `dtype`, and `error`, of which one is null; the column of images is left out. Resuming is Ray's
    (`ray.data.checkpoint.CheckpointConfig`).

    Args:
        model: as of Embedder.
        column: of the images: bytes of files, or paths that the worker can read.
        options: as of Embedder.
    """

    def __init__(self, model: Any, *, column: str = "bytes", **options: Any) -> None:
        self.column, self.embedder = column, Embedder(model, **options)

    def __call__(self, table: Any) -> Any:
        """A pyarrow Table with the columns added."""
        import pyarrow as pa

        vectors, errors = _embedded(self.embedder, table[self.column].to_pylist())
        table = table.drop_columns([self.column])
        table = table.append_column("vector", pa.array(vectors, pa.list_(pa.float32())))
        return table.append_column("error", pa.array(errors, pa.string()))


def _embedded(
    embedder: Embedder, images: Iterable[Any]
) -> tuple[list[list[float] | None], list[str | None]]:
    """A vector or None, and None or the reason, for each image."""
    found = list(embedder.stream((str(i), image) for i, image in enumerate(images)))
    vectors = [None if one.vector is None else one.vector.tolist() for one in found]
    return vectors, [one.error for one in found]
