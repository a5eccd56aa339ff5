"""The page in a real browser. Debian's Chromium; screenshots of every state go to outputs/screenshots."""

import io
import re
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

gradio = pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")

SHOTS = Path(__file__).parents[1] / "outputs" / "screenshots"


@pytest.fixture(scope="module")
def server():
    from palette_diffusers import demo

    # no port is named: Gradio takes a free one
    page, url, _ = demo.launch(host="127.0.0.1", prevent_thread_lock=True, quiet=True)
    yield url
    demo.gr.close_all()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as library:
        yield library.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])


@pytest.fixture
def open_page(server, browser):
    """A page whose console must stay free of errors."""
    contexts, errors = [], []

    def open_page(**options):
        context = browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | options))
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda e: errors.append(str(e)))
        page.goto(server)
        page.get_by_role("tab", name="Colorize").wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert errors == []


def shot(page, name):
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.wait_for_timeout(200)
    page.screenshot(path=SHOTS / f"{name}.png", full_page=True)


def choose(page, path):
    page.set_input_files("#photo input[type=file]", path)
    page.locator("#facts").get_by_text("x").wait_for()


def run(page, name):
    before = page.locator("#status").inner_text()
    page.get_by_role("button", name=name, exact=True).click()
    page.wait_for_function(
        "before => /^Done/.test(document.querySelector('#status').innerText.trim())"
        " && document.querySelector('#status').innerText != before", arg=before
    )
    return page.locator("#status").inner_text()


def download(page, button="#download"):
    with page.expect_download() as waiting:
        page.locator(button).click()
    return Path(waiting.value.path()).read_bytes(), waiting.value.suggested_filename


def pixels(png):
    image = Image.open(io.BytesIO(png))
    assert image.format == "PNG"
    return np.asarray(image.convert("RGB"))


def steps(page, number):
    field = page.get_by_label("number input for Steps")
    if not field.is_visible():
        page.get_by_role("button", name="Advanced").click()
        field.wait_for()
        page.wait_for_timeout(500)  # what is typed while Gradio is still filling a panel just opened is put back
    field.fill(str(number))
    field.press("Tab")
    assert field.input_value() == str(number)


def paint_and_run(page, editor, button):
    """A short stroke across the middle, then the task => the PNG, its name."""
    canvas = page.locator(f"{editor} canvas").first
    canvas.wait_for()
    canvas.scroll_into_view_if_needed()
    page.wait_for_timeout(1000)
    box = canvas.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 30, y)
    page.mouse.down()
    page.mouse.move(x + 30, y, steps=8)
    page.mouse.up()
    shot(page, f"{button.lower()}-painted")
    run(page, button)
    page.locator("#result img").first.wait_for()
    shot(page, f"{button.lower()}-done")
    return download(page)


@pytest.fixture
def upload(photo, tmp_path):
    Image.fromarray(photo).save(tmp_path / "my photo.png")
    return tmp_path / "my photo.png"


@pytest.mark.parametrize("kind", ["tif", "heic"])
def test_a_photo_that_browsers_cannot_show_is_seen(open_page, photo, tmp_path, kind):
    """It was a broken picture, though its result was right."""
    if kind == "heic":
        pytest.importorskip("pillow_heif").register_heif_opener()
    exif = Image.Exif()
    exif[0x010E] = "the harbour"
    exif[0x0112] = 1 if kind == "heic" else 6  # pillow-heif turns pixels and takes the tag away as it reads
    Image.fromarray(photo).save(tmp_path / f"my harbour.{kind}", exif=exif)
    page = open_page()
    choose(page, tmp_path / f"my harbour.{kind}")
    page.wait_for_function(
        "() => (document.querySelector('#photo img')?.naturalWidth || 0) > 0 && "
        "document.querySelector('#photo img').complete"
    )
    shot(page, f"photo-{kind}")
    steps(page, 2)
    run(page, "Colorize")
    png, name = download(page)
    result = Image.open(io.BytesIO(png))
    assert name.endswith("my_harbour-colorization.png") and result.getexif()[0x010E] == "the harbour"
    assert result.size == (photo.shape[1::-1] if kind == "heic" else photo.shape[:2])


def test_a_photo_chosen_while_another_is_made_visible_stays(open_page, upload, photo, tmp_path, monkeypatch):
    """The PNG of a TIFF came late and took its place."""
    from palette_diffusers import demo

    begun, go_on, forward = threading.Event(), threading.Event(), demo.write

    def slowly(*given):
        begun.set()
        assert go_on.wait(60)
        return forward(*given)

    monkeypatch.setattr(demo, "write", slowly)
    Image.fromarray(photo[::-1].copy()).save(tmp_path / "slow.tif")
    page = open_page()
    choose(page, tmp_path / "slow.tif")
    assert begun.wait(60)
    page.locator("#photo").get_by_label(re.compile("clear|remove", re.I)).first.click()
    choose(page, upload)
    page.wait_for_function("() => /my.{1,3}photo/.test(document.querySelector('#photo img')?.src)")
    go_on.set()
    page.wait_for_timeout(3000)
    assert re.search("my.{1,3}photo", page.locator("#photo img").get_attribute("src"))


def test_a_second_task_waits_for_the_first(open_page, upload):
    """Both wrote the same results."""
    page = open_page()
    choose(page, upload)
    steps(page, 60)
    page.get_by_role("button", name="Colorize", exact=True).click()
    page.locator("#stop").wait_for()
    page.wait_for_function("() => /step/i.test(document.querySelector('#status').innerText)")
    page.get_by_role("tab", name="Restore").click()
    page.get_by_role("button", name="Restore", exact=True).click()
    page.get_by_text("still at work").wait_for()
    page.wait_for_function("() => /^Done/.test(document.querySelector('#status').innerText.trim())")
    assert download(page)[1].endswith("-colorization.png")
    assert "Done" in run(page, "Restore")
    assert download(page)[1].endswith("-jpeg_restoration.png")


def test_a_mask_drawn_by_mouse_and_every_pixel_outside_it_kept(open_page, upload, photo):
    page = open_page()
    choose(page, upload)
    page.get_by_role("tab", name="Inpaint").click()
    png, name = paint_and_run(page, "#editor", "Inpaint")
    result = pixels(png)
    changed = (result != photo).any(-1)
    assert name.endswith("my_photo-inpainting.png") and result.shape == photo.shape
    assert 0.01 < changed.mean() < 0.5, "what was painted changes, and nothing far from it"
    rows, columns = np.nonzero(changed)
    height, width = changed.shape
    assert abs(rows.mean() / height - 0.5) < 0.1 and abs(columns.mean() / width - 0.5) < 0.1


def test_a_stroke_painted_by_mouse_colours_the_thing_beneath(open_page, photo, tmp_path):
    Image.fromarray(photo).convert("L").save(tmp_path / "gray.png")
    page = open_page()
    choose(page, tmp_path / "gray.png")
    page.get_by_role("button", name="Paint colours").click()
    result = pixels(paint_and_run(page, "#strokes", "Colorize")[0])
    height, width, _ = result.shape
    middle = result[height // 2 - 3 : height // 2 + 3, width // 2 - 10 : width // 2 + 10].astype(float)
    # the first paint is skin: its chroma, exactly
    light = middle @ [0.299, 0.587, 0.114]
    expected = np.array([0xD9, 0xA1, 0x84]) @ np.array([0.299, 0.587, 0.114])
    assert abs((middle[..., 0] - light).mean() - (0xD9 - expected)) < 6
    assert abs((middle[..., 2] - light).mean() - (0x84 - expected)) < 6


def test_the_prediction_streams_and_stop_stops(open_page, upload):
    page = open_page()
    choose(page, upload)
    steps(page, 100)
    page.get_by_role("button", name="Colorize", exact=True).click()
    preview = page.locator("#preview img")
    preview.wait_for()
    first = preview.get_attribute("src")
    assert preview.bounding_box()["width"] > 300, "large enough to watch"
    page.wait_for_function("first => document.querySelector('#preview img').src != first", arg=first)
    assert "of 100" in page.locator("#status").inner_text()
    shot(page, "streaming")
    page.locator("#stop").click()
    page.locator("#status").get_by_text("Stopped").wait_for()
    page.locator("#stop").wait_for(state="hidden")
    shot(page, "stopped")
    steps(page, 8)
    begun = time.monotonic()
    assert "Done" in run(page, "Colorize")  # at once: what was stopped holds no place
    assert time.monotonic() - begun < 10


def test_variations_slider_and_chaining(open_page, upload, photo):
    page = open_page()
    choose(page, upload)
    page.get_by_label("number input for Variations").fill("3")
    page.get_by_label("number input for Variations").press("Tab")
    run(page, "Colorize")
    page.locator("#gallery button img").nth(2).wait_for()
    first, _ = download(page)
    page.locator("#gallery button:has(img)").nth(2).click()
    page.wait_for_timeout(1000)
    third, _ = download(page)
    assert (pixels(first) != pixels(third)).any()
    handle = page.locator("#result .handle, #result [role=slider], #result .inner").first
    box = page.locator("#result img").first.bounding_box()
    where = handle.bounding_box()
    page.mouse.move(where["x"] + where["width"] / 2, where["y"] + where["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + 20, where["y"] + where["height"] / 2, steps=5)
    page.mouse.up()
    assert handle.bounding_box()["x"] < where["x"] - 20
    shot(page, "variations")
    page.locator("#go-on").click()
    page.get_by_role("tab", name="Uncrop").click()
    page.wait_for_timeout(1000)
    run(page, "Uncrop")
    shot(page, "uncrop")
    wider = pixels(download(page)[0])
    assert wider.shape[1] == round(photo.shape[1] * 1.25)
    assert np.array_equal(wider[:, : photo.shape[1]], pixels(third)), "the picked result became the next photo"


def test_a_shape_sets_the_sides_and_a_speed_the_steps(open_page, upload):
    page = open_page()
    choose(page, upload)
    assert page.get_by_label("Fast").locator("visible=true").count() == 1, "what is for programs is not shown"
    page.get_by_label("Fast").locator("visible=true").click()
    page.get_by_role("tab", name="Uncrop").click()
    page.get_by_label("16:9").click()
    page.wait_for_function("document.querySelector('[aria-label=\"number input for Left (%)\"]').value > 16")
    run(page, "Uncrop")
    height, width, _ = pixels(download(page)[0]).shape
    assert abs(width / height - 16 / 9) < 0.01 and height == 150
    steps(page, 9)
    assert page.get_by_label("Standard").locator("visible=true").is_checked(), "own steps are no speed's"


def test_jpeg_shows_its_quality(open_page, photo, tmp_path):
    Image.fromarray(photo).save(tmp_path / "old.jpg", quality=13)
    page = open_page()
    choose(page, tmp_path / "old.jpg")
    page.get_by_role("tab", name="Restore").click()
    assert page.get_by_label("JPEG quality found").input_value() == "13 of 100"
    run(page, "Restore")
    shot(page, "restore")
    assert pixels(download(page)[0]).shape == photo.shape


def test_batch_gives_a_zip(open_page, photo, tmp_path):
    import zipfile

    files = [tmp_path / name for name in ("a long name of a photo 0.png", "1.png", "2.png")]
    for i, file in enumerate(files):
        Image.fromarray(photo[: 100 + 10 * i]).save(file)
    page = open_page()
    page.get_by_role("tab", name="Batch").click()
    page.set_input_files("#files input[type=file]", files)
    page.locator("#files tr").nth(2).wait_for()
    run(page, "Run all")
    page.wait_for_function("[...document.querySelectorAll('#gallery img')].filter(i => i.complete).length == 3")
    shot(page, "batch")
    captions = page.locator("#gallery .caption-label")
    names = [text.partition(", seed ")[0] for text in captions.all_inner_texts()]
    assert names == ["a_long_name_of_a_photo_0", "1", "2"]
    assert all(captions.nth(i).evaluate("e => e.scrollWidth <= e.clientWidth") for i in range(3)), "none is cut off"
    gap = "e => e.getBoundingClientRect().bottom - e.querySelector('.grid-container').getBoundingClientRect().bottom"
    assert page.locator("#gallery .grid-wrap").evaluate(gap) < 30, "no empty strip below"
    with zipfile.ZipFile(io.BytesIO(download(page, "#zip")[0])) as archive:
        heights = [pixels(archive.read(name)).shape[0] for name in sorted(archive.namelist())]
    assert heights == [100, 110, 120]


def test_a_batch_goes_on_after_a_photo_that_is_refused(open_page, upload, tmp_path):
    (tmp_path / "note.png").write_text("no picture")
    page = open_page()
    page.get_by_role("tab", name="Batch").click()
    page.set_input_files("#files input[type=file]", [tmp_path / "note.png", upload])
    page.locator("#files tr").nth(1).wait_for()
    page.get_by_role("button", name="Run all", exact=True).click()
    page.locator("#status").get_by_text("no picture that can be read").wait_for()
    assert "1 of 2 pictures are ready. note: This file" in page.locator("#status").inner_text()
    shot(page, "batch-with-one-refused")
    assert len(download(page, "#zip")[0]) > 1000


def test_examples_run_in_one_click_and_are_kept(open_page):
    results = []
    for text in ("Done in", "kept"):  # the second visitor has the first one's
        page = open_page()
        page.get_by_role("tab", name="Inpaint").click()
        page.locator("button.gallery-item:visible, .gallery button:visible, tr.tr-body:visible").first.click()
        page.locator("#status").get_by_text(text).wait_for()
        page.locator("#result img").first.wait_for()
        shot(page, f"example-{text[:4].lower()}")
        results.append(download(page)[0])
    assert results[0] == results[1]


def test_strokes_go_when_another_photo_comes(open_page):
    page = open_page()
    page.get_by_role("button", name="Paint colours").click()
    page.get_by_role("button", name="Upload strokes instead").click()
    page.locator("tr.tr-body:visible").nth(1).click()
    page.locator("#hints img").wait_for()
    page.locator("#status").get_by_text("Seed 0").wait_for()
    page.get_by_role("tab", name="Restore").click()
    page.locator("button.gallery-item:visible, .gallery button:visible, tr.tr-body:visible").first.click()
    page.locator("#stop").wait_for(state="hidden")
    page.get_by_role("tab", name="Colorize").click()
    page.locator("#hints img").wait_for(state="detached")


def test_a_wrong_file_gives_a_clear_message(open_page, tmp_path):
    (tmp_path / "note.png").write_text("no picture")
    page = open_page()
    page.set_input_files("#photo input[type=file]", tmp_path / "note.png")
    page.get_by_text("no picture that can be read").first.wait_for()
    page.locator("#photo img").wait_for(state="detached")
    shot(page, "wrong-file")


def test_a_network_that_fails_is_told_in_plain_words(open_page, upload, monkeypatch):
    import torch

    from palette_diffusers.demo_batches import SharedNetwork

    predict, calls = SharedNetwork.predict, 0

    def lost(*args):
        nonlocal calls
        calls += 1
        if calls > 20:
            raise torch.AcceleratorError("CUDA error: device-side assert triggered")
        return predict(*args)

    page = open_page()
    choose(page, upload)
    page.get_by_label("number input for Variations").fill("3")
    page.get_by_label("number input for Variations").press("Tab")
    with monkeypatch.context() as patch:
        patch.setattr(SharedNetwork, "predict", lost)
        page.get_by_role("button", name="Colorize", exact=True).click()
        page.locator("#status").get_by_text("graphics processor").wait_for()
        assert "2 of 3 pictures are ready" in page.locator("#status").inner_text()
        page.locator("#gallery button img").nth(1).wait_for()
        page.locator("#stop").wait_for(state="hidden")
        shot(page, "network-lost-later")
        page.reload()
        choose(page, upload)
        page.get_by_role("button", name="Colorize", exact=True).click()
        page.locator("#status").get_by_text("graphics processor").wait_for()
        shot(page, "network-lost")
    assert not page.get_by_text("Error", exact=True).is_visible()


@pytest.mark.parametrize(
    ("scheme", "size", "tabs"),
    [
        ("light", (390, 844), ["Colorize"]),
        ("dark", (390, 844), ["Inpaint", "Uncrop", "Restore", "Batch", "Colorize"]),
        ("light", (1440, 900), ["Inpaint", "Uncrop", "Restore", "Batch", "Colorize"]),
        ("dark", (1440, 900), ["Colorize"]),
    ],
)
def test_phone_and_desk_light_and_dark(open_page, upload, scheme, size, tabs):
    page = open_page(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
    choose(page, upload)
    dark = page.evaluate("document.body.classList.contains('dark')")
    assert dark == (scheme == "dark")
    for tab in tabs:
        page.get_by_role("tab", name=tab).click()
        shot(page, f"{scheme}-{size[0]}-{tab.lower()}")
        assert page.evaluate("document.documentElement.scrollWidth") <= size[0], "nothing sticks out at the side"
    run(page, "Colorize")
    page.wait_for_timeout(700)
    assert page.locator("#status").evaluate("e => e.getBoundingClientRect().top < innerHeight"), "the result is in view"
    shot(page, f"{scheme}-{size[0]}-done")


def test_keyboard_alone(open_page, upload):
    page = open_page()
    choose(page, upload)
    page.get_by_role("tab", name="Colorize").focus()
    for _ in range(8):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.innerText").strip() == "Colorize":
            break
    page.keyboard.press("Enter")
    page.locator("#status").get_by_text("Done in").wait_for()
