"""The nearest rows of a gallery that is never held: block by block, part by part, over ranks."""

import time
from pathlib import Path

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor

from imsvd_core.distributed import world
from imsvd_core.evaluation.features import share, shares, write_tensors

SAVE_SECONDS = 60.0  # between savings of what is compared so far


class Neighbors:
    """The k nearest rows, by cosine similarity, of a gallery that is handed over in blocks and
    never held.

    Exact: every similarity is computed in float32. Which of equally near rows count, where not all
    can, is not fixed.

    Args:
        queries: (Q, F), on the device where they are to be compared.
        k: how many neighbours to keep of each.
        chunk: sets the memory, 16·chunk² bytes and some: chunk / 2 queries meet 8·chunk rows at a
            time.
        first: index in the whole gallery of the row that comes first here.

    Memory: a copy of the queries, 12 bytes for each of their neighbours, `chunk`'s and two blocks
    of gallery.
    """

    def __init__(self, queries: Tensor, k: int, chunk: int = 2048, first: int = 0):
        self.queries, self.k = _normalized("queries", queries), k
        self.query_chunk, self.gallery_block = max(1, chunk // 2), 8 * chunk
        #: (Q, k), falling; -inf where fewer than k rows have been compared
        self.similarity = torch.full((len(queries), k), -torch.inf, device=queries.device)
        #: int64 (Q, k), places in the gallery
        self.index = torch.zeros(len(queries), k, dtype=torch.int64, device=queries.device)
        self.next_row = first  #: the row to be compared next
        self._waiting: list[Tensor] = []  # rows that do not fill a block yet
        self._saved_at = time.monotonic()

    @torch.no_grad()
    def add(self, gallery: Tensor) -> None:
        """Take the gallery's next rows, (n, F). They are compared as soon as they fill a block."""
        for rows in gallery.split(self.gallery_block):
            self._waiting.append(rows)
            if sum(map(len, self._waiting)) >= self.gallery_block:
                self._compare()

    def nearest(self) -> tuple[Tensor, Tensor]:
        """Similarities (Q, k), falling, and places in the gallery, int64 (Q, k)."""
        self._compare()
        return self.similarity, self.index

    @torch.no_grad()
    def _compare(self) -> None:
        """Compare the rows that wait with all queries."""
        if not self._waiting:
            return
        rows = _normalized("gallery", torch.cat(self._waiting).to(self.queries.device))
        self._waiting = []
        for start in range(0, len(self.queries), self.query_chunk):
            part = slice(start, start + self.query_chunk)
            similarity = self.queries[part] @ rows.T
            similarity, index = similarity.topk(min(self.k, len(rows)))
            similarity = torch.cat([self.similarity[part], similarity], 1)
            index = torch.cat([self.index[part], index + self.next_row], 1)
            self.similarity[part], self.index[part] = nearest_of(similarity, index, self.k)
        self.next_row += len(rows)

    def save(self, file: Path | None) -> None:
        """Keep what the compared rows gave, once a minute at most; rows that wait are left out."""
        if file and time.monotonic() - self._saved_at >= SAVE_SECONDS:
            row = torch.tensor(self.next_row)
            write_tensors(file, {"similarity": self.similarity, "index": self.index, "seen": row})
            self._saved_at = time.monotonic()

    def resume(self, file: Path | None) -> int:
        """Go on from what was saved, if anything was; returns the row to be compared next."""
        if file and file.exists():
            state = safetensors.torch.load_file(file, device=str(self.queries.device))
            self.similarity, self.index = state["similarity"], state["index"]
            self.next_row = int(state["seen"])
        return self.next_row


def nearest_of(similarity: Tensor, index: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Of candidates (Q, n) the k most similar: similarities (Q, k), falling, and their places."""
    similarity, column = similarity.topk(k)
    return similarity, index.gather(1, column)


def merge_over_ranks(similarity: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest of all ranks' rows to this rank's share of the queries, from those that each
    found in its own.

    similarity and index (Q, k) are for all queries, as `Neighbors.nearest` gives them; every rank
    calls this. Memory: as much again as is given, twice.
    """
    size, k = world()[1], index.shape[1]
    if size == 1:
        return similarity, index
    queries = len(share(len(index)))
    tables = []
    for table in (similarity, index):
        received = table.new_empty(size * queries, k)
        counts = [len(rows) for rows in shares(len(index), size)]
        dist.all_to_all_single(received, table.contiguous(), [queries] * size, counts)
        tables.append(received.view(size, queries, k).transpose(0, 1).flatten(1))
    return nearest_of(tables[0], tables[1], k)


@torch.no_grad()
def _normalized(name: str, features: Tensor) -> Tensor:
    """Rows of length 1, float32; a row of zeros stays one. Raises ValueError for NaN and infinite
    features."""
    length = torch.linalg.vector_norm(features.float(), dim=1, keepdim=True)
    if not bool(length.isfinite().all()):
        raise ValueError(
            f"{name} holds features that are not finite: look at the backbone's weights, or use "
            "precision fp32"
        )
    return features / length.clamp_min_(1e-12)
