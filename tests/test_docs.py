"""What the README and the pages say is run: every block of Python, the quick commands, the options of the others; and
the site is built, without a dead link."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from hub_server import serve
from PIL import Image
from test_hub import run as process

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
QUICK = {"colorize", "inpaint", "uncrop", "restore", "again", "info", "publish"}  # the rest is only parsed


def blocks(document: Path) -> list[tuple[str, str]]:
    """("python" or "bash", its text) of each block, in order; an indented block is of commands."""
    text = document.read_text()
    found = re.finditer(r"(?ms)^```(\w+)[^\n]*\n(.*?)^```$|(?:(?<=\n\n)|\A)((?: {4}[^\n]*\n+)+)", text)
    return [(m[1], m[2]) if m[1] else ("bash", m[3]) for m in found]


def commands(text: str) -> list[list[str]]:
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines for words in [shlex.split(line, comments=True)] if words]


def program(words: list[str]) -> list[str]:
    """What is run: `accelerate launch` and `python` are taken away, `&&` is not looked behind."""
    words = words[2:] if words[:2] == ["accelerate", "launch"] else words
    words = words[1:] if words[0] == "python" else words
    return ["palette", *words[2:]] if words[:2] == ["-m", "palette_diffusers.cli"] else words


def check(words: list[str]) -> None:
    """Fails where a command, a file or an option does not exist."""
    from typer.main import get_command

    from palette_diffusers.cli import app
    from palette_diffusers.settings import parse

    name, *arguments = program(words)
    if name == "palette":
        command = get_command(app).commands[arguments[0]]
        command.make_context(arguments[0], arguments[1:])
    elif name.endswith(".py"):
        text = (ROOT / name).read_text()
        if "training import main" in text or "train_palette.py" in text:
            parse(arguments)
        else:
            assert all(f'"{option}"' in text for option in arguments if option.startswith("--")), words
    elif name == "make":
        assert re.search(rf"(?m)^{arguments[0]}:", (ROOT / "Makefile").read_text()), words
    elif name == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        asked = ",".join(re.findall(r"\[([\w,]+)\]", " ".join(words)))
        assert set(filter(None, asked.split(","))) <= set(extras), words
    else:
        assert words[:3] == ["hf", "auth", "login"], f"no such program here: {words}"


def follow(documents: list[str]) -> None:
    """In a process of its own: what a reader of each would type, in order, with the demo running beside."""
    from palette_diffusers import demo
    from palette_diffusers.cli import app

    url = demo.launch(prevent_thread_lock=True, quiet=True)[1]
    for document in documents:
        names: dict = {}
        for kind, text in blocks(Path(document)):
            if kind == "python":
                text = text.replace("http://127.0.0.1:7860", url)
                exec(compile(text, f"{document}, {text[:40]!r}", "exec"), names)
            for words in commands(text) if kind == "bash" else []:
                if words[0] == "palette" and words[1] in QUICK:
                    app(words[1:], standalone_mode=False)


@pytest.fixture(scope="module")
def hub():
    with serve() as running:
        yield running


@pytest.fixture
def place(tmp_path, photo):
    """The files that the documents speak of."""
    from palette_diffusers import PalettePipeline

    image = Image.fromarray(photo[:90, :120])
    for name in ("photo.jpg", "large.jpg", "faded.jpg"):
        image.save(tmp_path / name, quality=30)
    mask = np.zeros((90, 120), np.uint8)
    mask[40:60, 40:60] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    stroke = Image.new("RGBA", image.size)
    stroke.paste("#c83c32", (20, 20, 50, 26))
    stroke.save(tmp_path / "strokes.png")
    clear = image.copy()
    clear.putalpha(Image.fromarray(255 - mask))
    clear.save(tmp_path / "photo.png")
    (tmp_path / "ALBUM").mkdir()
    image.save(tmp_path / "ALBUM" / "one.png")
    starter = PalettePipeline.from_pretrained()
    own = PalettePipeline(starter.unet, starter.scheduler, tasks=["paired"], default_task="paired")
    own.save_pretrained(tmp_path / "runs" / "faded" / "pipeline")
    (tmp_path / "runs" / "faded" / "settings.json").write_text('{"init": "starter"}')
    return tmp_path


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_exist(document):
    for kind, text in blocks(document):
        for words in commands(text) if kind == "bash" else []:
            check(words)


def test_options_in_the_text_exist(capsys):
    from typer.main import get_command

    from palette_diffusers.cli import app
    from palette_diffusers.settings import parse

    commands = get_command(app).commands.values()
    known = {option for command in commands for p in command.params for option in (*p.opts, *p.secondary_opts)}
    with pytest.raises(SystemExit):
        parse(["--help"])
    known |= set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    for script in (path for folder in ("train", "benchmarks", "examples") for path in (ROOT / folder).glob("*.py")):
        known |= set(re.findall(r'"(--[\w-]+)"', script.read_text()))
    for document in DOCUMENTS:
        assert set(re.findall(r"(?<![\w-])--[a-z][\w-]+", document.read_text())) <= known, document.name


def test_what_is_written_runs(place, hub):
    pytest.importorskip("gradio")
    some = [str(document) for document in DOCUMENTS]
    done = process(hub, place, code=f"from test_docs import follow; follow({some})", GRADIO_ANALYTICS_ENABLED="0")
    for name in ("colorized.png", "clean.png", "photo-colorization-4.png", "mended.png", "COLORED/one.png"):
        assert (place / name).is_file(), name
    assert "evaluations" in done.stdout and "4.4e-05 6.6e-21" in done.stdout and "USER/faded" in hub.repos


class Links(HTMLParser):
    def __init__(self, page: Path):
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(page.read_text())

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.links += [given[name] for name in ("href", "src") if given.get(name)]
        self.anchors |= {given[name] for name in ("id", "name") if given.get(name)}


def test_the_site_has_no_dead_link(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path / "site")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    pages = {page: Links(page) for page in (tmp_path / "site").rglob("*.html") if page.name != "404.html"}
    assert len(pages) >= 9
    for page, found in pages.items():
        for link in found.links:
            parts = urlsplit(link)
            if parts.scheme:
                assert parts.scheme in ("https", "mailto", "data"), link
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file(), f"{page}: {link}"
            if parts.fragment and target in pages:
                assert parts.fragment in pages[target].anchors, f"{page}: {link}"
    api = (tmp_path / "site" / "api" / "index.html").read_text()
    assert 'id="palette_diffusers.pipeline.PalettePipeline"' in api and "num_images_per_input" in api
    hub = (tmp_path / "site" / "hub" / "index.html").read_text()
    assert re.search(r"<code>(<[^>]*>)*hf auth login\n", hub), "a section may begin with commands"


def test_files_named_in_the_text_exist():
    for document in [*DOCUMENTS, ROOT / "model_card.md", ROOT / "benchmarks" / "README.md"]:
        text = document.read_text()
        for name in re.findall(r"`((?:benchmarks|docs|examples|spaces_app|tests|train)/[\w./-]*)`", text):
            assert (ROOT / name).exists(), f"{document.name}: {name}"
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
            assert (document.parent / link).exists(), f"{document.name}: {link}"
