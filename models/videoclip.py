"""VideoCLIP's two towers (docs/METHOD.md section 3): a BERT over a clip's features, a BERT over a text's words.

The parameters have the names of the published checkpoint, so it loads strictly; `models.convert` makes the folder that
`VideoCLIP.load` reads. A video's and a text's vector are means of last states without [CLS]; they are compared by their
raw dot product, and so the pair's score is the mean of its tokens' scores.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from models.bert import Bert, TowerConfig, initialise
from models.bert_pretrained import read_bert
from models.weights import check_finite
from pipeline.errors import IntegrityError, UsageError

KIND = "videoclip"
CONFIG_NAME = "config.json"
WEIGHTS_NAME = "videoclip.safetensors"


@dataclass(frozen=True, slots=True)
class VideoCLIPConfig:
    """Sizes and special ids of both towers. The defaults are the released model's.

    Attributes:
        hidden_size, n_heads, intermediate_size, n_words, n_positions, dropout: Of both towers, as in `TowerConfig`.
        video_layers, text_layers: Of each tower.
        feature_dim: Length of one token's features (S3D: 512).
        max_video_tokens: Longest clip in tokens; longer videos are several clips.
        max_text_tokens: Longest text in word pieces, special tokens left out.
        cls_id, sep_id, pad_id: Rows of the word tables.
        tokenizer: Folder beside the weights, or name on the hub.
    """

    hidden_size: int = 768
    n_heads: int = 12
    intermediate_size: int = 3072
    n_words: int = 30522
    n_positions: int = 512
    dropout: float = 0.1
    video_layers: int = 6
    text_layers: int = 12
    feature_dim: int = 512
    max_video_tokens: int = 32
    max_text_tokens: int = 61
    cls_id: int = 101
    sep_id: int = 102
    pad_id: int = 0
    tokenizer: str = "bert-base-uncased"

    def tower(self, n_layers: int) -> TowerConfig:
        """The size of one tower."""
        return TowerConfig(
            n_layers,
            self.hidden_size,
            self.n_heads,
            self.intermediate_size,
            self.n_words,
            self.n_positions,
            self.dropout,
        )

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Reads the folder's config.json.

        Raises:
            UsageError: No such file.
            IntegrityError: It is not a VideoCLIP's, or holds what it should not.
        """
        file = folder / CONFIG_NAME
        if not file.is_file():  # a pipe in its place would be waited for
            raise UsageError(
                f"{folder} holds no {CONFIG_NAME}", "'fineco convert OUT --videoclip checkpoint_best.pt' makes one."
            )
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise IntegrityError(f"{file} cannot be read: {error}") from error
        if not isinstance(content, dict) or content.pop("kind", None) != KIND:
            raise IntegrityError(f"{file} is not a VideoCLIP's: its kind is not {KIND!r}")
        types = {field.name: type(field.default) for field in fields(cls)}
        if content.keys() != types.keys():
            raise IntegrityError(f"{file}: unknown or missing: {', '.join(sorted(content.keys() ^ types.keys()))}")
        for name, value in content.items():
            if type(value) is not types[name]:
                raise IntegrityError(f"{file}: {name} is {value!r}, not of type {types[name].__name__}")
        return cls(**content)

    def write(self, folder: Path) -> None:
        """Writes the folder's config.json."""
        content = {"kind": KIND, **asdict(self)}
        (folder / CONFIG_NAME).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


class VideoStates(NamedTuple):
    """What a video tower makes of a batch of videos.

    Attributes:
        tokens: (B, T, H), the state of every token; where the mask is false it means nothing.
        pooled: (B, H), the mean over valid tokens and the [SEP] of each clip.
        hidden: (B, T + 2, H): [CLS], the tokens, [SEP]; of several clips, the first [CLS] and the mean of the [SEP]s.
    """

    tokens: Tensor
    pooled: Tensor
    hidden: Tensor


class VideoTokens(nn.Module):
    """Features (B, T, F) to token vectors (B, T, H), `videomlp` in the checkpoint."""

    def __init__(self, feature_dim: int, hidden_size: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(feature_dim, hidden_size)
        self.LayerNorm = nn.LayerNorm(hidden_size)  # epsilon 1e-5, not BERT's
        self.linear2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, features: Tensor) -> Tensor:
        tokens: Tensor = self.linear2(self.LayerNorm(F.gelu(self.linear1(features))))
        return tokens


class VideoTower(nn.Module):
    """A transformer over the features of a video; it needs no vocabulary beyond its two special tokens.

    Args:
        config: Its size. `n_words` is 2 where [CLS] and [SEP] are learned vectors of the tower's own.
        feature_dim: Length of one token's features.
        max_tokens: Longest clip (at most `config.n_positions - 2`).
        cls_id, sep_id: Their rows in the word table.
    """

    def __init__(
        self, config: TowerConfig, feature_dim: int, max_tokens: int = 32, cls_id: int = 0, sep_id: int = 1
    ) -> None:
        super().__init__()
        if not 1 <= max_tokens <= config.n_positions - 2:
            raise ValueError(f"clips of {max_tokens} tokens and two more do not fit {config.n_positions} positions")
        self.max_tokens = max_tokens
        self.special = (cls_id, sep_id)
        self.videomlp = VideoTokens(feature_dim, config.hidden_size)
        self.bert = Bert(config)
        self.apply(initialise)

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        """One clip in each row: `[CLS] v_1..v_T [SEP]`.

        Args:
            features: (B, T, F), T <= max_tokens.
            mask: (B, T) bool, true where a token is valid. Gaps are allowed: token i keeps position i + 1.

        Returns:
            (B, T + 2, H) states; those of masked tokens mean nothing.
        """
        tokens = self.videomlp(features)
        special = self.bert.words(torch.tensor(self.special, device=features.device))
        special = special.to(tokens.dtype).expand(len(tokens), 2, -1)
        # [SEP] has the place after the longest clip, however short this one is
        positions = torch.arange(features.shape[1] + 2, device=features.device)
        positions[-1] = self.max_tokens + 1
        states: Tensor = self.bert(
            torch.cat([special[:, :1], tokens, special[:, 1:]], dim=1), positions, F.pad(mask, (1, 1), value=True)
        )
        return states

    def encode(self, features: Tensor, mask: Tensor) -> VideoStates:
        """Videos of any length: consecutive clips of `max_tokens`, each its own `[CLS] .. [SEP]`.

        Args:
            features: (B, T, F), any T.
            mask: (B, T) bool, true where a token is valid.

        Returns:
            The states. A video's clips without a valid token play no part; one without any valid token at all is the
            [SEP] of an empty clip, as in the reference.
        """
        batch, length = mask.shape
        if length <= self.max_tokens:
            hidden = self(features, mask)
            valid = F.pad(mask, (0, 1), value=True)
            return VideoStates(hidden[:, 1:-1], masked_mean(hidden[:, 1:], valid), hidden)
        n_clips = -(-length // self.max_tokens)
        padding = n_clips * self.max_tokens - length
        clips = F.pad(features, (0, 0, 0, padding)).reshape(batch * n_clips, self.max_tokens, -1)
        valid = F.pad(mask, (0, padding)).reshape(batch * n_clips, self.max_tokens)
        used = valid.any(dim=1)
        used[::n_clips] = True
        states = self(clips[used], valid[used])
        hidden = states.new_zeros(len(used), *states.shape[1:])
        hidden[used] = states
        tokens = hidden[:, 1:-1].reshape(batch, n_clips * self.max_tokens, -1)[:, :length]
        ends = hidden[:, -1].reshape(batch, n_clips, -1)
        used = used.reshape(batch, n_clips)
        pooled = masked_mean(torch.cat([tokens, ends], dim=1), torch.cat([mask, used], dim=1))
        whole = [hidden[::n_clips, :1], tokens, masked_mean(ends, used).unsqueeze(1)]
        return VideoStates(tokens, pooled, torch.cat(whole, dim=1))


class VideoCLIP(nn.Module):
    """Both towers."""

    def __init__(self, config: VideoCLIPConfig) -> None:
        super().__init__()
        self.config = config
        if config.max_text_tokens + 2 > config.n_positions:
            raise ValueError(
                f"texts of {config.max_text_tokens} words and two more exceed {config.n_positions} positions"
            )
        video = config.tower(config.video_layers)
        self.video_encoder = VideoTower(
            video, config.feature_dim, config.max_video_tokens, config.cls_id, config.sep_id
        )
        self.text_encoder = Bert(config.tower(config.text_layers)).apply(initialise)

    def encode_video(self, features: Tensor, mask: Tensor) -> VideoStates:
        """Features (B, T, F) of any T, with their mask (B, T) -> states; see `VideoTower.encode`."""
        return self.video_encoder.encode(features, mask)

    def encode_text(self, token_ids: Tensor, mask: Tensor) -> Tensor:
        """Texts as `text_batch` lays them out, (B, L) ids and mask -> (B, H), the mean over words and [SEP]."""
        return masked_mean(self.text_states(token_ids, mask)[:, 1:], mask[:, 2:])

    def text_states(self, token_ids: Tensor, mask: Tensor) -> Tensor:
        """The same texts -> (B, L - 1, H): [CLS], words, [SEP]; those of padding mean nothing."""
        # the layout's second id belongs to the video tower
        token_ids, mask = (torch.cat([part[:, :1], part[:, 2:]], dim=1) for part in (token_ids, mask))
        positions = torch.arange(token_ids.shape[1], device=token_ids.device)
        states: Tensor = self.text_encoder(self.text_encoder.words(token_ids), positions, mask)
        return states

    @classmethod
    def from_bert(cls, source: str | Path = "bert-base-uncased", config: VideoCLIPConfig | None = None) -> Self:
        """Both towers with BERT's published weights, to train from there; the video tower takes its first layers.

        Args:
            source: Folder with config.json and model.safetensors, or a repository of the hub.
            config: What BERT does not say: `video_layers`, features, longest clip. BERT's own sizes replace the others.

        Returns:
            The model in training mode, float32, on the CPU. The layers before the video tower are random.

        Raises:
            UsageError, FinecoError, IntegrityError: As `models.bert_pretrained.read_bert`.
        """
        bert, state = read_bert(source)
        config = config or VideoCLIPConfig()
        try:
            config = replace(
                config,
                hidden_size=bert["hidden_size"],
                n_heads=bert["num_attention_heads"],
                intermediate_size=bert["intermediate_size"],
                n_words=bert["vocab_size"],
                n_positions=bert["max_position_embeddings"],
                video_layers=min(config.video_layers, bert["num_hidden_layers"]),
                text_layers=bert["num_hidden_layers"],
            )
            model = cls(config)
            model.text_encoder.load_state_dict(state, strict=True)
            unused = tuple(f"encoder.layer.{n}." for n in range(config.video_layers, config.text_layers))
            first_layers = {name: tensor for name, tensor in state.items() if not name.startswith(unused)}
            model.video_encoder.bert.load_state_dict(first_layers, strict=True)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise IntegrityError(f"{source} is not a BERT that both towers can take: {reason}") from error
        return model

    def save(self, folder: Path) -> None:
        """Writes config.json and videoclip.safetensors (float32) into an existing folder."""
        self.config.write(folder)
        state = {name: tensor.detach().float().cpu().contiguous() for name, tensor in self.state_dict().items()}
        save_file(state, folder / WEIGHTS_NAME)
        shutil.copymode(folder / CONFIG_NAME, folder / WEIGHTS_NAME)  # safetensors makes it unreadable for others

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Reads a folder that `save` or `fineco convert` wrote; in evaluation mode, float32, on the CPU.

        Raises:
            UsageError: The folder lacks a file.
            IntegrityError: A file is damaged, or the two do not fit each other.
        """
        config = VideoCLIPConfig.read(folder)
        file = folder / WEIGHTS_NAME
        if not file.is_file():
            raise UsageError(f"{folder} holds no {WEIGHTS_NAME}", "Convert the checkpoint again: fineco convert.")
        try:
            model = cls(config)
            state = load_file(file)
            check_finite(state)
            model.load_state_dict(state, strict=True)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:300]
            raise IntegrityError(
                f"{file} cannot be loaded as the weights of {folder / CONFIG_NAME}: {reason}",
                "Convert the checkpoint again: fineco convert.",
            ) from error
        return model.eval()


def text_batch(texts: Sequence[Sequence[int]], config: VideoCLIPConfig) -> tuple[Tensor, Tensor]:
    """Lays out tokenised texts as the reference does: `[CLS] [SEP] words [SEP] [PAD]..`, padded to the longest.

    Args:
        texts: Ids of word pieces without special tokens; those beyond `config.max_text_tokens` are cut.
        config: For the special ids.

    Returns:
        Ids (B, L) int64 and their mask (B, L) bool, false on [PAD].
    """
    rows = [[config.cls_id, config.sep_id, *ids[: config.max_text_tokens], config.sep_id] for ids in texts]
    longest = max(map(len, rows), default=3)
    ids = torch.full((len(rows), longest), config.pad_id)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
        mask[number, : len(row)] = True
    return ids, mask


def masked_mean(states: Tensor, mask: Tensor) -> Tensor:
    """(B, L, H) and (B, L) bool -> (B, H), the mean over valid places; at least one in each row."""
    total = torch.where(mask.unsqueeze(-1), states, 0).sum(dim=1)
    return total / mask.sum(dim=1, keepdim=True)
