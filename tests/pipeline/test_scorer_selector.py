"""`--selector scorer`: the highest predicted scores are kept, by the scorer that the collection was selected with."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from command_line import fineco
from fakes import FakeEncoder
from models.scorer import FrameScorer, load_scorer, save_scorer, score_frames_without_text
from models.scorer_file import ScorerFacts
from pipeline import commands
from pipeline.collection import Collection
from pipeline.config import SelectOptions, plan_selection
from pipeline.errors import UsageError
from pipeline.files import sha256_of
from pipeline.run import Selecting
from pipeline.select import Keep, embed_video, n_kept, parse_keep, select_frames
from pipeline.store import round_features
from pipeline.types import FrameFeatures
from small_runs import checked, embeddings_of, features_of, machine, make_videos, run


def write_scorer(path: Path, encoder: FakeEncoder, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    scorer = FrameScorer(encoder.spec.dim, 8)
    save_scorer(path, scorer, ScorerFacts(encoder.spec.name, encoder.spec.fingerprint, 1, 1, {}))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four videos, two of them with text, selected by caption; a scorer, another, and one of another encoder."""
    folder = tmp_path_factory.mktemp("finished")
    run(folder / "c", make_videos(folder / "videos"))
    write_scorer(folder / "scorer", FakeEncoder())
    write_scorer(folder / "other", FakeEncoder(), seed=1)
    write_scorer(folder / "stranger", FakeEncoder(seed=1))
    return folder


@pytest.fixture
def here(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to change, without its videos; loading an encoder fails."""
    for name in ("scorer", "other", "stranger"):
        shutil.copy(finished / name, tmp_path / name)
    shutil.copytree(finished / "c", tmp_path / "c")
    monkeypatch.setattr("models.registry.load_encoder", None)
    return tmp_path


def by(path: Path, keep: str | None = "0.5") -> SelectOptions:
    return SelectOptions("scorer", keep, scorer=path)


def test_the_best_frame_of_every_part_is_kept_without_decoding_or_embedding(here: Path) -> None:
    assert commands.select(here / "c", by(here / "scorer"), machine()) == 4
    assert Collection(here / "c").current_selection() == f"scorer-0.5-{sha256_of(here / 'scorer')[:8]}"
    scorer, embeddings = load_scorer(here / "scorer"), embeddings_of(here / "c")
    for path, features in features_of(here / "c").items():
        scores = score_frames_without_text(scorer, features.features)
        n = n_kept(parse_keep("0.5"), len(scores))
        parts = [range(i * len(scores) // n, (i + 1) * len(scores) // n) for i in range(n)]
        kept = [min(part, key=lambda i: (-scores[i], i)) for part in parts]
        found = embeddings[path]
        assert found.selector == "scorer"  # of videos with text too
        np.testing.assert_array_equal(found.pts_seconds, features.pts_seconds[kept])
        np.testing.assert_array_equal(found.scores, scores[kept])
        np.testing.assert_array_equal(found.features, features.features[kept])
        mean = features.features[kept].mean(axis=0)
        np.testing.assert_allclose(found.vector, mean / np.linalg.norm(mean), atol=1e-6)
    checked(here / "c")


def test_a_run_selects_as_a_later_selection_does(finished: Path, tmp_path: Path) -> None:
    run(tmp_path / "c", finished / "videos", select=by(finished / "scorer"))
    commands.select(shutil.copytree(finished / "c", tmp_path / "d"), by(finished / "scorer"), machine())
    streamed, later = embeddings_of(tmp_path / "c"), embeddings_of(tmp_path / "d")
    assert streamed.keys() == later.keys()
    for path, embedding in streamed.items():
        np.testing.assert_array_equal(embedding.vector, later[path].vector)
        np.testing.assert_array_equal(embedding.scores, later[path].scores)


def test_an_index_of_it_is_searched_like_any_other(here: Path) -> None:
    encoder = FakeEncoder()
    commands.select(here / "c", by(here / "scorer"), machine())
    commands.index(here / "c", machine=machine())
    (hits,) = commands.search(here / "c", ["a red block on a hill"], machine=machine(), encoder=encoder)
    assert len(hits) == 4
    (query,) = encoder.encode_text(["a red block on a hill"])
    for hit in hits:
        best = (embeddings_of(here / "c")[hit.path].features @ query).max()
        assert hit.moments[0].score == pytest.approx(best, abs=1e-5)


def test_the_selection_in_use_goes_on_without_naming_the_scorer_again(here: Path, finished: Path) -> None:
    commands.select(here / "c", by(here / "scorer"), machine())
    name = Collection(here / "c").current_selection()
    for options in (SelectOptions(), SelectOptions("scorer"), SelectOptions(keep="0.5"), by(finished / "scorer")):
        plan = plan_selection(Collection(here / "c"), options, change=False)
        assert plan.name == name
    videos = finished / "videos"
    run(here / "c", videos, select=SelectOptions())
    assert {embedding.selector for embedding in embeddings_of(here / "c").values()} == {"scorer"}


@pytest.mark.parametrize("how", ["another file", "the file was trained anew"])
def test_another_scorer_is_another_selection(how: str, here: Path, finished: Path) -> None:
    commands.select(here / "c", by(here / "scorer"), machine())
    before = Collection(here / "c").current_selection()
    options = by(here / "other") if how == "another file" else SelectOptions()
    if how != "another file":
        shutil.copy(here / "other", here / "scorer")
    with pytest.raises(
        UsageError, match=r"^scorer: the selection in use was made with \w{12}, the command says \w{12}\n"
    ):
        run(here / "c", finished / "videos", select=options)
    assert Collection(here / "c").current_selection() == before
    assert commands.select(here / "c", options, machine()) == 4
    after = Collection(here / "c").current_selection()
    assert after == f"scorer-0.5-{sha256_of(here / 'other')[:8]}" != before
    checked(here / "c")


def test_another_share_is_refused_by_run(here: Path, finished: Path) -> None:
    commands.select(here / "c", by(here / "scorer"), machine())
    with pytest.raises(UsageError, match=r"^keep: .* made with 0\.5, the command says 3\n"):
        run(here / "c", finished / "videos", select=by(here / "scorer", "3"))
    with pytest.raises(UsageError, match=r"^selector: .* made with scorer, the command says caption\n"):
        run(here / "c", finished / "videos", select=SelectOptions("caption"))


def test_a_scorer_that_is_gone_is_asked_for(here: Path) -> None:
    commands.select(here / "c", by(here / "scorer"), machine())
    (here / "scorer").rename(here / "moved")
    with pytest.raises(UsageError, match="scorer is gone") as refused:
        plan_selection(Collection(here / "c"), SelectOptions(), change=False)
    assert "--scorer FILE" in refused.value.hint
    plan = plan_selection(Collection(here / "c"), by(here / "moved"), change=False)
    assert plan.name == Collection(here / "c").current_selection()


def test_another_encoders_scorer_is_refused_and_nothing_changes(here: Path) -> None:
    before = Collection(here / "c").current_selection()
    with pytest.raises(UsageError, match=r"^scorer: .*stranger was trained on features of fake \(") as refused:
        commands.select(here / "c", by(here / "stranger"), machine())
    assert FakeEncoder().spec.fingerprint[:12] in refused.value.message
    assert FakeEncoder(seed=1).spec.fingerprint[:12] in refused.value.message
    assert Collection(here / "c").current_selection() == before
    with pytest.raises(UsageError, match="was trained on features of"):
        plan = plan_selection(None, by(here / "stranger"), change=False)
        Selecting(plan, FakeEncoder())


def test_a_new_collection_is_not_begun_with_another_encoders_scorer(here: Path, finished: Path) -> None:
    with pytest.raises(UsageError, match=r"stranger was trained on features of fake \("):
        run(here / "new", finished / "videos", select=by(here / "stranger"))
    assert not (here / "new").exists()
    with pytest.raises(UsageError, match="no scorer comes with fake"):
        run(here / "new", finished / "videos", select=SelectOptions("scorer"))
    assert not (here / "new").exists()


def test_without_a_scorer_the_way_to_one_is_said(here: Path) -> None:
    with pytest.raises(UsageError, match="no scorer comes with fake") as refused:
        commands.select(here / "c", SelectOptions("scorer"), machine())
    assert "fineco train-scorer -c COLLECTION" in refused.value.hint
    with pytest.raises(UsageError, match=r"^scorer: .*absent: no such file\n"):
        commands.select(here / "c", by(here / "absent"), machine())


def test_a_heads_own_scorer_is_found_in_its_folder(here: Path, tmp_path: Path) -> None:
    head = tmp_path / "head"
    head.mkdir()
    shutil.copy(here / "scorer", head / "scorer.safetensors")
    plan = plan_selection(None, SelectOptions("scorer"), change=False, model=f"fineco:{head}")
    assert plan.scorer == head / "scorer.safetensors"
    assert plan.content["scorer"] == sha256_of(here / "scorer")
    with pytest.raises(UsageError, match="no scorer comes with fineco:elsewhere"):
        plan_selection(None, SelectOptions("scorer"), change=False, model="fineco:elsewhere")


def test_a_scorer_goes_with_its_selector_alone(here: Path) -> None:
    with pytest.raises(UsageError, match="--scorer goes with --selector scorer, not uniform"):
        plan_selection(None, SelectOptions("uniform", scorer=here / "scorer"), change=True)


def test_the_command_takes_the_file_as_the_choice(here: Path) -> None:
    done = fineco("select", "-c", here / "c", "--scorer", here / "scorer", "--keep", "2")
    assert done.code == 0, done.err
    assert {len(e.features) for e in embeddings_of(here / "c").values()} == {2}
    refused = fineco("select", "-c", here / "c", "--selector", "uniform", "--scorer", here / "scorer")
    assert refused.code == 2
    assert refused.err.startswith("error: --scorer goes with")
    assert "scorer" in fineco("select", "--help").out.decode()


def test_of_equal_predictions_the_earlier_frames_are_kept() -> None:
    rows = round_features(np.eye(4, dtype=np.float32)[[0, 1, 2, 3, 0]])
    video = FrameFeatures("v", rows, np.arange(5, dtype=np.float64), 1.0)
    predicted = np.array([0.5, 7, -3, 7, 7], np.float32)
    selection = select_frames(video, "scorer", Keep(count=2), predicted=predicted)
    assert list(np.flatnonzero(selection.kept)) == [1, 3]
    np.testing.assert_array_equal(selection.scores, predicted)
    assert embed_video(video, selection).selector == "scorer"
    for bad in (None, predicted[:4], predicted.astype(np.float64), np.full(5, np.nan, np.float32)):
        with pytest.raises(ValueError):
            select_frames(video, "scorer", Keep(count=2), predicted=bad)  # type: ignore[arg-type]
