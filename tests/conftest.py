"""Fixtures every test may use."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under `nohup` all that the tests start would ignore it, as it should


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real clips and golden numbers beside the checkout (`FINECO_SHARED` overrides the place)."""
    folder = Path(os.environ.get("FINECO_SHARED", Path(__file__).parents[2] / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no folder {folder} with real clips and golden numbers (set FINECO_SHARED)")
    return folder
