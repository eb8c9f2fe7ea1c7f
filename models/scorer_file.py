"""What a scorer's file says of itself, and where a model's own scorer lies. Loads no torch: a plan needs only this."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from pipeline.errors import UsageError

KIND, VERSION = "fineco-scorer", 1
METADATA_KEY = "fineco"  # one key: safetensors writes several in an order that changes from run to run
FILE_NAME = "scorer.safetensors"
BUILTIN = Path(__file__).parent / "builtin" / FILE_NAME
MAX_SIZE = 1 << 14  # of either size: a file that claims more is damaged, and must not decide how much memory is taken


@dataclass(frozen=True, slots=True)
class ScorerFacts:
    """A scorer's sizes and origin.

    Attributes:
        encoder: Name of the encoder whose features it scores.
        fingerprint: Of that encoder; no other's features may be given to it.
        dim: Length of a feature (D).
        hidden: Width of its layers.
        distilled_from: How many videos and frames, the seed, and what was measured on held-out videos.
    """

    encoder: str
    fingerprint: str
    dim: int
    hidden: int
    distilled_from: dict[str, Any]

    def metadata(self) -> dict[str, str]:
        """As the file's header holds it."""
        content = {"kind": KIND, "version": VERSION, **asdict(self)}
        return {METADATA_KEY: json.dumps(content, sort_keys=True)}

    def check_encoder(self, path: Path, name: str, fingerprint: str) -> None:
        """Raises UsageError unless this encoder made the features that the scorer at `path` was trained on."""
        if fingerprint != self.fingerprint:
            raise UsageError(
                f"scorer: {path} was trained on features of {self.encoder} ({self.fingerprint[:12]}), "
                f"the collection's are of {name} ({fingerprint[:12]})",
                f"A scorer belongs to one encoder. {how_to_train(name)}",
            )


def how_to_train(model: str) -> str:
    """What to type for a scorer of this model."""
    return (
        f"Train one on a collection made with {model} whose videos have text beside them: "
        f"fineco train-scorer -c COLLECTION -o {FILE_NAME}; then select with --scorer {FILE_NAME}."
    )


def read_facts(path: Path) -> ScorerFacts:
    """Reads the header of a scorer's file.

    Raises:
        UsageError: There is no file, or it is not a scorer that this version reads.
    """
    try:
        if path.exists() and not path.is_file():
            raise ValueError("not a regular file")  # to open a pipe would wait for its writer
        with safe_open(path, framework="numpy") as file:
            content = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
        if not isinstance(content, dict) or content.pop("kind", None) != KIND:
            raise ValueError("not a scorer")
        version = content.pop("version", None)
        if version != VERSION:
            raise ValueError(f"a scorer of format {version}, this program reads format {VERSION}")
        facts = ScorerFacts(**content)
        if not all(type(n) is int and 0 < n <= MAX_SIZE for n in (facts.dim, facts.hidden)):
            raise ValueError(f"a scorer of impossible sizes ({facts.dim}, {facts.hidden})")
    except (OSError, SafetensorError, ValueError, TypeError) as error:
        missing = isinstance(error, FileNotFoundError)
        reason = "no such file" if missing else (getattr(error, "strerror", None) or str(error)).splitlines()[0]
        raise UsageError(f"scorer: {path}: {reason}", "Give a file that 'fineco train-scorer' made.") from error
    return facts


def default_scorer(model: str) -> Path | None:
    """The scorer that comes with a model: `builtin` has one, `fineco:FOLDER` may have one in or beside its folder."""
    if model == "builtin":
        return BUILTIN if BUILTIN.is_file() else None
    if not model.startswith("fineco:"):
        return None
    folder = Path(model.removeprefix("fineco:"))
    return next((path for path in (folder / FILE_NAME, folder.parent / FILE_NAME) if path.is_file()), None)
