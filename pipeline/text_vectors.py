"""Vectors of the texts that an index is measured with: kept with it, so that the next one seldom needs the encoder."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from indexes.generations import current_generation, read_sidecar
from models.base import Encoder, caution_about
from pipeline.embed import encode_captions
from pipeline.errors import FinecoError, VideoError
from pipeline.files import FileRecord, check_file
from pipeline.schema import SCHEMA_VERSION, Schema
from pipeline.store import Array, Shard, check_offsets, offsets_of, write_shard
from pipeline.types import Float32

TEXTS_FILE = "texts.h5"
TEXTS: Schema = {"texts": ("|u1", 1), "text_offsets": ("<i8", 1), "vectors": ("<f4", 2)}


class TextsShard(Shard):
    """Texts and their vectors, beside an index."""

    kind, schema = "texts", TEXTS

    def _read_videos(self) -> None:
        self._offsets = self._datasets["text_offsets"][:]
        check_offsets("text_offsets", self._offsets, len(self._datasets["texts"]))
        self._check_length(len(self._offsets) - 1, "vectors")

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def vectors(self) -> dict[str, Float32]:
        """Text -> its vector (D,); zeros for one that the encoder does not read as a whole."""
        texts = bytes(self._datasets["texts"][:])
        pieces = zip(self._offsets[:-1].tolist(), self._offsets[1:].tolist(), strict=True)
        return dict(zip([texts[a:b].decode() for a, b in pieces], self._datasets["vectors"][:], strict=True))


class TextVectors:
    """Texts to vectors under a collection's encoder, which is loaded when a text is met that the index in use was not
    measured with.

    Args:
        index_folder: The collection's `index/`.
        fingerprint, dim: Of the encoder.
        get_encoder: Loads it; None: texts that are not known are left out.
        say: Told where it cannot be loaded; then too they are left out.
    """

    def __init__(
        self,
        index_folder: Path,
        fingerprint: str,
        dim: int,
        get_encoder: Callable[[], Encoder] | None,
        say: Callable[[str], None],
    ) -> None:
        self._known: dict[str, Float32] = {}
        self._used: dict[str, Float32] = {}
        self._dim, self._get_encoder, self._say = dim, get_encoder, say
        with contextlib.suppress(FinecoError):  # no index yet, or a damaged one
            generation = current_generation(index_folder)
            sidecar = read_sidecar(generation)
            if sidecar.fingerprint == fingerprint and TEXTS_FILE in sidecar.files:
                check_file(generation / TEXTS_FILE, sidecar.files[TEXTS_FILE])
                with TextsShard(generation / TEXTS_FILE) as shard:
                    self._known = shard.vectors()

    def __call__(self, texts: Sequence[str]) -> Float32:
        """(n, D) float32 unit rows, in order, of the texts that the encoder reads as a whole."""
        unknown = [text for text in texts if text not in self._known]
        if unknown and self._get_encoder is not None:
            try:
                encoder = self._get_encoder()
            except FinecoError as error:
                self._get_encoder = None
                self._say(
                    f"The index is measured without new texts: {error.message}. Where the model is at hand, "
                    "'fineco index --force' measures it with them."
                )
            else:
                self._known |= {text: self._encoded(encoder, text) for text in unknown}
        self._used |= {text: self._known[text] for text in texts if text in self._known}
        rows = [row for text in texts if (row := self._known.get(text)) is not None and row.any()]
        return np.stack(rows) if rows else np.empty((0, self._dim), np.float32)

    def _encoded(self, encoder: Encoder, text: str) -> Float32:
        nothing = np.zeros(self._dim, np.float32)
        if caution_about(encoder, text):
            return nothing
        try:
            vector: Float32 = encode_captions(encoder, [text])[0]
        except VideoError:  # a text without a vector is no question
            return nothing
        return vector

    def write(self, path: Path) -> FileRecord:
        """Writes the texts that were used, for the next index."""
        texts = [text.encode() for text in self._used]
        arrays: dict[str, Array] = {
            "texts": np.frombuffer(b"".join(texts), np.uint8),
            "text_offsets": offsets_of([len(text) for text in texts]),
            "vectors": np.array(list(self._used.values()), np.float32).reshape(-1, self._dim),
        }
        return write_shard(path, "texts", TEXTS, arrays, SCHEMA_VERSION)
