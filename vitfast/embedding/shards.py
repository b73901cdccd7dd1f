"""Vectors in a folder of Parquet files, each of which appears whole or not at all."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from vitfast.embedding.images import check_id, check_ids
from vitfast.embedding.provenance import difference
from vitfast.errors import BackendUnavailableError, InputValueError, first_line
from vitfast.runtime.files import sync, whole_file
from vitfast.settings import torchrun

KEY = b"vitfast"
"""Of the schema's metadata, which holds the facts about the vectors as JSON."""


class Source(Protocol):
    """What vectors come from: an Embedder."""

    @property
    def metadata(self) -> dict[str, Any]: ...

    def stream(
        self, items: Iterable[tuple[str, Any]]
    ) -> Generator[tuple[str, np.ndarray | None, str | None], None, None]: ...


@dataclass
class Written:
    """What a run of `Embedder.write` did.

    Attributes:
        embedded: vectors that it wrote.
        present: ids that were there before.
        errors: id -> why the image could not be embedded.
        seconds: all of it took.
    """

    embedded: int = 0
    present: int = 0
    errors: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


def parquet() -> Any:
    """pyarrow.parquet.

    Raises:
        BackendUnavailableError: it is not installed.
    """
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise BackendUnavailableError(
            'Parquet files need pyarrow: pip install "vitfast[embed]"'
        ) from error
    return pyarrow.parquet


def shard_paths(folder: str | os.PathLike[str]) -> list[Path]:
    """The whole shards of a folder, by name."""
    return sorted(Path(folder).glob("part-*.parquet"))


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A shard as a pyarrow ParquetFile.

    Raises:
        InputValueError: it is not what `Embedder.write` writes.
    """
    import pyarrow

    try:
        with parquet().ParquetFile(path, memory_map=True) as file:
            yield file
    except (pyarrow.ArrowException, OSError, KeyError) as error:
        raise InputValueError(f"{path} is no shard of vectors: {first_line(error)}") from error


def metadata_of(path: Path) -> dict[str, Any]:
    """The facts that a shard keeps about its vectors.

    Raises:
        InputValueError: it has none.
    """
    with opened(path) as file:
        kept = (file.schema_arrow.metadata or {}).get(KEY)
    if kept is None:
        raise InputValueError(
            f"{path} was not written by vitfast: its schema has no metadata of it"
        )
    return json.loads(kept)


def write(
    embedder: Source,
    items: Mapping[str, Any] | Iterable[tuple[str, Any]],
    out: str | os.PathLike[str],
    shard_rows: int,
    place: tuple[int, int] | None,
    progress: Callable[[int, int, int], None] | None,
) -> Written:
    """What `Embedder.write` does."""
    started = time.monotonic()
    rank, world = torchrun()[:2] if place is None else place
    if not 0 <= rank < world or shard_rows < 1:
        raise InputValueError(
            f"rank {rank} of {world}, {shard_rows} rows a shard: expected a rank below the number "
            "of ranks, and at least one row"
        )
    if isinstance(items, Mapping):
        items = list(items.items())
    if isinstance(items, (list, tuple)):
        check_ids([one for one, _ in items])  # before the long work; of a stream, as they come
    parquet()
    folder, done = Path(out), Written()
    metadata = embedder.metadata
    with _locked(folder, alone=world == 1):
        name = "" if world == 1 else f"r{rank:03d}-"
        shards = _Shards(folder, name, metadata, shard_rows)
        present = shards.present(metadata)

        def pending() -> Iterator[tuple[str, Any]]:
            seen: set[str] = set()
            for i, (one, image) in enumerate(items):
                check_id(one, seen)
                if i % world != rank:
                    continue
                if one in present:
                    done.present += 1
                else:
                    yield one, image

        stream = embedder.stream(pending())
        try:
            for one, vector, error in stream:
                if vector is None:
                    done.errors[one] = error or ""
                else:
                    shards.add(one, vector)
                    done.embedded += 1
                if progress is not None:
                    progress(done.embedded, len(done.errors), done.present)
        except KeyboardInterrupt:
            shards.flush()  # milliseconds, and nothing has to be computed again
            raise
        finally:
            stream.close()
        shards.flush()
        _write_errors(folder, name, rank, world, done.errors)
    done.seconds = time.monotonic() - started
    return done


class _Shards:
    """Gathers rows, and writes them a shard at a time.

    name: what shards and errors of this process have in their names; "" for the only one.
    """

    def __init__(self, folder: Path, name: str, metadata: dict[str, Any], rows: int) -> None:
        import pyarrow as pa

        self.folder, self.name, self.rows = folder, name, rows
        number = pa.float16() if metadata["dtype"] == "float16" else pa.float32()
        self.dim = metadata["dim"]
        # That no number is missing makes reading one and a half times as fast.
        vector = pa.list_(pa.field("element", number, nullable=False), self.dim)
        self.schema = pa.schema(
            [
                pa.field("id", pa.string(), nullable=False),
                pa.field("vector", vector, nullable=False),
            ],
            metadata={KEY: json.dumps(metadata).encode()},
        )
        self.ids: list[str] = []
        self.vectors: list[np.ndarray] = []
        for kind in ("part", "errors"):  # of a run that was killed; other ranks may be alive
            for left in folder.glob(f".{kind}-{name}*.tmp" if name else f".{kind}*.tmp"):
                left.unlink(missing_ok=True)
        # A number in order, not a free one: of two processes that both believe to be this rank, one
        # finds its next number taken, and nothing is written twice.
        own = folder.glob(f"part-{name}{'[0-9]' * 5}*.parquet")
        self.next = 1 + max((int(path.stem.rpartition("-")[2]) for path in own), default=-1)

    def present(self, metadata: dict[str, Any]) -> set[str]:
        """The ids in the shards of all processes.

        Raises:
            InputValueError: a shard holds vectors of another kind, or an id is there twice.
        """
        found: set[str] = set()
        for path in shard_paths(self.folder):
            why = difference(metadata_of(path), metadata)
            if why:
                raise InputValueError(f"{self.folder} holds vectors of another kind: {why}")
            with opened(path) as file:
                ids = file.read(columns=["id"])["id"].to_pylist()
            before = len(found)
            found.update(ids)
            if len(found) != before + len(ids):
                raise InputValueError(f"{path} holds an id twice, or one that is in another shard")
        return found

    def add(self, one: str, vector: np.ndarray) -> None:
        self.ids.append(one)
        self.vectors.append(vector)
        if len(self.ids) == self.rows:
            self.flush()

    def flush(self) -> None:
        """Write what there is as a shard, if there is anything."""
        if not self.ids:
            return
        import pyarrow as pa

        flat = pa.array(np.concatenate(self.vectors))
        vectors = pa.FixedSizeListArray.from_arrays(flat, type=self.schema.field("vector").type)
        table = pa.Table.from_arrays([pa.array(self.ids, pa.string()), vectors], schema=self.schema)
        target = self.folder / f"part-{self.name}{self.next:05d}.parquet"
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            # Floats neither compress nor repeat, and nobody asks for the least of them.
            parquet().write_table(
                table,
                temporary,
                compression="none",
                use_dictionary=False,
                write_statistics=["id"],
            )
            _publish(temporary, target)
        except FileExistsError as error:
            raise InputValueError(
                f"{target} is there already: another process writes here"
            ) from error
        finally:
            temporary.unlink(missing_ok=True)
        self.next += 1
        self.ids, self.vectors = [], []


def _publish(temporary: Path, target: Path) -> None:
    """Give a file that is written its name, once its bytes are on the disk.

    Raises:
        FileExistsError: the name is taken.
    """
    sync(temporary)
    try:
        os.link(temporary, target)  # unlike a rename, never over another file
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        if target.exists():
            raise FileExistsError(target) from None
        os.rename(temporary, target)
    sync(target.parent)


def _write_errors(
    folder: Path, name: str, rank: int, world: int, errors: Mapping[str, str]
) -> None:
    """List what could not be embedded, a line of JSON each; no file where there is nothing.

    What other numbers of processes listed is old: each of those images was tried again.
    """
    own = folder / ("errors.jsonl" if world == 1 else f"errors-{name}of-{world:03d}.jsonl")
    if rank == 0:
        for old in folder.glob("errors*.jsonl"):
            if old != own and (world == 1 or not old.stem.endswith(f"-of-{world:03d}")):
                old.unlink(missing_ok=True)
    if not errors:
        own.unlink(missing_ok=True)
        return
    with whole_file(own, on_disk=True) as temporary:
        lines = [json.dumps({"id": one, "error": why}) + "\n" for one, why in errors.items()]
        temporary.write_text("".join(lines), encoding="utf-8")


@contextmanager
def _locked(folder: Path, alone: bool) -> Iterator[None]:
    """Hold a folder, made if missing, against other processes; alone, or beside other ranks.

    The system lets go of it however the process ends.

    Raises:
        InputValueError: it is a file, cannot be written, or another process holds it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputValueError(f"{folder} cannot be a folder: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise InputValueError(f"{folder}: the folder is not writable")
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            kind = fcntl.LOCK_EX if alone else fcntl.LOCK_SH
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputValueError(f"{folder}: another process is writing there") from error
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(descriptor)
