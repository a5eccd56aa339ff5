import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import toy_unet
from test_distillation import TASKS, batch_of, toy_teacher
from test_replay import record_for
from test_training import _stopped_at, finish, fresh_accelerator, launch, same, settings

from palette_diffusers import PaletteScheduler, adversarial, training
from palette_diffusers.adversarial import Critic
from palette_diffusers.distillation import Teacher
from palette_diffusers.replay import Replay
from palette_diffusers.report import read_log
from palette_diffusers.scheduler import diffuse, output_for
from palette_diffusers.tasks import Given, get_task
from palette_diffusers.training import last_state, preset, train

__all__ = ["fresh_accelerator"]
TELLING = dict(hole_skip=0.5, condition_skip=0.2)


def critic_of(unet, tasks=TASKS) -> Critic:
    torch.manual_seed(1)
    return Critic(unet.requires_grad_(False), tasks, "v_prediction")


def drawn(folder, critic, number=8, tasks=TASKS):
    """A batch, and what the critic compares it with."""
    batch = batch_of(folder, tasks, number, holes=True)
    torch.manual_seed(2)
    return critic.draw(batch, batch["clean"])


def test_each_side_moves_itself_alone(folder):
    unet = toy_unet(**TELLING)
    critic = critic_of(unet)
    batch = drawn(folder, critic)
    fake = (batch["clean"] * 0.5).requires_grad_()
    student, own, right = critic.compare(fake, batch)
    assert student.shape == own.shape == right.shape == (8,) and not right.requires_grad
    student.mean().backward(retain_graph=True)
    assert fake.grad is not None and fake.grad.abs().sum() > 0
    assert all(p.grad is None for p in critic.parameters())
    fake.grad = None
    own.mean().backward()
    assert fake.grad is None and all(p.grad is not None and p.grad.abs().sum() > 0 for p in critic.parameters())
    assert all(p.grad is None for p in unet.parameters())


def test_only_what_is_generated_is_moved(folder):
    critic = critic_of(toy_unet(**TELLING), ["inpainting"])
    batch = drawn(folder, critic, tasks=["inpainting"])
    noisy = diffuse(batch["clean"], batch["noise"], batch["gamma"])
    output = output_for(batch["clean"] * 0.5, noisy, batch["gamma"], "v_prediction").requires_grad_()
    student, _, _ = critic.compare(critic.picture(output, noisy, batch), batch)
    student.mean().backward()
    hole = batch["mask"].expand_as(output) > 0
    assert (output.grad[~hole] == 0).all() and (output.grad[hole] != 0).float().mean() > 0.9


def test_a_gradient_of_its_own_that_is_not_finite_changes_nothing(distilling, tmp_path, monkeypatch):
    train(replace(distilling, output=str(tmp_path / "run"), steps=2))
    before = last_state(tmp_path / "run")
    original = Critic.compare

    def wrong(self, fake, batch):
        student, own, right = original(self, fake, batch)
        return student, own * float("nan"), right

    monkeypatch.setattr(Critic, "compare", wrong)
    train(replace(distilling, output=str(tmp_path / "run"), steps=3, resume=True))
    after = last_state(tmp_path / "run")
    assert after["step"] == 3
    for part in ("critic", "critic_optimizer"):
        torch.testing.assert_close(after[part], before[part], atol=0, rtol=0)


def test_who_cannot_be_told_apart_has_nothing_to_learn(folder):
    critic = critic_of(toy_unet(**TELLING))
    batch = drawn(folder, critic)
    student, own, right = critic.compare(batch["clean"].clone(), batch)
    torch.testing.assert_close(student, torch.full((8,), math.log(2)))
    torch.testing.assert_close(own, student)
    assert right.sum() == 0, "equal scores are no right answer"


def test_a_critic_learns_what_blur_is_and_a_student_to_be_sharp(folder):
    critic = critic_of(toy_unet(**TELLING), ["jpeg_restoration"])
    batch = drawn(folder, critic, 16, ["jpeg_restoration"])
    soft = torch.nn.functional.avg_pool2d(batch["clean"], 5, 1, 2, count_include_pad=False)
    optimizer = torch.optim.Adam(critic.parameters(), 2e-3, betas=(0.0, 0.99))
    for _ in range(60):
        batch = critic.draw(batch, batch["clean"])
        _, own, _ = critic.compare(soft, batch)
        own.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    _, _, right = critic.compare(soft, batch)
    assert right.mean() > 0.8
    amount = torch.zeros((), requires_grad=True)  # of what the blur took
    student, _, _ = critic.compare(soft + amount * (batch["clean"] - soft), batch)
    student.mean().backward()
    assert amount.grad < 0, "more of it is more real"


@pytest.mark.parametrize("kind", ["v_prediction", "epsilon", "sample"])
def test_it_judges_what_sampling_would_show(folder, kind):
    """What is known is put in, by task, as the scheduler's predicted picture has it."""
    critic = critic_of(toy_unet(**TELLING))
    critic.prediction_type = kind
    batch = drawn(folder, critic)
    assert len(set(batch["task"].tolist())) == 4
    noisy = diffuse(batch["clean"], batch["noise"], batch["gamma"])
    guess = batch["clean"] + 0.1 * torch.randn_like(noisy)  # beyond [-1, 1] here and there, as outputs are
    shown = critic.picture(output_for(guess, noisy, batch["gamma"], kind), noisy, batch)
    for i, name in enumerate(TASKS[t] for t in batch["task"]):
        task = get_task(name)
        mask = batch["mask"][i : i + 1] if task.takes_mask else None
        given = Given(batch["known"][i : i + 1], batch["condition"][i : i + 1, :3], mask)
        # epsilon's picture is divided by sqrt(gamma): of much noise it has few digits left
        loose = 1e-4 if kind != "epsilon" else 1e-6 / float(batch["gamma"][i]) ** 0.5 + 1e-4
        right = task.guide(guess[i : i + 1].clamp(-1, 1), given)
        torch.testing.assert_close(shown[i : i + 1], right, atol=loose, rtol=0)


def test_a_recording_can_hold_it(folder, monkeypatch):
    """Nothing of it depends on a tensor's values but by computing: no shape, no branch."""
    from torch.fx.experimental.proxy_tensor import make_fx

    monkeypatch.setattr(adversarial, "fill_holes", lambda condition: condition)  # which looks first, on a CPU alone
    critic = critic_of(toy_unet(**TELLING))
    batch = drawn(folder, critic)
    names = sorted(batch)

    def losses(*values):
        given = dict(zip(names, values, strict=True))
        noisy = diffuse(given["clean"], given["noise"], given["gamma"])
        return critic.compare(critic.picture(torch.zeros_like(noisy), noisy, given), given)

    values = [batch[name] for name in names]
    traced = make_fx(losses, tracing_mode="fake", _allow_non_fake_inputs=True)(*values)
    for a, b in zip(traced(*values), losses(*values), strict=True):
        torch.testing.assert_close(a, b)


@pytest.fixture
def distilling(folder, tmp_path):
    """Settings of a short adversarial distillation, but for the output."""
    pipe = toy_teacher()
    pipe.save_pretrained(tmp_path / "teacher")
    names = dict(init=str(tmp_path / "teacher"), teacher=str(tmp_path / "teacher"))
    chosen = settings(folder, "", prediction_type="v_prediction", on_policy=True, levels=1, student_steps=2, **names)
    return replace(chosen, tasks="inpainting,jpeg_restoration", crops=str(folder), adversarial=0.1)


def test_a_resumed_run_has_the_same_critic(distilling, tmp_path):
    train(replace(distilling, output=str(tmp_path / "a")))
    _stopped_at(1, replace(distilling, output=str(tmp_path / "b"), save_every=1))
    train(replace(distilling, output=str(tmp_path / "b"), resume=True))
    a, b = last_state(tmp_path / "a"), last_state(tmp_path / "b")
    same(a, b)
    for part in ("critic", "critic_optimizer"):
        torch.testing.assert_close(a[part], b[part], atol=0, rtol=0)
    told = [[line["told"] for line in read_log(tmp_path / run / "log.jsonl")] for run in "ab"]
    assert told[0] == told[1] and len(told[0]) == 4 and all(0 <= share <= 1 for share in told[0])


def test_a_run_by_replayed_steps_has_the_same_critic(distilling, tmp_path, monkeypatch):
    train(replace(distilling, output=str(tmp_path / "run")))
    monkeypatch.setattr(training, "_check_graph", lambda *_: None)
    monkeypatch.setattr(training, "ReplayedForward", lambda predict: predict)
    monkeypatch.setattr(training, "Replay", lambda work, trained: Replay(work, trained, record_for(trained)))
    train(replace(distilling, output=str(tmp_path / "replayed"), cuda_graph=True))
    right, found = last_state(tmp_path / "run"), last_state(tmp_path / "replayed")
    for part in ("unet", "optimizer", "critic", "critic_optimizer"):
        torch.testing.assert_close(found[part], right[part], atol=0, rtol=0)


def test_two_processes_have_one_critic(distilling, tmp_path):
    """Each sees other samples, and both step by the mean of their gradients."""
    names = ("data", "crops", "size", "batch", "steps", "workers", "warmup", "validate_every", "tasks", "init",
        "teacher", "levels", "student_steps", "adversarial", "prediction_type")  # fmt: skip
    chosen = [f"--{name.replace('_', '-')}={getattr(distilling, name)}" for name in names]
    script = Path(__file__).with_name("critics.py")
    out = finish(launch(*chosen, "--on-policy", f"--output={tmp_path / 'run'}", script=script, processes=2))
    found = dict(re.findall(r"critic of (\d): (\S+)", out))
    assert len(found) == 2 and found["0"] == found["1"]


def test_its_weight_counts(distilling, tmp_path):
    """The student goes elsewhere with it, and the critic itself has learnt."""
    ends = {}
    for weight in (0.0, 0.1):
        train(replace(distilling, output=str(tmp_path / str(weight)), adversarial=weight))
        ends[weight] = last_state(tmp_path / str(weight))
    assert "critic" not in ends[0.0]
    assert any(not torch.equal(ends[0.0]["unet"][k], v) for k, v in ends[0.1]["unet"].items())
    train(replace(distilling, output=str(tmp_path / "short"), steps=1))
    first = last_state(tmp_path / "short")["critic"]
    assert all(not torch.equal(first[k], v) for k, v in ends[0.1]["critic"].items())


def test_a_student_that_is_left_alone_is_where_its_own_steps_lead(folder):
    """The same start as with the teacher, who makes no picture there."""
    pipe, other, calls = toy_teacher(**TELLING), toy_unet(**TELLING), []

    def predict(*given):
        calls.append(given)
        return pipe._predict(*given)

    def student(sample, gamma, condition):
        return other(sample, gamma, condition, return_dict=False)[0]

    batch = batch_of(folder, TASKS, holes=True)
    teacher = Teacher(pipe, TASKS, levels=1, predict=predict, student=student)
    for seed in range(6):
        starts = []
        for alone in (False, True):
            calls.clear()
            torch.manual_seed(seed)
            out = teacher.pairs(batch, alone=alone)
            starts.append(diffuse(out["clean"], out["noise"], out["gamma"]))
            assert (len(calls) == 0) == alone
            assert (out["taught"] == (not alone)).all() and out["taught"].dtype == torch.float32
            assert torch.equal(out["clean"], batch["clean"]) == alone
        torch.testing.assert_close(*starts, atol=1e-4, rtol=1e-4)
    assert isinstance(pipe.scheduler, PaletteScheduler) and type(pipe.scheduler) is PaletteScheduler


def test_steps_that_the_teacher_leaves_out(distilling, tmp_path):
    """They count as samples, not as losses; and without the critic's weight they would change nothing."""
    folder = Path(train(replace(distilling, output=str(tmp_path / "a"), steps=3, teacher_every=2, log_every=1))).parent
    lines = read_log(folder / "log.jsonl")
    assert [line["loss"] is None for line in lines] == [False, True, False]
    assert all(line["samples_per_second"] > 0 and 0 <= line["told"] <= 1 for line in lines)
    assert "Patches that the critic tells apart" in (folder / "report.html").read_text()
    states = {}
    for weight in (1e-30, 0.1):
        chosen = replace(distilling, output=str(tmp_path / str(weight)), adversarial=weight, teacher_every=2, steps=2)
        train(replace(chosen, save_every=1, optimizer="adam", workers=0))
        first, second = (torch.load(tmp_path / str(weight) / f"step-000000{n}.pt") for n in (1, 2))
        moments = [(first["optimizer"]["state"][k], v) for k, v in second["optimizer"]["state"].items()]
        # Adam's first moment of no gradient is 0.9 of what it was
        states[weight] = max(float((b["exp_avg"] - 0.9 * a["exp_avg"]).abs().max()) for a, b in moments)
    assert states[1e-30] < 1e-8 < states[0.1]


def test_settings_say_what_it_needs():
    with pytest.raises(ValueError, match=r"teacher_every is 2, expected adversarial and on_policy"):
        replace(preset("distill-64"), teacher_every=2)
    with pytest.raises(ValueError, match="teacher_every is 2 and levels 4, expected 1 of either"):
        replace(preset("distill-64"), adversarial=0.1, teacher_every=2, levels=4)
    with pytest.raises(ValueError, match=r"adversarial is 0\.1, but there is no teacher"):
        replace(preset("tiny-64"), adversarial=0.1)
    with pytest.raises(ValueError, match=r"adversarial is -1, expected at least 0"):
        replace(preset("distill-64"), adversarial=-1)
    with pytest.raises(ValueError, match=r"critic_rate is 0, expected above 0"):
        replace(preset("distill-64"), critic_rate=0)
