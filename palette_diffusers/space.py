"""The Space of the demo: its exact tree, written to a folder or published.

The tree carries the package's own source, so that it runs whether or not the package is on an index.
"""

import os
import shutil
import tempfile
from pathlib import Path

from huggingface_hub import HfApi, SpaceCard

from .files import new_folder, occupied

PACKAGE = Path(__file__).parent
# in a wheel the files of the Space lie inside the package, in a checkout beside it
APP = next((folder for folder in (PACKAGE / "spaces_app", PACKAGE.parent / "spaces_app") if folder.is_dir()), PACKAGE)
FILES = ("README.md", "app.py", "requirements.txt", "Dockerfile")


def write_space(folder: str | os.PathLike, model: str | None = None) -> list[str]:
    """Writes the Space's tree, whose card names the model (a Hub id) if it isn't the starter; the names of its files,
    sorted.

    Raises:
        FileExistsError: something is there already. FileNotFoundError: the package came without `spaces_app`.
    """
    folder = Path(folder)
    if occupied(folder):
        raise FileExistsError(f"{folder} is not empty: name a new folder")
    for name in FILES:
        if not (APP / name).is_file():
            raise FileNotFoundError(f"{name} of the Space is missing: install the package from its wheel or source")
    with new_folder(folder) as part:
        shutil.copytree(
            PACKAGE, part / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__", "*.pyi", "spaces_app", ".*")
        )
        for file in FILES:
            shutil.copy(APP / file, part / file)
        if model:
            card = SpaceCard.load(part / "README.md")
            card.data.models = [model]
            card.save(part / "README.md")
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def publish_space(repo_id: str, private: bool = False, model: str | None = None) -> str:
    """Creates or updates the Space in one commit, and sets the variable that names its model; its address. The token is
    the one of `hf auth login`."""
    api = HfApi()
    with tempfile.TemporaryDirectory() as name:
        write_space(Path(name) / "space", model)
        api.create_repo(repo_id, repo_type="space", space_sdk="gradio", private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id, repo_type="space", folder_path=Path(name) / "space", commit_message="The Palette demo"
        )
    if model:
        api.add_space_variable(repo_id, "PALETTE_MODEL", model)
    return f"{api.endpoint}/spaces/{repo_id}"
