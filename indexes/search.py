"""Searching a generation: verified before FAISS reads it, memory-mapped, compared with what its sidecar says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from indexes.build import INDEX_FILE
from indexes.exact import Ids
from indexes.generations import Sidecar, read_sidecar
from pipeline.errors import IntegrityError, UsageError
from pipeline.files import check_file
from pipeline.types import Float32

# FAISS takes a file with flipped or trailing bytes for a good one (FAULTS.md section 2), so its digest is checked
# before it is read: about half a second a gigabyte. Over this size only the length is; 'fineco verify' checks it all.
FULLY_CHECKED_BYTES = 1 << 30


class VectorIndex:
    """An index open for search.

    Attributes:
        sidecar: What its generation says of itself.
    """

    def __init__(self, index: Any, sidecar: Sidecar) -> None:
        self._index = index
        self.sidecar = sidecar

    @classmethod
    def open(cls, generation: Path, fingerprint: str) -> VectorIndex:
        """Opens a generation for queries of one encoder.

        Args:
            fingerprint: Of the encoder that will make the queries.

        Raises:
            UsageError: The index was built with another encoder.
            IntegrityError: A file of the generation is damaged, or is not what the sidecar says.
        """
        sidecar = read_sidecar(generation)
        if sidecar.fingerprint != fingerprint:
            raise UsageError(
                f"the index was built with encoder {sidecar.fingerprint[:12]}, the query's is {fingerprint[:12]}",
                "Search with the encoder of the collection.",
            )
        path = generation / INDEX_FILE
        if INDEX_FILE not in sidecar.files:
            raise IntegrityError(f"{generation}: its sidecar does not name {INDEX_FILE}", "Run 'fineco index --force'.")
        for name, record in sidecar.files.items():
            check_file(generation / name, record, full=record.size_bytes <= FULLY_CHECKED_BYTES)
        import faiss

        faiss.set_deserialization_vector_byte_limit(2 * sidecar.files[INDEX_FILE].size_bytes + (1 << 20))
        faiss.set_deserialization_loop_limit(10**8)
        try:
            index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
        except RuntimeError as error:
            reason = str(error).splitlines()[0].rpartition(": ")[2]
            raise IntegrityError(f"{path}: {reason}", "Run 'fineco index --force'.") from error
        report = sidecar.report
        found = (index.d, index.ntotal, index.metric_type)
        if found != (report.dim, report.n_vectors, faiss.METRIC_INNER_PRODUCT):
            raise IntegrityError(
                f"{path}: {found[1]} x {found[0]}, its sidecar says {report.n_vectors} x {report.dim}",
                "Run 'fineco index --force'.",
            )
        if report.nprobe:
            faiss.extract_index_ivf(index).nprobe = report.nprobe
        return cls(index, sidecar)

    def __len__(self) -> int:
        return int(self._index.ntotal)

    def search(self, queries: Float32, k: int) -> list[tuple[Ids, Float32]]:
        """The best k of each query: (ids, cosines), best first; fewer when the index, or its probed cells, hold fewer.

        Args:
            queries: (Q, D) float32 unit rows.

        Raises:
            UsageError: Another dimension, or numbers that are not finite.
        """
        if queries.ndim != 2 or queries.shape[1] != self._index.d:
            raise UsageError(f"queries of shape {queries.shape}, the index has {self._index.d} dimensions")
        if not np.isfinite(queries).all():
            raise UsageError("a query vector is not finite")
        k = min(k, len(self))
        if k < 1:
            return [(np.empty(0, np.int64), np.empty(0, np.float32)) for _ in queries]
        scores, ids = self._index.search(np.ascontiguousarray(queries, np.float32), k)
        return [(row_ids[row_ids >= 0], row[row_ids >= 0]) for row_ids, row in zip(ids, scores, strict=True)]
