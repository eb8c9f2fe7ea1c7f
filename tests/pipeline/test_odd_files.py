"""Every odd or broken file has the outcome that the table asks for, and none opens what it was not told to."""

from __future__ import annotations

import http.server
import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pipeline.decode import DecodePool, VideoFailed
from pipeline.decoding.container import Report
from pipeline.decoding.decoder import sample_frames
from pipeline.decoding.pixels import Resizer
from pipeline.errors import VideoError
from pipeline.sampling import Sampling
from pipeline.types import DecodeLimits, FrameGeometry, UInt8
from videos import encode_video, moving_picture, pixel_digest, video

ONCE_A_SECOND = Sampling("fps", 1.0)
EVERY_FRAME = Sampling("fps", 1000.0)

# File -> code of the failure, or (frames in all, samples at 1 fps, time of the first frame, time of the last).
OUTCOMES: dict[str, str | tuple[int, int, float, float]] = {
    "NO_EXTENSION": (150, 6, 0.0, 5.96),
    "all_black.mp4": (125, 5, 0.0, 4.96),
    "alpha_vp8.webm": (75, 3, 0.0, 2.96),
    "animated.gif": (20, 2, 0.0, 1.9),
    "audio_only.mp3": "no_video",
    "audio_only.mp4": "no_video",
    "av1.mp4": (50, 2, 0.0, 1.96),
    "bad_stts_count.mp4": "invalid",
    "base_faststart.mp4": (150, 6, 0.0, 5.96),
    "base_ok.mp4": (150, 6, 0.0, 5.96),
    "bitflips_mdat.mp4": (148, 6, 0.0, 5.96),
    "cover_art.m4a": "no_video",
    "cover_art.mp3": "no_video",
    "cover_first_then_video.mp4": (150, 6, 0.0, 5.96),
    "dangling_symlink.mp4": "invalid",
    "edit_list_trim.mp4": (92, 4, 0.0, 3.64),
    "extreme_aspect_1920x32.mp4": (50, 2, 0.0, 1.96),
    "ffv1.mkv": (15, 1, 0.0, 0.56),
    "flv.flv": (75, 3, 0.0, 2.96),
    "fps240.mp4": (480, 2, 0.0, 479 / 240),
    "fragmented_no_duration.mp4": (150, 7, 0.08, 6.04),
    "h263.3gp": (75, 3, 0.0, 2.96),
    "h264_444.mp4": (75, 3, 0.0, 2.96),
    "h264_fullrange_yuvj420p.mp4": (75, 3, 0.0, 2.96),
    "h264_hi422_10bit.mp4": (75, 3, 0.0, 2.96),
    "header_only_200B.mp4": "invalid",
    "hevc10_pq_tagged.mp4": (75, 3, 0.0, 2.96),
    "html_404.mp4": "invalid",
    "image_sequence": "invalid",  # a folder: the catalog's business
    "mkv_piped_no_duration.mkv": (150, 6, 0.0, 5.96),
    "mpeg4_bframes_nopts.avi": (100, 5, 0.04, 4.0),
    "negative_pts.mp4": (100, 4, 0.0, 3.96),
    "negative_start.mkv": (150, 6, 0.0, 5.96),
    "odd_321x181.webm": (75, 3, 0.0, 2.96),
    "odd_321x181_444.mp4": (75, 3, 0.0, 2.96),
    "one_keyframe_only.mp4": (324, 13, 0.0, 12.92),
    "prores.mov": (75, 3, 0.0, 2.96),
    "random_bytes.mp4": "invalid",
    "raw_annexb_nopts.h264": (75, 3, 0.0, 2.96),
    "raw_nopts.mjpeg": (75, 3, 0.0, 2.96),
    "real_dali_cfr.mpeg": (180, 3, 0.0, 2.98),
    "real_decord_corrupted.mp4": (49, 5, 0.0, 4.9),
    "real_decord_unordered.mov": (4, 1, 0.0, 0.09),
    "real_decord_video_180.mov": (3, 1, 0.0, 0.07),
    "real_decord_video_270.mov": (3, 1, 0.0, 0.07),
    "real_decord_video_90.mov": (3, 1, 0.0, 0.07),
    "real_exo_clearkey_encrypted.mp4": "invalid",
    "real_exo_desks.3gp": (71, 6, 0.13, 5.08),
    "real_exo_dolbyvision_hdr.MOV": (4, 1, 0.0, 0.1),
    "real_exo_h265_metadata_track.mp4": (3, 1, 0.0, 0.07),
    "real_exo_htc_rotation.mkv": (30, 1, 0.0, 0.97),
    "real_exo_mdat_too_long.mp4": (30, 1, 0.0, 0.97),
    "real_exo_partially_fragmented.mp4": (30, 2, 0.07, 1.03),
    "real_exo_sef_slow_motion.mp4": (63, 3, 0.0, 2.07),
    "real_gradio_bad_container.mkv": (150, 5, 0.0, 4.97),
    "real_gradio_bad_container.mp4": (150, 5, 0.0, 4.97),
    "real_imageio_cockatoo_seek_artifacts.mp4": (280, 14, 0.0, 13.95),
    "real_moviepy_failing_audio.mp4": (280, 12, 0.0, 11.16),
    "real_moviepy_no_duration.webm": (74, 5, 0.0, 4.87),
    "real_moviepy_transparent.webm": (150, 5, 0.0, 4.97),
    "real_mp4parse_encrypted_cenc.mp4": "no_frames",
    "real_mp4parse_no_timescale.mp4": (168, 7, 0.0, 6.01),  # two of 170 at the time of the one before
    "real_mp4parse_zero_empty_stsc.mp4": "no_frames",
    "real_pixeltable_bad_video.mp4": "invalid",
    "real_torchcodec_av1.mkv": (125, 5, 0.0, 4.96),
    "real_torchcodec_bt2020_10bit.mp4": (60, 2, 0.0, 1.97),
    "real_torchcodec_discard_first_keyframe.mp4": (25, 1, 0.0, 0.96),
    "real_torchcodec_h264_10bits.mp4": (30, 1, 0.0, 0.97),
    "real_torchcodec_h265_10bits.mp4": (30, 1, 0.0, 0.97),
    "real_torchcodec_nasa_multistream.mp4": (390, 13, 0.0, 12.98),  # the larger of two default streams
    "resolution_change_midstream.ts": (109, 4, 0.0, 3.97),
    "rot180.mp4": (150, 6, 0.0, 5.96),
    "rot270.mp4": (150, 6, 0.0, 5.96),
    "rot90.mp4": (150, 6, 0.0, 5.96),
    "sar_16x9_nonsquare.mp4": (75, 3, 0.0, 2.96),
    "single_frame.mp4": (1, 1, 0.0, 0.0),
    "single_still.png": (1, 1, 0.0, 0.0),
    "start_at_3600s.ts": (150, 6, 0.02, 5.98),
    "static_10min_1fps.mp4": (600, 600, 0.0, 599.0),
    "text_named.mp4": "invalid",
    "theora.ogv": (74, 3, 0.0, 2.96),
    "tiny_16x16.mp4": (50, 2, 0.0, 1.96),
    "trunc_90pct_faststart.mp4": (133, 6, 0.0, 5.28),
    "trunc_half_faststart.mp4": (75, 3, 0.0, 2.96),
    "trunc_half_moov_at_end.mp4": "invalid",
    "ts_concat_timestamp_reset.ts": (300, 12, 0.02, 11.98),
    "ts_cut_start_unaligned.ts": "no_frames",
    "ts_cut_start_unaligned_gop1s.ts": (125, 6, 0.48, 5.44),
    "two_video_streams_second_default.mkv": (148, 5, 0.02, 5.0),  # the second stream
    "vfr_5s_hole.mp4": (124, 5, 0.0, 9.96),
    "vfr_gaps.mp4": (111, 8, 0.0, 7.92),
    "video_starts_3s_after_audio.mp4": (150, 6, 3.0, 8.96),
    "vp9.webm": (75, 3, 0.0, 2.96),
    "webm_named.mp4": (75, 3, 0.0, 2.96),
    "wmv2.wmv": (75, 3, 0.0, 2.96),
    "zero_bytes.mp4": "invalid",
    "zeroed_hole_mdat.mp4": (116, 6, 0.0, 5.96),  # two of 118 at the time of the one before
    "名前 with spaces & ünïcode 'quote'.mp4": (150, 6, 0.0, 5.96),
}
NOTES = {
    "bitflips_mdat.mp4": "decoder errors",
    "real_decord_corrupted.mp4": "decoder errors",
    "zeroed_hole_mdat.mp4": "decoder errors",
    "trunc_half_faststart.mp4": "ends at 3.0 s though it declares 6.0 s",
    "trunc_90pct_faststart.mp4": "ends at 5.3 s though it declares 6.0 s",
    "edit_list_trim.mp4": "frames hidden by the file's edit list: 58",
    "negative_pts.mp4": "frames hidden by the file's edit list: 50",
    "ts_concat_timestamp_reset.ts": "the clock jumps back",
}


@pytest.fixture(scope="module")
def odd(shared: Path) -> Path:
    return shared / "data" / "odd"


def read(path: Path, sampling: Sampling, skip: bool = True) -> tuple[list[tuple[float, bytes]], Report]:
    report = Report()
    frames = sample_frames(str(path), sampling, report, DecodeLimits(), skip=skip)
    return [(seconds, pixel_digest(frame)) for seconds, frame in frames], report


def refused(path: str, limits: DecodeLimits | None = None) -> str:
    """The code that decoding `path` ends with."""
    with pytest.raises(VideoError) as caught:
        next(sample_frames(path, EVERY_FRAME, Report(), limits or DecodeLimits()))
    assert "\n" not in caught.value.message
    return caught.value.code


def test_the_table_knows_every_file(odd: Path) -> None:
    assert {path.name for path in odd.iterdir()} - {"README.md"} == set(OUTCOMES)


@pytest.mark.parametrize("name", OUTCOMES)
def test_outcome(name: str, odd: Path) -> None:
    outcome = OUTCOMES[name]
    if isinstance(outcome, str):
        assert refused(str(odd / name)) == outcome
        return
    every, _ = read(odd / name, EVERY_FRAME)
    times = [seconds for seconds, _ in every]
    n_frames, n_samples, first, last = outcome
    assert len(every) == n_frames
    assert [times[0], times[-1]] == pytest.approx([first, last], abs=0.006)
    assert all(a < b for a, b in itertools.pairwise(times))
    samples, report = read(odd / name, ONCE_A_SECOND)
    assert len(samples) == n_samples
    assert set(samples) <= set(every)  # times and pixels are those of frames that are there
    assert [int(seconds) for seconds, _ in samples] == sorted({int(seconds + 1e-9) for seconds in times})
    assert report.duration_seconds == pytest.approx(last, abs=1.01)
    assert NOTES.get(name, "") in "; ".join(report.notes)


@pytest.mark.parametrize(
    "name",
    ["base_ok.mp4", "edit_list_trim.mp4", "mkv_piped_no_duration.mkv", "trunc_half_faststart.mp4", "vfr_gaps.mp4"],
)
def test_frames_and_keyframes_of_odd_files_are_those_of_plain_decoding(name: str, odd: Path) -> None:
    for sampling in (Sampling("frames", 5), Sampling("keyframes")):
        assert read(odd / name, sampling)[0] == read(odd / name, sampling, skip=False)[0]


def test_no_frame_is_invented_in_a_hole(odd: Path) -> None:
    times = [seconds for seconds, _ in read(odd / "vfr_5s_hole.mp4", Sampling("fps", 4.0))[0]]
    assert [t for t in times if 2 < t < 7] == []
    assert min(t for t in times if t >= 7) == pytest.approx(7.04)
    assert max(t for t in times if t <= 2) >= 1.7


def test_times_behind_a_zeroed_hole_are_those_of_the_whole_file(odd: Path) -> None:
    whole = {round(seconds, 6) for seconds, _ in read(odd / "base_ok.mp4", EVERY_FRAME)[0]}
    damaged = [round(seconds, 6) for seconds, _ in read(odd / "zeroed_hole_mdat.mp4", EVERY_FRAME)[0]]
    assert set(damaged) <= whole
    assert max(b - a for a, b in itertools.pairwise(damaged)) > 1  # the hole is still there, not closed up


def picture(path: Path, geometry: FrameGeometry) -> UInt8:
    report = Report()
    _, frame = next(sample_frames(str(path), ONCE_A_SECOND, report, DecodeLimits()))
    return Resizer(geometry)(frame, report.pixel_aspect)


@pytest.mark.parametrize(("name", "quarter_turns"), [("rot90.mp4", 1), ("rot180.mp4", 2), ("rot270.mp4", 3)])
def test_rotated_files_come_upright(name: str, quarter_turns: int, odd: Path) -> None:
    """The same clip with a display matrix: the picture is the control's, turned."""
    geometry = FrameGeometry(90, 90, resize="bound")
    expected = np.rot90(picture(odd / "base_ok.mp4", geometry), quarter_turns)
    assert expected.shape == ((160, 90, 3) if quarter_turns % 2 else (90, 160, 3))
    assert np.array_equal(picture(odd / name, geometry), expected)


def test_the_same_picture_in_other_files_looks_the_same(odd: Path) -> None:
    """Moved index, cover art first, edit list, another name: the control's picture."""
    geometry = FrameGeometry(64, 64)
    control = picture(odd / "base_ok.mp4", geometry)
    for name in ("base_faststart.mp4", "cover_first_then_video.mp4", "NO_EXTENSION", "video_starts_3s_after_audio.mp4"):
        assert np.array_equal(picture(odd / name, geometry), control), name


def test_pixels_that_are_not_square_are_stretched(odd: Path) -> None:
    assert picture(odd / "sar_16x9_nonsquare.mp4", FrameGeometry(90, 90, resize="bound")).shape == (90, 160, 3)


def test_of_several_streams_the_default_then_the_largest_is_taken(odd: Path) -> None:
    for name, size in (
        ("real_torchcodec_nasa_multistream.mp4", (480, 270)),
        ("two_video_streams_second_default.mkv", (640, 360)),
        ("cover_first_then_video.mp4", (640, 360)),
    ):
        _, frame = next(sample_frames(str(odd / name), ONCE_A_SECOND, Report(), DecodeLimits()))
        assert (frame.width, frame.height) == size, name


# ---- what a name or a file's content must not make the decoder open


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """A server on this machine: (address, the paths that were asked for)."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            return

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listener:
        threading.Thread(target=listener.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{listener.server_address[1]}", asked
        listener.shutdown()


HLS = "#EXTM3U\n#EXT-X-TARGETDURATION:2\n{extra}#EXTINF:2.0,\n{target}\n#EXT-X-ENDLIST\n"
MASTER = "#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=100000\n{target}\n"
SDP = "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n"
DASH = (
    '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" mediaPresentationDuration="PT2S">'
    '<Period><AdaptationSet mimeType="video/mp4"><Representation id="1" bandwidth="1000" codecs="avc1.64000a">'
    "<BaseURL>{target}</BaseURL></Representation></AdaptationSet></Period></MPD>"
)


@pytest.mark.fault
@pytest.mark.parametrize("name", ["list.m3u8", "list.mp4", "list.mkv", "list.ts"])
@pytest.mark.parametrize("kind", ["local", "relative", "http", "key", "master", "master http", "concat", "sdp", "dash"])
def test_a_file_that_names_other_media_is_refused(
    kind: str, name: str, tmp_path: Path, server: tuple[str, list[str]]
) -> None:
    address, asked = server
    other = encode_video(tmp_path / "other.ts", n_frames=10)
    child = tmp_path / "child.m3u8"
    child.write_text(HLS.format(extra="", target=other))
    text = {
        "local": HLS.format(extra="", target=other),
        "relative": HLS.format(extra="", target="other.ts"),
        "http": HLS.format(extra="", target=f"{address}/segment.ts"),
        "key": HLS.format(extra=f'#EXT-X-KEY:METHOD=AES-128,URI="{address}/key"\n', target="other.ts"),
        "master": MASTER.format(target="child.m3u8"),
        "master http": MASTER.format(target=f"{address}/child.m3u8"),
        "concat": "ffconcat version 1.0\nfile other.ts\n",
        "sdp": SDP,
        "dash": DASH.format(target=f"{address}/x.mp4"),
    }[kind]
    (tmp_path / name).write_text(text)
    started = time.monotonic()
    assert refused(str(tmp_path / name)) == "invalid"
    assert time.monotonic() - started < 3
    assert asked == []


@pytest.mark.fault
def test_a_name_is_a_file_and_nothing_else(
    tmp_path: Path, server: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, asked = server
    monkeypatch.chdir(tmp_path)
    encode_video(tmp_path / "a.ts", n_frames=10)
    encode_video(tmp_path / "001.png", [moving_picture(1, (32, 32))], codec="png", pixel_format="rgb24")
    names = [
        f"{address}/a.mp4",
        "concat:a.ts|a.ts",
        "file:a.ts",
        "subfile,,start,0,end,100,,:a.ts",
        "%03d.png",
        "*.png",
        "-",
        "pipe:0",
        "fd:",
        "data:video/mp4;base64,AAAA",
        "lavfi:testsrc",
        "testsrc",
        "/dev/video0",
        "a\0b.ts",
    ]
    assert {name: refused(name) for name in names} == dict.fromkeys(names, "invalid")
    assert asked == []


@pytest.mark.parametrize("name", ["%03d.mp4", "-", "concat:a|b.mp4", "http:a.mp4", "file:x.mp4", "a\nb.mp4"])
def test_a_file_with_such_a_name_is_decoded(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode_video(tmp_path / "x.mp4", n_frames=10).rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert len(read(Path(name), EVERY_FRAME)[0]) == 10


# ---- bombs


@pytest.mark.fault
def test_a_picture_over_the_limit_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    """16000x16000 in a few kilobytes: a real picture whose header is made to say so."""
    path = encode_video(tmp_path / "bomb.mkv", codec="ffv1", n_frames=1, size=(256, 256), pixel_format="bgr0")
    data = path.read_bytes()
    small, large = b"\xb0\x82\x01\x00\xba\x82\x01\x00", b"\xb0\x82\x3e\x80\xba\x82\x3e\x80"  # PixelWidth, PixelHeight
    assert data.count(small) == 1
    path.write_bytes(data.replace(small, large))
    started = time.monotonic()
    assert refused(str(path)) == "max_pixels"
    assert time.monotonic() - started < 2


@pytest.mark.fault
@pytest.mark.parametrize("codec", ["libx264", "mjpeg", "libvpx"])
def test_a_frame_larger_than_declared_is_refused_by_the_decoder(codec: str, tmp_path: Path) -> None:
    """The container says 96x64; the pictures behind it are 640x480, over the limit."""
    pixel_format = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    path = encode_video(tmp_path / "liar.mkv", codec=codec, n_frames=3, size=(640, 480), pixel_format=pixel_format)
    data = path.read_bytes()
    large, small = b"\xb0\x82\x02\x80\xba\x82\x01\xe0", b"\xb0\x82\x00\x60\xba\x82\x00\x40"
    assert data.count(large) == 1
    path.write_bytes(data.replace(large, small))
    assert read(path, EVERY_FRAME)[0]  # within the limit it decodes, whatever the header says
    assert refused(str(path), DecodeLimits(max_pixels=320 * 240)) in ("max_pixels", "no_frames")


@pytest.mark.fault
def test_one_bad_video_leaves_its_neighbours_alone(tmp_path: Path) -> None:
    good = video(encode_video(tmp_path / "good.mp4", n_frames=10))
    (tmp_path / "empty.mp4").touch()
    big = video(encode_video(tmp_path / "big.mp4", n_frames=2, size=(640, 480)))
    limits = DecodeLimits(max_pixels=320 * 240)
    with DecodePool(1, ONCE_A_SECOND, FrameGeometry(32, 32), limits) as pool:
        events = list(pool.decode([video(tmp_path / "empty.mp4"), big, good], threading.Event()))
    failed = {event.video.video_id: event.error.code for event in events if isinstance(event, VideoFailed)}
    assert failed == {"empty": "invalid", "big": "max_pixels"}
    assert sum(event.video == good for event in events) == 2  # its frame and its end
