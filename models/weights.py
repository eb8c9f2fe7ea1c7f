"""What every loader checks of the tensors that it has read."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def check_finite(state: Mapping[str, Tensor]) -> None:
    """Raises ValueError that names the first tensor with NaN or infinite values: all its vectors would be NaN."""
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(f"{name} has values that are not finite")
