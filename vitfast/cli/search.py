"""`vitfast search`: what in an embedded folder is most like an image."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from vitfast.errors import InputValueError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("folder", metavar="DIR", help="what `vitfast embed` wrote")
    add("query", metavar="QUERY", nargs="+", help="an id in DIR, or else an image file")
    add("--top", type=int, default=10, metavar="N", help="hits a query; 10 by default")
    add("--checkpoint", metavar="FILE", help="where the model's weights are now, for image files")
    add("--device", metavar="NAME", help="cpu, cuda or cuda:N; cuda where there is one")
    add("--exact", action="store_true", help="compare with every vector, also beyond a million")
    add("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    import numpy as np

    from vitfast.cli.table import print_table
    from vitfast.embedding import Archive, Embedder

    if args.top < 1:
        raise InputValueError(f"--top {args.top}: expected at least 1")
    archive = Archive(args.folder)
    files = [query for query in args.query if query not in archive]
    for query in files:
        if not Path(query).is_file():
            what = (
                "a folder" if Path(query).is_dir() else f"no id in {args.folder}, and no such file"
            )
            raise InputValueError(f"{query}: {what}")
    vectors = {query: archive.vector(query) for query in args.query if query in archive}
    if files:
        given = {"checkpoint": args.checkpoint} if args.checkpoint else {}
        embedder = Embedder.like(archive.metadata, device=args.device, **given)
        for one in embedder.stream((query, query) for query in files):
            if one.vector is None:
                raise InputValueError(f"{one.id}: {one.error}")
            vectors[one.id] = one.vector
    # One more than asked for: an id that is searched for finds itself.
    queries = np.stack([vectors[query] for query in args.query])
    found = archive.search(queries, args.top + 1, exact=True if args.exact else None)
    answers = []
    for query, hits in zip(args.query, found, strict=True):
        hits = [hit for hit in hits if query in files or hit.id != query]
        answers.append((query, hits[: args.top]))
    if args.json:
        answer = [{"query": q, "hits": [hit._asdict() for hit in hits]} for q, hits in answers]
        print(json.dumps(answer, indent=1))
        return 0
    for query, hits in answers:
        rows = [(f"{hit.score:.4f}", hit.id) for hit in hits]
        print_table(f"Nearest to {query}", ("cosine", "id"), rows)
    return 0
