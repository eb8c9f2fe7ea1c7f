"""From texts to examples: matching by name, spans in tokens, merged cues, cached vectors."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fakes import FakeEncoder
from pipeline.collection import Collection, Snapshot
from pipeline.errors import IntegrityError, UsageError
from pipeline.training.bank import FeatureBank
from pipeline.training.captions import SpokenOf, read_texts, text_vectors, tokens_between
from pipeline.types import TimedText
from small_trainings import caption_of, make_collection, random_rows


def lines(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(
    folder: Path, path: Path | None = None, merge: bool = False, subset: str | None = None
) -> tuple[FeatureBank, SpokenOf, list[str]]:
    snapshot, said = Snapshot(Collection(folder)), list[str]()
    bank = FeatureBank(snapshot)
    return bank, read_texts(snapshot, bank, path, subset, merge, said.append), said


def by_text(bank: FeatureBank, spoken_of: SpokenOf) -> dict[str, tuple[str, list[int]]]:
    parts = zip(spoken_of.texts, spoken_of.videos.tolist(), spoken_of.spans.tolist(), strict=True)
    return {text: (bank.video_ids[video], span) for text, video, span in parts}


def test_without_a_file_the_texts_found_with_the_videos_are_taken(tmp_path: Path) -> None:
    folder = make_collection(tmp_path / "kitchen", 4, {2: [TimedText("whole"), TimedText("part", 1.0, 3.0)]})
    bank, spoken_of, said = read(folder)
    found = by_text(bank, spoken_of)
    assert found["whole"] == ("id-2", [0, 6])
    assert found["part"] == ("id-2", [1, 3])
    assert found[caption_of(0)] == ("id-0", [0, 4])
    assert said == []


def test_a_text_names_its_video_by_id_file_name_or_stem(tmp_path: Path) -> None:
    folder = make_collection(tmp_path / "kitchen", 4, paths={3: "/videos/clip.one.mkv"})
    rows: list[dict[str, Any]] = [
        {"video": "id-0", "caption": "by id"},
        {"video": "clip1.mp4", "text": "by file name"},
        {"video": "clip2", "caption": "by stem", "start": 0.5, "end": 1.5},
        {"video": "clip.one", "caption": "by stem with a dot"},
    ]
    bank, spoken_of, said = read(folder, lines(tmp_path / "captions.jsonl", rows))
    found = by_text(bank, spoken_of)
    assert {text: video for text, (video, _) in found.items()} == {
        "by id": "id-0",
        "by file name": "id-1",
        "by stem": "id-2",
        "by stem with a dot": "id-3",
    }
    assert found["by stem"][1] == [0, 2]
    assert said == []


def test_texts_of_unknown_or_doubtful_videos_are_left_out_and_said(tmp_path: Path) -> None:
    folder = make_collection(tmp_path / "kitchen", 3, paths={1: "/a/same.mp4", 2: "/b/same.mp4"})
    rows: list[dict[str, Any]] = [{"video": f"gone{n}", "caption": "x"} for n in range(5)]
    rows += [
        {"video": "same", "caption": "which one?"},
        {"video": "id-2", "caption": "this one"},
    ]
    bank, spoken_of, said = read(folder, lines(tmp_path / "captions.jsonl", rows))
    assert by_text(bank, spoken_of) == {"this one": ("id-2", [0, 6])}
    assert said == [
        "left out: 5 texts name a video that the collection does not have (gone0, gone1, gone2, ...)",
        "left out: 1 text name one that fits several of its videos (same)",
    ]


def test_texts_of_no_video_here_are_an_error(tmp_path: Path) -> None:
    folder = make_collection(tmp_path / "kitchen", 2, {0: [], 1: []})
    with pytest.raises(UsageError, match="none of its texts belongs to a video of"):
        read(folder, lines(tmp_path / "captions.jsonl", [{"video": "other", "caption": "x"}]))
    with pytest.raises(UsageError, match="have no texts"):
        read(folder)


def test_published_annotations_give_their_training_part(tmp_path: Path, shared: Path) -> None:
    path = shared / "data" / "annotations" / "msrvtt_train_val_annotation.zip"
    folder = make_collection(tmp_path / "kitchen", 2, paths={0: "/videos/video0.mp4", 1: "/videos/video6513.mkv"})
    _, training, _ = read(folder, path)
    _, validation, _ = read(folder, path, subset="validate")
    assert set(training.videos.tolist()) == {0} and len(training.texts) == 20
    assert set(validation.videos.tolist()) == {1} and len(validation.texts) == 20


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (0.0, 10.0, (0, 5)),
        (1.0, 3.0, (1, 3)),  # [1, 2) and [2, 3); what only touches is not covered
        (0.5, 1.5, (0, 2)),
        (2.2, 2.4, (2, 3)),
        (2.0, 2.0, (2, 3)),  # a moment
        (4.9, 99.0, (4, 5)),
        (-3.0, 0.5, (0, 1)),
        (5.0, 6.0, None),
    ],
)
def test_a_span_in_seconds_is_the_tokens_that_cover_it(
    start: float, end: float, expected: tuple[int, int] | None
) -> None:
    assert tokens_between(np.arange(5.0), 1.0, start, end) == expected


def test_a_text_after_the_end_of_its_video_is_left_out(tmp_path: Path) -> None:
    texts = [TimedText("seen", 0.0, 1.0), TimedText("never", 100.0, 101.0)]
    _, spoken_of, said = read(make_collection(tmp_path / "kitchen", 2, {0: texts}))
    assert "never" not in spoken_of.texts and "seen" in spoken_of.texts
    assert said == ["left out: 1 text of a time after the end of the video"]


def test_neighbouring_cues_become_one_text_of_enough_words(tmp_path: Path) -> None:
    cues = [TimedText(f"word{n} two three", float(n), n + 1.0) for n in range(4)]
    long = TimedText(" ".join(f"w{n}" for n in range(100)), 0.0, 2.0)
    texts = {0: [cues[2], cues[0], cues[3], cues[1]], 1: [long], 2: [TimedText("about all of it")]}
    bank, spoken_of, _ = read(make_collection(tmp_path / "kitchen", 3, texts), merge=True)
    found = by_text(bank, spoken_of)
    assert found["word0 two three word1 two three word2 two three"] == ("id-0", [0, 3])
    assert found["word3 two three"] == ("id-0", [3, 4])
    assert found["about all of it"] == ("id-2", [0, 6])
    assert " ".join(f"w{n}" for n in range(64)) in found


def test_features_are_the_latest_of_each_video_and_come_from_the_map(tmp_path: Path) -> None:
    bank, _, _ = read(make_collection(tmp_path / "kitchen", 9, shards=3))
    assert bank.lengths.tolist() == [4 + n % 7 for n in range(9)]
    for number in range(9):
        expected = random_rows(4 + number % 7, number).astype(np.float16).astype(np.float32)
        np.testing.assert_array_equal(bank.rows(number, 1, 4), expected[1:4])
        assert bank.times(number)[0].tolist() == list(range(4 + number % 7))


def test_a_damaged_shard_is_found_before_training(tmp_path: Path) -> None:
    folder = make_collection(tmp_path / "kitchen", 4)
    shard = next((folder / "features").glob("*.h5"))
    content = bytearray(shard.read_bytes())
    content[-20] ^= 1
    shard.write_bytes(content)
    with pytest.raises(IntegrityError, match="SHA-256 differs"):
        read(folder)


def test_a_collection_without_features_is_refused(tmp_path: Path) -> None:
    Collection.create(tmp_path / "empty", {})
    with pytest.raises(UsageError, match="has no features to train on"):
        FeatureBank(Snapshot(Collection(tmp_path / "empty")))


def test_texts_are_encoded_once(tmp_path: Path) -> None:
    spoken_of = SpokenOf(["a", "b", "a"], np.zeros(3, np.int64), np.array([[0, 1]] * 3))
    encoder = FakeEncoder()
    first = text_vectors(spoken_of, tmp_path, "abc", lambda: encoder, lambda: None)
    np.testing.assert_allclose(first, encoder.encode_text(["a", "b", "a"]), atol=1e-3)

    def refuse() -> FakeEncoder:
        raise AssertionError("encoded again")

    again = text_vectors(spoken_of, tmp_path, "abc", refuse, lambda: None)
    np.testing.assert_array_equal(again, first)
    for other in (SpokenOf(["a", "c"], spoken_of.videos[:2], spoken_of.spans[:2]), spoken_of):
        with pytest.raises(AssertionError, match="encoded again"):
            text_vectors(other, tmp_path, "abc" if other is not spoken_of else "abd", refuse, lambda: None)
