import diffusers
import pytest
import torch
from conftest import toy_unet
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from palette_diffusers import PalettePipeline, PaletteScheduler
from palette_diffusers.scheduler import diffuse, noise_level, output_for
from palette_diffusers.speed import SPEEDS, build
from palette_diffusers.tasks import Given


@pytest.mark.parametrize("name", list(SPEEDS))
def test_a_speed_survives_saving(name, pipe, photo, tmp_path, seeded):
    solver, steps = SPEEDS[name]
    assert pipe.speed(name) is pipe
    pipe.save_pretrained(tmp_path)
    loaded = PalettePipeline.from_pretrained(tmp_path)
    assert type(loaded.scheduler).__name__ == solver and loaded.config.default_steps == steps
    assert loaded.scheduler.config.beta_end == 0.01  # the network's own schedule, not the library's default
    taken = []
    callback = lambda pipe, step, t, tensors: taken.append(step) or tensors  # noqa: E731
    loaded(photo, generator=seeded(), callback_on_step_end=callback)
    assert len(taken) == steps


def test_what_is_saved_has_the_terms_of_its_weights(taught, tmp_path):
    for name in ("few", "whole"):
        (tmp_path / name / "LICENSE").write_text(f"The terms of {name}.\n")
    pipe = PalettePipeline.from_pretrained(tmp_path / "whole")
    for speed, terms in (("fast", "few"), ("fast", "few"), ("balanced", "whole")):
        pipe.speed(speed).save_pretrained(tmp_path / f"saved-{terms}")
        assert (tmp_path / f"saved-{terms}" / "LICENSE").read_text() == f"The terms of {terms}.\n"


def test_an_unknown_speed_is_refused(pipe):
    with pytest.raises(ValueError, match="speed is 'warp', expected fast, balanced, best"):
        pipe.speed("warp")


@pytest.fixture
def taught(tmp_path):
    """A checkpoint that names its student, which is beside it."""
    own = dict(sampling_spacing="logsnr", sampling_variance="zero", initial_noise=0.8)
    few = PalettePipeline(toy_unet(1), PaletteScheduler(**own), default_steps=3, few_steps=3)
    few.save_pretrained(tmp_path / "few")
    scheduler = PaletteScheduler(**own | {"sampling_order": 2, "initial_noise": 0.9})
    pipe = PalettePipeline(toy_unet(), scheduler, default_steps=8, student=str(tmp_path / "few"))
    pipe.save_pretrained(tmp_path / "whole")
    pipe = PalettePipeline.from_pretrained(tmp_path / "whole")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_fast_is_the_student_until_another_speed(taught, photo, seeded, tmp_path):
    picture = lambda pipe: pipe(photo, generator=seeded(), output_type="pt").images  # noqa: E731
    few = PalettePipeline.from_pretrained(tmp_path / "few")
    few.set_progress_bar_config(disable=True)
    before = picture(taught)
    assert torch.equal(picture(taught.speed("fast")), picture(few)) and taught.config.default_steps == 3
    assert torch.equal(picture(taught.speed("fast")), picture(few)), "twice is once"
    taught.save_pretrained(tmp_path / "saved")
    saved = PalettePipeline.from_pretrained(tmp_path / "saved")
    assert saved.config.few_steps == 3 and saved.config.student is None
    torch.testing.assert_close(picture(saved), picture(few))
    taught.speed("balanced")
    assert torch.equal(picture(taught), before) and taught.config.few_steps is None
    assert torch.equal(picture(taught.speed("fast")), picture(few)), "and back"
    assert taught.speed("best").config.default_steps == 16 and taught.scheduler.config.initial_noise == 0.9


def test_the_student_is_as_its_checkpoint_is_now(taught):
    """Device, dtype and layout are those of the network whose place it takes."""
    from palette_diffusers.norms import ChannelsLastGroupNorm, lay_out

    lay_out(taught.unet, "cpu")
    torch.nn.Module.to(taught.unet, torch.bfloat16)
    few = taught.speed("fast").unet
    assert few.dtype == torch.bfloat16 and any(isinstance(part, ChannelsLastGroupNorm) for part in few.modules())
    torch.nn.Module.to(few, torch.float32)
    assert taught.speed("best").unet.dtype == torch.float32


def test_a_changed_network_has_no_student(taught, tmp_path, caplog):
    assert PalettePipeline.from_pretrained(tmp_path / "whole", unet=toy_unet(2)).config.student is None
    own = taught.unet
    taught.unet = toy_unet(2)
    unet = taught.unet
    assert taught.load_student() is None and "was changed since it was loaded" in caplog.text
    assert taught.speed("fast").unet is unet and taught.config.default_steps == SPEEDS["fast"][1]
    taught.unet = own
    assert taught.load_student() is not None
    own.peft_config = {"default": "adapters"}
    assert taught.load_student() is None


def test_a_changed_network_is_saved_without_its_student(taught, tmp_path):
    taught.unet = toy_unet(2)
    taught.save_pretrained(tmp_path / "changed")
    assert PalettePipeline.from_pretrained(tmp_path / "changed").config.student is None
    assert taught.config.student == str(tmp_path / "few")


def test_a_network_put_in_after_fast_is_kept(taught):
    own = taught.speed("fast").unet = toy_unet(2)
    taught.speed("balanced")
    assert taught.unet is own


def test_students_that_do_not_say_their_steps_or_take_many(taught, tmp_path):
    scheduler = PaletteScheduler(sampling_spacing="logsnr", sampling_variance="zero")
    for default, few_steps in ((3, None), (8, 8)):
        PalettePipeline(toy_unet(1), scheduler, default_steps=default, few_steps=few_steps).save_pretrained(
            tmp_path / "few"
        )
        for _ in range(2):
            taught.speed("fast")
            assert taught.config.default_steps == taught.config.few_steps == default
            assert taught.scheduler.config.sampling_order == 1
        taught.speed("best")


def test_the_student_is_fetched_as_its_teacher_was(taught, tmp_path, monkeypatch):
    pipe = PalettePipeline.from_pretrained(tmp_path / "whole", local_files_only=True, token="secret")
    asked, plain = {}, PalettePipeline.from_pretrained.__func__
    monkeypatch.setattr(
        PalettePipeline, "from_pretrained",
        classmethod(lambda cls, name, **options: asked.update(options) or plain(cls, name, **options)),
    )  # fmt: skip
    pipe.load_student()
    assert asked == {"dtype": torch.float32, "local_files_only": True, "token": "secret"}


def test_a_speed_is_chosen_before_offloading(taught):
    accelerate = pytest.importorskip("accelerate")
    accelerate.cpu_offload(taught.unet, torch.device("cpu"))
    with pytest.raises(ValueError, match="is offloaded .*: choose a speed before"):
        taught.speed("fast")


def test_a_student_that_is_not_there_changes_nothing(taught, tmp_path):
    (tmp_path / "few" / "model_index.json").unlink()
    before = taught.unet, taught.scheduler, dict(taught.config)
    with pytest.raises(OSError, match="few"):
        taught.speed("fast")
    assert (taught.unet, taught.scheduler, dict(taught.config)) == before


def test_a_student_knows_every_task_and_is_named_by_text(taught, tmp_path):
    with pytest.raises(ValueError, match="student is 5, expected a checkpoint's name or None"):
        PalettePipeline(taught.unet, taught.scheduler, student=5)
    assert PalettePipeline.from_pretrained(tmp_path / "few", unet=toy_unet(2)).config.few_steps is None
    for wrong in (0, 2.0, True):
        with pytest.raises(ValueError, match=f"few_steps is {wrong}, expected a whole number of at least 1"):
            PalettePipeline(taught.unet, taught.scheduler, few_steps=wrong)
    few = PalettePipeline(toy_unet(1), PaletteScheduler(), tasks="colorization,inpainting", few_steps=3)
    few.save_pretrained(tmp_path / "few")
    with pytest.raises(ValueError, match="few, this checkpoint's student, does not know uncropping, jpeg_restoration"):
        taught.speed("fast")


@pytest.mark.parametrize("name", list(SPEEDS))
def test_a_student_takes_its_own_steps(tmp_path, taught, name, caplog):
    few = PalettePipeline.from_pretrained(tmp_path / "few")
    scheduler = few.scheduler
    few.speed(name)
    assert few.scheduler is scheduler and few.config.default_steps == 3
    assert ("changes nothing: this is a student of at most 3 steps" in caplog.text) == (name != "fast")


def test_a_student_need_not_have_its_teachers_variant(taught, tmp_path):
    taught.save_pretrained(tmp_path / "half", variant="fp16")
    pipe = PalettePipeline.from_pretrained(tmp_path / "half", variant="fp16")
    assert pipe.load_student().config.few_steps == 3, "which was saved without one"
    PalettePipeline.from_pretrained(tmp_path / "few").save_pretrained(tmp_path / "few-half", variant="fp16")
    pipe.register_to_config(student=str(tmp_path / "few-half"))
    assert pipe.load_student().config.few_steps == 3, "and one that has it alone"


def test_the_shipped_checkpoints_fast_is_its_shipped_student(photo, seeded):
    pipe, few = PalettePipeline.from_pretrained(), PalettePipeline.from_pretrained("starter-few-steps")
    pipe.speed("fast")
    assert pipe.config.default_steps == few.config.default_steps == few.config.few_steps == 4
    for one in (pipe, few):
        one.set_progress_bar_config(disable=True)
    first, second = (one(photo, generator=seeded(), output_type="pt").images for one in (pipe, few))
    torch.testing.assert_close(first, second, atol=1e-5, rtol=0)


S = 0.5  # standard deviation of the pictures of the Gaussian problem


def solve(scheduler, steps: int) -> float:
    """The error after all steps, with the exact denoiser of pictures N(0, S^2), whose flow has a known solution:
    y(gamma) grows as the standard deviation, (gamma S^2 + 1 - gamma)^(1/2)."""
    deviation = lambda gamma: (gamma * S**2 + 1 - gamma) ** 0.5  # noqa: E731
    original = lambda y, gamma: gamma**0.5 * S**2 * y / deviation(gamma) ** 2  # noqa: E731
    scheduler.set_timesteps(steps)
    first = noise_level(scheduler, scheduler.timesteps[0]).double()
    last = noise_level(scheduler, scheduler.timesteps[-1]).double()
    start = y = torch.full((1, 1, 1, 1), 0.8, dtype=torch.float64)
    for t in scheduler.timesteps:
        gamma = noise_level(scheduler, t).double()
        y = scheduler.step(output_for(original(y, gamma), y, gamma, "epsilon").double(), t, y).prev_sample.double()
    exact = original(start * deviation(last) / deviation(first), last)  # the last step returns the predicted picture
    return (y - exact).abs().item()


@pytest.mark.parametrize(
    "solver, order, steps",
    [
        (lambda c: PaletteScheduler.from_config(c, sampling_variance="zero", sampling_spacing="logsnr"), 1, 50),
        (
            lambda c: PaletteScheduler.from_config(
                c, sampling_variance="zero", sampling_spacing="logsnr", sampling_order=2
            ), 2, 50,
        ),
        (lambda c: diffusers.UniPCMultistepScheduler.from_config(c), 2, 100),
        (lambda c: diffusers.DPMSolverMultistepScheduler.from_config(c, use_lu_lambdas=True), 2, 50),
    ],
    ids=["zero variance", "zero variance, order 2", "UniPC", "DPM++ 2M"],
)
def test_order_of_convergence(solver, order, steps):
    """Twice the steps, an error 2^order times smaller."""
    config = PaletteScheduler(num_train_timesteps=2000).config
    coarse, fine = (solve(solver(config), n) for n in (steps, 2 * steps))
    assert 0.75 * 2**order < coarse / fine < 2 * 2**order


def spread(order: int, steps: int) -> float:
    """How far the deviation of ancestral samples of the Gaussian problem is from S."""
    scheduler = PaletteScheduler(
        sampling_spacing="logsnr", sampling_variance="fixed_small", sampling_order=order, clip_sample=False
    )
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(1, 1, 1000, 1000, generator=generator)
    for t in scheduler.timesteps:
        gamma = noise_level(scheduler, t)
        original = gamma**0.5 * S**2 * y / (gamma * S**2 + 1 - gamma)
        y = scheduler.step(output_for(original, y, gamma, "epsilon"), t, y, generator=generator).prev_sample
    return abs(y.std().item() - S * torch.sigmoid(torch.tensor(9.0)).sqrt().item())


def test_ancestral_steps_of_second_order():
    """Twice the steps, an error of the pictures' deviation 2^order times smaller; first order is far from it."""
    assert 1.6 < spread(1, 24) / spread(1, 48) < 2.4
    assert 3 < spread(2, 24) / spread(2, 48) < 5.5
    assert spread(2, 24) < 0.2 * spread(1, 24)


def test_eta_is_the_share_of_new_noise(seeded):
    y, output = torch.randn(1, 3, 8, 8, generator=seeded()), torch.randn(1, 3, 8, 8, generator=seeded(1))
    kinds = ("zero", "fixed_small", "fixed_large")
    of = {v: PaletteScheduler(sampling_spacing="logsnr", sampling_variance=v) for v in kinds}
    steps: dict = {}
    for variance, scheduler in of.items():
        scheduler.set_timesteps(8)
        for eta in (None, 0, 0.5, 1):
            steps[variance, eta] = scheduler.step(output, 4, y, generator=seeded(2), eta=eta).prev_sample
    for eta in (0, 0.5, 1):
        assert torch.equal(steps["zero", eta], steps["fixed_small", eta])
        assert torch.equal(steps["zero", eta], steps["fixed_large", eta])
    noise = randn_tensor(y.shape, generator=seeded(2))
    given = of["zero"].step(output, 4, y, eta=0.5, variance_noise=noise).prev_sample
    assert torch.equal(given, steps["zero", 0.5])
    assert torch.equal(steps["zero", None], steps["zero", 0])
    assert torch.equal(steps["fixed_small", None], steps["zero", 1])
    assert not torch.allclose(steps["zero", 0.5], steps["zero", 1], atol=0.1)
    ddim = diffusers.DDIMScheduler(num_train_timesteps=2000, clip_sample=False)  # our level of step 4 is one of its own
    ddim.set_timesteps(10)
    own = PaletteScheduler(sampling_variance="zero", clip_sample=False)
    own._gammas = torch.cat([torch.ones(1), ddim.alphas_cumprod[ddim.timesteps.flip(0)]]).double().numpy()
    theirs = ddim.step(output, int(ddim.timesteps[5]), y, eta=0.5, generator=seeded(2)).prev_sample
    assert torch.allclose(own.step(output, 4, y, eta=0.5, generator=seeded(2)).prev_sample, theirs, atol=1e-4)
    with pytest.raises(ValueError, match=r"eta is 1.5, expected 0 \(no new noise\) to 1"):
        own.step(output, 4, y, eta=1.5)
    with pytest.raises(ValueError, match="source_eta is -1, expected 0"):
        PaletteScheduler(source_eta=-1)


def test_source_eta_is_of_tasks_that_start_from_their_source(pipe, photo, seeded):
    """It is our scheduler's, where that is deterministic; other solvers take an eta where they know one."""
    picture = lambda task, **options: pipe(  # noqa: E731
        photo[:48, :64], task=task, generator=seeded(), num_inference_steps=20, output_type="pt", **options
    ).images
    settings = dict(sampling_spacing="logsnr", sampling_variance="zero")
    pipe.scheduler = PaletteScheduler(**settings)
    plain = {task: picture(task) for task in ("jpeg_restoration", "colorization")}
    new = picture("jpeg_restoration", eta=0.6)
    assert not torch.equal(new, plain["jpeg_restoration"])
    pipe.scheduler = PaletteScheduler(**settings, source_eta=0.6)
    assert torch.equal(picture("jpeg_restoration"), new)
    assert torch.equal(picture("jpeg_restoration", eta=0), plain["jpeg_restoration"])
    assert torch.equal(picture("colorization"), plain["colorization"])
    pipe.scheduler = PaletteScheduler(**settings | {"sampling_variance": "fixed_small"}, source_eta=0.6)
    assert torch.equal(picture("jpeg_restoration"), picture("jpeg_restoration", eta=1)), "as it was asked for"
    pipe.scheduler = build(diffusers.DDIMScheduler, PaletteScheduler(**settings, source_eta=0.6).config)
    assert torch.equal(picture("jpeg_restoration"), picture("jpeg_restoration", eta=0))
    assert not torch.equal(picture("jpeg_restoration"), picture("jpeg_restoration", eta=1))
    pipe.scheduler = build(diffusers.UniPCMultistepScheduler, pipe.scheduler.config)
    with pytest.raises(ValueError, match="eta is 0.5, but UniPCMultistepScheduler takes none"):
        picture("jpeg_restoration", eta=0.5)
    with pytest.raises(ValueError, match="eta is 2, expected 0"):
        picture("jpeg_restoration", eta=2)


@pytest.mark.parametrize(("quality", "share"), [(10, 1), (20, 0.5), (30, 0)])
def test_mild_jpegs_get_less_new_noise(pipe, photo, seeded, tmp_path, quality, share):
    photo = photo[:64, :64]
    Image.fromarray(photo).save(tmp_path / "a.jpg", quality=quality)
    pipe.scheduler = PaletteScheduler(sampling_spacing="logsnr", sampling_variance="zero", source_eta=0.6)
    options = dict(task="jpeg_restoration", num_inference_steps=8, output_type="pt")
    picture = lambda image, **more: pipe(image, generator=seeded(), **options, **more).images  # noqa: E731
    with Image.open(tmp_path / "a.jpg") as opened:
        for image in (tmp_path / "a.jpg", opened):
            own = picture(image)
            assert torch.equal(own, picture(image, eta=0.6 * share))
            assert not torch.equal(own, picture(image, eta=0.6 * share + 0.1))
    assert torch.equal(picture(photo), picture(photo, eta=0.6)), "nothing is known of its quality"


def test_strength_is_the_share_of_steps_that_are_taken(photo, seeded):
    pipe = PalettePipeline(toy_unet(), PaletteScheduler(sampling_spacing="logsnr", restart_noise=0.5), default_steps=10)
    pipe.set_progress_bar_config(disable=True)
    source = torch.rand(1, 3, 64, 64) * 2 - 1  # larger than the network's own size, where `restart_noise` holds
    given, seen = Given(known=source, condition=source), []

    def predict(y, gamma, condition):
        seen.append((y, gamma))
        return torch.zeros_like(y)

    for strength, taken in ((1.0, 10), (0.3, 3), (0.01, 1)):
        seen.clear()
        pipe.denoise(given, seeded(), predict=predict, strength=strength)
        assert len(seen) == taken
    y, gamma = seen[0]
    noise = torch.randn(1, 3, 64, 64, generator=seeded())
    torch.testing.assert_close(y, diffuse(source, noise * 0.5, gamma))
    seen.clear()
    small = source[..., :32, :32]
    pipe.denoise(Given(known=small, condition=small), seeded(), predict=predict, strength=0.3)
    y, gamma = seen[0]
    torch.testing.assert_close(y, diffuse(small, torch.randn(1, 3, 32, 32, generator=seeded()), gamma))
    with pytest.raises(ValueError, match="strength is 0"):
        pipe(photo, strength=0)


def test_a_hole_starts_from_its_smooth_fill(pipe, seeded):
    pipe.scheduler = PaletteScheduler(sampling_spacing="logsnr", restart_noise=0.0)
    known, mask = torch.full((1, 3, 64, 64), 0.5), torch.zeros(1, 1, 64, 64)
    mask[..., 4:12, 4:12] = 1
    given, seen = Given(known * (1 - mask), torch.randn(1, 3, 64, 64), mask), []
    pipe.denoise(given, seeded(), 8, predict=lambda y, g, x: seen.append((y, g)) or y * 0, strength=0.5)
    y, gamma = seen[0]
    torch.testing.assert_close(y / gamma.sqrt(), known)


@pytest.mark.parametrize("name", list(SPEEDS))
def test_large_fills_are_refined_by_what_few_steps_allow(pipe, photo, name):
    """The last steps of all are calm enough."""
    pipe.speed(name)
    calls, predict = [], pipe._predict
    pipe._predict = lambda *given: calls.append(given[1]) or predict(*given)
    size = pipe.unet.config.sample_size
    large = Image.fromarray(photo).resize((6 * size, 6 * size))
    pipe(large, task="inpainting", mask_image=f"{size},{size},{4 * size},{4 * size}")
    assert len(calls) > pipe.config.default_steps


def test_a_solver_is_built_with_changes_that_only_we_know():
    import diffusers

    from palette_diffusers.speed import build

    config = PaletteScheduler(sampling_spacing="logsnr").config  # the others are defaults, which the library drops
    built = build(diffusers.UniPCMultistepScheduler, config, chroma_guidance=1.2, use_karras_sigmas=True)
    assert built.config["chroma_guidance"] == 1.2 and built.config.use_karras_sigmas
    assert built.config["sampling_spacing"] == "logsnr" and built.config.num_train_timesteps == 2000
    assert build(PaletteScheduler, config, initial_noise=0.5).init_noise_sigma == 0.5
    scheduler = PaletteScheduler(sampling_spacing="logsnr")
    scheduler.register_to_config(chroma_guidance=1.2)  # of what the library still counts among the defaults
    assert build(diffusers.UniPCMultistepScheduler, scheduler.config).config["chroma_guidance"] == 1.2


def test_a_folder_of_half_precision_alone_is_loaded_from_it(taught, tmp_path):
    half = tmp_path / "half"
    taught.save_pretrained(half, variant="fp16")
    pipe = PalettePipeline.from_pretrained(half)
    rounded = PalettePipeline.from_pretrained(half, variant="fp16", dtype=torch.float32)
    assert pipe.unet.dtype == torch.float32
    for name, value in rounded.unet.state_dict().items():
        assert torch.equal(pipe.unet.state_dict()[name], value), name
    assert PalettePipeline.from_pretrained(half, dtype=torch.bfloat16).unet.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="`variant=bf16`, but .*half has variant='fp16'"):
        PalettePipeline.from_pretrained(half, variant="bf16")
    taught.save_pretrained(half)  # with the plain one beside it, that is taken
    plain = PalettePipeline.from_pretrained(half).unet.state_dict()
    assert all(torch.equal(plain[name], value) for name, value in taught.unet.state_dict().items())
