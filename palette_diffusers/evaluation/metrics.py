"""The figures. Images are (B, 3, H, W), RGB, [-1, 1]; features (N, D); logits (N, C).

What is summed over a set is summed in float64 and in constant memory; shards are added.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

MS_SSIM_BETAS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang et al. 2003, table 1
Interval = tuple[float, float]


@dataclass
class Moments:
    """Sums of a set of features: how many, (D,) and (D, D) in float64.

    >>> moments = Moments.of([torch.tensor([[0.0, 1.0], [2.0, 1.0]])])
    >>> moments.mean.tolist(), moments.covariance.tolist()
    ([1.0, 1.0], [[2.0, 0.0], [0.0, 0.0]])
    """

    count: float
    total: torch.Tensor
    outer: torch.Tensor

    @classmethod
    def of(cls, batches: Iterable[torch.Tensor]) -> "Moments":
        """Of batches of features (N, D).

        Raises:
            ValueError: no batch.
        """
        return cls.resampled(batches)[0]

    @classmethod
    def resampled(cls, batches: Iterable[torch.Tensor], counts: np.ndarray | None = None) -> "list[Moments]":
        """Of R sets at once, in which each sample stands as often as `counts` (R, N) says; of one, without."""
        sums: list[Moments] = []
        for x, weights in _weighted(batches, counts):
            parts = [cls(w.sum().item(), w @ x, x.T @ (x * w[:, None])) for w in weights]
            sums = [a + b for a, b in zip(sums, parts, strict=True)] if sums else parts
        if not sums:
            raise ValueError("no images came, their moments need at least 1")
        return sums

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(self.count + other.count, self.total + other.total, self.outer + other.outer)

    @property
    def mean(self) -> torch.Tensor:
        return self.total / self.count

    @property
    def covariance(self) -> torch.Tensor:
        """Raises:
        ValueError: fewer than 2 samples.
        """
        if self.count < 2:
            raise ValueError(f"{self.count:g} images came, a covariance needs at least 2")
        return (self.outer - torch.outer(self.total, self.mean)) / (self.count - 1)


def _weighted(
    batches: Iterable[torch.Tensor], counts: np.ndarray | None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches (B, ...) in float64, each with its columns of `counts` (R, N) => (R, B)."""
    start = 0
    for batch in batches:
        here = np.ones((1, len(batch))) if counts is None else counts[:, start : start + len(batch)]
        yield batch.double(), torch.from_numpy(here.astype(np.float64))
        start += len(batch)


class Frechet:
    """The Frechet distance of any set from one reference, whose matrix root is taken once.

    Source: Heusel et al. 2017, equation 6; tr (A B)^1/2 = tr (A^1/2 B A^1/2)^1/2, which stays symmetric.
    """

    def __init__(self, reference: Moments):
        self.reference = reference
        values, vectors = torch.linalg.eigh(reference.covariance)
        self._root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T

    def __call__(self, moments: Moments) -> float:
        reference, covariance = self.reference, moments.covariance
        product = torch.linalg.eigvalsh(self._root @ covariance @ self._root)
        trace = reference.covariance.trace() + covariance.trace() - 2 * product.clamp_min(0).sqrt().sum()
        return max(0.0, ((moments.mean - reference.mean).square().sum() + trace).item())


def frechet_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Between Gaussians fitted to two sets of features (N, D). It is FID only for Inception's features.

    >>> x = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
    >>> frechet_distance(x, x) < 1e-6, round(frechet_distance(x, x + 1), 3)
    (True, 4.0)
    """
    return Frechet(Moments.of([b]))(Moments.of([a]))


def kernel_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """The unbiased squared MMD of two sets of features (N, D) of one size, with the kernel (x y / D + 1)^3.

    Source: Binkowski et al. 2018, "Demystifying MMD GANs", equation 4 and section 3.1.
    """
    from torchmetrics.image.kid import poly_mmd

    return poly_mmd(a.double(), b.double()).item()


def inception_scores(logits: Iterable[torch.Tensor], counts: np.ndarray | None = None) -> list[float]:
    """exp(E KL(p(y|x) || p(y))) over batches of logits (N, C), in one split; of R resampled sets at once by `counts`
    (R, N). It is the Inception Score only for Inception's logits.

    Source: Salimans et al. 2016; without splits, Barratt & Sharma 2018. E KL is H(mean p) - mean H(p).

    >>> inception_scores([torch.eye(4) * 1000])
    [4.0]
    """
    number, certainty, marginal = (torch.zeros(1, dtype=torch.float64) for _ in range(3))
    for batch, weights in _weighted(logits, counts):
        log = batch.log_softmax(1)
        number = number + weights.sum(1)
        certainty = certainty + weights @ (log.exp() * log).sum(1)
        marginal = marginal + weights @ log.exp()
    if not number.min():
        raise ValueError("no images came, the score needs at least 1")
    mean = marginal / number[:, None]
    return (certainty / number - torch.special.xlogy(mean, mean).sum(1)).exp().tolist()


def eight_bits(images: torch.Tensor) -> torch.Tensor:
    """What is left of (B, 3, H, W) once written to a file."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255) / 127.5 - 1


def psnr(images: torch.Tensor, originals: torch.Tensor) -> torch.Tensor:
    """In dB, of each picture: (B,); identical ones give 100.

    >>> psnr(torch.zeros(1, 3, 8, 8), torch.full((1, 3, 8, 8), 0.2)).item()
    20.0
    """
    return -10 * ((images - originals) / 2).square().mean((1, 2, 3)).clamp_min(1e-10).log10()


def _blur(images: torch.Tensor, window: int = 11, sigma: float = 1.5) -> torch.Tensor:
    """Gaussian means, the border reflected: (B, C, H, W)."""
    weights = torch.exp(-(((torch.arange(window) - window // 2) / sigma) ** 2) / 2)
    weights = weights / weights.sum()

    def bands(length: int) -> torch.Tensor:
        places = torch.arange(length + window - 1)[None] - torch.arange(length)[:, None]
        inside = (places >= 0) & (places < window)
        return torch.where(inside, weights[places.clamp(0, window - 1)], torch.zeros(())).to(images)

    padded = F.pad(images, [window // 2] * 4, mode="reflect")
    return bands(images.shape[-2]) @ padded @ bands(images.shape[-1]).T


def _from_black(images: torch.Tensor) -> torch.Tensor:
    """[-1, 1] => [0, 1]: the luminance term compares means with their distance from black, not from gray."""
    return (images.float() + 1) / 2


def ssim(images: torch.Tensor, originals: torch.Tensor) -> torch.Tensor:
    """Of each picture (B,): Gaussian windows of 11 pixels, sigma 1.5.

    Source: Wang et al. 2004, equation 13. It equals torchmetrics', whose convolutions are slow on a CPU.

    >>> ssim(torch.full((1, 3, 16, 16), -1.0), torch.ones(1, 3, 16, 16)).item() < 1e-3
    True
    """
    x, y = _from_black(images), _from_black(originals)
    c1, c2 = 0.01**2, 0.03**2
    a, b, aa, bb, ab = _blur(torch.cat([x, y, x**2, y**2, x * y])).chunk(5)
    structure = (2 * (ab - a * b) + c2) / ((aa - a**2).clamp_min(0) + (bb - b**2).clamp_min(0) + c2)
    return ((2 * a * b + c1) / (a**2 + b**2 + c1) * structure).mean((1, 2, 3))


def ms_ssim_scales(size: int) -> tuple[int, int]:
    """(scales, window) for pictures of `size` pixels: the paper's (5, 11) from 176 pixels on, fewer below.

    >>> ms_ssim_scales(256), ms_ssim_scales(64)
    ((5, 11), (3, 7))
    """
    for scales, window in ((5, 11), (4, 9), (3, 7), (2, 5)):
        if size // (scales - 1) ** 2 >= window:  # torchmetrics' bound
            return scales, window
    raise ValueError(f"pictures are {size} pixels, MS-SSIM needs at least 5")


def ms_ssim_name(size: int) -> str:
    """ "MS-SSIM", or a name that says what was left of it.

    >>> ms_ssim_name(64)
    'MS-SSIM (3 scales, window 7)'
    """
    scales, window = ms_ssim_scales(size)
    return "MS-SSIM" if scales == 5 else f"MS-SSIM ({scales} scales, window {window})"


def ms_ssim(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Of each pair (B,), by torchmetrics, with as many scales as the size allows (`ms_ssim_name`)."""
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    scales, window = ms_ssim_scales(min(a.shape[-2:]))
    betas = torch.tensor(MS_SSIM_BETAS[:scales])
    return multiscale_structural_similarity_index_measure(
        _from_black(a), _from_black(b), sigma=1.5 * window / 11, kernel_size=window, data_range=1.0, reduction="none",
        betas=tuple((betas / betas.sum()).tolist()),
    )  # fmt: skip  # torchmetrics takes the window's width from sigma, and checks the size by kernel_size


def resamples(count: int, replicates: int, seed: int = 0) -> np.ndarray:
    """How often each of `count` images stands in each bootstrap sample: (1 + replicates, count); the first row is
    the set itself."""
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=replicates)
    return np.concatenate([np.ones((1, count)), drawn]).astype(np.uint8)


def interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Of a figure and its values in bootstrap samples, in this order: their quantiles, moved so that their mean is
    the figure. A distance between sets grows when a set is resampled: the plain quantiles would lie beside it.

    >>> interval([10.0, 11.0, 12.0, 13.0], level=0.5)
    (9.5, 10.5)
    """
    figure, drawn = values[0], np.asarray(values[1:], float)
    low, high = np.quantile(drawn - drawn.mean(), [(1 - level) / 2, (1 + level) / 2])
    return float(figure + low), float(figure + high)
