"""The vectors nearest to others: exact up to a million, by an index beyond."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vitfast.embedding.provenance import difference
from vitfast.embedding.shards import metadata_of, opened, parquet, shard_paths
from vitfast.errors import InputValueError
from vitfast.runtime.files import whole_file
from vitfast.settings import logger

EXACT_UP_TO = 1_000_000
"""Vectors. An exact pass over so many of 384 float16 took 6 s on two cores, most of it to decode
Parquet; an index of them takes minutes to build, and pays where many searches follow."""
CHUNK = 65_536
"""Rows of one matrix product, so that memory stays small beside an archive's."""
READERS = 4
"""Threads that read shards: decoding Parquet takes longer than the matrix product."""
CANDIDATES = 8
"""How many times as many as asked for an index is asked for, to be ranked exactly."""


class Hit(NamedTuple):
    """An id, and the cosine of the angle between its vector and the query's."""

    id: str
    score: float


class Archive:
    """The vectors that `Embedder.write` left in a folder.

    Args:
        folder: of shards; those there now are what is searched.

    Attributes:
        folder: as given.
        metadata: the facts about the vectors, see `Embedder.metadata`.

    Raises:
        InputValueError: there is no such folder, no shard in it, or shards of several kinds.
        BackendUnavailableError: pyarrow is missing.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        parquet()
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise InputValueError(f"{self.folder}: no such folder of vectors")
        self._paths = shard_paths(self.folder)
        if not self._paths:
            raise InputValueError(f"{self.folder} holds no vectors: `vitfast embed` writes them")
        self.metadata = metadata_of(self._paths[0])
        for path in self._paths[1:]:
            why = difference(metadata_of(path), self.metadata)
            if why:
                raise InputValueError(
                    f"{path} is of another kind than {self._paths[0].name}: {why}"
                )

    def __len__(self) -> int:
        """How many vectors there are."""
        return sum(self._rows)

    @cached_property
    def ids(self) -> list[str]:
        """All ids, in the order of the shards and of the rows in them."""
        found: list[str] = []
        for path in self._paths:
            with opened(path) as file:
                found += file.read(columns=["id"])["id"].to_pylist()
        return found

    def vectors(self) -> np.ndarray:
        """All vectors, [N, D] in the dtype they are kept in, in the order of `ids`."""
        return np.concatenate([self._shard(path) for path in self._paths])

    def vector(self, one: str) -> np.ndarray:
        """The vector [D] of an id.

        Raises:
            InputValueError: there is no such id.
        """
        if one not in self._places:
            raise InputValueError(f"{self.folder} has no id {one!r}")
        return self._at(np.array([self._places[one]]))[0]

    def __contains__(self, one: object) -> bool:
        """Whether there is such an id."""
        return one in self._places

    def search(
        self, queries: np.ndarray, top: int = 10, *, exact: bool | None = None
    ) -> list[list[Hit]]:
        """The nearest vectors to each query, best first; equals in the order of `ids`.

        Vectors and queries are compared by cosine, whatever their length, in float32.

        Args:
            queries: [Q, D] or [D], of any floating dtype.
            top: hits for each, fewer where there are fewer vectors.
            exact: compare with every vector; False takes an index of usearch, which finds almost
                all of the nearest, is built at the first search and kept in the folder. By default
                exact up to a million vectors, and beyond where usearch is missing, which is logged.

        Raises:
            InputValueError: queries of another width, or without direction; or `exact` False
                without usearch.
        """
        unit = self._unit_queries(queries)
        if top < 1:
            raise InputValueError(f"top {top}: expected at least 1")
        if exact is None:
            exact = len(self) <= EXACT_UP_TO
            if not exact and importlib.util.find_spec("usearch") is None:
                logger.warning(
                    "searching %d vectors one by one; an index is faster: "
                    'pip install "vitfast[search]"',
                    len(self),
                )
                exact = True
        found = self._exact(unit, top) if exact else self._by_index(unit, top)
        names = self._ids_at(sorted({i for row in found for i, _ in row}))
        return [[Hit(names[i], score) for i, score in row] for row in found]

    def _unit_queries(self, queries: np.ndarray) -> np.ndarray:
        queries = np.atleast_2d(np.asarray(queries, np.float32))
        dim = self.metadata["dim"]
        if queries.ndim != 2 or queries.shape[1] != dim:
            raise InputValueError(f"queries of shape {list(queries.shape)}: expected [Q, {dim}]")
        lengths = np.linalg.norm(queries, axis=1, keepdims=True)
        if not (np.isfinite(lengths).all() and (lengths > 0).all()):
            raise InputValueError("a query is zero or not finite: it has no direction")
        return queries / lengths

    def _exact(self, queries: np.ndarray, top: int) -> list[list[tuple[int, float]]]:
        """(row, score) of the nearest to each query."""
        scores = np.empty((len(queries), 0), np.float32)
        rows = np.empty((len(queries), 0), np.int64)
        first = 0
        for chunk in self._chunks():
            here, numbers = _best(_cosines(queries, chunk), None, top)
            scores, rows = _best(
                np.concatenate([scores, here], 1),
                np.concatenate([rows, numbers + first], 1),
                top,
            )
            first += len(chunk)
        return [_pairs(r, s) for r, s in zip(rows, scores, strict=True)]

    def _by_index(self, queries: np.ndarray, top: int) -> list[list[tuple[int, float]]]:
        index = self._index()
        found = []
        for query in queries:
            keys = index.search(query, min(top * CANDIDATES, len(self))).keys
            near = np.sort(keys.astype(np.int64))
            best, rows = _best(_cosines(query[None], self._at(near)), near[None], top)
            found.append(_pairs(rows[0], best[0]))
        return found

    def _index(self) -> Any:
        """usearch's index of these shards: the one kept, or else built now."""
        try:
            from usearch.index import Index
        except ImportError as error:
            raise InputValueError(
                'an index needs usearch: pip install "vitfast[search]"'
            ) from error
        facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in self._paths]
        key = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
        target = self.folder / f"index-{key}.usearch"
        index = Index(ndim=self.metadata["dim"], metric="cos", dtype="f16")
        if target.exists():
            index.view(str(target))
            return index
        logger.warning("building an index of %d vectors, once", len(self))
        first = 0
        for chunk in self._chunks():
            index.add(np.arange(first, first + len(chunk)), _unit(chunk))
            first += len(chunk)
        with whole_file(target) as temporary:
            index.save(str(temporary))
        for old in self.folder.glob("index-*.usearch"):
            if old != target:
                old.unlink(missing_ok=True)
        return index

    @cached_property
    def _rows(self) -> list[int]:
        """Of each shard."""
        counts = []
        for path in self._paths:
            with opened(path) as file:
                counts.append(file.metadata.num_rows)
        return counts

    @cached_property
    def _places(self) -> dict[str, int]:
        return {one: i for i, one in enumerate(self.ids)}

    def _ids_at(self, numbers: list[int]) -> dict[int, str]:
        """The ids of these rows, which are in order."""
        found: dict[int, str] = {}
        first = 0
        for path, rows in zip(self._paths, self._rows, strict=True):
            here = [i for i in numbers if first <= i < first + rows]
            if here:
                with opened(path) as file:
                    column = file.read(columns=["id"])["id"]
                found.update((i, column[i - first].as_py()) for i in here)
            first += rows
        return found

    def _at(self, numbers: np.ndarray) -> np.ndarray:
        """[N, D] of these rows, which are in order; each shard is read once."""
        found, first = [], 0
        for path, rows in zip(self._paths, self._rows, strict=True):
            here = numbers[(numbers >= first) & (numbers < first + rows)] - first
            if len(here):
                found.append(self._shard(path)[here])
            first += rows
        return np.concatenate(found)

    def _shard(self, path: Path) -> np.ndarray:
        """[rows, D], of the dtype it is kept in."""
        with opened(path) as file:
            column = file.read(columns=["vector"])["vector"].combine_chunks()
            return (
                column.flatten().to_numpy(zero_copy_only=False).reshape(-1, column.type.list_size)
            )

    def _chunks(self) -> Iterator[np.ndarray]:
        """All vectors in order, a part at a time; threads read the next shards meanwhile."""
        paths = iter(self._paths)
        with ThreadPoolExecutor(READERS) as threads:
            ahead = deque(threads.submit(self._shard, path) for path in islice(paths, READERS))
            while ahead:
                shard = ahead.popleft().result()
                ahead.extend(threads.submit(self._shard, path) for path in islice(paths, 1))
                for start in range(0, len(shard), CHUNK):
                    yield shard[start : start + CHUNK]


def _unit(vectors: np.ndarray) -> np.ndarray:
    """In float32, of unit length but for those that are zero."""
    vectors = vectors.astype(np.float32)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.maximum(lengths, np.finfo(np.float32).tiny)


def _cosines(queries: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """[Q, N] of queries of unit length and vectors of any; 0 of a vector that is zero."""
    wide = vectors.astype(np.float32, copy=False)
    lengths = np.sqrt(np.einsum("nd,nd->n", wide, wide))
    return (queries @ wide.T) / np.maximum(lengths, np.finfo(np.float32).tiny)


def _best(scores: np.ndarray, rows: np.ndarray | None, top: int) -> tuple[np.ndarray, np.ndarray]:
    """The `top` highest of each line and their rows, best first, equals by row.

    rows: the numbers of the columns, in rising order where scores are equal; None counts from 0.
    """
    kept_scores, kept_rows = [], []
    for i, line in enumerate(scores):
        numbers = np.arange(len(line)) if rows is None else rows[i]
        if len(line) > top:  # all that reach the last place: a partition alone takes any of equals
            enough = line >= np.partition(line, len(line) - top)[len(line) - top]
            line, numbers = line[enough], numbers[enough]
        order = np.lexsort((numbers, -line))[:top]
        kept_scores.append(line[order])
        kept_rows.append(numbers[order])
    return np.stack(kept_scores), np.stack(kept_rows)


def _pairs(rows: Sequence[Any] | np.ndarray, scores: Sequence[Any] | np.ndarray) -> list[Any]:
    return [(int(i), float(s)) for i, s in zip(rows, scores, strict=True)]
