"""Images to vectors, folders of them to Parquet, and the search for what is near."""

from vitfast.embedding.adapters import RayEmbedder, daft_embedder
from vitfast.embedding.embedder import Embedded, Embedder
from vitfast.embedding.images import find_images
from vitfast.embedding.search import Archive, Hit
from vitfast.embedding.shards import Written

__all__ = [
    "Archive",
    "Embedded",
    "Embedder",
    "Hit",
    "RayEmbedder",
    "Written",
    "daft_embedder",
    "find_images",
]
