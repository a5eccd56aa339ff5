"""Where a saved pipeline comes from, and what its index says. A folder or a repository of the Hub => a folder."""

import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

FORMAT = 1  # of what `save_pretrained` writes; raised when an older package could no longer read it
WEIGHTS = re.compile(r"unet/diffusion_pytorch_model(?:\.(\w+))?(?:-\d+-of-\d+)?\.(safetensors|bin)")


def is_local(name: str) -> bool:
    """Whether this names a folder, and not a repository of the Hub."""
    return os.path.isabs(name) or name.startswith(".") or os.path.exists(name)


def check_folder(folder: Path, variant: str | None) -> str | None:
    """A folder as `save_pretrained` writes it => the variant of its weights to load: this one, or, where none is asked
    for, "fp16" if it has no other.

    Raises:
        FileNotFoundError: no index. ValueError: no weights of this variant; those that are there are listed.
    """
    if not (folder / "model_index.json").is_file():
        inside = folder / "pipeline"  # of a training run
        hint = f"; did you mean {inside}?" if (inside / "model_index.json").is_file() else ""
        raise FileNotFoundError(f"{folder} is no folder with a model_index.json, as save_pretrained writes it{hint}")
    files = [path.relative_to(folder).as_posix() for path in folder.glob("unet/*")]
    known = variants(files, ("safetensors", "bin"))
    if variant is None and known == {"fp16"}:
        return "fp16"
    check_variant(str(folder), known, variant)
    return variant


def variants(files: list[str], kinds: tuple[str, ...] = ("safetensors",)) -> set[str]:
    """The variants whose weights are among these files; "" is the plain one. (A pickle of one's own folder, "bin",
    is read by diffusers with `weights_only`; of the Hub, none is.)"""
    return {match[1] or "" for match in map(WEIGHTS.fullmatch, files) if match and match[2] in kinds}


def check_variant(name: str, known: set[str], variant: str | None) -> None:
    if (variant or "") not in known:
        there = ", ".join(f"variant={v!r}" if v else "no variant" for v in sorted(known)) or "no weights at all"
        raise ValueError(f"You are trying to load the model files of the `variant={variant}`, but {name} has {there}")


def read_index(index: dict[str, Any], classes: set[str], modules: dict[str, str], where: str) -> dict[str, Any]:
    """model_index.json => the same, its components in this package's modules.

    A published repository carries copies of the code for those who lack the package, and names these instead.

    Args:
        classes: names of the pipelines that are wanted. modules: names of components => where they are defined.

    Raises:
        ValueError: a format that is too new or none, or another class of pipeline.
    """
    form = index.get("_format", 1) if isinstance(index, dict) else None
    if not isinstance(form, int):
        raise ValueError(f"the model_index.json of {where} is damaged: expected an object, its _format a number")
    if form > FORMAT:
        raise ValueError(f"{where} is of format {form}, this package reads up to {FORMAT}: upgrade palette-diffusers")
    kind = index.get("_class_name")
    kind = kind[1] if isinstance(kind, list) else kind
    if kind not in classes:
        raise ValueError(f"{where} holds a {kind}, expected a PalettePipeline")
    own = {
        name: [modules[value[1]], value[1]]
        for name, value in index.items()
        if isinstance(value, list) and len(value) == 2 and value[1] in modules
    }
    return index | own | {"_class_name": kind}


def merge_adapters(network: torch.nn.Module, file: str | Path) -> None:
    """Adds low-rank adapters, of PEFT's names and with alpha = rank, to the weights of convolutions and linear layers,
    in place: W + B A (Hu et al. 2021).

    Raises:
        KeyError: an adapter of a layer that the network does not have.
    """
    weights, layers = load_file(file), dict(network.named_modules())
    with torch.no_grad():
        for name, down in weights.items():
            layer, kind, _ = name.rsplit(".", 2)
            if kind == "lora_A":
                up = weights[f"{layer}.lora_B.weight"]
                weight = layers[layer].get_parameter("weight")
                weight += (up.flatten(1).float() @ down.flatten(1).float()).reshape(weight.shape).to(weight.dtype)


def licence(name: str, revision: str | None = None, cache_dir: str | Path | None = None) -> str | None:
    """The LICENSE of a folder, or of a repository that is in the cache."""
    from huggingface_hub import try_to_load_from_cache

    path: Any = os.path.join(name, "LICENSE")
    if not is_local(name):
        path = try_to_load_from_cache(name, "LICENSE", cache_dir, revision)
    known = isinstance(path, str) and os.path.isfile(path)
    return Path(path).read_text(encoding="utf-8", errors="replace") if known else None


def even_modes(folder: Path) -> None:
    """The weights' files of a saved pipeline, which safetensors makes readable for their owner alone, get the mode of
    its index, which is the umask's."""
    index = folder / "model_index.json"
    if index.is_file():
        for path in (*folder.glob("unet/*.safetensors"), *folder.glob("lora/*.safetensors")):
            shutil.copymode(index, path)


def fetch(
    name: str,
    variant: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Path:
    """The files of a repository that a pipeline of this variant needs (and no code) => their folder in the cache.

    A file in the cache that is shorter than the repository's is fetched again.

    Raises:
        OSError: not found, gated, offline and not in the cache. ValueError: no such variant.
    """
    from huggingface_hub import constants, get_cached_repo_tree, snapshot_download
    from huggingface_hub.errors import (
        CachedRepoTreeNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        IncompleteSnapshotError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    stem, dot = "unet/diffusion_pytorch_model", f".{variant}" if variant else ""
    weights = [f"{stem}{dot}.safetensors", f"{stem}{dot}-?????-of-?????.safetensors"]
    files = ["model_index.json", "*_config.json", "*/config.json", f"{stem}.safetensors.index{dot}.json", *weights]
    options: dict[str, Any] = dict(
        revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
    )
    page = f"{constants.ENDPOINT}/{name}"
    try:
        try:
            got = snapshot_download(name, allow_patterns=[*files, "LICENSE"], force_download=force_download, **options)
        except IncompleteSnapshotError:  # offline, and the cache has no LICENSE
            got = snapshot_download(name, allow_patterns=files, **options)
        folder = Path(got)
        tree = get_cached_repo_tree(name, revision=revision or folder.name, cache_dir=cache_dir)
        sizes = {file.path: file.size for file in tree}
        short = [path for path, size in sizes.items() if (folder / path).is_file() and _size(folder / path) != size]
        if short and local_files_only:
            raise OSError(f"{', '.join(short)} of {name} is incomplete in the cache: load it once with the network")
        if short:
            snapshot_download(name, allow_patterns=files, force_download=True, **options)
    except GatedRepoError as error:
        raise PermissionError(
            f"{name} is gated: accept its terms at {page}, then log in (hf auth login) or give a token"
        ) from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(f"{name} has no revision {revision!r}") from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{name} is no folder, and {constants.ENDPOINT} has no such repository; "
            "if it is private, log in (hf auth login) or give a token"
        ) from error
    except IncompleteSnapshotError as error:
        raise FileNotFoundError(f"{name} is only partly in the cache, and the Hub is not asked or reached") from error
    except (LocalEntryNotFoundError, CachedRepoTreeNotFoundError) as error:
        raise FileNotFoundError(
            f"{name} is no folder and not in the cache, and {constants.ENDPOINT} is not asked or reached"
        ) from error
    except HFValidationError as error:
        raise FileNotFoundError(f"{name} is no folder, and no name of a repository (USER/NAME)") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        raise OSError(f"{name} could not be fetched from {constants.ENDPOINT}: HTTP {status}") from error
    if "model_index.json" not in sizes:
        raise FileNotFoundError(f"{page} holds no pipeline: it has no model_index.json")
    check_variant(name, variants(list(sizes)), variant)
    return folder


def _size(path: Path) -> int:
    return path.stat().st_size
