"""3x3 convolutions in float32 on a CPU with a quarter of the products: Winograd's F(4x4, 3x3).

oneDNN, which computes a CPU's convolutions, has it for ARM only. 4x4 pixels are made from 6x6 by 36 products a pair of
channels instead of 144; what it takes besides grows with the channels and not with their square, so that wide layers
gain and narrow ones lose. Its rounding errors are 50 times those of the plain sum (5e-5 where values are about 1):
between those of float32 and TF32.

Source: Lavin & Gray 2016, "Fast Algorithms for Convolutional Neural Networks", section 4.3.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

WIDE = 128 * 128  # input times output channels, from which it pays
LEAST_TILES = 16  # tiles of 4x4, from which it pays
TILES_AT_ONCE = 128  # tiles, about: few enough to stay in the cache

# data, filter and output transforms, for the points 0, 1, -1, 2, -2 and infinity
B = [[4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0], [0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0],
     [0, 4, 0, -5, 0, 1]]  # fmt: skip
G = [[1 / 4, 0, 0], [-1 / 6, -1 / 6, -1 / 6], [-1 / 6, 1 / 6, -1 / 6], [1 / 24, 1 / 12, 1 / 6],
     [1 / 24, -1 / 12, 1 / 6], [0, 0, 1]]  # fmt: skip
A = [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]


def _squared(matrix: list[list[int]]) -> torch.Tensor:
    """Along rows and along columns, as one matrix on both: it has few entries, but one product reads memory once."""
    one = torch.tensor(matrix, dtype=torch.float32, device="cpu")
    return torch.kron(one, one)


INTO, BACK = _squared(B), _squared(A)


def transform_filter(weight: torch.Tensor) -> torch.Tensor:
    """(K, C, 3, 3) => (36, C, K), float32; computed in float64."""
    g = torch.tensor(G, dtype=torch.float64)
    return torch.einsum("ai,kcij,bj->abck", g, weight.double(), g).reshape(36, *weight.shape[1::-1]).float()


def sampled(weight: torch.Tensor) -> torch.Tensor:
    """(K, C, 3, 3) => about 9 C of its numbers, evenly spaced in memory: among them one of every filter (if there are
    at most 9 C), and one of every input channel at each of the nine places."""
    outputs, period = weight.shape[0], weight[0].numel()
    step = next(n for n in range(outputs, 0, -1) if math.gcd(n, period) == 1)
    flat = weight if weight.is_contiguous() else weight.permute(0, 2, 3, 1)
    return flat.detach().reshape(-1)[::step]


def winograd_conv2d(image: torch.Tensor, transformed: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`F.conv2d(image, weight, bias, padding=1)` for a 3x3 weight, without gradients.

    Args:
        image: (B, C, H, W), float32, on the CPU.
        transformed: (36, C, K), of `transform_filter`. bias: (K,).

    Returns:
        (B, K, H, W), channels last.

    >>> image, weight = torch.randn(1, 8, 9, 10), torch.randn(4, 8, 3, 3)
    >>> with torch.no_grad():
    ...     found = winograd_conv2d(image, transform_filter(weight))
    >>> torch.allclose(found, F.conv2d(image, weight, padding=1), atol=1e-3)
    True
    """
    count, channels, height, width = image.shape
    outputs = transformed.shape[2]
    down, across = -(-height // 4), -(-width // 4)
    image = F.pad(image.permute(0, 2, 3, 1), (0, 0, 1, across * 4 + 1 - width, 1, down * 4 + 1 - height))
    tiles = image.unfold(1, 6, 4).unfold(2, 6, 4).permute(4, 5, 0, 1, 2, 3)  # (6, 6, B, down, across, C), a view
    out = image.new_empty(count, down, 4, across, 4, outputs)

    # some rows of tiles of some images at a time, in buffers that are used again
    rows = min(down, max(1, TILES_AT_ONCE // across))
    images = min(count, max(1, TILES_AT_ONCE // (down * across)))
    most = rows * images * across
    a, b = (image.new_empty(36 * most * channels) for _ in range(2))
    c, d = image.new_empty(36 * most * outputs), image.new_empty(16 * most * outputs)
    for i in range(0, count, images):
        for r in range(0, down, rows):
            part, place = tiles[:, :, i : i + images, r : r + rows], out[i : i + images, r : r + rows]
            n = part.shape[2] * part.shape[3] * across
            data = a[: 36 * n * channels].view(part.shape).copy_(part).view(36, -1)
            data = torch.mm(INTO, data, out=b[: 36 * n * channels].view(36, -1)).view(36, n, channels)
            product = torch.bmm(data, transformed, out=c[: 36 * n * outputs].view(36, n, outputs)).view(36, -1)
            pixels = torch.mm(BACK, product, out=d[: 16 * n * outputs].view(16, -1))
            pixels = pixels.view(4, 4, *part.shape[2:4], across, outputs).permute(2, 3, 0, 4, 1, 5)
            torch.add(pixels, 0 if bias is None else bias, out=place)
    return out.view(count, down * 4, across * 4, outputs).permute(0, 3, 1, 2)[:, :, :height, :width]


class WinogradConv2d(nn.Conv2d):
    """A 3x3 convolution that takes Winograd's way wherever it is right and pays, and the plain one elsewhere: with
    gradients, in half precision, on an accelerator, while it is compiled or exported, for few channels or pixels.

    It keeps its weight transformed, at four times the weight's memory, and transforms it again when it has changed.
    Parameters, state dict and `repr` are a convolution's."""

    _transformed: tuple[tuple[int, int], torch.Tensor, torch.Tensor] | None = None

    def _conv_forward(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if not self._pays(input, weight):
            return super()._conv_forward(input, weight, bias)
        return winograd_conv2d(input, self._filter(weight), bias)

    def _filter(self, weight: torch.Tensor) -> torch.Tensor:
        """A merged adapter and a moving average are written through `.data`, which no version tells: some numbers of
        every filter and of every input channel are compared."""
        key, some = (weight.data_ptr(), 0 if weight.is_inference() else weight._version), sampled(weight)
        kept = self._transformed
        if kept is None or kept[0] != key or not torch.equal(kept[1], some):
            kept = self._transformed = key, some.clone(), transform_filter(weight.detach())
        return kept[2]

    def _pays(self, input: torch.Tensor, weight: torch.Tensor) -> bool:
        return (
            _fits(self)  # an adapter makes layers of its base's class, of other shapes
            and not torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and input.device.type == "cpu"
            and input.dtype == weight.dtype == torch.float32
            and input.dim() == 4
            and not torch.is_autocast_enabled("cpu")
            and input.shape[0] * input.shape[2] * input.shape[3] >= 16 * LEAST_TILES
        )

    def __getstate__(self) -> dict:
        return super().__getstate__() | {"_transformed": None}

    def _get_name(self) -> str:
        return "Conv2d"


def _fits(layer: nn.Conv2d) -> bool:
    """Whether it is 3x3 with stride 1, padding 1 by zeros and one group, and wide enough."""
    return (
        (layer.kernel_size, layer.stride, layer.padding, layer.dilation) == ((3, 3), (1, 1), (1, 1), (1, 1))
        and layer.groups == 1
        and layer.padding_mode == "zeros"
        and layer.weight.shape[0] * layer.weight.shape[1] >= WIDE
    )


def use_winograd(network: nn.Module) -> int:
    """Changes the network's 3x3 convolutions to `WinogradConv2d`, in place; returns how many.

    Their parameters stay the same tensors. Only those with stride 1, padding 1 by zeros and one group are changed.
    """
    found = [module for module in network.modules() if type(module) is nn.Conv2d and _fits(module)]
    for module in found:
        module.__class__ = WinogradConv2d
    return len(found)
