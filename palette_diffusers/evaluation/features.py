"""The network that measures. Its name is part of every figure's: only Inception's distance is called FID.

Images are (B, 3, H, W), RGB, [-1, 1].
"""

import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from .. import canvas
from .store import fingerprint

Extract = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
Prepare = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class FeatureNetwork:
    """images (B, 3, H, W) => features (B, D) and logits (B, C), both float32 on the CPU.

    name: as the figures say it. classes: the names of the classes where they are known. inception: whether it is the
    network that FID, KID and IS are defined by, whatever its name. content: a hash, which tells it from others of its
    name.

    Raises:
        ValueError: what it gave is not finite.
    """

    name: str
    extract: Extract
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    classes: tuple[str, ...] | None = None
    inception: bool = False
    content: str = ""

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features, logits = (x.float().cpu() for x in self.extract(images.to(self.device, self.dtype)))
        if not (torch.isfinite(features).all() and torch.isfinite(logits).all()):
            raise ValueError(f"{self.name} gave features or logits that are not finite, its figures can't be told")
        return features, logits

    @property
    def figures(self) -> dict[str, str]:
        """What the figures are called."""
        if self.inception:
            return {"frechet": "FID", "kernel": "KID", "score": "IS", "distance": "PD"}
        return {
            "frechet": f"FD-{self.name}",
            "kernel": f"KD-{self.name}",
            "score": f"score-{self.name}",
            "distance": f"distance-{self.name}",
        }


def load_features(spec: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> FeatureNetwork:
    """A feature network by its name:

    - `inception`: FID's own, by torch-fidelity;
    - `FILE.py:FUNCTION`: a local module; the function takes nothing and returns an `nn.Module` with
      `features(images)` => (B, D) and `head(features)` => logits (B, C);
    - a folder or Hub id of a `transformers` image classifier; the features are what its last layer sees.

    Raises:
        ValueError: no such network, or a module without `features` and `head`.
        ImportError: torch-fidelity, or the torchvision that it needs, is missing, or a torchvision does not fit; the
            message says what to install.
    """
    check_torchvision()
    if spec == "inception":
        extract, content = _inception(device)
        return FeatureNetwork("inception", extract, device, inception=True, content=content)
    path, _, function = spec.rpartition(":")
    if path.endswith(".py"):
        extract, content = _local(path, function, device, dtype)
        return FeatureNetwork(_foreign(Path(path).stem), extract, device, dtype, content=content)
    return _transformers(spec, device, dtype)


def check_torchvision() -> None:
    """That it is whole, if it is there: torchmetrics and transformers import it and fail, and not at once.

    Raises:
        ImportError: it was built for another torch.
    """
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError, OSError) as error:
        raise ImportError(
            f"torchvision does not fit torch {torch.__version__} ({error}): install the release that does, or remove "
            "it; only --features inception needs it"
        ) from None


def _foreign(name: str) -> str:
    """The name of a network that is not FID's, and must not read as if it were."""
    return f"other-{name}" if name.lower() == "inception" else name


def load_module(path: str, expected: str = "FILE.py") -> Any:
    """The Python file at `path`, run.

    Raises:
        FileNotFoundError: no such file. ValueError: it can't be loaded.
    """
    if not (Path(path).is_file() and path.endswith(".py")):
        raise FileNotFoundError(f"{path}: no such Python file, expected {expected}")
    name = f"_palette_file_{len(sys.modules)}_{Path(path).stem}"  # meets no other
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # where dataclasses look for it
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # another's code: it can be anything
        del sys.modules[name]
        raise ValueError(f"{path} can't be loaded: {type(error).__name__}: {error}") from error
    return module


def load_function(path: str, function: str) -> Callable:
    """FUNCTION of the Python file at `path`.

    Raises:
        FileNotFoundError: no such file. ValueError: it can't be loaded, or has no such function.
    """
    found = getattr(load_module(path, "FILE.py:FUNCTION"), function, None)
    if not callable(found):
        raise ValueError(f"{path} has no function {function!r}, expected FILE.py:FUNCTION")
    return found


def _local(path: str, function: str, device: str, dtype: torch.dtype) -> tuple[Extract, str]:
    model: Any = load_function(path, function)()
    if not (callable(getattr(model, "features", None)) and callable(getattr(model, "head", None))):
        raise ValueError(f"{path}:{function} gave a {type(model).__name__}, expected one with features() and head()")
    model = model.eval().to(device, dtype)

    def extract(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = model.features(images)
        return features, model.head(features)

    return extract, fingerprint(Path(path), function, model.state_dict())


def _inception(device: str) -> tuple[Extract, str]:
    """Inception of 2015-12-05, with TensorFlow's resizing; features of pool_3, logits without bias, as for FID and IS.

    PALETTE_INCEPTION_WEIGHTS names the weights' file where they can't be downloaded.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except (ImportError, RuntimeError) as error:  # a torchvision built for another torch raises RuntimeError
        raise ImportError(
            f"--features inception needs torch-fidelity and a torchvision that fits torch {torch.__version__}: "
            f"pip install 'palette-diffusers[inception]' ({error})"
        ) from None
    try:
        model = FeatureExtractorInceptionV3(
            "inception",
            ["2048", "logits_unbiased"],
            feature_extractor_weights_path=os.environ.get("PALETTE_INCEPTION_WEIGHTS"),
        ).to(device)
    except OSError as error:  # URLError among them
        raise OSError(
            f"Inception's weights could not be loaded ({error}): download weights-inception-2015-12-05-6726825d.pth "
            "from torch-fidelity's releases and name it in PALETTE_INCEPTION_WEIGHTS"
        ) from None

    def extract(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return model(((images + 1) * 127.5).round().clamp(0, 255).byte())

    return extract, fingerprint(model.state_dict())


def _transformers(name: str, device: str, dtype: torch.dtype) -> FeatureNetwork:
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    if name.startswith((".", "/")) and not (Path(name) / "config.json").is_file():
        raise FileNotFoundError(f"{name} is no folder with a config.json, as save_pretrained of transformers writes it")
    model: Any = AutoModelForImageClassification.from_pretrained(name, dtype=dtype).eval().to(device)
    processor = AutoImageProcessor.from_pretrained(name, backend="pil")
    prepare = _preprocessing(processor)
    heads = [
        module
        for module in model.modules()
        if isinstance(module, torch.nn.Linear) and module.out_features == model.config.num_labels
    ]
    if not heads:
        raise ValueError(f"{name} has no linear layer of {model.config.num_labels} classes, its features are unknown")
    seen: list[torch.Tensor] = []
    heads[-1].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))

    def extract(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.clear()
        logits = model(pixel_values=prepare(images)).logits
        return seen[-1].flatten(1), logits

    labels = model.config.id2label
    named = [str(labels[i]) for i in range(len(labels))]
    classes = None if named[0] == "LABEL_0" else tuple(named)  # what transformers calls classes without a name
    content = fingerprint(model.config.model_type, processor.to_json_string(), model.state_dict())
    return FeatureNetwork(_foreign(Path(name).name), extract, device, dtype, classes, content=content)


def _preprocessing(processor: Any) -> Prepare:
    """What a processor does to square pictures, (B, 3, S, S) => (B, 3, s, s): in torch and by the batch where that
    gives its pixels, else by the processor itself, one by one."""

    def own(images: torch.Tensor) -> torch.Tensor:
        pixels = [canvas.to_uint8(image) for image in images.split(1)]
        return processor(pixels, return_tensors="pt")["pixel_values"].to(images)

    batched = _batched(processor)
    if batched is None:
        return own
    probe = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mine, theirs = batched(probe), own(probe)
    same = mine.shape == theirs.shape and (mine - theirs).abs().mean() < 0.01 * theirs.std()  # rounding is less
    return batched if same else own


def _batched(processor: Any) -> Prepare | None:
    """In torch, what most processors do; None for a resampling that it does not know."""
    size, modes = dict(processor.size or {}), {2: "bilinear", 3: "bicubic"}
    side, mode = size.get("shortest_edge") or size.get("height"), modes.get(int(processor.resample))
    if not side or not mode:
        return None
    crop = dict(processor.crop_size)["height"] if processor.do_center_crop else side
    share = getattr(processor, "crop_pct", None)
    if share and side < 384:  # ConvNeXt's: larger first, then its middle
        side, crop = int(side / share), side
    mean, std = (torch.tensor(v).reshape(1, 3, 1, 1) for v in (processor.image_mean, processor.image_std))
    offset = float(getattr(processor, "rescale_offset", False))
    if getattr(processor, "include_top", False):  # EfficientNet's: divided by it again
        std = std**2

    def prepare(images: torch.Tensor) -> torch.Tensor:
        x = (images.float() + 1) * 127.5
        if x.shape[-1] != side:
            x = F.interpolate(x, (side, side), mode=mode, antialias=True, align_corners=False).clamp(0, 255)
        low = (side - crop) // 2
        x = x[..., low : low + crop, low : low + crop] * processor.rescale_factor - offset
        return ((x - mean.to(x)) / std.to(x)).to(images.dtype)

    return prepare
