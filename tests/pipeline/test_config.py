"""Options against what a collection was made with."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from fakes import FakeEncoder
from models.base import PREPROCESSING_VERSION
from pipeline.collection import Collection
from pipeline.config import (
    DEFAULT_KEEP,
    EmbedOptions,
    SelectOptions,
    check_encoder,
    merge_config,
    plan_selection,
    read_lines,
    sampling_of,
    set_sampling,
)
from pipeline.errors import UsageError
from pipeline.sampling import Sampling
from pipeline.select import Keep

RECORDED = {
    "sampling": {"mode": "fps", "value": 2.0},
    "model": "builtin",
    "precision": "fp32",
    "exact_resize": False,
    "frame_size": 336,
}


@pytest.fixture
def collection(tmp_path: Path) -> Collection:
    return Collection.create(tmp_path / "kitchen", {})


def make_with(collection: Collection, encoder: FakeEncoder) -> None:
    spec = encoder.spec
    collection.update({}, {"name": spec.name, "fingerprint": spec.fingerprint, "precision": encoder.precision})


def use(collection: Collection, options: SelectOptions) -> str:
    plan = plan_selection(collection, options, change=True)
    collection.use_selection(plan.name, plan.content)
    return plan.name


# ------------------------------------------------------------------------------------------------------- features


def test_a_new_collection_gets_one_frame_a_second() -> None:
    merged = merge_config({}, EmbedOptions())
    set_sampling(merged, FakeEncoder().spec)
    assert sampling_of(merged) == Sampling("fps", 1.0)
    assert set(merged) == {"sampling"}


def test_an_encoder_of_windows_settles_the_sampling_rate() -> None:
    spec = replace(FakeEncoder().spec, fps=30.0)
    config: dict[str, Any] = {}
    set_sampling(config, spec)
    assert sampling_of(config) == Sampling("fps", 30.0)
    with pytest.raises(UsageError, match="takes 30 frames/s, not 8 frames a video"):
        set_sampling(merge_config({}, EmbedOptions(Sampling("frames", 8))), spec)


def test_a_demanded_rate_is_part_of_the_fingerprint_and_none_is_not() -> None:
    spec = FakeEncoder().spec
    assert replace(spec, fps=30.0).fingerprint != spec.fingerprint
    facts = {k: v for k, v in asdict(spec).items() if k not in ("name", "licence", "fps")}
    facts["preprocessing"] = PREPROCESSING_VERSION  # as it was computed before a spec had a rate
    expected = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
    assert spec.fingerprint == expected


def test_options_are_recorded_as_given() -> None:
    options = EmbedOptions(Sampling("frames", 8), "fake", "bf16", True, 224)
    merged = merge_config({}, options)
    assert merged == {
        "sampling": {"mode": "frames", "value": 8},
        "model": "fake",
        "precision": "bf16",
        "exact_resize": True,
        "frame_size": 224,
    }
    assert merge_config(merged, options) == merged


def test_options_that_are_not_given_take_the_recorded_value() -> None:
    assert merge_config(RECORDED, EmbedOptions()) == RECORDED
    assert merge_config(RECORDED, EmbedOptions(model="builtin")) == RECORDED
    assert merge_config(RECORDED, EmbedOptions(precision="auto")) == RECORDED


def test_the_recorded_configuration_is_not_changed_in_place() -> None:
    recorded: dict[str, Any] = {"model": "builtin"}
    merge_config(recorded, EmbedOptions(frame_size=224))
    assert recorded == {"model": "builtin"}


@pytest.mark.parametrize(
    ("field", "options", "values"),
    [
        ("sampling", EmbedOptions(sampling=Sampling("fps", 1.0)), ("2 frames/s", "1 frame/s")),
        ("sampling", EmbedOptions(sampling=Sampling("keyframes")), ("2 frames/s", "keyframes")),
        ("model", EmbedOptions(model="open_clip:ViT-B-32"), ("builtin", "open_clip:ViT-B-32")),
        ("precision", EmbedOptions(precision="bf16"), ("fp32", "bf16")),
        ("exact_resize", EmbedOptions(exact_resize=True), ("False", "True")),
        ("frame_size", EmbedOptions(frame_size=224), ("336", "224")),
    ],
)
def test_another_value_is_refused_with_the_field_and_both_values(
    field: str, options: EmbedOptions, values: tuple[str, str]
) -> None:
    with pytest.raises(UsageError) as refused:
        merge_config(RECORDED, options)
    assert refused.value.message.startswith(f"{field}: ")
    assert all(value in refused.value.message for value in values)
    assert "-c" in refused.value.hint
    assert refused.value.exit_code == 2


def test_another_encoder_is_refused_with_both_names(collection: Collection) -> None:
    encoder = FakeEncoder()
    check_encoder(collection, encoder.spec, "fp32")  # nothing recorded yet
    make_with(collection, encoder)
    check_encoder(collection, encoder.spec, "fp32")
    other = FakeEncoder(seed=1).spec
    with pytest.raises(UsageError, match="encoder: ") as refused:
        check_encoder(collection, other, "fp32")
    assert encoder.spec.fingerprint[:12] in refused.value.message
    assert other.fingerprint[:12] in refused.value.message
    with pytest.raises(UsageError, match=r"precision: .*fp32.*bf16"):
        check_encoder(collection, encoder.spec, "bf16")


# ----------------------------------------------------------------------------------------------------- selections


def test_the_first_selection_is_by_caption_and_keeps_a_quarter(collection: Collection) -> None:
    plan = plan_selection(collection, SelectOptions(), change=False)
    assert (plan.selector, plan.keep, plan.topics) == ("caption", Keep(ratio=0.25), ())
    assert plan.name == f"caption-{DEFAULT_KEEP}"


def test_the_selection_in_use_goes_on(collection: Collection) -> None:
    name = use(collection, SelectOptions("uniform", "8"))
    assert name == "uniform-8"
    for options in (SelectOptions(), SelectOptions("uniform"), SelectOptions(keep="8")):
        plan = plan_selection(collection, options, change=False)
        assert (plan.name, plan.keep) == ("uniform-8", Keep(count=8))


def test_another_selection_is_for_select_to_choose(collection: Collection) -> None:
    use(collection, SelectOptions("uniform", "8"))
    with pytest.raises(UsageError, match=r"^keep: .* made with 8, the command says 0\.5") as refused:
        plan_selection(collection, SelectOptions(keep="0.5"), change=False)
    assert "fineco select" in refused.value.hint
    with pytest.raises(UsageError, match=r"^selector: .*uniform.*all"):
        plan_selection(collection, SelectOptions("all"), change=False)
    assert use(collection, SelectOptions("all")) == "all"
    # What belongs to one selector is not carried over to another.
    assert plan_selection(collection, SelectOptions("uniform"), change=True).name == f"uniform-{DEFAULT_KEEP}"


def test_topics_have_a_folder_of_their_own(collection: Collection) -> None:
    with pytest.raises(UsageError, match="topics needs a list"):
        plan_selection(collection, SelectOptions("topics"), change=True)
    with pytest.raises(UsageError, match="not caption"):
        plan_selection(collection, SelectOptions(topics=("a fire",)), change=True)
    first = use(collection, SelectOptions("topics", "4", ("a fire", "a flood")))
    plan = plan_selection(collection, SelectOptions(), change=False)
    assert (plan.name, plan.topics, plan.keep) == (first, ("a fire", "a flood"), Keep(count=4))
    with pytest.raises(UsageError, match="topics: "):
        plan_selection(collection, SelectOptions(topics=("a fire",)), change=False)
    second = use(collection, SelectOptions("topics", "4", ("a fire",)))
    assert first != second
    assert first.startswith("topics-4-")
    assert collection.selection(first)["topics"] == ["a fire", "a flood"]


def test_keep_that_cannot_be_read_is_refused(collection: Collection) -> None:
    with pytest.raises(UsageError, match="half"):
        plan_selection(collection, SelectOptions(keep="half"), change=True)


# ------------------------------------------------------------------------------------------------- lists of texts


def test_lines_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "topics.txt"
    path.write_bytes("\ufeffa fire\r\n\n  a flood  \nüber\n".encode())
    assert read_lines(path, "topic") == ("a fire", "a flood", "über")


@pytest.mark.parametrize("content", [None, b"", b" \n\n", b"\xff\xfe\x00"])
def test_a_file_without_lines_is_refused(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "topics.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=r"topics\.txt") as refused:
        read_lines(path, "topic")
    assert "one topic a line" in refused.value.hint


def test_a_local_model_is_found_again_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = merge_config({}, EmbedOptions(model="open_clip:local-dir:vit"))
    assert config["model"] == f"open_clip:local-dir:{tmp_path / 'vit'}"
    assert merge_config(config, EmbedOptions(model="open_clip:local-dir:./vit"))["model"] == config["model"]
