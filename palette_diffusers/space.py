"""The Space of the demo: its exact tree, written to a folder or published.

The tree carries the package's own source, so that it runs whether or not the package is on an index.
"""

import os
import shutil
import tempfile
from pathlib import Path

from huggingface_hub import HfApi, SpaceCard

from .checkpoint import is_local
from .files import new_folder, occupied
from .hub import check_name, upload, write_sums
from .pipeline import SHIPPED, STARTER

PACKAGE = Path(__file__).parent
# in a wheel the files of the Space lie inside the package, in a checkout beside it
APP = next((folder for folder in (PACKAGE / "spaces_app", PACKAGE.parent / "spaces_app") if folder.is_dir()), PACKAGE)
FILES = ("README.md", "app.py", "requirements.txt", "Dockerfile")
VARIABLE = "PALETTE_MODEL"


def write_space(folder: str | os.PathLike, model: str | None = None) -> list[str]:
    """Writes the Space's tree, whose card names the model (a Hub id) if it isn't shipped with the package; the names of
    its files, sorted.

    Raises:
        FileExistsError: something is there already. FileNotFoundError: the package came without `spaces_app`.
        ValueError: the model is a folder of this machine, or no Hub id.
    """
    folder = Path(folder).resolve()
    model = None if model in SHIPPED else model
    if model:
        if is_local(model):
            raise ValueError(f"model is {model!r}, a folder of this machine: publish it, and name its Hub id")
        check_name(model)
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
        write_sums(part)
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def publish_space(
    repo_id: str, private: bool = False, model: str | None = None, overwrite_card: bool = False
) -> str:  # fmt: skip
    """Creates or updates the Space in one commit, and sets the variable that names its model, or deletes it; its
    address. The token is the one of `hf auth login`.

    Raises:
        ValueError: a card that was edited on the Hub, without overwrite_card; a public Space where a private one was
            asked for; no USER/NAME; a model that is a folder of this machine, or no Hub id.
    """
    check_name(repo_id)
    with tempfile.TemporaryDirectory() as name:
        write_space(Path(name) / "space", model)
        url = upload(Path(name) / "space", repo_id, private, overwrite_card=overwrite_card, space=True)
    api = HfApi()
    if model and model != STARTER.name:
        api.add_space_variable(repo_id, VARIABLE, model)
    elif VARIABLE in api.get_space_variables(repo_id):
        api.delete_space_variable(repo_id, VARIABLE)
    return url
