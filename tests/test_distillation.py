import runpy
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import toy_unet
from test_replay import record_forward
from torch.utils.data import default_collate

from palette_diffusers import PalettePipeline, PaletteScheduler, distillation, tasks
from palette_diffusers.data import PaletteDataset
from palette_diffusers.distillation import Teacher, guided
from palette_diffusers.replay import ReplayedForward
from palette_diffusers.scheduler import diffuse, predicted_original, training_target
from palette_diffusers.sources import load_images
from palette_diffusers.tasks import Given, fill_holes, get_task
from palette_diffusers.training import TrainSettings, _check_alike, _check_same, _own, preset, train, training_loss

DISTILL = Path(__file__).parents[1] / "train" / "distill_palette.py"
TASKS = ["colorization", "inpainting", "uncropping", "jpeg_restoration"]


def toy_teacher(**options) -> PalettePipeline:
    settings = dict(prediction_type="v_prediction", sampling_spacing="logsnr", initial_noise=0.8, restart_noise=0.4)
    return PalettePipeline(toy_unet(**options), PaletteScheduler(**settings), default_steps=4)


def batch_of(folder, tasks, number=8, **options):
    images = load_images(str(folder))
    dataset = PaletteDataset(images, PaletteScheduler(), tasks, crops=images, size=32, seed=3, **options)
    return default_collate([dataset[i] for i in range(number)])


@pytest.mark.parametrize("holes", [False, True])
def test_a_pair_is_what_the_pipeline_samples(folder, holes):
    options = dict(hole_skip=0.5, condition_skip=0.2) if holes else {}
    pipe = toy_teacher(**options)
    batch = batch_of(folder, TASKS, holes=holes)
    out = Teacher(pipe, TASKS, levels=3).pairs(batch)
    assert len(out["clean"]) == len(out["gamma"]) == len(out["condition"]) == 24
    assert len(set(batch["task"].tolist())) == 4
    for i in range(8):
        task = get_task(TASKS[batch["task"][i]])
        mask = batch["mask"][i : i + 1] if task.takes_mask else None
        given = Given(batch["known"][i : i + 1], batch["condition"][i : i + 1, :3], mask)
        picture = pipe.denoise(given, latents=batch["noise"][i : i + 1], num_inference_steps=4, task=task)
        assert torch.allclose(picture[0], out["clean"][3 * i], atol=1e-4)
        # the line's first point is the teacher's first sample, of calmer noise (`restart_noise` is for larger pictures)
        first = diffuse(out["clean"][3 * i : 3 * i + 1], out["noise"][3 * i : 3 * i + 1], out["gamma"][3 * i])
        g = out["gamma"][3 * i]
        known = given.known
        expected = 0.8 * batch["noise"][i : i + 1] if task.start is None else diffuse(
            known, 0.8 * batch["noise"][i : i + 1], g
        )
        assert torch.allclose(first, expected, atol=1e-4)


def test_a_teacher_by_replayed_passes_makes_the_same_pairs(folder):
    batch, out = batch_of(folder, TASKS), []
    for replayed in (False, True):
        pipe = toy_teacher()
        predict = ReplayedForward(pipe._predict, 4, record_forward)
        torch.manual_seed(0)
        out.append(Teacher(pipe, TASKS, predict=predict if replayed else None).pairs(batch))
        assert bool(predict._recorded) is replayed
    for name in out[0]:
        assert torch.allclose(out[0][name], out[1][name], atol=1e-5), name


def test_a_teacher_goes_on_from_the_students_own_steps(folder, monkeypatch):
    """Against a sampler written from the formulas: the student's steps, first order, then the teacher's, second order
    but for its first."""
    monkeypatch.setattr(distillation, "LAST_SHARE", 1.0)  # or the last of its steps would come too seldom
    pipe, other = toy_teacher(), toy_unet()
    settings = dict(sampling_order=2, sampling_variance="zero", task_logsnr_min={"inpainting": -12.0})
    pipe.scheduler = PaletteScheduler.from_config(pipe.scheduler.config, **settings)
    batch = batch_of(folder, TASKS)

    def student(sample, gamma, condition):
        return other(sample, gamma, condition, return_dict=False)[0]

    teacher = Teacher(pipe, TASKS, steps=8, levels=1, student=student, student_steps=4)
    scheduler, joints, from_noise = pipe.scheduler, set(), 0
    for seed in range(24):
        torch.manual_seed(seed)
        out = teacher.pairs(batch)
        assert pipe.scheduler is scheduler
        torch.manual_seed(seed)
        for number, name in enumerate(TASKS):
            task, rows = get_task(name), torch.nonzero(batch["task"] == number).flatten()
            start, joined, task = teacher._with_own_steps(task)
            from_noise += name == "jpeg_restoration" and task.start is None  # two own steps are too few for its start
            levels, own, skipped = np.array(joined.logsnrs), joined.own, joined.own - start.left
            joints.add((name, start.left))
            low = -12 if name == "inpainting" else -9
            assert (np.diff(levels) > 0).all() and levels[-1] == 9 and levels[0] == low
            spacing = np.diff(levels[own:]).max(initial=0)
            assert spacing < 1.5 * (9 - low) / 7, "as far apart as the teacher's, or nearly so"
            assert (levels[skipped] >= -4) == (task.start is not None)
            known, condition = batch["known"][rows], batch["condition"][rows]
            given = Given(known, condition[:, :3], batch["mask"][rows] if task.takes_mask else None)
            gammas = torch.sigmoid(torch.tensor(levels))
            y = 0.8 * batch["noise"][rows].double()
            if skipped:
                y = diffuse(known, y, gammas[skipped])
            before = None
            for i in range(skipped, len(levels)):
                if i <= own:
                    before = None
                if i == own:
                    begin = diffuse(*(out[name][rows] for name in ("clean", "noise", "gamma")))
                    assert torch.allclose(y.float(), begin, atol=2e-3)
                g = gammas[i]
                network = other if i < own else pipe.unet
                with torch.no_grad():
                    v = network(y.float(), g.float(), condition, return_dict=False)[0].double()
                y0 = (g.sqrt() * y - (1 - g).sqrt() * v).clamp(-1, 1)
                y0 = task.guide(y0.float(), given).double().clamp(-1, 1)
                ahead = y0
                if before is not None and i + 1 < len(levels):
                    r = 0.5 * (levels[i + 1] - levels[i]) / (levels[i] - levels[i - 1])
                    ahead = y0 + r * (y0 - before)
                s = gammas[i + 1] if i + 1 < len(levels) else torch.tensor(1.0).double()
                kept = ((1 - s) / (1 - g)).sqrt()
                y, before = kept * y + (s.sqrt() - kept * g.sqrt()) * ahead, y0
            assert torch.allclose(y.float(), out["clean"][rows], atol=2e-3), name
            assert torch.allclose(torch.logit(out["gamma"][rows].double()), torch.tensor(levels[own]), atol=1e-2)
    assert {joint for name, joint in joints if name == "colorization"} == {0, 1, 2, 3}
    assert {joint for name, joint in joints if name == "jpeg_restoration"} == {0, 1, 2}
    assert 2 < from_noise < 20 and get_task("jpeg_restoration").start == -4


def test_a_task_that_starts_after_all_own_steps_is_taken_from_noise(folder, monkeypatch):
    class Late(type(get_task("jpeg_restoration"))):
        name, start = "late", 8.5

    monkeypatch.setattr(tasks, "_TASKS", dict(tasks._TASKS))
    tasks.register_task(Late())
    pipe = toy_teacher()
    pipe.register_to_config(tasks=["late"])
    teacher = Teacher(pipe, ["late"], steps=4, levels=1, student=pipe._predict, student_steps=2)
    batch = batch_of(folder, ["late"], 2)
    firsts = []
    for seed in range(20):
        torch.manual_seed(seed)
        out = teacher.pairs(batch)
        firsts.append(round(torch.logit(out["gamma"].double()).min().item(), 3))
        if firsts[-1] == -9:
            begin = diffuse(out["clean"], out["noise"], out["gamma"])
            assert torch.allclose(begin, 0.8 * batch["noise"], atol=1e-4), "noise alone"
    assert min(firsts) == -9 and (np.array(firsts)[np.array(firsts) > -9] >= 6).all()


def test_student_and_teacher_predict_alike():
    pipe = toy_teacher()
    for wrong, said in (
        (dict(prediction_type="epsilon"), "prediction_type is 'epsilon', starter's 'v_prediction': on_policy needs"),
        (dict(unet=toy_unet()), "hole_skip is False, starter's True"),
    ):
        with pytest.raises(ValueError, match=said):
            teacher = PalettePipeline(toy_unet(hole_skip=0.5, condition_skip=0.2), pipe.scheduler)
            chosen = replace(preset("distill-64"), prediction_type=wrong.get("prediction_type", "v_prediction"))
            _check_alike(teacher, wrong.get("unet", teacher.unet), chosen)


def test_what_a_students_own_steps_need():
    student = toy_teacher()._predict
    with pytest.raises(ValueError, match="student_steps is 1"):
        Teacher(toy_teacher(), TASKS, student=student, student_steps=1)
    pipe = toy_teacher()
    pipe.scheduler = PaletteScheduler(prediction_type="v_prediction")
    with pytest.raises(ValueError, match="the teacher's sampling_spacing is 'paper'"):
        Teacher(pipe, TASKS, student=student)


def test_levels_lie_between_the_teachers_first_and_the_last(folder):
    torch.manual_seed(0)
    out = Teacher(toy_teacher(), TASKS, levels=50, steps=8).pairs(batch_of(folder, TASKS))
    logsnr = torch.logit(out["gamma"].double()).reshape(8, 50)
    jpeg = out["task"].reshape(8, 50)[:, 0] == 3
    assert jpeg.any() and not jpeg.all()
    assert torch.allclose(logsnr[~jpeg, 0], torch.tensor(-9.0).double(), atol=1e-3)
    assert (logsnr[jpeg, 0] > -4).all() and (logsnr[jpeg].min(1).values == logsnr[jpeg, 0]).all()
    assert logsnr.max() <= 9.01 and logsnr[:, 1:].max() > 8 and logsnr[~jpeg].std() > 4


def test_a_teacher_samples_without_noise_of_its_own(folder):
    pipe = toy_teacher()
    settings = dict(sampling_variance="fixed_large", source_eta=0.5)
    pipe.scheduler = PaletteScheduler.from_config(pipe.scheduler.config, **settings)
    teacher, batch = Teacher(pipe, TASKS), batch_of(folder, TASKS)
    a, b = teacher.pairs(batch), teacher.pairs(batch)
    assert torch.equal(a["clean"], b["clean"])
    assert not any(p.requires_grad for p in pipe.unet.parameters())


def test_an_unknown_task_is_named():
    with pytest.raises(ValueError, match="tasks has paired, the teacher knows colorization"):
        Teacher(toy_teacher(), ["colorization", "paired"])


def test_a_student_reaches_its_teachers_picture_in_one_step(folder):
    """The straight line's velocity is the same all along, so that one step of the trained student ends where many of
    the teacher's do; before, it does not."""
    batch = batch_of(folder, ["colorization"])
    teacher = Teacher(toy_teacher(), ["colorization"], levels=2)
    student = toy_unet().train()
    settings = TrainSettings(prediction_type="v_prediction", loss="l2")
    target = teacher.pairs(batch)["clean"][::2]

    def miss() -> float:
        pairs = {k: v[::2] if len(v) == 16 else v for k, v in teacher.pairs(batch).items()}
        y = diffuse(pairs["clean"], pairs["noise"], pairs["gamma"])
        with torch.no_grad():
            v = student(y, pairs["gamma"], pairs["condition"], return_dict=False)[0]
        one_step = predicted_original(v, y, pairs["gamma"], "v_prediction")
        return (one_step - target).square().mean().item()

    before = miss()
    optimizer = torch.optim.Adam(student.parameters(), 2e-3)
    for _ in range(40):
        training_loss(student, teacher.pairs(batch), settings).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert miss() < 0.3 * before


def test_settings_say_what_does_not_go_together():
    with pytest.raises(ValueError, match="a regression twin has no teacher"):
        replace(preset("tiny-64-regression"), teacher="starter")
    with pytest.raises(ValueError, match="condition_dropout is 0.1"):
        replace(preset("distill-64"), condition_dropout=0.1)
    with pytest.raises(ValueError, match="levels is 0"):
        replace(preset("distill-64"), levels=0)


def test_a_guide_leads_away_between_its_levels():
    asked = []

    def guide(sample, gamma, condition):
        asked.append(len(sample))
        return sample + condition

    levels = torch.tensor([-9.5, -9.0, 0.0, 4.0, 4.5])
    gamma = torch.sigmoid(levels.double()).float()
    x, c = torch.randn(5, 3, 4, 4), torch.randn(5, 3, 4, 4)
    lead = guided(lambda sample, gamma, condition: 2 * sample - condition, guide, 3.0, (-9.0001, 4.0001))
    out = lead(x, gamma, c)
    good, bad = 2 * x - c, x + c
    assert torch.equal(out[[0, 4]], good[[0, 4]]), "outside of its levels"
    assert torch.allclose(out[1:4], (3 * good - 2 * bad)[1:4], atol=1e-5) and asked == [3]
    assert torch.allclose(lead(x, gamma[2], c), 3 * good - 2 * bad, atol=1e-5), "one level for all"
    assert torch.equal(lead(x, torch.tensor(0.0), c), good) and torch.equal(lead(x, torch.tensor(1.0), c), good)
    assert asked == [3, 5], "where nothing is led away, the guide is not asked"
    same = guided(lambda *given: guide(*given), guide, 1.0, (-99, 99))(x, gamma, c)
    assert torch.allclose(same, bad, atol=1e-6)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_predictions_are_what_is_asked_for(folder, kind):
    pipe = toy_teacher(hole_skip=0.5, condition_skip=0.2) if kind == "v_prediction" else toy_teacher()
    pipe.scheduler = PaletteScheduler.from_config(pipe.scheduler.config, prediction_type=kind)
    batch = batch_of(folder, TASKS, holes=kind == "v_prediction")
    gamma = batch["gamma"] = batch["gamma"].clamp(1e-3, 1 - 1e-3)
    out = Teacher(pipe, TASKS).predictions(batch)
    noisy = diffuse(batch["clean"], batch["noise"], gamma)
    assert torch.allclose(diffuse(out["clean"], out["noise"], gamma), noisy, atol=1e-4), "the same noisy images"
    expected = pipe._predict(noisy, gamma, fill_holes(batch["condition"]))
    assert torch.allclose(training_target(out["clean"], out["noise"], gamma, kind), expected, atol=1e-3)
    assert set(out) == set(batch) and all(out[k] is v for k, v in batch.items() if k not in ("clean", "noise"))
    settings = TrainSettings(size=32, prediction_type=kind)
    assert training_loss(pipe.unet, out, settings) < 1e-6 < training_loss(pipe.unet, batch, settings)
    clear = Teacher(pipe, TASKS).predictions(batch | {"gamma": torch.ones_like(gamma)})  # which 1 - 1e-8 is in float32
    assert all(torch.isfinite(clear[name]).all() for name in ("clean", "noise"))


def test_what_a_guide_and_predictions_need(tmp_path):
    for options, said in (
        (dict(guide="starter"), "guide is 'starter', but there is no teacher"),
        (dict(learns="predictions"), "learns is 'predictions', but there is no teacher"),
        (dict(learns="colours"), "learns is 'colours', expected one of pictures, predictions"),
        (dict(teacher="starter", guide="starter", guided_from=5), "guided_from is 5, expected below guided_to, 4.0"),
    ):
        with pytest.raises(ValueError, match=said):
            replace(preset("finetune-64"), **options)
    with pytest.raises(ValueError, match="on_policy is True, but learns is 'predictions'"):
        replace(preset("distill-64"), learns="predictions")
    with pytest.raises(ValueError, match="adversarial is 0.1, but learns is 'predictions'"):
        replace(preset("finetune-64"), learns="predictions", teacher="starter", adversarial=0.1)
    other = PalettePipeline(toy_unet(), PaletteScheduler(prediction_type="epsilon"))
    with pytest.raises(ValueError, match="prediction_type is 'v_prediction', .*'s 'epsilon': guide needs the same"):
        _check_same(other, str(tmp_path), toy_unet(), "v_prediction", "guide")


@pytest.mark.parametrize("learns", ["pictures", "predictions"])
def test_a_network_learns_of_a_teacher_that_is_led(folder, tmp_path, learns):
    """What is trained is the guided prediction or picture: without the guide, other weights."""
    pipe = toy_teacher()
    pipe.scheduler.register_to_config(source_eta=0.5)
    pipe.save_pretrained(tmp_path / "good")
    with torch.no_grad():
        for p in pipe.unet.parameters():
            p.mul_(0.9)
    pipe.save_pretrained(tmp_path / "worse")
    (tmp_path / "worse" / "LICENSE").write_text("of the guide")
    weights = []
    for guide in ("", str(tmp_path / "worse")):
        out = tmp_path / f"run{len(weights)}"
        settings = TrainSettings(
            data=str(folder), output=str(out), size=32, batch=4, steps=2, workers=0, warmup=1, validate_every=0,
            prediction_type="v_prediction", tracker="none", init=str(tmp_path / "good"), teacher=str(tmp_path / "good"),
            learns=learns, guide=guide, rate=1e-3, levels=1,
        )  # fmt: skip
        train(settings)
        trained = PalettePipeline.from_pretrained(out / "pipeline")
        weights.append(torch.cat([p.flatten() for p in trained.unet.parameters()]))
        kept = learns == "predictions"
        assert trained.config.default_steps == 4 and trained.config.few_steps == (None if kept else 4)
        assert trained.scheduler.config.source_eta == (0.5 if kept else None), "its own sampling"
    assert not torch.equal(*weights)
    card = (tmp_path / "run1" / "pipeline" / "README.md").read_text()
    assert "- guidance: 3 of the teacher from `worse`, at log-SNR -9 to 4\n" in card
    assert ("- teacher: `good`, its prediction at each noise level\n" in card) is (learns == "predictions")
    assert (tmp_path / "run1" / "pipeline" / "LICENSE").read_text() == "of the guide"


def test_on_policy_settings():
    with pytest.raises(ValueError, match="on_policy is on, expected a teacher"):
        replace(preset("tiny-64"), on_policy=True)
    with pytest.raises(ValueError, match=r"student_steps \(1\)"):
        replace(preset("distill-64"), student_steps=1)


def test_a_students_own_evaluations_are_of_its_weights_as_they_are():
    """In evaluation mode, without gradients, and by a recording as well, which reads the weights anew."""
    unet = toy_unet(dropout=0.5).train()
    unet.forward = torch.autocast("cpu", torch.bfloat16)(unet.forward)  # as Accelerate prepares it
    given = torch.randn(2, 3, 32, 32), torch.tensor(0.5), torch.randn(2, 3, 32, 32)
    own = partial(_own, unet, "cpu", torch.bfloat16)
    replayed = ReplayedForward(own, 2, record_forward)
    first, recorded = own(*given), replayed(*given)
    assert unet.training and not first.requires_grad and first.dtype == torch.float32
    assert torch.equal(first, own(*given)) and torch.equal(first, recorded)
    with torch.autocast("cpu", torch.bfloat16):  # the cache of casts of a surrounding one is left alone
        own(*given)
        with torch.no_grad():
            for p in unet.parameters():
                p.add_(0.01)
        second = own(*given)
    assert not torch.allclose(first, second)
    assert torch.equal(second, replayed(*given))
    unet.eval()
    own(*given)
    assert not unet.training


@pytest.mark.parametrize("wrong", [{}, {"teacher": "nowhere"}, {"on_policy": False}, {"on_policy": False, "init": ""}])
def test_the_script_makes_a_student(folder, tmp_path, wrong, monkeypatch, capsys):
    pipe = toy_teacher()
    pipe.scheduler.register_to_config(source_eta=0.5)
    pipe.save_pretrained(tmp_path / "init")
    pipe.scheduler.register_to_config(slow_noise=0.0)
    pipe.save_pretrained(tmp_path / "teacher")
    options = dict(
        data=folder, output=tmp_path / "run", size=32, batch=4, steps=2, workers=0, warmup=1, validate_every=0,
        save_every=1, student_steps=2, tracker="none", init=tmp_path / "init", teacher=tmp_path / "teacher",
    ) | wrong  # fmt: skip
    if options.pop("on_policy", True) is False:
        options["no_on_policy"] = None
    named = {"--" + k.replace("_", "-"): v for k, v in options.items()}
    arguments = [x for k, v in named.items() for x in ([k] if v is None else [k, str(v)])]
    monkeypatch.chdir(tmp_path)
    if "teacher" in wrong:
        monkeypatch.setattr(sys, "argv", [str(DISTILL), *arguments])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(DISTILL), run_name="__main__")
        assert end.value.code == 2 and "nowhere" in capsys.readouterr().err
        return
    done = subprocess.run([sys.executable, DISTILL, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pipe = PalettePipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert pipe.config.default_steps == pipe.config.few_steps == 2
    assert pipe.scheduler.config.slow_noise == 0, "the noise that it learnt from"
    assert pipe.scheduler.config.sampling_variance == (
        "zero" if not wrong else "fixed_small" if "init" in wrong else "fixed_large"
    ), "its own steps"
    assert pipe.scheduler.config.source_eta is None
    card = (tmp_path / "run" / "pipeline" / "README.md").read_text()
    assert "- teacher: `teacher`, its default steps\n" in card and "- distilled: for 2 steps, " in card
    before = PalettePipeline.from_pretrained(tmp_path / "teacher").unet.state_dict()
    assert any(not torch.equal(value, before[name]) for name, value in pipe.unet.state_dict().items())
