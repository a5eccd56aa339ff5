import numpy as np
import pytest

from palette_diffusers.plan import plan


@pytest.mark.parametrize("options", [
    dict(task="colorization"), dict(task="jpeg_restoration"),
    dict(task="uncropping", right=1.5, num_images_per_input=2),
    dict(task="inpainting", mask_image="20,30,120,90"),
])  # fmt: skip
def test_a_plan_is_what_happens(pipe, photo, options):
    """The evaluations that are counted are those that are made then, in size and number."""
    made: dict = {}

    def count(_, inputs):
        batch, _, height, width = inputs[0].shape
        made[batch, height, width] = made.get((batch, height, width), 0) + 1

    image = np.tile(photo, (2, 1, 1))
    planned = plan(pipe, image, **options)
    with_hook = pipe.unet.register_forward_pre_hook(count)
    pipe(image, **options)
    with_hook.remove()
    assert planned.evaluations == made and sum(made.values()) >= 2
    assert planned.seconds >= planned.network_seconds > 0
    assert planned.memory == 0 or 10 * 2**20 < planned.memory < 24 * 2**30


def test_a_plan_leaves_the_pipeline_as_it_was(pipe, photo, seeded):
    generator, called = seeded(3), []
    before = generator.get_state()
    plan(pipe, photo, task="colorization", generator=generator, callback_on_step_end=lambda *_: called.append(1) or {})
    plan(pipe, [photo], task="colorization", generator=[generator])
    assert not called and (generator.get_state() == before).all()
    with pytest.raises(ValueError, match="needs a mask_image"):
        plan(pipe, photo, task="inpainting")
    assert "_predict" not in vars(pipe)
