"""The folder of a training: what it was started with, its state for an exact restart, its metrics, its weights.

fineco-kitchen/
  config.json           what the model is, what it was trained on and with, and the result once there is one
  head.safetensors      the best weights so far (VideoCLIP's towers: in the form of `fineco convert`)
  metrics.jsonl         a line now and then, and one for each validation
  training/state.pt     everything a restart needs
  training/texts-*.npy  the texts' vectors
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from pipeline.errors import FinecoError, IntegrityError, UsageError
from pipeline.files import FileRecord, write_bytes, write_file

WORK = "training"
STATE = "state.pt"
METRICS = "metrics.jsonl"
SAVE_SECONDS = 60.0
SAVE_SHARE = 20  # saving takes at most a twentieth of the time: a state of 3 GB is written less often


class Journal:
    """State and metrics of one training on disk.

    Args:
        folder: Of the checkpoint.
        save_steps: Save the state after so many steps; None: every minute.
        tensorboard: Also write the metrics for TensorBoard, in `tensorboard/`.
        writes: False in all processes of a training but one.

    Raises:
        UsageError: TensorBoard is not installed.
    """

    def __init__(
        self, folder: Path, save_steps: int | None = None, tensorboard: bool = False, writes: bool = True
    ) -> None:
        self.folder = folder
        self._writes = writes
        self._save_steps = save_steps
        self._saved_at = time.monotonic()
        self._save_cost = 0.0
        self._metrics = folder / METRICS
        self._writer_of_events = _summary_writer() if tensorboard and writes else None
        self._events: Any = None

    def load(self) -> dict[str, Any] | None:
        """The saved state; metrics that are not in its history are dropped, for they will come again.

        Raises:
            IntegrityError: The state is damaged.
        """
        path = self.folder / WORK / STATE
        state: dict[str, Any] | None = None
        if path.exists():
            try:
                state = torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:  # torch, zipfile and pickle each have their own
                raise IntegrityError(
                    f"{path} cannot be read: {type(error).__name__}",
                    f"Remove the folder {path.parent} to start the training again.",
                ) from error
        if not self._writes:
            return state
        self._keep_metrics(len(state["history"]) if state else 0)
        if self._writer_of_events is not None:
            self._events = self._writer_of_events(
                str(self.folder / "tensorboard"), purge_step=int(state["step"]) + 1 if state else None
            )
        return state

    def is_due(self, step: int) -> bool:
        """Whether the state is to be saved now."""
        if self._save_steps is not None:
            return step % self._save_steps == 0
        return time.monotonic() - self._saved_at >= max(SAVE_SECONDS, SAVE_SHARE * self._save_cost)

    def save(self, state: dict[str, Any]) -> None:
        """Writes the state, whole or absent."""
        if not self._writes:
            return
        started = time.monotonic()
        write_file(self.folder / WORK / STATE, lambda path: _write_state(path, state))
        self._saved_at = time.monotonic()
        self._save_cost = self._saved_at - started

    def write(self, line: dict[str, Any]) -> None:
        """Adds a line of metrics, on disk before the next step."""
        if not self._writes:
            return
        try:
            with self._metrics.open("a", encoding="ascii") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:  # half a line may be there: a restart drops it
            raise FinecoError(
                f"cannot write {self._metrics}: {error.strerror or error}",
                "Free some space; the same command then goes on from the last saved state.",
            ) from error
        if self._events is not None:
            for name, value in line.items():
                if isinstance(value, float):
                    self._events.add_scalar(name, value, line["step"])
            self._events.flush()

    def close(self) -> None:
        if self._events is not None:
            self._events.close()

    def _keep_metrics(self, n_lines: int) -> None:
        """Drops all but the first so many lines, and with them half a line that a dying process left."""
        try:
            lines = self._metrics.read_bytes().splitlines(keepends=True)
        except FileNotFoundError:
            return
        if len(lines) > n_lines:
            write_bytes(self._metrics, b"".join(lines[:n_lines]))


def write_weights(path: Path, write: Callable[[Path], None]) -> FileRecord:
    """`write_file` for a function that writes with safetensors.

    Raises:
        FinecoError: As `write_file`; safetensors has an exception of its own for what the disk refuses.
    """

    def write_or_raise(temporary: Path) -> None:
        try:
            write(temporary)
        except SafetensorError as error:
            number = re.search(r"\(os error (\d+)\)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from error

    return write_file(path, write_or_raise)


def _write_state(path: Path, state: dict[str, Any]) -> None:
    with path.open("wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # which torch makes of an error that the file's `write` raised
            cause = error.__context__
            if isinstance(cause, OSError):
                raise cause from error
            raise


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UsageError(
            "--tensorboard: the package TensorBoard is not installed", "Run: pip install tensorboard"
        ) from error
    return SummaryWriter
