"""Does FineCo help, and where: R@1 against the share of a video's frames that show what its caption says.

    python benchmarks/noise_share.py             the whole study; about an hour on 2 shared cores, no GPU
    python benchmarks/noise_share.py --quick     the same on few videos, without docs: does it work?

Writes docs/study/ (results.json, the plot) and the tables of docs/STUDY.md, which says what is measured and what came
out. Painted frames and finished runs stay in the folder `--work`: after a kill the same command goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
SEEDS = 3


def main() -> None:
    """Makes what runs are missing, then the report."""
    sys.path.insert(0, str(ROOT))  # run as a file, Python looks beside it only
    os.environ["OMP_NUM_THREADS"] = "1"  # each process computes alone; more threads would also round otherwise
    import torch

    from benchmarks.noise_share_grid import SHARES, make_runs, runs
    from benchmarks.noise_share_report import report
    from benchmarks.noise_share_runs import Budget, read_lines
    from benchmarks.noise_share_videos import Sizes, load_bank
    from models.registry import load_encoder

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "fineco-noise-share")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--quick", action="store_true", help="a few small runs; writes to --work alone")
    parser.add_argument("--report", action="store_true", help="train nothing: report the runs that there are")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sizes, budget, planned = Sizes(), Budget(), runs(SEEDS)
    docs = ROOT / "docs"
    if options.quick:
        sizes, budget = Sizes(48, 8, 16, 12), Budget(epochs=2, long_epochs=3)
        planned = runs(1, (SHARES[0], SHARES[-1]))[:12]
        docs = options.work / "docs"
    encoder = load_encoder("builtin", "cpu", "fp32")
    key = repr((encoder.spec.fingerprint, asdict(sizes), asdict(budget)))
    file = options.work / f"runs-{hashlib.sha256(key.encode()).hexdigest()[:16]}.jsonl"
    options.work.mkdir(parents=True, exist_ok=True)
    file.touch()

    def done(line: str) -> None:
        with file.open("a", encoding="utf-8") as lines:
            lines.write(f"\n{line}")  # a line that a kill cut off stays alone

    if not options.report:
        print("painting and embedding the frames, unless they are there")
        load_bank(options.work, encoder, sizes, options.workers)
        there = read_lines(file.read_text("utf-8").splitlines())
        todo = [setup for setup in planned if setup.key not in there]
        print(f"{len(planned)} runs, {len(todo)} to do")
        make_runs(todo, options.work, sizes, budget, options.workers, done)
    there = read_lines(file.read_text("utf-8").splitlines())
    report([there[s.key] for s in planned if s.key in there], docs, sizes, budget, encoder.spec.weights_sha256)
    print(f"wrote {docs / 'study'} and the tables of {docs / 'STUDY.md'}")


if __name__ == "__main__":
    main()
