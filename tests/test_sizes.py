import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from palette_diffusers import sizes
from palette_diffusers.color import luma

side = st.integers(1, 3000)


@settings(max_examples=300, deadline=None)
@given(height=side, width=side, native=st.sampled_from([32, 64, 256]), multiple=st.sampled_from([4, 8, 32]))
def test_views_fit_the_network(height, width, native, multiple):
    view = sizes.fit(height, width, native, multiple)
    assert all(o % multiple == 0 and 0 <= o - i < multiple for o, i in zip(view.outer, view.inner, strict=True))
    if min(height, width) * 4 >= max(height, width) and min(height, width) >= native:
        ratio = view.inner[0] / view.inner[1] / (height / width)
        assert 0.9 < ratio < 1.12 and 0.5 < view.inner[0] * view.inner[1] / native**2 < 2


@settings(max_examples=60, deadline=None)
@given(height=st.integers(1, 90), width=st.integers(1, 90), data=st.data())
def test_hole_views_hold_the_hole(height, width, data):
    y, x = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    mask = torch.zeros(1, 1, height, width)
    mask[..., y:, x:] = 1
    view = sizes.hole_views(mask, 32, 4)
    assert view.top >= 0 and view.top + view.height <= height and view.left + view.width <= width
    inside = mask[..., view.top : view.top + view.height, view.left : view.left + view.width]
    assert inside.sum() == mask.sum()


@settings(max_examples=40, deadline=None)
@given(height=st.integers(1, 40), width=st.integers(1, 40))
def test_padding_reflects(height, width):
    image = torch.rand(1, 3, height, width)
    padded = sizes.pad_to(image, (41, 43))
    assert torch.equal(padded[..., :height, :width], image)
    if width > 2:
        assert torch.equal(padded[..., :height, width], image[..., width - 2])


def test_tiles_blend_to_what_the_whole_would_give():
    """A pointwise network gives the same in tiles as at once, at every size, without a seam."""
    calls = []

    def predict(sample, gamma, condition):
        calls.append(tuple(sample.shape))
        return sample * 2 + condition

    for height, width in ((64, 64), (80, 200), (170, 64), (129, 131)):
        x, c = torch.randn(2, 3, height, width), torch.randn(2, 3, height, width)
        torch.testing.assert_close(sizes.tiled(predict, 64, 16, batch=4)(x, torch.tensor(0.5), c), x * 2 + c)
    assert max(s[0] for s in calls) <= 4 and max(s[-1] for s in calls) <= 64


def test_tiles_keep_the_jpeg_grid():
    seen = []

    def predict(sample, gamma, condition):
        seen.extend((condition[:, 0, 0, 0] % 8).tolist() + (condition[:, 1, 0, 0] % 8).tolist())
        return sample

    y, x = torch.meshgrid(torch.arange(208.0), torch.arange(304.0), indexing="ij")
    condition = torch.stack([y, x, y])[None]
    sizes.tiled(predict, 64, 16)(torch.zeros(1, 3, 208, 304), torch.tensor(0.5), condition)
    assert len(seen) > 20 and set(seen) == {0.0}
    with pytest.raises(ValueError, match="multiples of 16"):
        sizes.tiled(predict, 60, 16)


def test_chroma_comes_up_and_luma_stays():
    gray = torch.rand(1, 1, 90, 120).expand(1, 3, -1, -1) * 1.6 - 0.8
    view = sizes.fit(90, 120, 32, 4)
    sample = torch.zeros(1, 3, *view.outer)
    sample[:, 0] = 0.3
    out = sizes.merge_chroma(gray, sample, view)
    torch.testing.assert_close(luma(out), luma(gray), atol=1e-5, rtol=0)
    assert (out[:, 0] - out[:, 1] > 0.05).float().mean() > 0.95
