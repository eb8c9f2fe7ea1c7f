"""What shows that a fault test can fail: the line of the program that it watches over, and what removes it.

A test file in tests/faults lists its guards beside its tests, as GUARDS. The long suite (tests/faults/test_guards.py)
takes each one out of a copy of the program and expects the test to fail there.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Guard:
    """A guard of the program, and the test that fails without it.

    Attributes:
        faults: Numbers of the faults (docs/FAULTS.md) that it guards against.
        file: Of the program, relative to the root of the project.
        old: Text that stands there exactly once.
        new: What removes the guard when it stands there instead.
        test: Name of the test, in the file that lists the guard; with `[case]` behind it where only one case fails.
    """

    faults: tuple[int, ...]
    file: str
    old: str
    new: str
    test: str
