"""Any model of open_clip as an `Encoder`."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from models.base import EncoderSpec, caution_of_length
from models.open_clip_weights import Located, licence, one_line, quiet
from models.weights import check_finite
from pipeline.errors import FinecoError, IntegrityError
from pipeline.types import Float32, FrameGeometry, UInt8, check_shape

_RESIZE_MODES = ("shortest", "squash", "longest")
MAX_IMAGE_SIDE = 4096  # a configuration that claims more must not decide how much memory is taken
TEXTS_PER_BATCH = 256  # bounds the memory of a call with all the captions of a collection


class OpenClipEncoder:
    """An open_clip model on one device; build it with `load_open_clip`."""

    def __init__(
        self,
        spec: EncoderSpec,
        model: torch.nn.Module,
        tokenizer: Callable[[list[str]], torch.Tensor],
        device: str,
        precision: str,
    ) -> None:
        self.spec = spec
        self.device = device
        self.precision = precision
        self._dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        # bf16 weights, not autocast: the casts would eat the gain (measured: two to four times faster)
        self._model: Any = model.to(device=device, dtype=self._dtype).eval().requires_grad_(False)
        self._tokenizer = tokenizer
        # Tensors, 255 too: CUDA multiplies by the reciprocal of a plain number, which rounds differently.
        self._white = torch.tensor(255.0, device=device)
        self._mean = torch.tensor(spec.mean, device=device).view(3, 1, 1)
        self._std = torch.tensor(spec.std, device=device).view(3, 1, 1)

    def preprocess(self, frames: UInt8) -> torch.Tensor:
        """(B, H, W, 3) uint8 RGB -> (B, 3, H, W) float32 on the device, as torchvision's ToTensor and Normalize.

        The arithmetic is theirs, step by step, so the result has the same bits.
        """
        # torch wants to own writable, contiguous memory; frames from shared memory may be neither
        pixels = torch.from_numpy(np.require(frames, requirements=["C", "W"]))
        if self.device.startswith("cuda"):
            pixels = pixels.pin_memory().to(self.device, non_blocking=True)
        # The view is channels-last, which convolutions of patches like best.
        scaled = pixels.to(self.device).permute(0, 3, 1, 2).float().div_(self._white)
        return scaled.sub_(self._mean).div_(self._std)

    def encode_frames(self, frames: UInt8) -> Float32:
        """(B, H, W, 3) uint8 RGB of the spec's geometry -> (B, D) float32 unit rows.

        Raises torch's out-of-memory error when B is too large for the device.
        """
        geometry = self.spec.geometry
        check_shape("frames", frames, (None, geometry.height, geometry.width, 3), np.uint8)
        if len(frames) == 0:
            return np.empty((0, self.spec.dim), np.float32)
        with torch.inference_mode():
            return _unit_rows(self._model.encode_image(self.preprocess(frames).to(self._dtype), normalize=False))

    def encode_text(self, texts: Sequence[str]) -> Float32:
        """B texts -> (B, D) float32 unit rows. A text longer than the context is cut by the model's tokenizer."""
        rows = np.empty((len(texts), self.spec.dim), np.float32)
        with torch.inference_mode():
            for start in range(0, len(texts), TEXTS_PER_BATCH):
                tokens = self._tokenizer(list(texts[start : start + TEXTS_PER_BATCH])).to(self.device)
                rows[start : start + len(tokens)] = _unit_rows(self._model.encode_text(tokens, normalize=False))
        return rows

    def caution(self, text: str) -> str:
        """That only the start of a text is read."""

        def tokens(start: str) -> list[int]:
            ids: list[int] = self._tokenizer([start])[0].tolist()
            return ids

        return caution_of_length(text, tokens)


def load_open_clip(located: Located, device: str, precision: str) -> OpenClipEncoder:
    """Builds the model and loads its weights, as tensors only (safetensors, or `weights_only`).

    Args:
        located: By `models.open_clip_weights.locate`.
        device: As torch names it.
        precision: `fp32` or `bf16`.

    Raises:
        IntegrityError: The weights are damaged, not plain tensors, or of another architecture.
        FinecoError: The model cannot be built or does not fit the device.
    """
    # The digest of 1.8 GB takes a second: it is taken while the model is built.
    with ThreadPoolExecutor(1) as pool, quiet():
        digest = pool.submit(_sha256, located.weights)
        model, tokenizer = _build(located)
        try:
            spec = _spec(located, model, tokenizer, digest.result())
        except (TypeError, ValueError, KeyError, IndexError, OverflowError) as error:
            raise IntegrityError(
                f"{located.name}: its settings make no sense: {one_line(error)}", "Get its files again."
            ) from error
    try:
        return OpenClipEncoder(spec, model, tokenizer, device, precision)
    except torch.OutOfMemoryError as error:
        raise FinecoError(f"{located.name} does not fit the memory of {device}", "Use a smaller model.") from error


def frame_geometry(preprocess: Mapping[str, Any]) -> FrameGeometry:
    """open_clip's preprocessing settings (`get_model_preprocess_cfg`) as the frames' geometry."""
    size = preprocess["size"]
    height, width = (size, size) if isinstance(size, int) else (int(size[0]), int(size[-1]))
    if not (0 < height <= MAX_IMAGE_SIDE and 0 < width <= MAX_IMAGE_SIDE):
        raise ValueError(f"images of {width}x{height} pixels; at most {MAX_IMAGE_SIDE} on a side are taken")
    resize = preprocess.get("resize_mode") or "shortest"
    if resize not in _RESIZE_MODES:
        raise IntegrityError(f"unknown resize_mode {resize!r} in the model's preprocessing", f"Known: {_RESIZE_MODES}.")
    # open_clip's own transform is bicubic unless told bilinear, and always so for a rectangle resized by its short side
    bilinear = preprocess.get("interpolation") == "bilinear" and not (resize == "shortest" and height != width)
    return FrameGeometry(
        height=height,
        width=width,
        resize=cast(Literal["shortest", "squash", "longest"], resize),
        interpolation="bilinear" if bilinear else "bicubic",
        fill=int(preprocess.get("fill_color") or 0),
    )


class _NoRandomInit(TorchFunctionMode):
    """Leaves new parameters as they are: the strict load that follows sets every one.

    Building PE-Core-B-16 takes 0.9 s instead of 7.6 s.
    """

    _FILLERS = frozenset(
        {torch.Tensor.normal_, torch.Tensor.uniform_, torch.Tensor.erfinv_}
        | {getattr(torch.nn.init, f"{name}_") for name in ("normal", "uniform", "kaiming_uniform", "xavier_uniform")}
    )

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in self._FILLERS:
            return args[0] if args else kwargs["tensor"]
        if func is torch.randn:
            func = torch.empty
        return func(*args, **kwargs)


def _build(located: Located) -> tuple[Any, Any]:
    """The model in fp32 on the CPU with its weights, and its tokenizer."""
    import open_clip

    try:
        with _NoRandomInit():
            model = open_clip.create_model(
                located.source,
                load_weights=False,
                pretrained_text=False,
                force_quick_gelu=located.quick_gelu,
                force_preprocess_cfg=located.preprocess,
            )
        tokenizer = open_clip.get_tokenizer(located.source)
    except Exception as error:  # whatever a configuration can break in open_clip, timm or transformers
        raise FinecoError(f"{located.name} cannot be built: {one_line(error)}") from error
    try:
        open_clip.load_checkpoint(model, str(located.weights), strict=True, weights_only=True)
        check_finite(model.state_dict())
    except Exception as error:  # safetensors, pickle and torch each have their own
        raise IntegrityError(
            f"{located.weights} cannot be loaded as the weights of {located.name}: {one_line(error)}",
            "Get the file again; fineco loads safetensors, or .bin files that hold tensors only.",
        ) from error
    return model, tokenizer


def _spec(located: Located, model: Any, tokenizer: Any, weights_sha256: str) -> EncoderSpec:
    import open_clip

    preprocess = open_clip.get_model_preprocess_cfg(model)
    logit_scale = float(model.logit_scale.detach().flatten()[0])
    return EncoderSpec(
        name=located.name,
        dim=int(open_clip.get_model_config(located.source)["embed_dim"]),
        geometry=frame_geometry(preprocess),
        mean=_per_channel(preprocess["mean"]),
        std=_per_channel(preprocess["std"]),
        window=1,
        # rounded, because the fingerprint must not hang on the last bit of a machine's exp()
        temperature=float(f"{math.exp(-logit_scale):.6g}"),
        context_length=int(tokenizer.context_length),
        weights_sha256=weights_sha256,
        licence=licence(located.weights),
    )


def _per_channel(value: Any) -> tuple[float, float, float]:
    red, green, blue = (value,) * 3 if isinstance(value, int | float) else value
    return float(red), float(green), float(blue)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _unit_rows(features: torch.Tensor) -> Float32:
    unit: Float32 = torch.nn.functional.normalize(features.float(), dim=-1).cpu().numpy()
    return unit
