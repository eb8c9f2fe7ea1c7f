"""Names to encoders: what is refused, where weights are looked for, and what a user without a hub is told."""

from __future__ import annotations

import http.server
import importlib.util
import json
import subprocess
import sys
import threading
import time
import types
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
import pytest

from models import open_clip_weights as weights
from models.registry import DEFAULT_MODEL, KINDS, list_cached_encoders, list_encoders, load_encoder
from open_clip_models import TINY, save_random_model
from pipeline.errors import FinecoError, IntegrityError, UsageError

REPOSITORY, COMMIT = "timm/PE-Core-B-16", "0123456789abcdef0123456789abcdef01234567"
CARD = "---\nlicense: other\nlicense_name: test-licence\n---\n# A model\n"


class FakeHub(http.server.BaseHTTPRequestHandler):
    """Serves `files` of one repository; answers `status` instead when it is not 200."""

    files: dict[str, bytes]
    status: int
    requests: list[str]

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        name = self.path.rpartition("/")[2]
        self.requests.append(f"{self.command} {name}")
        data = self.files.get(name)
        status = self.status if self.status != 200 else 200 if data is not None else 404
        self.send_response(status)
        if status == 404:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{name}-1"')
        self.send_header("Content-Length", str(len(data or b"")))
        self.end_headers()
        if body and data and status == 200:
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Keeps the test's output clean."""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FakeHub]]:
    handler = type("Hub", (FakeHub,), {"files": {}, "status": 200, "requests": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    _point_at(monkeypatch, server.server_address[1])
    yield handler
    server.shutdown()
    server.server_close()


def _point_at(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    endpoint = f"http://127.0.0.1:{port}"
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    template = f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def _put_in_cache(cache: Path, name: str) -> Path:
    folder = cache / f"models--{REPOSITORY.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    file = folder / "snapshots" / COMMIT / name
    file.parent.mkdir(parents=True)
    file.write_bytes(b"weights")
    return file


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("ViT-B-32", "did you mean 'open_clip:ViT-B-32'?"),
        ("PE-Core-B-16/meta", "did you mean 'open_clip:PE-Core-B-16/meta'?"),
        ("buildin", r"did you mean 'builtin'\?\)\n.*open_clip:ARCHITECTURE"),
        ("openclip:ViT-B-32", "did you mean 'open_clip:ViT-B-32'?"),
        ("zzz", DEFAULT_MODEL),
        ("", DEFAULT_MODEL),
        ("builtin:large", "takes no choice"),
        ("open_clip", "which model"),
        ("open_clip:PE-Core-B16", r"did you mean 'PE-Core-B-16'\?\)\n.*ViT-B-32, "),
        ("open_clip:vit-b-32", "did you mean 'ViT-B-32'?"),
        ("open_clip:ViT-B-32/opena", r"did you mean 'openai'\?\)\n.*laion400m_e31, "),
        ("open_clip:ViT-e-14", "publishes no weights for ViT-e-14"),
    ],
)
def test_an_unknown_name_lists_the_choices_and_the_nearest(name: str, told: str) -> None:
    with pytest.raises(UsageError, match=told.replace("'?", r"'\?") if told.endswith("'?") else told):
        load_encoder(name, device="cpu")


def test_listing_and_wrong_names_need_no_torch() -> None:
    code = (
        "import sys\n"
        "from models.registry import list_encoders, load_encoder\n"
        "from pipeline.errors import UsageError\n"
        "assert 'open_clip:PE-Core-B-16' in list_encoders() and 'builtin' in list_encoders()\n"
        "for name in ('open_clip:ViT-B-33', 'open_clip:local-dir:/does/not/exist', 'nothing'):\n"
        "    try: load_encoder(name)\n"
        "    except UsageError: continue\n"
        "    raise SystemExit(name)\n"
        "assert not {'torch', 'open_clip', 'huggingface_hub'} & set(sys.modules)\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_builtin_model_gets_a_device_and_a_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("models.builtin.model")
    module.__dict__["load_builtin"] = lambda device, precision: (device, precision)
    monkeypatch.setitem(sys.modules, "models.builtin", types.ModuleType("models.builtin"))
    monkeypatch.setitem(sys.modules, "models.builtin.model", module)
    loaded: object = load_encoder("builtin", device="cpu", precision="fp32")
    assert loaded == ("cpu", "fp32")


def test_every_architecture_is_listed() -> None:
    import open_clip

    assert {f"open_clip:{name}" for name in open_clip.list_models()} | {"builtin"} == set(list_encoders())
    assert set(KINDS) == {"builtin", "open_clip", "s3d", "videoclip", "fineco"}


def test_the_default_is_published(cache: Path) -> None:
    path = _put_in_cache(cache, "open_clip_model.safetensors")
    located = weights.locate(DEFAULT_MODEL.partition(":")[2])
    assert (located.name, located.source, located.weights) == (f"{DEFAULT_MODEL}/meta", "PE-Core-B-16", path)
    assert located.preprocess["resize_mode"] == "squash"
    assert located.preprocess["interpolation"] == "bilinear"
    assert not located.quick_gelu


def test_weights_in_the_cache_need_no_request(cache: Path, hub: type[FakeHub]) -> None:
    path = _put_in_cache(cache, "open_clip_pytorch_model.bin")
    assert weights.locate("PE-Core-B-16/meta").weights == path
    assert list_cached_encoders() == ["open_clip:PE-Core-B-16/meta"]
    assert hub.requests == []


def test_an_empty_cache_holds_no_encoder(cache: Path) -> None:
    assert list_cached_encoders() == []


def test_openai_weights_get_the_activation_they_were_trained_with(hub: type[FakeHub]) -> None:
    hub.files = {"open_clip_model.safetensors": b"weights"}
    located = weights.locate("ViT-B-32")
    assert (located.name, located.quick_gelu) == ("open_clip:ViT-B-32/openai", True)
    assert not weights.locate("ViT-B-32/laion2b_s34b_b79k").quick_gelu


@pytest.mark.parametrize("name", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
def test_missing_weights_are_downloaded_with_their_licence(hub: type[FakeHub], name: str) -> None:
    hub.files = {name: b"weights of the model", "README.md": CARD.encode()}
    located = weights.locate("PE-Core-B-16")
    assert located.weights.read_bytes() == b"weights of the model"
    assert located.weights.name == name
    assert weights.licence(located.weights) == "test-licence"
    hub.requests.clear()
    assert weights.locate("PE-Core-B-16") == located
    assert hub.requests == []


@pytest.mark.parametrize("status", [401, 403, 404, 429, 500, 503])
def test_a_hub_that_refuses_is_one_error_with_the_ways_on(
    hub: type[FakeHub], status: int, capfd: pytest.CaptureFixture[str]
) -> None:
    hub.status = status
    began = time.monotonic()
    with pytest.raises(FinecoError) as caught:
        load_encoder(DEFAULT_MODEL)
    assert time.monotonic() - began < 5
    _check_ways_on(caught.value)
    assert capfd.readouterr() == ("", "")


def test_an_unreachable_hub_is_told_at_once(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    _point_at(monkeypatch, 9)  # nobody listens there
    began = time.monotonic()
    with pytest.raises(FinecoError) as caught:
        load_encoder("open_clip:ViT-B-32/openai")
    assert time.monotonic() - began < 5
    assert "timm/vit_base_patch32_clip_224.openai" in str(caught.value)
    assert "Other tags: laion400m_e31, " in caught.value.hint
    assert str(cache) in caught.value.message
    assert capfd.readouterr() == ("", "")


def test_a_silent_hub_is_given_up(hub: type[FakeHub], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "do_HEAD", lambda self: time.sleep(3))
    monkeypatch.setattr(weights, "HUB_TIMEOUT_SECONDS", 0.5)
    began = time.monotonic()
    with pytest.raises(FinecoError) as caught:
        load_encoder(DEFAULT_MODEL)
    assert time.monotonic() - began < 2.5
    _check_ways_on(caught.value)


def test_a_download_that_breaks_off_is_told(hub: type[FakeHub], cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.files = {"open_clip_model.safetensors": b"weights"}
    monkeypatch.setattr(hub, "do_GET", lambda self: self.connection.close())
    began = time.monotonic()
    with pytest.raises(FinecoError) as caught:
        load_encoder(DEFAULT_MODEL)
    assert time.monotonic() - began < 10
    _check_ways_on(caught.value)
    assert not list(cache.rglob("*.safetensors"))


def test_offline_mode_makes_no_request(hub: type[FakeHub], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FinecoError, match="HF_HUB_OFFLINE is set") as caught:
        load_encoder(DEFAULT_MODEL)
    _check_ways_on(caught.value)
    assert hub.requests == []


def _check_ways_on(error: FinecoError) -> None:
    assert not isinstance(error, UsageError)
    assert "\n" not in error.message
    for told in ("open_clip:PE-Core-B-16/meta", REPOSITORY, "cache"):
        assert told in error.message
    for way in ("--model builtin", "--model open_clip:local-dir:FOLDER"):
        assert way in error.hint


def test_a_model_that_reads_text_with_transformers_says_so_before_any_download(
    hub: type[FakeHub], monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "transformers" else find_spec(name))
    with pytest.raises(UsageError, match=r"needs the package transformers\n.*pip install"):
        load_encoder("open_clip:ViT-B-16-SigLIP2")
    assert hub.requests == []


def test_a_folder_is_named_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_random_model(TINY, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    encoder = load_encoder("open_clip:local-dir:model", device="cpu")
    assert encoder.spec.name == f"open_clip:local-dir:{tmp_path / 'model'}"
    (tmp_path / "model" / "README.md").write_text(CARD)
    (tmp_path / "model").rename(tmp_path / "moved")
    moved = load_encoder("open_clip:local-dir:moved", device="cpu", precision="fp32")
    assert moved.spec.licence == "test-licence"
    assert moved.spec.fingerprint == encoder.spec.fingerprint


@pytest.mark.parametrize(
    ("files", "error", "told"),
    [
        (None, UsageError, "no such folder"),
        ({}, UsageError, "it holds no open_clip_config.json"),
        ({"open_clip_config.json": "{"}, IntegrityError, "open_clip_config.json cannot be read"),
        ({"open_clip_config.json": '{"a": 1}'}, IntegrityError, "no 'model_cfg'"),
        ({"open_clip_config.json": "[]"}, IntegrityError, "no 'model_cfg'"),
        ({"open_clip_config.json": "whole"}, UsageError, "it holds no weights"),
        ({"open_clip_config.json": "whole", "a.bin": "", "b.bin": ""}, UsageError, "which weights.* a.bin, b.bin"),
        ({"open_clip_config.json": "whole", "a.safetensors": "", "b.bin": ""}, IntegrityError, "a.safetensors cannot"),
    ],
)
def test_a_wrong_folder_says_what_is_wrong(
    tmp_path: Path, files: dict[str, str] | None, error: type[FinecoError], told: str
) -> None:
    for name, text in (files or {}).items():
        (tmp_path / name).write_text(json.dumps({"model_cfg": dict(TINY)}) if text == "whole" else text)
    folder = tmp_path if files is not None else tmp_path / "none"
    with pytest.raises(error, match=told) as caught:
        load_encoder(f"open_clip:local-dir:{folder}", device="cpu")
    assert str(folder) in caught.value.message


def test_a_device_that_is_not_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    folder = save_random_model(TINY, tmp_path)
    with pytest.raises(UsageError, match="device cuda: "):
        load_encoder(f"open_clip:local-dir:{folder}", device="cuda")
