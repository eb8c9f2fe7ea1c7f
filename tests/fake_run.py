"""`fineco run` with the fake encoder, in a process that a test can kill: fake_run.py VIDEOS COLLECTION SECONDS."""

from __future__ import annotations

import sys
from pathlib import Path

from fakes import FakeEncoder
from pipeline import run as streaming
from pipeline.commands import Machine, Sources, run
from pipeline.config import EmbedOptions, SelectOptions
from pipeline.errors import FinecoError
from pipeline.sampling import Sampling


def main() -> int:
    """Small shards, so that a run of a dozen videos has many commits."""
    videos, collection, seconds_per_batch = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3])
    streaming.SHARD_VIDEOS = 2
    encoder = FakeEncoder(seconds_per_batch=seconds_per_batch)
    machine = Machine(workers=2, batch_size=8)
    try:
        summary = run(
            collection,
            Sources([videos]),
            EmbedOptions(sampling=Sampling("fps", 5.0)),
            SelectOptions("caption", "0.5"),
            machine,
            encoder=encoder,
        )
    except FinecoError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 3 if summary.any_failed else 0


if __name__ == "__main__":
    sys.exit(main())
