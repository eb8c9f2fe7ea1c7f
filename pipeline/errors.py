"""The two kinds of failure: of the command, and of one video.

A `FinecoError` ends the command; its text is all the user sees, so it says what failed, where, why and what to do.
A `VideoError` ends one video; it becomes a row of `outcomes/` and the run goes on.
"""

from __future__ import annotations


class FinecoError(Exception):
    """The command cannot go on. `exit_code` follows the table in the README (1: the run failed)."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  {self.hint}" if self.hint else self.message


class UsageError(FinecoError):
    """Wrong usage, or the collection, the model and the command do not match (exit code 2)."""

    exit_code = 2


class IntegrityError(FinecoError):
    """A file is damaged, incomplete, or not what its record says (exit code 1)."""


class VideoError(Exception):
    """One video failed.

    Args:
        code: A short stable word, e.g. `no_video`, `timeout`, `changed`; scripts match on it.
        message: One line for a person.
        stage: The stage that failed: `catalog`, `decode`, `embed` or `select`.
    """

    def __init__(self, code: str, message: str, stage: str = "decode") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.stage = stage


class Interrupted(FinecoError):
    """Ctrl-C (exit code 130), SIGTERM (143) or SIGHUP (129); what was finished is kept.

    Args:
        command: To go on with; none where nothing was begun that could be gone on with.
    """

    def __init__(self, signal_number: int, command: str = "") -> None:
        super().__init__(*("stopped; what was finished is kept", f"Go on with: {command}") if command else ("stopped",))
        self.exit_code = 128 + signal_number
