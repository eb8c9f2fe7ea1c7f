"""Damaged files of many kinds end in known outcomes, each once, and no decoding process dies without being counted.

A seed makes the same mutants again. Some damage is blind (bits, pieces, the end), some knows what it hits: sizes of
boxes and elements, counts, the order of atoms.
"""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from guards import Guard
from pipeline.decode import DecodedFrame, DecodePool, VideoDecoded
from pipeline.sampling import Sampling
from pipeline.types import DecodeLimits, FrameGeometry
from stories import KNOWN_CODES, Story, hear, nothing_left_behind
from videos import Clip, encode_video, video

# A suffix names the container. Small, so that much of a file is structure.
BASES: dict[str, tuple[str, Clip]] = {
    "mp4": ("mp4", {}),
    "fragmented": ("mov", {"container_options": {"movflags": "frag_keyframe+empty_moov+default_base_moof"}}),
    "mov hevc": ("mov", {"codec": "libx265", "options": {"x265-params": "log-level=none:pools=none"}}),
    "mkv": ("mkv", {"codec": "mpeg4", "b_frames": 2}),
    "webm vp9": ("webm", {"codec": "libvpx-vp9"}),
    "webm vp8": ("webm", {"codec": "libvpx"}),
    "mp4 av1": ("mp4", {"codec": "libsvtav1"}),
    "ts": ("ts", {"fps": 25}),
    "mpeg": ("mpg", {"codec": "mpeg2video", "fps": 25, "b_frames": 2}),
    "avi": ("avi", {"codec": "mpeg4"}),
    "avi mjpeg": ("avi", {"codec": "mjpeg", "pixel_format": "yuvj420p"}),
    "flv": ("flv", {}),
    "ogg": ("ogv", {"codec": "libvpx"}),
    "wmv": ("wmv", {"codec": "wmv2"}),
    "ffv1": ("mkv", {"codec": "ffv1"}),
    "raw": ("h264", {}),
    "gif": ("gif", {"codec": "gif", "pixel_format": "rgb8"}),
    "prores": ("mov", {"codec": "prores", "pixel_format": "yuv422p10le", "n_frames": 6}),
}
ATOMS = (b"moov", b"trak", b"mdia", b"stbl", b"stsz", b"stts", b"stsc", b"stco", b"ctts", b"elst", b"avcC", b"moof")
ELEMENTS = (b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67", b"\x16\x54\xae\x6b", b"\x1f\x43\xb6\x75", b"\xa3", b"\xe0")
SIZES = (0, 1, 7, 8, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
MODES = (Sampling("fps", 5.0), Sampling("frames", 4), Sampling("keyframes"))

pytestmark = pytest.mark.fault


def damage(whole: bytes, rng: random.Random) -> bytes:
    """A few blind changes, or one that knows the structure, or both."""
    data = bytearray(whole)
    if rng.random() < 0.5:
        damage_structure(data, rng)
    if rng.random() < 0.7:
        for _ in range(rng.choice([1, 3, 20])):
            damage_blindly(data, rng)
    return bytes(data)


def damage_blindly(data: bytearray, rng: random.Random) -> None:
    # Most often where the header is: what stands there is believed.
    start = rng.randrange(min(len(data), 1024) if rng.random() < 0.3 else len(data))
    size = rng.choice([1, 4, 64, 512])
    kind = rng.choice(["flip", "flip", "set", "zero", "double", "remove", "swap", "cut"])
    if kind == "flip":
        data[start] ^= 1 << rng.randrange(8)
    elif kind == "set":
        data[start : start + 4] = rng.choice(SIZES).to_bytes(4, rng.choice(["big", "little"]))
    elif kind == "zero":
        data[start : start + size] = bytes(len(data[start : start + size]))
    elif kind == "double":
        data[start:start] = data[start : start + size]
    elif kind == "remove" and len(data) > size + 256:
        del data[start : start + size]
    elif kind == "swap":
        other = rng.randrange(len(data))
        first, second = data[start : start + size], data[other : other + size]
        if abs(other - start) >= size and len(first) == len(second):
            data[start : start + size], data[other : other + size] = second, first
    elif kind == "cut":
        del data[max(256, start) :]


def damage_structure(data: bytearray, rng: random.Random) -> None:
    """Another size, count, number or name in an atom or element; two top-level atoms change places."""
    names = [name for name in ATOMS if name in data]
    if names:
        name = rng.choice(names)
        at = data.index(name)
        kind = rng.choice(["size", "count", "name", "field", "order"])
        if kind == "size":
            data[at - 4 : at] = rng.choice(SIZES).to_bytes(4, "big")
        elif kind == "count":  # behind version and flags
            data[at + 8 : at + 12] = rng.choice(SIZES).to_bytes(4, "big")
        elif kind == "name":
            data[at : at + 4] = rng.choice(ATOMS)
        elif kind == "field":
            field = at + 12 + 4 * rng.randrange(8)
            data[field : field + 4] = rng.choice(SIZES).to_bytes(4, "big")
        else:
            atoms = list(top_level(bytes(data)))
            rng.shuffle(atoms)
            data[:] = b"".join(atoms)
        return
    elements = [name for name in ELEMENTS if name in data]
    if elements:
        name = rng.choice(elements)
        at = data.index(name) + len(name)
        data[at : at + 1] = bytes([rng.choice([0x00, 0x01, 0x80, 0x81, 0xFF, 0x40])])


def top_level(data: bytes) -> Iterator[bytes]:
    """The atoms of an MP4 one after the other; the last may be anything."""
    position = 0
    while position < len(data):
        size = int.from_bytes(data[position : position + 4], "big")
        size = size if 8 <= size <= len(data) - position else len(data) - position
        yield data[position : position + size]
        position += size


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("bases")
    return {
        name: encode_video(
            folder / f"{i}.{suffix}", **{"n_frames": 20, "size": (64, 48), "gop": 8, **arguments}
        ).read_bytes()
        for i, (name, (suffix, arguments)) in enumerate(BASES.items())
    }


def check_mutants(bases: dict[str, bytes], seed: int, n: int, folder: Path) -> Counter[str]:
    """Decodes `n` mutants in each of the ways to sample in turn; returns how often each outcome came."""
    rng = random.Random(seed)
    names = list(bases)
    mutants = []
    for i in range(n):
        name = names[i % len(names)]
        path = folder / f"{seed}-{i}-{name.replace(' ', '-')}"
        path.write_bytes(damage(bases[name], rng))
        mutants.append(video(path, path.name))
    stories: dict[str, Story] = {}
    limits = DecodeLimits(stall_seconds=20, cpu_seconds=20, memory_bytes=1 << 30)
    for k, sampling in enumerate(MODES):
        share = mutants[k :: len(MODES)]
        stop = threading.Event()
        with nothing_left_behind(), DecodePool(2, sampling, FrameGeometry(32, 32), limits) as pool:
            for event in pool.decode(share, stop):
                hear(stories, event)
                if isinstance(event, DecodedFrame):
                    assert event.data.shape == (32, 32, 3)
    assert set(stories) == {mutant.video_id for mutant in mutants}
    assert all(story.over for story in stories.values())
    outcomes: Counter[str] = Counter()
    for name, story in stories.items():
        codes = {code for code, _ in story.failures}
        assert codes <= KNOWN_CODES, f"seed {seed}, mutant {name}: {story.failures}"
        assert isinstance(story.decoded, VideoDecoded) == (not codes)
        assert story.decoded is None or story.seconds
        outcomes[story.failures[-1][0] if story.failures else "ok"] += 1
    return outcomes


def test_a_hundred_mutants_end_in_known_outcomes(bases: dict[str, bytes], tmp_path: Path) -> None:
    outcomes = check_mutants(bases, 20, 100, tmp_path)
    assert 20 <= outcomes["ok"] <= 90, outcomes  # some of each, or the mutations say nothing
    assert len(outcomes) >= 3, outcomes


@pytest.mark.long
@pytest.mark.parametrize("seed", range(100, 110))
def test_a_thousand_mutants_end_in_known_outcomes(seed: int, bases: dict[str, bytes], tmp_path: Path) -> None:
    assert check_mutants(bases, seed, 100, tmp_path).total() == 100


GUARDS = [
    Guard(
        (11,),
        "pipeline/decoding/container.py",
        "    streams = [s for s in streams if s.codec_context is not None]\n",
        "",
        "test_a_hundred_mutants_end_in_known_outcomes",
    ),
    Guard(
        (11,),
        "pipeline/decoding/decoder.py",
        "        except (av.FFmpegError, MemoryError) as error:",
        "        except MemoryError as error:",
        "test_a_hundred_mutants_end_in_known_outcomes",
    ),
]
