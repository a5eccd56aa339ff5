"""The demo without a browser: programs that call it, and visitors who mean no good."""

import asyncio
import base64
import contextlib
import errno
import gzip
import http.server
import importlib.util
import io
import json
import os
import pickle
import shlex
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import requests
import torch
from conftest import free_port, toy_unet
from filelock import FileLock
from PIL import Image
from typer.testing import CliRunner

gr = pytest.importorskip("gradio")
from gradio_client import Client, handle_file  # noqa: E402

from palette_diffusers import (  # noqa: E402
    PalettePipeline,
    PaletteScheduler,
    cli,
    demo,
    demo_downloads,
    demo_editor,
    demo_files,
    demo_handlers,
)  # fmt: skip
from palette_diffusers.demo_batches import Stopped  # noqa: E402
from palette_diffusers.demo_handlers import Handlers, Refused, Result, Settings, gpu_seconds  # noqa: E402
from palette_diffusers.demo_jobs import SOLVERS, Step, watch, with_solver  # noqa: E402
from palette_diffusers.demo_limits import Failed, Limits, whole  # noqa: E402
from palette_diffusers.space import write_space  # noqa: E402

LIMITS = {"PALETTE_MAX_PIXELS": "1000000", "PALETTE_MAX_BYTES": "2000000", "PALETTE_MAX_QUEUE": "2",
    "PALETTE_MAX_JOBS": "2", "PALETTE_MAX_VISITORS": "3"}  # fmt: skip
ROOT = Path(__file__).parents[1]
MCP = importlib.util.find_spec("mcp") is not None


@pytest.fixture(scope="module")
def running():
    os.environ.update(LIMITS)
    try:
        app, url, _ = demo.launch(host="127.0.0.1", prevent_thread_lock=True, quiet=True, mcp=MCP)
    finally:
        for name in LIMITS:
            del os.environ[name]
    yield app, url
    gr.close_all()


@pytest.fixture
def server(running):
    return running[1]


@pytest.fixture
def client(server, tmp_path):
    return Client(server, verbose=False, download_files=str(tmp_path / "answers"))


@pytest.fixture
def file(photo, tmp_path):
    Image.fromarray(photo).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def pixels(path):
    image = Image.open(path)
    assert image.format == "PNG"
    return np.asarray(image.convert("RGB"))


def data_url(data, kind="png"):
    return {"url": f"data:image/{kind};base64,{base64.b64encode(data).decode()}", "meta": {"_type": "gradio.FileData"}}


def encoded(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, **({"format": "PNG"} | options))
    return buffer.getvalue()


def soon(happened, seconds=20):
    """Whether it happens; machines are busy."""
    until = time.monotonic() + seconds
    while not happened() and time.monotonic() < until:
        time.sleep(0.1)
    return happened()


class Request:
    session_hash = "visitor"


PIXEL = encoded(Image.new("RGB", (64, 64), "gray"))


def bomb(side=30_000):
    """A PNG of a few kilobytes' header that says it is 900 megapixels."""
    chunk = lambda kind, data: (  # noqa: E731
        len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
    )
    size = side.to_bytes(4, "big") * 2
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size + b"\x08\x02\0\0\0") + chunk(b"IDAT", zlib.compress(b"\0" * 999))


# programs


def test_every_task_as_an_endpoint(client, file, photo, tmp_path):
    mask = np.zeros(photo.shape[:2], np.uint8)
    mask[40:80, 60:100] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    image = handle_file(file)
    assert pixels(client.predict(image, api_name="/colorize")).shape == photo.shape
    filled = pixels(client.predict(image, handle_file(tmp_path / "mask.png"), api_name="/inpaint"))
    assert np.array_equal(filled[mask == 0], photo[mask == 0]) and (filled != photo).any()
    wide = pixels(client.predict(image, left=10, bottom=20, api_name="/uncrop"))
    assert wide.shape == (180, 220, 3) and np.array_equal(wide[:150, 20:], photo)
    first = pixels(client.predict(image, seed=1, steps=4, api_name="/restore_jpeg"))
    assert np.array_equal(first, pixels(client.predict(image, seed=1, steps=4, api_name="/restore_jpeg")))


def test_a_scan_is_extended_without_its_edges(client, photo, tmp_path):
    scan = photo.copy()
    scan[:, :3] = 0
    Image.fromarray(scan).save(tmp_path / "scan.png")
    kept, made = (
        pixels(client.predict(handle_file(tmp_path / "scan.png"), left=10, trim=trim, api_name="/uncrop"))[:, 20:]
        for trim in (False, True)
    )
    assert np.array_equal(kept, scan) and np.array_equal(made[:, 3:], scan[:, 3:]) and made[:, :3].mean() > 60


def test_hints_as_an_endpoint(client, file, photo, tmp_path):
    strokes = np.zeros((*photo.shape[:2], 4), np.uint8)
    strokes[60:80, 60:100] = 200, 40, 40, 255
    Image.fromarray(strokes).save(tmp_path / "strokes.png")
    free = pixels(client.predict(handle_file(file), seed=1, api_name="/colorize"))
    hints = handle_file(tmp_path / "strokes.png")
    told = client.predict(handle_file(file), hints, seed=1, api_name="/colorize_with_hints")
    change = pixels(told).astype(int) - free
    assert (change[60:80, 60:100, 0] - change[60:80, 60:100, 2]).mean() > 30, "the stroke is red"
    assert np.abs(change @ [0.299, 0.587, 0.114]).max() < 1.5, "and luma what it was"
    for wrong, message in (
        (Image.new("RGBA", (10, 20)), "picture of strokes is 10x20, the photo 200x150"),
        (Image.new("RGB", (200, 150)), "picture of strokes has no transparency"),
        (Image.new("RGBA", (200, 150)), "no stroke is opaque"),
    ):
        wrong.save(tmp_path / "wrong.png")
        with pytest.raises(Exception, match=message):
            client.predict(handle_file(file), handle_file(tmp_path / "wrong.png"), api_name="/colorize_with_hints")


def test_visitors_who_were_away_longest_are_forgotten(running, client, file):
    """Gradio keeps a copy of the page for each visitor, and would for 10,000."""
    first = pixels(client.predict(handle_file(file), seed=1, steps=2, api_name="/colorize"))
    for _ in range(4):
        Client(running[1], verbose=False).predict(api_name="/health")
    assert client.session_hash not in running[0].state_holder
    again = pixels(client.predict(handle_file(file), seed=1, steps=2, api_name="/colorize"))
    assert np.array_equal(again, first)


def test_the_endpoints_are_documented(client):
    endpoints = client.view_api(return_format="dict")["named_endpoints"]
    assert set(endpoints) == {"/colorize", "/colorize_with_hints", "/inpaint", "/uncrop", "/restore_jpeg", "/health"}
    names = [p["parameter_name"] for p in endpoints["/uncrop"]["parameters"]]
    assert names == ["image", "left", "right", "top", "bottom", "seed", "steps", "speed", "trim"]
    assert "luma" in endpoints["/colorize"]["description"]


def test_health(server, client):
    answer = requests.get(f"{server}health", timeout=5)
    assert answer.status_code == 200 and answer.json()["status"] == "ok"
    assert client.predict(api_name="/health")["tasks"] == answer.json()["tasks"]


def test_orientation_alpha_and_gray(client, photo, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(photo).save(tmp_path / "turned.jpg", exif=exif, xmp=b"<rights>mine</rights>", dpi=(300, 300))
    turned = Image.open(client.predict(handle_file(tmp_path / "turned.jpg"), api_name="/colorize"))
    assert turned.size == (150, 200) and turned.info["XML:com.adobe.xmp"] == "<rights>mine</rights>"
    assert round(turned.info["dpi"][0]) == 300
    clear = Image.fromarray(photo).convert("RGBA")
    clear.putalpha(Image.fromarray(photo[..., 0]))
    clear.save(tmp_path / "clear.webp", lossless=True, exact=True)
    out = Image.open(client.predict(handle_file(tmp_path / "clear.webp"), api_name="/restore_jpeg"))
    assert out.mode == "RGBA" and np.array_equal(np.asarray(out)[..., 3], photo[..., 0])


def test_heic(client, photo, tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.register_heif_opener()
    Image.fromarray(photo).save(tmp_path / "phone.heic")
    assert pixels(client.predict(handle_file(tmp_path / "phone.heic"), api_name="/colorize")).shape == photo.shape


@pytest.mark.skipif(not MCP, reason="the package mcp is not installed")
def test_an_agent_finds_the_tasks_and_calls_one(server, photo):
    from mcp import ClientSession
    from mcp.client.streamable_http import streamablehttp_client

    async def talk():
        async with streamablehttp_client(f"{server}gradio_api/mcp/") as (read, write, _):
            async with ClientSession(read, write) as session:
                await session.initialize()
                tools = {tool.name: tool for tool in (await session.list_tools()).tools}
                image = data_url(encoded(Image.fromarray(photo)))["url"]
                called = [name for name in tools if name.endswith("restore_jpeg")][0]
                for _ in range(3):  # Gradio's own client gives its server 5 s to answer, which busy machines miss
                    answer = await session.call_tool(called, {"image": image, "seed": 0, "steps": 4})
                    if [getattr(content, "text", "") for content in answer.content] != ["timed out"]:
                        break
                return tools, answer

    tools, answer = asyncio.run(talk())
    for task in ("colorize", "inpaint", "uncrop", "restore_jpeg"):
        assert any(name.endswith(task) for name in tools), list(tools)
    assert "image" in tools[[name for name in tools if name.endswith("colorize")][0]].inputSchema["properties"]
    assert not answer.isError
    pictures = [content for content in answer.content if content.type == "image"]
    result = Image.open(io.BytesIO(base64.b64decode(pictures[-1].data)))
    assert result.size == (200, 150) and result.format == "PNG"


@pytest.mark.parametrize("task", ["colorization", "inpainting", "uncropping", "jpeg_restoration", "paired"])
def test_it_starts_with_a_model_of_any_task(pipe, tmp_path, task):
    pipe.register_to_config(tasks=[task], default_task=task)
    pipe.save_pretrained(tmp_path)
    assert demo.load(str(tmp_path))[0].config.tasks == [task]


def test_old_files_are_deleted_while_others_come(monkeypatch, tmp_path, photo):
    monkeypatch.setenv("PALETTE_KEEP_SECONDS", "1")
    app, url, _ = demo.launch(host="127.0.0.1", prevent_thread_lock=True, quiet=True)
    picture, until = encoded(Image.fromarray(photo[::-1])), time.monotonic() + 4  # in folders of its own

    def visit(i):
        while time.monotonic() < until:
            assert requests.post(f"{url}gradio_api/upload", files={"files": (f"{i}.png", picture)}, timeout=9).ok

    threads = [threading.Thread(target=visit, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    known = lambda: {n for names in app.get_blocks().temp_file_sets for n in list(names) if n[-6:-5] == "/"}  # noqa: E731
    uploads = known()
    for name in uploads:
        os.utime(name, (time.time() + 1e6,) * 2)  # as where the clock was set back since
    assert {Path(name).name for name in uploads} == {"0.png", "1.png", "2.png", "3.png"}
    half = Path(os.environ["GRADIO_TEMP_DIR"], "tmp1234")  # of a connection that broke
    half.write_bytes(picture)
    (folder := half.with_name("a")).mkdir()
    time.sleep(3.5)
    assert not any(Path(name).exists() for name in uploads) and not known() and not half.exists()
    folders = {folder} | {Path(name).parent for name in uploads}
    assert soon(lambda: not any(path.exists() for path in folders)), "nor empty folders"
    assert half.with_name(demo_files.LOCK).exists()
    app.get_blocks().close()


# who means no good


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bomb.png", bomb(), "pixels"),
        ("large.png", encoded(Image.new("L", (1001, 1000))), "1001x1000"),
        ("note.png", b"no picture at all", "no picture"),
        ("drawing.svg", b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>', "SVG"),
        ("script.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no picture"),
        ("phone.heic", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        ("cut.png", encoded(Image.effect_noise((99, 99), 90))[:4000], "trunc"),
        ("empty.png", b"", "empty"),
    ],
)
def test_files_that_are_refused(client, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(Exception) as caught:
        client.predict(handle_file(tmp_path / name), api_name="/colorize")
    text = str(caught.value)
    assert message.lower() in text.lower(), text
    assert "/tmp" not in text and str(ROOT) not in text, "no path of the machine"


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 0}, {"steps": 101}, {"steps": 2.5}, {"steps": "many"}, {"steps": [8]}, {"steps": True},
        {"seed": -1}, {"seed": 2**40}, {"seed": {"a": 1}}, {"seed": None},
    ],
)  # fmt: skip
def test_values_that_are_refused(client, file, options):
    with pytest.raises(Exception, match=f"{next(iter(options))} is .*expected a whole number from"):
        client.predict(handle_file(file), api_name="/colorize", **options)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 10**400, "7", b"7", None, True])
def test_no_number(value):
    with pytest.raises(gr.Error, match="expected a whole number"):
        whole("seed", value, 0, 9)


def test_too_many_bytes(server, client, tmp_path):
    (tmp_path / "large.png").write_bytes(b"0" * 2_100_000)
    answer = requests.post(
        f"{server}gradio_api/upload", files={"files": (tmp_path / "large.png").open("rb")}, timeout=30
    )
    assert answer.status_code == 413 and "/tmp" not in answer.text
    head = {"Content-Length": "200000000", "Content-Type": "application/json"}
    prepared = requests.Request("POST", f"{server}gradio_api/queue/join", data=b"{", headers=head).prepare()
    prepared.headers["Content-Length"] = "200000000"
    assert requests.Session().send(prepared, timeout=10).status_code == 413

    def endless():
        for _ in range(400):
            yield b" " * 100_000

    try:  # the server may hang up before it has read all
        assert requests.post(f"{server}gradio_api/queue/join", data=endless(), timeout=30).status_code == 413
    except requests.ConnectionError:
        pass
    assert requests.get(f"{server}health", timeout=5).ok


def call(server, endpoint, *data):
    """As a program without the client would call: the error's text, or None."""
    answer = requests.post(f"{server}gradio_api/call/{endpoint}", json={"data": list(data)}, timeout=10)
    if not answer.ok:
        return answer.text
    with requests.get(f"{server}gradio_api/call/{endpoint}/{answer.json()['event_id']}", timeout=60) as stream:
        return stream.text if "event: error" in stream.text else None


def test_files_of_the_server_stay_there(server):
    picture = str(ROOT / "palette_diffusers" / "photographs" / "cat.jpg")
    told = set()
    others = "/etc/passwd", "../../etc/passwd", "/proc/self/environ", "/no", "\0"
    for path in (*others, str(ROOT / "README.md"), picture):
        text = call(server, "colorize", {"path": path, "meta": {"_type": "gradio.FileData"}}, 0, 4, "Standard")
        assert text and "root:" not in text
        for given in ({"path": path}, {"path": path, "meta": {"_type": "x"}}, {"path": f"/tmp/../{path}"}):
            told.add(call(server, "colorize", given, 0, 4, "Standard"))  # Gradio lets it pass
            told.add(call(server, "inpaint", data_url(PIXEL), given, 0, 4, "Standard").replace("mask", "photo"))
        for address in (f"gradio_api/file={path}", f"file={path}", f"gradio_api/file/{path}"):
            assert not requests.get(server + address, timeout=5).ok
    assert len(told) == 1 and "not here any more" in told.pop(), "nor is told what exists"
    local = {"path": f"{server}health", "meta": {"_type": "gradio.FileData"}}
    assert "address" in call(server, "colorize", local, 0, 4, "Standard"), "its own network isn't open to visitors"


class Elsewhere(http.server.BaseHTTPRequestHandler):
    """A photograph, a large file, one that never ends, another address."""

    def do_GET(self):
        kind = self.path.strip("/").partition(".")[0]
        self.send_response({"moved": 302, "round": 302, "gone": 404}.get(kind, 200))
        if kind in ("moved", "round"):
            self.send_header("Location", "/photo.png" if kind == "moved" else "/round")
        if kind == "packed":
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        with contextlib.suppress(OSError):
            if kind == "photo":
                self.wfile.write(encoded(Image.new("RGB", (80, 60), "gray")))
            if kind == "packed":
                self.wfile.write(gzip.compress(bytes(50_000_000)))
            for _ in range({"large": 300, "slow": 20}.get(kind, 0)):
                self.wfile.write(b" " * 10_000)
                time.sleep(0.5 if kind == "slow" else 0)

    def log_message(self, *args):
        pass


def test_an_address_is_read_within_the_limits(server, monkeypatch, tmp_path):
    async def public(host):  # as if this one were
        return host

    monkeypatch.setattr(demo_downloads.safehttpx, "async_validate_url", public)
    monkeypatch.setattr(demo_downloads, "SECONDS", 2)
    demo_downloads.bound_downloads(Limits(max_bytes=2_000_000))  # of the server that was started last
    other = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere)
    threading.Thread(target=other.serve_forever, daemon=True).start()
    try:
        ask = lambda name: call(  # noqa: E731
            server, "colorize", {"path": f"http://127.0.0.1:{other.server_port}/{name}",
                                 "meta": {"_type": "gradio.FileData"}}, 0, 1, "Standard"
        )  # fmt: skip
        assert ask("photo.png") is None and ask("moved") is None
        for name, message in (
            ("large.png", "more than 2 MB"), ("slow.png", "more than 2 s"), ("gone", "answers 404"),
            ("round", "leads on"), ("empty", "empty"), ("a b", "empty"), ("packed", "no picture"),
        ):  # fmt: skip
            assert message in ask(name), name
    finally:
        other.shutdown()
    assert not list(Path(os.environ["GRADIO_TEMP_DIR"]).rglob("*.part"))
    with pytest.raises(Failed, match="can't be read"):
        asyncio.run(demo_downloads.fetch("http://[::1", tmp_path, 9))


def test_what_is_painted_has_an_end_in_memory(server, running, monkeypatch):
    editors = [block for block in running[0].get_blocks().blocks.values() if isinstance(block, gr.ImageEditor)]
    monkeypatch.setattr(demo_editor, "STORE", 1_000_000)
    kept = editors[0].blob_storage

    def paint(name, size, kind="layer", index="0"):
        data = {"type": kind, "index": index, "id": name, "session_hash": "s", "fn_name": "accept_blobs",
                "component_id": editors[0]._id}  # fmt: skip
        return requests.post(f"{server}gradio_api/component_server", data=data, files={"file": b"x" * size}, timeout=9)

    for i in range(9):
        assert paint(f"{i}", 300_000).ok
    assert set(kept) == {"6", "7", "8"} and len(editors) == 2
    assert paint("6", 300_000, "background").ok and set(kept) == {"6", "8"}, "the oldest goes"
    for kind, index in (("layer", "100000000"), ("layer", "-1"), ("layer", "x"), ("other", "0")):
        assert not paint("9", 1, kind, index).ok and "9" not in kept
    monkeypatch.setattr(demo_editor, "AGE", -1)
    paint("10", 1)
    assert not kept
    monkeypatch.setattr(demo_editor, "AGE", 3600)
    assert paint("11", 1).ok and kept
    monkeypatch.setattr(demo_editor, "AGE", -1)
    editors[0].accept_blobs.__self__.forget()  # as is done with the files, without another visitor
    assert not kept
    assert not list((ROOT / "palette_diffusers").glob("*.pyi")), "nothing is written beside the code"


def test_payloads_of_the_wrong_type(server, photo):
    for payload in (None, 7, "photo.png", [], {}, {"path": None}, {"path": 3}, {"url": 5},
                    {"url": "data:image/png;base64,###"}, {"url": "data:image/png;base64,é"}):  # fmt: skip
        assert call(server, "colorize", payload, 0, 4, "Standard"), payload
    assert call(server, "colorize", data_url(encoded(Image.fromarray(photo))), 0, 4, "Standard") is None


def test_a_polyglot_comes_back_as_a_picture_alone(client, photo, tmp_path):
    (tmp_path / "both.png").write_bytes(encoded(Image.fromarray(photo)) + b"<script>alert(1)</script>PK\x03\x04")
    out = client.predict(handle_file(tmp_path / "both.png"), api_name="/restore_jpeg")
    assert b"<script>" not in Path(out).read_bytes()


def test_a_full_queue_says_so_and_none_are_mixed_up(server, tmp_path, photo):
    """Twelve at once, where two may wait: each gets its own picture or is told; the server lives on."""
    answers = {}

    def visit(i):
        Image.new("RGB", (90 + i, 70), (i, i, i)).save(tmp_path / f"{i}.png")
        try:
            own = Client(server, verbose=False, download_files=str(tmp_path / f"answers{i}"))
            answers[i] = pixels(own.predict(handle_file(tmp_path / f"{i}.png"), steps=30, api_name="/colorize")).shape
        except Exception as error:
            answers[i] = str(error)

    threads = [threading.Thread(target=visit, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    done = {i: a for i, a in answers.items() if isinstance(a, tuple)}
    away = [a for a in answers.values() if isinstance(a, str)]
    assert len(answers) == 12 and done and away
    assert all(shape == (70, 90 + i, 3) for i, shape in done.items())
    assert all("queue is full" in text.lower() for text in away), away
    assert requests.get(f"{server}health", timeout=5).json()["waiting"] == 0


@pytest.mark.parametrize(
    ("error", "told", "status"),
    [
        (torch.AcceleratorError("CUDA error: device-side assert triggered\nCompile with"), "graphics processor", 503),
        (RuntimeError("CUDA error: device-side assert triggered"), "graphics processor", 503),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "no memory left", 200),
        (RuntimeError("CUDA error: out of memory"), "no memory left", 200),
        (RuntimeError("/home/anna/unet.py: shapes cannot be multiplied"), "failed at this photo", 200),
    ],
)
def test_a_network_that_fails(pipe, photo, monkeypatch, error, told, status):
    monkeypatch.setattr(demo, "load", lambda *args: (pipe, None))
    forward, calls = pipe.unet.forward, 0

    def failing(*args, **options):
        nonlocal calls
        calls += 1
        if calls > 2:  # in the middle of a job
            raise error
        return forward(*args, **options)

    pipe.unet.forward = failing
    app, url, _ = demo.launch(host="127.0.0.1", prevent_thread_lock=True, quiet=True)
    try:
        given = data_url(encoded(Image.fromarray(photo))), 0, 4, "Standard"
        answer = call(url, "colorize", *given)
        assert told in answer and "CUDA" not in answer and "anna" not in answer
        health = requests.get(f"{url}health", timeout=5)
        assert health.status_code == status and health.json()["reason"] in answer
        assert (health.json()["status"] == "ok") == (status == 200)
        pipe.unet.forward = forward
        assert call(url, "colorize", *given) is None, "whoever comes next is served, where that can be"
    finally:
        app.get_blocks().close()


def test_who_leaves_frees_the_place(server, file):
    own = Client(server, verbose=False)
    job = own.submit(handle_file(file), steps=100, api_name="/restore_jpeg")
    while not job.outputs():
        assert not job.done()
        time.sleep(0.05)
    job.cancel()
    begun = time.monotonic()
    Client(server, verbose=False).predict(handle_file(file), steps=1, api_name="/colorize")
    assert time.monotonic() - begun < 6


# handlers


def settings(**values):
    given = {"seed": 1, "anew": False, "samples": 1, "steps": 2, "solver": next(iter(SOLVERS)), "speed": "Standard"}
    return Settings.checked(Limits(), *(given | values).values())


def test_settings_are_checked():
    assert settings(anew=True) != settings(anew=True) and settings().seed == 1
    for bad in ({"samples": 5}, {"solver": "os.system"}, {"steps": 1000}, {"speed": "light"}):
        with pytest.raises(gr.Error, match="expected"):
            settings(**bad)


def test_limits_come_from_the_environment():
    assert Limits.from_environment({"PALETTE_MAX_QUEUE": "3"}) == Limits(max_queue=3)
    for bad in ("0", "-1", "many", "1.5", ""):
        with pytest.raises(ValueError, match="PALETTE_MAX_BYTES"):
            Limits.from_environment({"PALETTE_MAX_BYTES": bad})


@pytest.mark.parametrize("solver", list(SOLVERS))
def test_every_solver_works_and_leaves_the_pipeline_alone(pipe, photo, solver):
    before = type(pipe.scheduler), dict(pipe.scheduler.config)
    own = with_solver(pipe, SOLVERS[solver])
    *steps, image = watch(own, Handlers(pipe, Limits()).photo(data_url(encoded(Image.fromarray(photo)))),
                          threading.Event(), task="colorization", num_inference_steps=3)
    assert image.size == (200, 150)
    assert (type(pipe.scheduler), dict(pipe.scheduler.config)) == before


def at_once(handlers, photo, number, speeds):
    """Jobs of these speeds, together: their pictures, and of how many steps each told."""
    payload, made, steps = data_url(encoded(Image.fromarray(photo))), {}, {}

    def visit(speed):
        *moments, result = handlers.moments(
            "colorization", payload, handlers.photo(payload), settings(steps=number, speed=speed), speed
        )
        made[speed], steps[speed] = np.asarray(result.after).astype(int), {step.of for step in moments}

    threads = [threading.Thread(target=visit, args=(speed,)) for speed in speeds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return made, steps


def test_a_speed_is_one_request_s_alone(pipe, photo):
    """Fast jobs beside standard ones, at the same time, on one network: each gets what its own pipeline makes."""
    before = type(pipe.scheduler), dict(pipe.scheduler.config), pipe.config.default_steps
    made, steps = at_once(Handlers(pipe, Limits()), photo, 12, ("Fast", "Standard", "Best"))
    assert (type(pipe.scheduler), dict(pipe.scheduler.config), pipe.config.default_steps) == before
    assert steps == {"Fast": {4}, "Standard": {12}, "Best": {16}}
    for speed, number in (("Standard", 12), ("Fast", None), ("Best", None)):
        own = with_solver(pipe, None)
        own = own.speed(speed.lower()) if number is None else own
        generator = torch.Generator().manual_seed(1)
        alone = own(photo, task="colorization", num_inference_steps=number, generator=generator).images[0]
        assert np.abs(made[speed] - np.asarray(alone)).max() <= 1, speed


def test_fast_is_the_student_of_few_steps(pipe, photo):
    """Beside jobs of the network itself, at the same time: no batch mixes the two."""
    few = PalettePipeline(toy_unet(5), PaletteScheduler(initial_noise=0.7), default_steps=5, few_steps=5)
    made, steps = at_once(Handlers(pipe, Limits(), few), photo, 6, ("Fast", "Standard", "Balanced"))
    assert steps == {"Fast": {5}, "Standard": {6}, "Balanced": {8}}
    for speed, own in (("Fast", few), ("Standard", pipe)):
        generator = torch.Generator().manual_seed(1)
        alone = with_solver(own, None)(photo, num_inference_steps=steps[speed].pop(), generator=generator).images[0]
        assert np.abs(made[speed] - np.asarray(alone)).max() <= 1, speed


def test_the_demo_loads_the_student_that_a_checkpoint_names(pipe, tmp_path):
    few = PalettePipeline(toy_unet(5), PaletteScheduler(), default_steps=3, few_steps=3)
    few.save_pretrained(tmp_path / "few")
    own = PalettePipeline(pipe.unet, pipe.scheduler, default_steps=8, student=str(tmp_path / "few"))
    own.save_pretrained(tmp_path / "whole")
    whole, student = demo.load(str(tmp_path / "whole"))
    assert student.config.few_steps == 3 and student.unet.dtype == whole.unet.dtype
    assert demo.load(str(tmp_path / "few"))[1] is None
    (tmp_path / "few" / "model_index.json").unlink()
    assert demo.load(str(tmp_path / "whole"))[1] is None, "the demo starts all the same"


def test_stop_is_within_one_step(pipe, photo):
    from palette_diffusers import canvas

    count, forward = 0, pipe.unet.forward

    def counted(*args, **options):
        nonlocal count
        count += 1
        time.sleep(0.02)
        return forward(*args, **options)

    pipe.unet.forward = counted
    stop = threading.Event()
    steps = watch(pipe, canvas.read(photo), stop, task="colorization", num_inference_steps=50)
    assert isinstance(next(steps), Step)
    stop.set()
    seen = count
    with pytest.raises(Stopped):
        list(steps)
    assert count <= seen + 1
    steps = watch(pipe, canvas.read(photo), threading.Event(), task="colorization", num_inference_steps=50)
    next(steps)
    steps.close()  # what Gradio does when the browser has left
    seen = count
    time.sleep(0.2)
    assert count <= seen + 1


def test_what_zero_gpu_is_given(pipe, photo, monkeypatch):
    """The real package's decorator takes the generator, whose arguments and results go from process to process. On a
    GPU of ZeroGPU, which needs torch built for CUDA, it has not been run."""
    pytest.importorskip("spaces")
    monkeypatch.setenv("SPACES_ZERO_GPU", "true")
    handlers = Handlers(pipe, Limits())
    picture = handlers.photo(data_url(encoded(Image.fromarray(photo))))
    given = pickle.loads(pickle.dumps((picture, "colorization", 1, settings(steps=20), 0, {})))
    assert abs(gpu_seconds(*given) - 10.6) < 1e-6
    *steps, image = [pickle.loads(pickle.dumps(moment)) for moment in handlers.steps(*given)]
    assert image.size == (200, 150) and steps[-1].number == 20
    with pytest.raises(gr.Error, match="this checkpoint knows"):  # a message that comes through
        list(handlers.steps(picture, "sharpening", 1, settings(), 0, {}))
    sides = dict(left=300, right=300, top=75, bottom=75)
    assert abs(gpu_seconds(picture, "uncropping", 1, settings(steps=20), 0, sides) - 14.8) < 1e-6, "of what is made"
    told = []
    monkeypatch.setattr(demo, "_warm", lambda *args: told.append(threading.current_thread()))
    demo.load(None, "cpu")
    assert told == [threading.main_thread()], "what `spaces` makes of CUDA holds for its own thread alone"
    page = demo.Page(handlers)

    def quota():
        yield from steps[:1]
        raise gr.Error("You have no GPU quota left.")

    assert "quota" in list(page._follow(quota(), 1, 0, Request()))[-1][page.status], "in its own words"


def test_brush_upload_invert_and_grow_make_one_mask(pipe, photo):
    handlers = Handlers(pipe, Limits())
    picture = handlers.photo(data_url(encoded(Image.fromarray(photo))))
    layer = Image.new("RGBA", (100, 75))  # painted on a copy of half the size
    layer.paste((255, 0, 120, 150), (10, 10, 20, 20))
    handlers.read_mask = lambda data: [encoded(layer)]
    mask = handlers.mask(picture, {"background": None, "layers": []}, None, False, 0)
    assert mask.shape == (1, 1, 150, 200) and mask[..., 20:40, 20:40].all() and mask.sum() < 25 * 25
    grown = handlers.mask(picture, {"background": None, "layers": []}, None, False, 3)
    assert grown[..., 17:43, 17:43].all() and grown.sum() < 31 * 31
    assert (handlers.mask(picture, {"background": None}, None, True, 0) == 1 - mask).all()
    hole = Image.new("L", (200, 150))
    hole.putpixel((199, 149), 255)
    both = handlers.mask(picture, {"background": None}, data_url(encoded(hole)), False, 0)
    assert both.sum() == mask.sum() + 1
    for nothing in (None, {}, {"background": None, "layers": [], "composite": None}):
        handlers.read_mask = lambda data: []
        with pytest.raises(gr.Error, match="Paint over"):
            handlers.mask(picture, nothing, None, False, 0)
    with pytest.raises(gr.Error, match="mask is 100x75, the photo 200x150"):
        handlers.mask(picture, None, data_url(encoded(Image.new("L", (100, 75), 255))), False, 0)


def test_strokes_are_painted_over_what_was_uploaded(pipe, photo):
    handlers = Handlers(pipe, Limits())
    picture = handlers.photo(data_url(encoded(Image.fromarray(photo))))
    nothing, brush = (None, {"background": None}, {"background": None, "layers": []}), {"background": None}
    for none in nothing:
        assert handlers.hints(picture, none, None) == {}
    layer = Image.new("RGBA", (100, 75))  # the editor's copy is smaller
    layer.paste((255, 0, 0, 255), (10, 10, 20, 20))
    handlers.read_strokes = lambda data: [encoded(layer)]
    painted = np.asarray(handlers.hints(picture, brush, None)["hints"])
    assert painted.shape == (150, 200, 4) and (painted[22:38, 22:38] == (255, 0, 0, 255)).all()
    assert (painted[..., 3] > 0).sum() < 25 * 25
    upload = Image.new("RGBA", (200, 150))
    upload.paste((0, 0, 255, 255), (30, 30, 60, 60))
    both = np.asarray(handlers.hints(picture, brush, data_url(encoded(upload)))["hints"])
    assert (both[22:38, 22:38, 0] == 255).all() and (both[45:59, 45:59] == (0, 0, 255, 255)).all()
    handlers.read_strokes = lambda data: [encoded(Image.new("RGBA", (100, 75)))]
    assert handlers.hints(picture, brush, None) == {}, "an empty layer is no stroke"


def test_a_thousand_strokes_are_one_mask(pipe, photo):
    from gradio.components.image_editor import EditorDataBlobs
    from PIL import ImageDraw

    page = demo.Page(Handlers(pipe, Limits()))
    layer = Image.new("RGBA", (200, 150))
    rng = np.random.default_rng(0)
    for _ in range(1000):
        ImageDraw.Draw(layer).line([tuple(rng.integers(0, 150, 2).tolist()) for _ in range(2)], (255, 0, 0, 255), 2)
    page.editor.blob_storage["x"] = EditorDataBlobs(background=None, layers=[encoded(layer), None], composite=None)
    picture = page.handlers.photo(data_url(encoded(Image.fromarray(photo))))
    mask = page.handlers.mask(picture, {"id": "x"}, None, False, 0)
    assert mask.mean() > 0.5 and not page.editor.blob_storage
    brush = {"layers": [data_url(encoded(layer))] * 99, "id": None}
    assert len(page.handlers._layers(brush, page.handlers.read_mask)) == demo_editor.LAYERS
    for bad in (b"P6 9 9 255 " + bytes(243), bomb(), b"x"):
        with pytest.raises(gr.Error, match="can't be read: paint it again"):
            page.handlers.mask(picture, {"layers": [data_url(bad)]}, None, False, 0)
        page.editor.blob_storage["y"] = EditorDataBlobs(background=None, layers=[bad], composite=None)
        with pytest.raises(gr.Error, match="can't be read: paint it again"):
            page.handlers.mask(picture, {"id": "y"}, None, False, 0)


def test_one_stop_ends_a_batch_and_one_refusal_does_not(pipe, photo):
    handlers = Handlers(pipe, Limits())
    good, bad = data_url(encoded(Image.fromarray(photo))), data_url(b"no picture")
    given = [good, bad | {"orig_name": "a note.png"}, good]
    moments = list(handlers.batch("colorization", given, settings(steps=1), "a"))
    kinds = [type(moment) for moment in moments if not isinstance(moment, Step)]
    assert kinds == [Result, Refused, Result]
    [refused] = [moment for moment in moments if isinstance(moment, Refused)]
    assert refused.name == "a_note" and "no picture" in refused.reason
    moments, seen = handlers.batch("colorization", [good] * 3, settings(steps=1), "a"), []
    with pytest.raises(Stopped):
        for moment in moments:
            seen.append(type(moment))
            if isinstance(moment, Result):  # while it is written, no step is at work
                handlers.stops.stop("a")
    assert seen.count(Result) == 1 and not handlers.stops.busy("a")
    handlers.unwell = "gone"
    with pytest.raises(Failed):
        list(handlers.batch("colorization", [bad, good], settings(steps=1), "a"))


def test_work_has_an_end(pipe, photo):
    forward = pipe.unet.forward
    pipe.unet.forward = lambda *args, **options: time.sleep(0.1) or forward(*args, **options)
    handlers, begun = Handlers(pipe, Limits(max_seconds=1)), time.monotonic()
    given = handlers.photo(data_url(encoded(Image.fromarray(photo))))
    with pytest.raises(Failed, match="more than 1 seconds") as kept:  # with its frames
        list(handlers.moments("colorization", "a", given, settings(steps=100), "a"))
    assert time.monotonic() - begun < 5 and not handlers.stops.busy("a") and kept
    assert soon(lambda: handlers.shared._jobs == 0)


def test_the_button_to_stop_stays_while_another_job_works(pipe):
    page = demo.Page(Handlers(pipe, Limits()))
    with page.handlers.stops.job(Request().session_hash) as job:
        assert page._idle(Request())["visible"]
        with pytest.warns(UserWarning, match="still at work"):
            assert list(page._example("Colorize")(Request(), 0)) == [{page.seed: gr.skip()}]
        page.handlers.stops.event(job).set()  # what was stopped is in nobody's way while it ends
        assert not page._idle(Request())["visible"]
        assert not list(page._example("Colorize")(Request(), 0))[-1][page.stop]["visible"]


def test_a_double_click_is_one_task(pipe):
    """The second began, too, before the first was at work."""
    page = demo.Page(Handlers(pipe, Limits()))
    first = page._example("Colorize")(Request(), 0)
    assert page.status in next(first)
    with pytest.warns(UserWarning, match="still at work"):
        assert list(page._example("Colorize")(Request(), 0)) == [{page.seed: gr.skip()}]
    first.close()  # the browser left
    second = page._example("Colorize")(Request(), 0)
    assert page.status in next(second)
    page.handlers.stops.stop(Request().session_hash or "")
    assert page.status in next(page._example("Colorize")(Request(), 0)), "what was stopped holds no place"


def test_looking_at_a_photo_needs_no_place_in_the_queue(pipe, photo):
    page = demo.Page(Handlers(pipe, Limits()))
    asked = {fn.name: fn.queue for fn in page.blocks.fns.values()}
    assert not any(asked[name] for name in ("_photo_again", "_aspect", "_stop", "_pick")) and asked["_photo"]
    given = data_url(encoded(Image.fromarray(photo)))
    kept, facts, *_ = page._photo_again(given)  # the queue was full
    assert kept == gr.skip() and facts == "200x150" == page._photo(given)[0]
    scan = photo.copy()
    scan[:, :2] = 0
    told = "200x150, with a line along an edge, which Uncrop can make anew"
    assert page._photo(data_url(encoded(Image.fromarray(scan))))[0] == told
    assert page._photo_again(data_url(b"no picture"))[:3] == (None, "", "Choose a photo")
    assert page._aspect(given, "Square") == [0, 0, 16.67, 16.67]
    narrow = data_url(encoded(Image.new("L", (30, 120))))
    with pytest.warns(UserWarning, match="Panorama 3:1 adds 550%"):
        assert all(side == gr.skip() for side in page._aspect(narrow, "Panorama 3:1"))


def test_thin_photos_are_extended_by_a_pixel_at_least(pipe):
    handlers = Handlers(pipe, Limits())
    thin = handlers.photo(data_url(encoded(Image.new("L", (1, 30)))))
    assert handlers.sides(thin, 0, 25, 0, 0)["right"] == 1


# starting and publishing


def test_a_login_needs_user_and_password(monkeypatch):
    for login, missing in ((":secret", "user"), ("anna", "password"), (":", "user"), ("anna:", "password")):
        monkeypatch.setenv("PALETTE_LOGIN", login)
        with pytest.raises(ValueError, match=f"PALETTE_LOGIN has no {missing}"):
            demo.launch()


def test_it_starts_and_asks_for_a_login(tmp_path):
    code = "import palette_diffusers.cli as c; c.app(['demo', '--port', '%d'])"
    port = free_port()
    environment = os.environ | {"PALETTE_LOGIN": "anna:secret", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", code % port], env=environment, cwd=tmp_path)
    try:
        url = f"http://127.0.0.1:{port}/"
        for _ in range(300):
            try:
                assert requests.get(f"{url}health", timeout=1).ok
                break
            except requests.ConnectionError:
                assert process.poll() is None
                time.sleep(0.2)
        assert requests.get(f"{url}config", timeout=5).status_code == 401
        session = requests.Session()
        session.post(f"{url}login", data={"username": "anna", "password": "secret"}, timeout=5)
        assert session.get(f"{url}config", timeout=5).ok
        assert not list(tmp_path.iterdir()), "nothing is written where it was started"
    finally:
        process.terminate()
        process.wait(10)


def test_the_command_says_what_is_missing(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u; f = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'gradio' else f(name, *a)"
    )
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = [sys.executable, "-m", "palette_diffusers.cli", "demo"]
    out = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert out.returncode == 2 and "pip install 'palette-diffusers[demo]'" in out.stderr


def test_the_tree_of_the_space_runs_by_itself(tmp_path):
    run = CliRunner().invoke(cli.app, ["publish-space", "anna/palette", "--dry-run", str(tmp_path / "space")])
    assert run.exit_code == 0, run.output
    names = run.output.split()
    assert {"README.md", "app.py", "requirements.txt", "Dockerfile", "palette_diffusers/demo.py"} <= set(names)
    assert "palette_diffusers/starter/model_index.json" in names and "palette_diffusers/photographs/cat.jpg" in names
    assert not [n for n in names if "__pycache__" in n or n.endswith(".pyc")]
    code = "import app, palette_diffusers.demo as d; print(d.__file__); print(d.load()[0].config.default_task)"
    command, environment = [sys.executable, "-c", code], os.environ | {"PYTHONPATH": ""}
    out = subprocess.run(command, cwd=tmp_path / "space", env=environment, capture_output=True, text=True)
    assert str(tmp_path / "space") in out.stdout and "colorization" in out.stdout, out.stderr
    named = ["publish-space", "anna/palette", "--dry-run", str(tmp_path / "named"), "--model", "anna/mine"]
    assert CliRunner().invoke(cli.app, named).exit_code == 0
    for name, models in (("space", None), ("named", ["anna/mine"])):
        assert huggingface_hub.SpaceCard.load(tmp_path / name / "README.md").data.models == models
    again = CliRunner().invoke(cli.app, ["publish-space", "anna/palette", "--dry-run", str(tmp_path / "space")])
    assert again.exit_code == 2
    assert CliRunner().invoke(cli.app, ["publish-space", "a/b/c", "--dry-run", str(tmp_path / "x")]).exit_code == 2


def test_what_the_dockerfile_does_can_be_done(tmp_path):
    """No docker here: every line is read, what it names is there, and its last command runs and answers its check."""
    tree = set(write_space(tmp_path / "space"))
    text = (tmp_path / "space" / "Dockerfile").read_text()
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]
    steps = {}
    for word, rest in lines:
        steps.setdefault(word, []).append(rest)
    assert lines[0][0] == "FROM" and set(steps) == {
        "FROM", "RUN", "WORKDIR", "COPY", "USER", "ENV", "EXPOSE", "HEALTHCHECK", "CMD"
    }  # fmt: skip
    sources = {word for rest in steps["COPY"] for word in rest.split()[:-1]}
    assert sources - {"."} and sources - {"."} <= tree
    user = steps["USER"][0]
    assert any(run.startswith("useradd") and run.split()[-1] == user for run in steps["RUN"]), "not root"
    order = [word for word, _ in lines]
    assert max(i for i, word in enumerate(order) if word in ("RUN", "COPY")) < order.index("USER")
    front = (ROOT / "spaces_app" / "README.md").read_text()
    assert f"FROM python:{front.split('python_version: ')[1].split()[0].strip(chr(34))}-slim" in text
    assert f"gradio=={front.split('sdk_version: ')[1].split()[0]}" in text
    port, exposed = free_port(), steps["EXPOSE"][0]
    given = dict(pair.split("=") for rest in steps["ENV"] for pair in rest.split())
    assert given["GRADIO_SERVER_NAME"] == "0.0.0.0" and f":{exposed}/health" in steps["HEALTHCHECK"][0]
    environment = os.environ | given | {"GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": str(port)}
    environment["PYTHONPATH"] = ""
    command = json.loads(steps["CMD"][0])
    assert command[0] == "python" and command[1] in tree
    process = subprocess.Popen([sys.executable, *command[1:]], env=environment, cwd=tmp_path / "space")
    try:
        check = shlex.split(steps["HEALTHCHECK"][0].removeprefix("CMD ").replace(exposed, str(port)))
        until = time.monotonic() + 90
        while subprocess.run([sys.executable, *check[1:]], stderr=subprocess.DEVNULL).returncode:
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.5)
    finally:
        process.terminate()
        process.wait(10)
    assert not list((tmp_path / "space").rglob("__pycache__")), "the server writes nothing beside its code"


def test_the_space_pins_what_is_tested():
    tested = set((ROOT / "constraints.txt").read_text().split("\n"))
    assert set((ROOT / "spaces_app" / "requirements.txt").read_text().split()) <= tested
    front = (ROOT / "spaces_app" / "README.md").read_text().split("---")[1]
    assert f"gradio=={front.split('sdk_version: ')[1].split()[0]}" in tested
    card = huggingface_hub.SpaceCard(f"---{front}---")
    assert card.data.sdk == "gradio" and (ROOT / "spaces_app" / card.data.app_file).exists()
    assert len(card.data.short_description) <= 60, "the Hub's limit"


def test_a_full_disk_is_told(pipe, photo, tmp_path, monkeypatch):
    def full(self, path, *args, **options):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    image = Image.fromarray(photo)
    with monkeypatch.context() as patch, pytest.raises(Failed, match="disk is full"):
        patch.setattr(Image.Image, "save", full)
        demo_handlers.write(image, tmp_path / "a.png")
    assert not list(tmp_path.iterdir())
    (tmp_path / "palette.zip").symlink_to("/dev/full")
    with pytest.raises(Failed, match="disk is full"):
        demo_handlers.pack([demo_handlers.write(image, tmp_path / "b.png")], tmp_path)

    monkeypatch.setattr(demo, "load", lambda *args: (pipe, None))
    app, url, _ = demo.launch(host="127.0.0.1", prevent_thread_lock=True, quiet=True)
    try:
        given = data_url(encoded(image)), 0, 4, "Standard"
        with monkeypatch.context() as patch:
            patch.setattr(Image.Image, "save", full)
            answer = call(url, "colorize", *given)
        assert "disk is full" in answer and "/tmp" not in answer
        assert call(url, "colorize", *given) is None, "whoever comes when there is room is served"
    finally:
        app.get_blocks().close()


@pytest.mark.parametrize("way", ["command", "Space"])
def test_visitors_files_are_in_a_folder_of_its_own_that_goes_with_it(photo, tmp_path, way):
    (tmp_path / "gradio").write_text("another user's")
    (left := tmp_path / f"{demo_files.PREFIX}left").mkdir()  # by one that was killed
    (left / demo_files.LOCK).touch()
    (other := tmp_path / f"{demo_files.PREFIX}other").mkdir()  # whatever that is
    (other / ".lock").touch()  # a run's, say
    (used := tmp_path / f"{demo_files.PREFIX}used").mkdir()
    with FileLock(used / demo_files.LOCK):
        _own_folder(photo, tmp_path, way, left)
    assert other.exists() and used.exists()


def _own_folder(photo, tmp_path, way, left):
    port = free_port()
    environment = {k: v for k, v in os.environ.items() if k != "GRADIO_TEMP_DIR"} | {"TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", "palette_diffusers.cli", "demo", "--port", str(port)]
    if way == "Space":
        command = [sys.executable, str(ROOT / "spaces_app" / "app.py")]
        environment |= {"GRADIO_SERVER_PORT": str(port), "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}/"
        for _ in range(600):
            try:
                requests.get(f"{url}health", timeout=1)
                break
            except requests.ConnectionError:
                assert process.poll() is None
                time.sleep(0.1)
        sent = requests.post(f"{url}gradio_api/upload", files={"files": encoded(Image.fromarray(photo))}, timeout=20)
        folder = Path(sent.json()[0]).parents[1]
        assert sent.status_code == 200 and folder.parent == tmp_path and folder.name.startswith(demo_files.PREFIX)
        assert folder.stat().st_mode & 0o077 == 0
        locked = {path.parent for path in tmp_path.glob(f"*/{demo_files.LOCK}")}
        [work] = locked - {folder, tmp_path / f"{demo_files.PREFIX}used"}
    finally:
        process.terminate()
        code = process.wait(30)
    assert code == 143 and not folder.exists() and not work.exists() and not left.exists()
