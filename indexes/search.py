"""Searching a generation: verified before FAISS reads it, memory-mapped, compared with what its sidecar says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from indexes.build import INDEX_FILE, IndexReport, faiss_reason
from indexes.candidates import search_index
from indexes.generations import REBUILD, Sidecar, check_generation, read_sidecar
from pipeline.errors import IntegrityError, UsageError
from pipeline.types import Float32, Int64

LOOP_LIMIT = 10**8  # no index has so many cells; FAISS's own default is none


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
        check_generation(generation, sidecar)
        return cls(_read(generation / INDEX_FILE, sidecar.report), sidecar)

    def __len__(self) -> int:
        return int(self._index.ntotal)

    def search(self, queries: Float32, k: int, without: Int64 | None = None) -> list[tuple[Int64, Float32]]:
        """The best k of each query: (ids, cosines), best first; fewer when the index, or its probed cells, hold fewer.

        Args:
            queries: (Q, D) float32 unit rows.
            without: Ids that are left out.

        Raises:
            UsageError: Another dimension, or numbers that are not finite.
        """
        if queries.ndim != 2 or queries.shape[1] != self._index.d:
            raise UsageError(f"queries of shape {queries.shape}, the index has {self._index.d} dimensions")
        if not np.isfinite(queries).all():
            raise UsageError("a query vector is not finite")
        return search_index(self._index, queries, k, without)


def _read(path: Path, report: IndexReport) -> Any:
    """Maps an index file into memory and compares it with its report.

    The file must be verified: FAISS takes one with flipped or trailing bytes for a good one.
    """
    import faiss

    faiss.set_deserialization_vector_byte_limit(2 * path.stat().st_size + (1 << 20))
    faiss.set_deserialization_loop_limit(LOOP_LIMIT)
    try:
        with path.open("rb") as file:  # by its number, since FAISS takes no name that is not UTF-8
            index = faiss.read_index(f"/dev/fd/{file.fileno()}", faiss.IO_FLAG_MMAP_IFC)
        if report.nprobe:
            faiss.extract_index_ivf(index).nprobe = report.nprobe
    except RuntimeError as error:
        raise IntegrityError(f"{path}: {faiss_reason(error)}", REBUILD) from error
    for what, found, wanted in (
        ("dimensions", index.d, report.dim),
        ("vectors", index.ntotal, report.n_vectors),
        ("metric", index.metric_type, faiss.METRIC_INNER_PRODUCT),
    ):
        if found != wanted:
            raise IntegrityError(f"{path}: {what} {found}, its sidecar says {wanted}", REBUILD)
    return index


def stored_ids(generation: Path) -> Int64:
    """Every id (n,) that a checked generation's index holds, in the order in which it holds them."""
    import faiss

    index = _read(generation / INDEX_FILE, read_sidecar(generation).report)
    cells = _cells(faiss, index)
    if cells is None:
        ids: Int64 = faiss.vector_to_array(index.id_map).astype(np.int64)
        return ids
    return np.concatenate([np.empty(0, np.int64), *(_ids_of(faiss, cells, i) for i in range(cells.nlist))])


def stored_vectors(generation: Path, ids: Int64) -> tuple[str, Float32]:
    """FAISS's name of how a checked generation's index codes vectors, and the vectors (n, D) of some of its ids."""
    import faiss

    report = read_sidecar(generation).report
    index = _read(generation / INDEX_FILE, report)
    cells = _cells(faiss, index)
    vectors = np.zeros((len(ids), index.d), np.float32)
    wanted = {identifier: row for row, identifier in enumerate(ids.tolist())}
    if cells is None:
        for at, identifier in enumerate(faiss.vector_to_array(index.id_map).tolist()):
            if identifier in wanted:
                vectors[wanted[identifier]] = index.index.reconstruct(at)
    else:
        ivf = faiss.extract_index_ivf(index)
        for number in range(cells.nlist):
            for at, identifier in enumerate(_ids_of(faiss, cells, number).tolist()):
                if identifier in wanted:
                    ivf.reconstruct_from_offset(number, at, faiss.swig_ptr(vectors[wanted[identifier]]))
    return report.factory, vectors


def _cells(faiss: Any, index: Any) -> Any:
    """The cells of an IVF index; None for a flat one, which has an id map."""
    ivf = faiss.try_extract_index_ivf(index)
    return None if ivf is None else ivf.invlists


def _ids_of(faiss: Any, cells: Any, number: int) -> Int64:
    size = cells.list_size(number)
    ids: Int64 = np.array(faiss.rev_swig_ptr(cells.get_ids(number), size), np.int64) if size else np.empty(0, np.int64)
    return ids
