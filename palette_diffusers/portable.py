"""The network without this package's code: ONNX, run by onnxruntime, or a program of `torch.export`; sampled by the
same pipeline. Any batch and size; float32, on a CPU."""

import copy
import json
import os
import shutil
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn

from .pipeline import PalettePipeline
from .scheduler import PaletteScheduler
from .unet import check_inputs

FILES = {"onnx": "network.onnx", "torch": "network.pt2"}
MOST = 63  # pictures of an evaluation: diffusers' upsampling takes another path from 64 on, a program has one only
TOLERANCE = 2e-3  # largest difference from eager float32, of outputs of about 1


class PortableUNet(nn.Module):
    """An exported network where the pipeline expects its U-Net: `forward` and what is read from it.

    Args:
        folder: with network.onnx or network.pt2, and config.json.

    Attributes:
        file: the network's, in that folder. exported: that it can't be changed, for `optimize`.

    Raises:
        FileNotFoundError: none of them is there. ImportError: onnxruntime is missing.
    """

    device, dtype, exported = torch.device("cpu"), torch.float32, True

    def __init__(self, folder: Path):
        super().__init__()
        config = json.loads((folder / "config.json").read_text())
        self.size_multiple = config.pop("size_multiple")
        self.config = FrozenDict(config)
        self.file = folder / FILES["onnx" if (folder / FILES["onnx"]).is_file() else "torch"]
        self._run = _onnx(self.file) if self.file.suffix == ".onnx" else torch.export.load(self.file).module()

    def _apply(self, fn: Any, recurse: bool = True) -> "PortableUNet":
        """It can't be moved, nor be cast."""
        return self

    def forward(
        self, sample: torch.Tensor, noise_level: torch.Tensor | float, condition: torch.Tensor, return_dict: bool = True
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        """As `PaletteUNet2DModel`; computed in float32."""
        gamma = check_inputs(self, sample, noise_level, condition)
        inputs = (sample.float().contiguous(), gamma.contiguous(), condition.float().contiguous())
        if len(sample):
            out = torch.cat([self._run(*some) for some in zip(*(x.split(MOST) for x in inputs), strict=True)])
        else:
            out = inputs[0].new_empty(0, self.config.out_channels, *sample.shape[2:])
        out = out.to(sample.dtype)
        return UNet2DOutput(sample=out) if return_dict else (out,)


def _onnx(path: Path) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError(f"{path} needs onnxruntime: pip install 'palette-diffusers[onnx]' ({error})") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    return lambda *inputs: torch.from_numpy(
        session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})[0]
    )


class _Plain(nn.Module):
    """Tensors in, a tensor out."""

    def __init__(self, unet: nn.Module):
        super().__init__()
        self.unet = unet

    def forward(self, sample: torch.Tensor, noise_level: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        return self.unet(sample, noise_level, condition, return_dict=False)[0]


def inputs_for(unet: Any, batch: int, height: int, width: int) -> tuple[torch.Tensor, ...]:
    """Random sample, noise levels and condition."""
    generator = torch.Generator().manual_seed(0)
    channels = unet.config.condition_channels + bool(unet.config.hole_skip)
    sample = torch.randn(batch, unet.config.in_channels, height, width, generator=generator)
    condition = torch.rand(batch, channels, height, width, generator=generator)
    return sample, torch.rand(batch, generator=generator) * 0.98 + 0.01, condition


@torch.no_grad()
def write_portable(pipe: PalettePipeline, folder: Path, kind: str = "onnx") -> float:
    """Writes a folder that `load_portable` reads => the largest difference between the exported network's output and
    the eager one's, at three shapes.

    Raises:
        ValueError: an unknown kind, or a difference above the tolerance. FileExistsError: the folder is there.
        ImportError: onnx or onnxscript is missing.
    """
    if kind not in FILES:
        raise ValueError(f"format is {kind!r}, expected {', '.join(FILES)}")
    if folder.exists():
        raise FileExistsError(f"{folder} is there already: name a new folder")
    unet = copy.deepcopy(pipe.unet).float().eval()
    multiple, size = unet.size_multiple, unet.config.sample_size
    batch = torch.export.Dim("batch", min=1, max=MOST)
    height, width = (multiple * torch.export.Dim(name, min=1, max=4096) for name in ("rows", "columns"))
    image = {0: batch, 2: height, 3: width}
    shapes = {"sample": image, "noise_level": {0: batch}, "condition": image}
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    (part / "unet").mkdir(parents=True)
    try:
        program = torch.export.export(
            _Plain(unet), inputs_for(unet, 2, size, size + 2 * multiple), dynamic_shapes=shapes
        )
        if kind == "torch":
            torch.export.save(program, part / "unet" / FILES[kind])
        else:
            _write_onnx(program, part / "unet" / FILES[kind])
        config = {k: v for k, v in unet.config.items() if not k.startswith("_")} | {"size_multiple": multiple}
        (part / "unet" / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        pipe.scheduler.save_pretrained(part / "scheduler")
        names = ("tasks", "default_task", "default_steps", "few_steps")
        about = {name: pipe.config[name] for name in names} | {"scheduler": type(pipe.scheduler).__name__}
        (part / "portable.json").write_text(json.dumps(about, indent=2) + "\n")
        error = 0.0
        written = PortableUNet(part / "unet")
        for shape in ((1, size, size), (3, size, size), (1, 2 * size, size + multiple)):
            inputs = inputs_for(unet, *shape)
            difference = written(*inputs).sample - unet(*inputs).sample
            error = max(error, difference.abs().max().item())
        if not error <= TOLERANCE:
            raise ValueError(f"the exported network differs by {error:.1e} from the eager one, at most {TOLERANCE:.0e}")
        os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return error


def _write_onnx(program: Any, path: Path) -> None:
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(f"ONNX needs onnxscript: pip install 'palette-diffusers[onnx]' ({error})") from None
    torch.onnx.export(program, (), path, dynamo=True, external_data=False, verbose=False)


def is_portable(name: str | os.PathLike | None) -> bool:
    """Whether this is a folder that `write_portable` wrote."""
    return name is not None and (Path(name) / "portable.json").is_file()


def load_portable(folder: str | os.PathLike) -> PalettePipeline:
    """The pipeline around an exported network: it is called as any other; one that can't be trained or moved.

    Raises:
        FileNotFoundError: no folder of `write_portable`. ValueError: a damaged one. ImportError: no onnxruntime.
    """
    folder = Path(folder)
    if not is_portable(folder):
        raise FileNotFoundError(f"{folder} is no folder with a portable.json, as palette export-network writes it")
    try:
        about = json.loads((folder / "portable.json").read_text())
        name = about.pop("scheduler")
        kind = PaletteScheduler if name == "PaletteScheduler" else getattr(diffusers, name)
        unet, scheduler = PortableUNet(folder / "unet"), kind.from_pretrained(folder / "scheduler")
        return PalettePipeline(unet, scheduler, **about)
    except (ImportError, FileNotFoundError, MemoryError):
        raise
    except Exception as error:  # each runtime has its own
        raise ValueError(f"{folder} is damaged, export it again: {type(error).__name__}: {error}") from None
