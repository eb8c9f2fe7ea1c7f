"""What is trained: a head over a base encoder's features, or VideoCLIP's own towers over S3D's."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from models.base import Encoder, VideoEncoder
from models.bert_pretrained import load_tokenizer
from models.fineco import CONFIG_NAME, WEIGHTS_NAME, FineCoHead, HeadConfig, describe_head, save_weights
from models.losses import Similarity
from models.registry import load_encoder
from models.videoclip import WEIGHTS_NAME as TOWERS_NAME
from models.videoclip import VideoCLIP, VideoCLIPConfig, VideoStates, text_batch
from pipeline.collection import Collection
from pipeline.config import check_encoder
from pipeline.errors import UsageError
from pipeline.files import write_bytes
from pipeline.output import number_of
from pipeline.training.captions import SpokenOf, text_vectors
from pipeline.training.checkpoints import WORK, write_weights
from pipeline.training.distributed import Group
from pipeline.training.examples import Rows, Texts, TextVectors

HEAD_OPTIONS = ("width", "layers", "heads", "dropout", "dim", "residual", "similarity")
TOWERS = "videoclip:"
S3D_FOLDER = "s3d"  # beside VideoCLIP's weights, where `fineco convert` puts it


class Subject(Protocol):
    """A model with its texts and its files."""

    def begin(self, output: Path) -> None:
        """Writes what its folder holds besides weights."""
        ...

    def texts(self, spoken_of: SpokenOf, output: Path, check: Callable[[], None], group: Group) -> Texts:
        """The texts as the model takes them. `check` is called now and then, and raises to stop."""
        ...

    def build(self) -> nn.Module:
        """The model as it starts; random where it is not given."""
        ...

    def save(self, output: Path, model: nn.Module) -> None:
        """Writes the weights."""
        ...


class Head:
    """A head over the features of a collection.

    Args:
        encoder: Instead of the collection's, which is loaded by name when texts are to be encoded.

    Raises:
        UsageError: Sizes that do not fit each other.
    """

    def __init__(
        self,
        options: Mapping[str, Any],
        collection: Collection,
        base_dim: int,
        device: str,
        say: Callable[[str], None],
        encoder: Encoder | None = None,
    ) -> None:
        self._collection, self._device, self._say, self._encoder = collection, device, say, encoder
        self._recorded = recorded_encoder(collection)
        try:
            self._config = HeadConfig(
                input_dim=base_dim,
                text_dim=base_dim,
                dim=options["dim"] or base_dim,
                width=options["width"],
                layers=options["layers"],
                heads=options["heads"],
                intermediate=4 * options["width"],
                dropout=options["dropout"],
                residual=options["residual"],
                similarity=options["similarity"],
                temperature=float(self._recorded["spec"]["temperature"]),
            )
        except ValueError as error:
            raise UsageError(str(error), "Choose other sizes for the head.") from error

    def begin(self, output: Path) -> None:
        description = describe_head(self._config, self._recorded["name"], self._recorded["fingerprint"])
        write_bytes(output / CONFIG_NAME, description)

    def texts(self, spoken_of: SpokenOf, output: Path, check: Callable[[], None], group: Group) -> Texts:
        def load() -> Encoder:
            encoder = self._encoder or load_encoder(
                self._collection.config["model"], self._device, self._recorded["precision"]
            )
            check_encoder(self._collection, encoder.spec, encoder.precision)
            if isinstance(encoder, VideoEncoder):
                raise UsageError(
                    f"{self._collection.folder} has features of {encoder.spec.name}, which is a trained model itself",
                    f"Train over a collection of its base, {encoder.base.spec.name}.",
                )
            self._say(f"Encoding {number_of(len(spoken_of.texts), 'text')} with {encoder.spec.name}")
            return encoder

        for turn in (group.leads, not group.leads):  # one process encodes, the others then find the file
            if turn:
                vectors = text_vectors(spoken_of, output / WORK, self._recorded["fingerprint"], load, check)
            group.say_to_all(None)
        return TextVectors(vectors)

    def build(self) -> nn.Module:
        return FineCoHead(self._config)

    def save(self, output: Path, model: nn.Module) -> None:
        write_weights(output / WEIGHTS_NAME, lambda path: save_weights(path, model))


class Towers:
    """VideoCLIP's towers, to be fine-tuned over a collection of its S3D's features (docs/METHOD.md section 3).

    Args:
        name: `videoclip:FOLDER`, as `fineco convert` makes the folder.

    Raises:
        UsageError: No such folder, or the features are not its S3D's.
    """

    def __init__(self, name: str, collection: Collection, device: str) -> None:
        if not name.startswith(TOWERS) or name == TOWERS:
            raise UsageError(f"--towers {name}: only VideoCLIP's can be trained", f"Write --towers {TOWERS}FOLDER.")
        self._folder = Path(name.removeprefix(TOWERS))
        self._config = VideoCLIPConfig.read(self._folder)
        base = load_encoder(f"s3d:{self._folder / S3D_FOLDER}", device, recorded_encoder(collection)["precision"])
        check_encoder(collection, base.spec, base.precision)

    def begin(self, output: Path) -> None:
        for name in (self._config.tokenizer, S3D_FOLDER):  # so that the folder stands for itself
            if (self._folder / name).is_dir() and not (output / name).exists():
                shutil.copytree(self._folder / name, output / f"{name}.tmp", dirs_exist_ok=True)
                os.replace(output / f"{name}.tmp", output / name)
        self._config.write(output)

    def texts(self, spoken_of: SpokenOf, output: Path, check: Callable[[], None], group: Group) -> Texts:
        config = self._config
        folder = self._folder / config.tokenizer
        special = {"[PAD]": config.pad_id, "[CLS]": config.cls_id, "[SEP]": config.sep_id}
        tokenizer = load_tokenizer(folder if folder.is_dir() else config.tokenizer, config.n_words, special)
        return WordPieces(tokenizer(spoken_of.texts), config)

    def build(self) -> nn.Module:
        return TrainableVideoCLIP(VideoCLIP.load(self._folder))

    def save(self, output: Path, model: nn.Module) -> None:
        assert isinstance(model, TrainableVideoCLIP)
        write_weights(output / TOWERS_NAME, lambda path: save_weights(path, model.towers))


class TrainableVideoCLIP(nn.Module):
    """VideoCLIP with what the objective asks of a model: raw dot products, at temperature 1."""

    similarity: Similarity = "dot"

    def __init__(self, towers: VideoCLIP) -> None:
        super().__init__()
        self.towers = towers

    def encode_video(self, features: Tensor, mask: Tensor) -> VideoStates:
        return self.towers.encode_video(features, mask)

    def encode_text(self, token_ids: Tensor, mask: Tensor) -> Tensor:
        return self.towers.encode_text(token_ids, mask)

    def logit_scale(self) -> Tensor:
        return torch.ones((), device=next(self.parameters()).device)


class WordPieces:
    """Texts as ids of word pieces; a batch is padded to its longest."""

    def __init__(self, ids: Sequence[Sequence[int]], config: VideoCLIPConfig) -> None:
        self._ids = [list(row[: config.max_text_tokens]) for row in ids]
        self._config = config

    def __len__(self) -> int:
        return len(self._ids)

    def inputs(self, rows: Rows) -> tuple[Tensor, ...]:
        return text_batch([self._ids[row] for row in rows.tolist()], self._config)


def recorded_encoder(collection: Collection) -> dict[str, Any]:
    """Name, fingerprint, precision and spec of the encoder of a collection that has features."""
    if collection.encoder is None:
        raise UsageError(f"{collection.folder} has no features to train on", "Run 'fineco run' or 'fineco embed'.")
    return collection.encoder
