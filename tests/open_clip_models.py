"""Saves an open_clip model with seeded random weights as a `local-dir` folder, for tests and timings.

No weights can be downloaded everywhere, but the loading code and the arithmetic are the same. From a shell:

    python tests/open_clip_models.py ViT-B-32 FOLDER
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TINY: Mapping[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def save_random_model(
    architecture: str | Mapping[str, Any], folder: Path, seed: int = 0, preprocess: Mapping[str, Any] | None = None
) -> Path:
    """Writes `open_clip_config.json` and `open_clip_model.safetensors` into `folder` and returns it.

    Args:
        architecture: A name that open_clip knows, or a `model_cfg` of its form (e.g. `TINY`).
        preprocess: Entries of open_clip's `preprocess_cfg`; without it those of the architecture's first tag.
    """
    import open_clip
    import torch
    from safetensors.torch import save_file

    if isinstance(architecture, str):
        config: Mapping[str, Any] = open_clip.get_model_config(architecture)
        tags = open_clip.list_pretrained_tags_by_model(architecture)
        if preprocess is None and tags:
            published = open_clip.get_pretrained_cfg(architecture, tags[0])
            preprocess = {key: published[key] for key in ("mean", "std", "interpolation", "resize_mode")}
    else:
        config = architecture
    folder.mkdir(parents=True, exist_ok=True)
    described = {"model_cfg": config, "preprocess_cfg": dict(preprocess or {})}
    (folder / "open_clip_config.json").write_text(json.dumps(described, indent=2))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = open_clip.create_model(f"local-dir:{folder}", load_weights=False, pretrained_text=False)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "open_clip_model.safetensors")
    return folder


if __name__ == "__main__":
    save_random_model(sys.argv[1], Path(sys.argv[2]))
