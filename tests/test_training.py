import json
import math
import os
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import psutil
import pytest
import torch
from conftest import free_port, toy_unet
from PIL import Image
from safetensors.torch import save_file
from test_replay import record_for

from palette_diffusers import (
    Given,
    PalettePipeline,
    PaletteScheduler,
    Task,
    batches,
    register_task,
    report,
    tasks,
    training,
    zero,
)
from palette_diffusers.data import PaletteDataset, random_crop
from palette_diffusers.hub import publish
from palette_diffusers.pipeline import SHIPPED
from palette_diffusers.replay import Replay
from palette_diffusers.report import licences, read_log, write_card
from palette_diffusers.scheduler import training_target
from palette_diffusers.sources import load_images, load_sources
from palette_diffusers.training import (
    PRESETS,
    Later,
    TrainSettings,
    capped_weight,
    last_state,
    learning_rate,
    masked_loss,
    parse,
    preset,
    save_state,
    snr_weight,
    train,
    training_loss,
)

TRAIN = Path(__file__).parents[1] / "train" / "train_palette.py"
TASKS = ["colorization", "inpainting", "uncropping", "jpeg_restoration"]


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Accelerate keeps one state a process, whose precision can't be changed."""
    yield
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def dataset(folder):
    images = load_images(str(folder))
    return PaletteDataset(images, PaletteScheduler(), TASKS, crops=images, size=32, seed=3)


def settings(folder, output, **changes) -> TrainSettings:
    unet = dict(toy_unet().config)
    unet = {k: list(v) if isinstance(v, tuple) else v for k, v in unet.items() if not k.startswith("_")}
    base = replace(
        preset("starter-64"), data=str(folder), output=str(output), size=32, batch=4, steps=4, workers=0,
        save_every=2, log_every=1, unet=unet, warmup=1, validate_every=0,
    )  # fmt: skip
    return replace(base, **changes)


def test_samples_are_functions_of_position(dataset):
    for position in (0, 7, 1000):
        a, b = dataset[position], dataset[position]
        assert all(torch.equal(a[k], b[k]) for k in a)
    noises = {dataset[i]["noise"].numpy().tobytes() for i in range(40)}
    assert len(noises) == 40  # no two positions, so no two epochs or workers, repeat
    masks = [dataset[i]["mask"] for i in range(60)]
    drawn = {m.numpy().tobytes() for m in masks if not m.all()}
    holes = sum(not m.all() for m in masks)
    assert len(drawn) > 0.6 * holes  # uncropping has five masks only


def test_condition_noise_is_not_the_starting_noise(dataset):
    for i in range(30):
        sample = dataset[i]
        if not sample["mask"].all():
            hole = sample["mask"].expand(3, -1, -1) > 0.5
            assert torch.isclose(sample["condition"][hole], sample["noise"][hole]).float().mean() < 0.01


def test_crops_do_not_distort():
    y, x = np.mgrid[0:300, 0:200]
    ramp = np.stack([y * 255 / 300, x * 255 / 300, y * 0], -1).astype(np.uint8)
    crop = random_crop(ramp, 64, np.random.default_rng(0)).astype(float)
    assert crop.shape == (64, 64, 3)
    down, across = np.diff(crop[..., 0].mean(1)).mean(), np.diff(crop[..., 1].mean(0)).mean()
    assert down == pytest.approx(across, rel=0.1)


def test_loss_counts_the_hole_only_and_per_sample():
    output, target = torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)
    target[1] = 3
    mask = torch.zeros(2, 1, 4, 4)
    mask[0, :, 0, 0] = 1  # a small hole weighs as much as a large one
    mask[1, :, :, :2] = 1
    target[:, :, 3, 3] = 100  # outside both
    assert masked_loss(output, target, mask).tolist() == pytest.approx([1, 9])
    assert masked_loss(output, target, mask, "l1").tolist() == pytest.approx([1, 3])
    small = masked_loss(output, target * 0.01, mask, "huber")
    assert small.tolist() == pytest.approx([0.5 * 0.01**2 / 0.1, 0.5 * 0.03**2 / 0.1])
    large = masked_loss(output, target, mask, "huber")
    assert large.tolist() == pytest.approx([1 - 0.05, 3 - 0.05])


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_snr_weight_is_min_snr_in_terms_of_the_picture(kind):
    """An error e in y0 costs min(SNR, 5) e^2, whatever the network predicts."""
    gamma = torch.tensor([0.999, 0.9, 0.5, 0.01])
    y0, eps = torch.randn(2, 4, 3, 8, 8).unbind()
    y = gamma.sqrt()[:, None, None, None] * y0 + (1 - gamma).sqrt()[:, None, None, None] * eps
    wrong = y0 + 0.1
    wrong_eps = (y - gamma.sqrt()[:, None, None, None] * wrong) / (1 - gamma).sqrt()[:, None, None, None]
    output = training_target(wrong, wrong_eps, gamma, kind)
    loss = masked_loss(output, training_target(y0, eps, gamma, kind), torch.ones(4, 1, 8, 8))
    snr = gamma / (1 - gamma)
    torch.testing.assert_close(loss * snr_weight(gamma, 5, kind), snr.clamp(max=5) * 0.01, rtol=1e-3, atol=1e-7)
    plain = {"sample": snr * 0 + 1, "epsilon": snr, "v_prediction": snr + 1}[kind]
    capped = loss * capped_weight(gamma, 5, kind)
    torch.testing.assert_close(capped, plain.clamp(max=5) * 0.01, rtol=1e-3, atol=1e-7)


def test_training_learns(dataset):
    """On one fixed batch the loss falls far below that of the zero network."""
    batch = {k: torch.stack([dataset[i][k] for i in range(8)]) for k in dataset[0]}
    unet = toy_unet().train()
    optimizer = torch.optim.Adam(unet.parameters(), 3e-3)
    losses = []
    for _ in range(60):
        loss = training_loss(unet, batch, TrainSettings())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def same(a, b):
    """Weights, average and optimiser, to the bit."""
    assert a["step"] == b["step"]
    assert all(torch.equal(a["unet"][k], b["unet"][k]) for k in a["unet"])
    pairs = list(zip(a["ema"]["shadow_params"], b["ema"]["shadow_params"], strict=True))
    for k, moments in a["optimizer"]["state"].items():
        pairs += [(moments[name], b["optimizer"]["state"][k][name]) for name in moments]
    assert pairs and all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize(
    ("cut", "changes"), [(1, {}), (3, dict(workers=2)), (2, dict(accumulate=2, schedule="cosine", precision="bf16"))]
)
def test_resume_equals_an_uninterrupted_run(folder, tmp_path, cut, changes):
    unet = settings(folder, "").unet | dict(dropout=0.1)
    changes = changes | dict(unet=unet)
    train(settings(folder, tmp_path / "a", **changes))
    _stopped_at(cut, settings(folder, tmp_path / "b", save_every=1, **changes))
    train(settings(folder, tmp_path / "b", resume=True, **changes))
    same(last_state(tmp_path / "a"), last_state(tmp_path / "b"))
    assert [line["loss"] for line in read_log(tmp_path / "a" / "log.jsonl")] == [
        line["loss"] for line in read_log(tmp_path / "b" / "log.jsonl")
    ]


def _stopped_at(step, chosen):
    """A run that gets SIGTERM after `step` steps."""
    import os
    import signal

    from palette_diffusers import training

    original = training.Tally.line

    def line(self, accelerator, now):
        if now == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, accelerator, now)

    training.Tally.line = line
    try:
        train(chosen)
    finally:
        training.Tally.line = original
    assert last_state(Path(chosen.output))["step"] == step


def launch(*arguments, processes=1, script=TRAIN, precision="no", **more):
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    if processes > 1:
        names = {"sharded.py": "eight_gpus_fsdp.yaml", "zero.py": "eight_gpus_deepspeed.yaml"}
        command += [
            "--config_file",
            str(TRAIN.parent / "configs" / names.get(script.name, "two_cpu_processes.yaml")),
            "--main_process_port",
            str(free_port()),  # given 0, two runs at a time may meet at one port, and wait for each other
            "--num_processes",
            str(processes),
            "--mixed_precision",
            precision,
        ]
    else:
        command += ["--cpu", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no",
            "--dynamo_backend", "no"]  # fmt: skip
    env = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    return subprocess.Popen([*command, str(script), *map(str, arguments)], text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env=env, start_new_session=True, **more)  # fmt: skip


def options(folder, output, **changes) -> list[str]:
    chosen = settings(folder, output, **changes)
    names = ("data", "output", "size", "batch", "steps", "workers", "save_every", "log_every", "warmup",
        "validate_every", "accumulate")  # fmt: skip
    out = [f"--{n.replace('_', '-')}={getattr(chosen, n)}" for n in names]
    return [*out, "--unet", json.dumps(chosen.unet)]


def finish(process, code=0):
    out, err = process.communicate(timeout=240)
    assert process.returncode == code, err[-3000:]
    return out


def test_kill_at_any_moment_and_go_on(folder, tmp_path):
    """kill -9 of the whole process group, twice, and SIGTERM once; the end equals an uninterrupted run to the bit."""
    arguments = options(folder, tmp_path / "b", steps=40, save_every=3, workers=1)
    wait = 0
    for number in (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM):
        process = launch(*arguments, *(["--resume"] if wait else []))
        goal = wait + 4
        begin = time.time()
        while wait < goal and process.poll() is None and time.time() - begin < 120:
            time.sleep(0.02)
            wait = max([int(p.stem[5:]) for p in (tmp_path / "b").glob("step-*.pt")], default=0)
        os.killpg(process.pid, number)
        out, err = process.communicate(timeout=60)
        assert last_state(tmp_path / "b")["step"] >= 3
        if number == signal.SIGTERM:
            assert "to go on: accelerate launch" in out or process.returncode, out + err
    finish(launch(*arguments, "--resume"))
    assert not list((tmp_path / "b").glob("*.part"))
    finish(launch(*options(folder, tmp_path / "a", steps=40, save_every=100, workers=0)))
    same(last_state(tmp_path / "a"), last_state(tmp_path / "b"))


def test_two_processes_equal_one(folder, tmp_path):
    """gloo: the same global batch, the same losses, weights within rounding; no two ranks see one sample."""
    two = launch(*options(folder, tmp_path / "two"), processes=2)
    one = launch(*options(folder, tmp_path / "one"))
    parts = launch(*options(folder, tmp_path / "parts", accumulate=2))
    for process in (two, one, parts):
        finish(process)
    logs = {
        name: [line["loss"] for line in read_log(tmp_path / name / "log.jsonl")] for name in ("two", "one", "parts")
    }
    states = {name: last_state(tmp_path / name) for name in logs}
    assert [states[name]["processes"] for name in ("two", "one", "parts")] == [2, 1, 1]
    for name in ("two", "parts"):
        assert logs[name] == pytest.approx(logs["one"], abs=2e-5) and len(logs[name]) == 4
        for k, v in states["one"]["optimizer"]["state"].items():  # the first moment holds the gradients
            torch.testing.assert_close(
                v["exp_avg"], states[name]["optimizer"]["state"][k]["exp_avg"], atol=1e-5, rtol=1e-3
            )


@pytest.fixture
def halfway(folder, tmp_path):
    """A whole run of 4 steps in `whole`, and the same after 2 of them in `divided`, to go on from."""
    train(settings(folder, tmp_path / "whole", save_every=2, validate_every=2, validate_steps=2))
    (tmp_path / "divided").mkdir()
    for name in ("settings.json", "step-0000002.pt"):
        shutil.copy(tmp_path / "whole" / name, tmp_path / "divided")
    return tmp_path


def alike(folder, atol):
    states = {name: last_state(folder / name) for name in ("whole", "divided")}
    for key in ("unet", "ema", "optimizer"):
        torch.testing.assert_close(states["divided"][key], states["whole"][key], atol=atol, rtol=1e-3)
    assert [states[name]["processes"] for name in states] == [1, 2]
    for name in ("unet/diffusion_pytorch_model.safetensors", "unet/config.json", "scheduler/scheduler_config.json"):
        assert (folder / "divided" / "pipeline" / name).stat().st_size > 100
    PalettePipeline.from_pretrained(folder / "divided" / "pipeline")
    sheets = [np.asarray(Image.open(folder / name / "samples" / "step-0000004.png"), int) for name in states]
    assert np.abs(sheets[0] - sheets[1]).max() <= 2


def test_divided_weights_equal_whole_ones(folder, halfway):
    """gloo and FSDP 2: the same weights, sheets and pipeline; a run that was whole goes on divided, and saves whole."""
    arguments = options(folder, halfway / "divided", validate_every=2)
    sharded = Path(__file__).with_name("sharded.py")
    finish(launch(*arguments, "--validate-steps=2", "--resume", processes=2, script=sharded))
    alike(halfway, 2e-4)


def test_divided_weights_leave_noise_levels_in_float32(folder, tmp_path):
    """Accelerate's policy for bf16 would round what goes into the network: 1.6% of the levels would become 1."""
    sharded = Path(__file__).with_name("sharded.py")
    finish(launch(*options(folder, tmp_path / "run", steps=1), processes=2, script=sharded, precision="bf16"))
    assert last_state(tmp_path / "run")["precision"] == "bf16"


def test_a_divided_optimizer_equals_a_whole_one(folder, halfway):
    """gloo and DeepSpeed's ZeRO 2: as above."""
    pytest.importorskip("deepspeed")
    arguments, script = options(folder, halfway / "divided", validate_every=2), Path(__file__).with_name("zero.py")
    finish(launch(*arguments, "--validate-steps=2", "--resume", processes=2, script=script))
    alike(halfway, 2e-5)


def test_a_divided_optimizer_keeps_weights_in_float32(folder, tmp_path):
    """DeepSpeed's own bf16 would round them, and noise levels; parts of a batch count as in one."""
    pytest.importorskip("deepspeed")
    arguments = options(folder, tmp_path / "low", accumulate=2, steps=2)
    low = launch(*arguments, processes=2, script=Path(__file__).with_name("zero.py"), precision="bf16")
    train(settings(folder, tmp_path / "exact", accumulate=2, steps=2))
    finish(low)
    states = [last_state(tmp_path / name) for name in ("exact", "low")]
    assert [state["precision"] for state in states] == ["no", "bf16"]
    assert all(value.dtype == torch.float32 for value in states[1]["unet"].values())
    losses = [[line["loss"] for line in read_log(tmp_path / name / "log.jsonl")] for name in ("exact", "low")]
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=0.01)
    assert any((value != value.bfloat16()).any() for value in states[1]["unet"].values())


def configured(**config):
    return SimpleNamespace(deepspeed_config=config)


@pytest.mark.parametrize(
    ("config", "precision", "message"),
    [
        ({"zero_optimization": {"stage": 3}}, "no", "ZeRO stage 3, expected 1 or 2; to divide weights: FSDP 2"),
        ({}, "bf16", "ZeRO stage 0, expected 1 or 2"),
        ({"zero_optimization": {"stage": 2}}, "fp16", "precision is fp16 under DeepSpeed, expected bf16 or no"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "bf16",
            "offload the optimizer to cpu, expected none",
        ),
    ],
)
def test_what_deepspeed_is_not_used_for(config, precision, message):
    with pytest.raises(ValueError, match=message):
        zero.configure(configured(**config), precision, 4, 1, 1.0)


def test_deepspeed_computes_in_bfloat16_and_keeps_float32():
    plugin = configured(zero_optimization={"stage": 1}, bf16={"enabled": True})
    zero.configure(plugin, "bf16", 4, 2, 0.5)
    config = plugin.deepspeed_config
    assert not config["bf16"]["enabled"] and config["torch_autocast"]["dtype"] == "bfloat16"
    assert (config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]) == (4, 2)
    assert config["gradient_clipping"] == 0.5
    state = SimpleNamespace(deepspeed_plugin=plugin)
    assert zero.precision_of(SimpleNamespace(state=state, mixed_precision="no")) == "bf16"


@pytest.mark.parametrize(("fused", "device"), [(True, "meta"), (False, "cpu")])
def test_a_divided_optimizers_step_lies_where_torch_wants_it(fused, device):
    """Fused optimizers of a GPU refuse one on the CPU."""
    flat, whole = (torch.nn.Parameter(torch.empty(size, device="meta")) for size in (6, (2, 5)))
    base = torch.optim.AdamW([flat])
    base.param_groups[0]["fused"] = fused
    inside, of = SimpleNamespace(start=2, numel=4), SimpleNamespace(start=6, numel=4)
    whole._hp_mapping = SimpleNamespace(param_group_index=0, hp_fragment_address=inside, lp_fragment_address=of)
    state = {0: {"step": torch.tensor(7.0), "exp_avg": torch.ones(2, 5)}}
    zero.load_optimizer_state(SimpleNamespace(optimizer=base), [whole], {"state": state})
    assert base.state[flat]["step"].device.type == device and base.state[flat]["exp_avg"].shape == (6,)


def test_what_a_user_configured_for_lower_precision_gives_way():
    plugin = configured(zero_optimization={"stage": 2}, torch_autocast={"enabled": True, "dtype": "float16"})
    zero.configure(plugin, "no", 4, 1, 1.0)
    assert not plugin.deepspeed_config["torch_autocast"]["enabled"]


def test_a_gradient_that_is_not_finite_under_deepspeed():
    """It writes -1 for the norm of one, and goes on."""
    norms = [zero.gradient_norm(SimpleNamespace(get_global_grad_norm=lambda n=n: n)) for n in (0.5, torch.tensor(-1.0))]
    assert norms[0] == 0.5 and math.isnan(norms[1])


def test_a_damaged_checkpoint_is_passed_over(tmp_path, capsys):
    for step in (1, 2, 3):
        save_state(tmp_path, step, keep=2, value=step)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["step-0000002.pt", "step-0000003.pt"]
    whole = (tmp_path / "step-0000003.pt").read_bytes()
    flipped = bytearray(whole)
    flipped[whole.index(b"value") + 30] ^= 1  # in the data, where torch reads another number
    for i, damage in enumerate((whole[:100], b"", b"garbage" * 99, bytes(200) + whole[200:], flipped)):
        (tmp_path / f"step-000010{i}.pt").write_bytes(damage)
    assert last_state(tmp_path)["value"] == 3
    assert capsys.readouterr().err.count("is damaged and passed over") == 5
    assert len(list(tmp_path.glob("*.damaged"))) == 5
    (tmp_path / "step-0000900.pt").write_bytes(b"")
    save_state(tmp_path, 4, keep=2, value=4)  # a damaged file of a later step does not cost the new one
    assert last_state(tmp_path)["value"] == 4
    for path in tmp_path.glob("step-*.pt"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="none of the 2 checkpoints"):
        last_state(tmp_path)


@pytest.fixture
def small_files():
    """A file may have so many bytes and no more, as on a disk that gets full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [3_000, 100_000, 1_000_000])
def test_a_full_disk_leaves_the_last_state(tmp_path, small_files, size):
    save_state(tmp_path, 1, unet=torch.ones(3))
    small_files(size)
    with pytest.raises(OSError, match=r"File too large: '.*step-0000002.part'"):
        save_state(tmp_path, 2, unet=torch.ones(300_000), more=list(range(1000)))
    small_files(resource.RLIM_INFINITY)
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000001.pt"]
    assert last_state(tmp_path)["step"] == 1


@pytest.mark.parametrize("why", ["a broken image", "a full disk", "a dry run", "two processes", "a stream"])
def test_a_run_that_fails_ends(folder, tmp_path, why):
    """Its workers ignore signals, and Python would wait for them for ever."""
    more, arguments = {}, [*options(folder, tmp_path / "run", workers=2), "--tracker=none"]
    if why == "a full disk":
        more["preexec_fn"] = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))
    else:
        (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:2000])
        arguments += ["--strict", *{"a dry run": ["--dry-run"], "a stream": ["--streaming"]}.get(why, [])]
    run = launch(*arguments, processes=2 if why == "two processes" else 1, **more)
    try:
        _, said = run.communicate(timeout=200)
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
    expected = "File too large" if why == "a full disk" else "can't be decoded"
    assert expected in said and run.returncode, said[-2000:]
    assert "Caught" not in said and said.startswith("error: ") or why == "two processes"  # no worker's traceback
    assert why == "two processes" or "exit status 2" in said  # the script's, which Accelerate passes on as 1
    assert not list((tmp_path / "run").glob("*.part"))


def test_a_run_is_continued_as_it_began(folder, tmp_path):
    first = settings(folder, tmp_path / "run", steps=1)
    train(first)
    with pytest.raises(FileExistsError, match="holds a run"):
        train(first)
    with pytest.raises(ValueError, match="rate was 0.0008, now 0.5"):
        train(replace(first, rate=0.5, resume=True, steps=2))
    assert last_state(tmp_path / "run")["step"] == 1
    train(replace(first, resume=True, steps=2, save_every=7, keep=1))


def test_precision_cannot_change_on_the_way(folder, tmp_path):
    """Neither by the setting nor by Accelerate's configuration, which the setting leaves the choice to."""
    train(settings(folder, tmp_path / "run", steps=2, precision=""))
    path = tmp_path / "run" / "step-0000002.pt"
    torch.save(torch.load(path, weights_only=True) | {"precision": "bf16"}, path)
    with pytest.raises(ValueError, match="trained with precision bf16, now it is no"):
        train(settings(folder, tmp_path / "run", precision="", resume=True))


@pytest.mark.parametrize(("kind", "name"), [("FSDP", "FSDP 1"), ("MEGATRON_LM", "MEGATRON_LM")])
def test_other_ways_to_divide_are_refused(folder, tmp_path, kind, name, monkeypatch):
    from accelerate import Accelerator
    from accelerate.utils import DistributedType

    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType(kind))
    with pytest.raises(ValueError, match=f"configured for {name}, expected one process, DDP, FSDP with"):
        train(settings(folder, tmp_path / "run"))


def test_divided_weights_lie_in_the_plain_layout(folder, tmp_path, monkeypatch):
    from accelerate import Accelerator
    from accelerate.utils import DistributedType

    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)
    monkeypatch.setattr(Accelerator, "is_fsdp2", True)
    with pytest.raises(ValueError, match="FSDP divides only weights in the plain layout"):
        train(settings(folder, tmp_path / "run", channels_last=True))
    with pytest.raises(ValueError, match="on_policy is on, but Accelerate is configured for FSDP"):
        train(settings(folder, tmp_path / "run", teacher="starter", on_policy=True))


def test_two_trainers_in_one_folder(folder, tmp_path):
    from filelock import FileLock

    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run" / ".lock"), pytest.raises(FileExistsError, match="another process"):
        train(settings(folder, tmp_path / "run"))


def test_losses_that_are_not_finite_stop_the_run(folder, tmp_path):
    with pytest.raises(FloatingPointError, match="not finite at step"):
        train(settings(folder, tmp_path / "run", rate=1e30, clip=0.0, steps=30, save_every=100))
    assert not (tmp_path / "run" / "pipeline").exists() and "<svg" in (tmp_path / "run" / "report.html").read_text()


class AsOnGPU(Later):
    """Gives the numbers a step later, as where they come from a GPU."""

    def __init__(self, waits):
        super().__init__(True)

    def put(self, step, **numbers):
        self._pending.append((step, numbers, None))


def test_what_a_gpu_computed_is_counted_once_and_in_order(folder, tmp_path, monkeypatch):
    from palette_diffusers import training

    train(settings(folder, tmp_path / "a", steps=5, log_every=2))
    monkeypatch.setattr(training, "Later", AsOnGPU)
    train(settings(folder, tmp_path / "b", steps=5, log_every=2))
    a, b = (read_log(tmp_path / name / "log.jsonl") for name in "ab")
    assert [line["step"] for line in b] == [2, 4, 5]
    assert all(x[key] == y[key] for x, y in zip(a, b, strict=True) for key in ("loss", "tasks", "logsnr", "gray"))


@pytest.mark.parametrize("kind", [Later, AsOnGPU])
def test_a_gradient_that_is_not_finite_changes_nothing(folder, tmp_path, monkeypatch, kind):
    from palette_diffusers import training

    monkeypatch.setattr(training, "Later", kind)
    train(settings(folder, tmp_path / "run", steps=2))
    before = last_state(tmp_path / "run")
    original = training._losses

    def wrong(*inputs):
        losses, *rest = original(*inputs)
        return losses.sqrt() * 0 + losses * 1e38 * 1e38 * 0, *rest

    monkeypatch.setattr(training, "_losses", wrong)
    for often in (1, 100):  # found before it is saved, be it by the way or at the end
        with pytest.raises(FloatingPointError, match="is not finite at step 2: the last state is in"):
            train(settings(folder, tmp_path / "run", steps=4 if often == 1 else 3, resume=True, save_every=often))
    same(before, last_state(tmp_path / "run"))


@pytest.mark.parametrize("fused", [False, True])
def test_steps_whose_gradient_is_not_finite_are_left_out(folder, tmp_path, monkeypatch, fused):
    original, make, calls = training._losses, training._optimizer, []

    def losses(*inputs):
        """Finite, with gradients that are not from the third step on."""
        calls.append(1)
        out, *rest = original(*inputs)
        return out if len(calls) < 3 else out.detach() + (out - out.detach()).abs().sqrt(), *rest

    def optimizer(parameters, chosen):
        options = make(parameters, chosen).defaults
        return torch.optim.AdamW(parameters, lr=options["lr"], weight_decay=0.0, fused=True)

    if fused:
        monkeypatch.setattr(training, "_optimizer", optimizer)
    train(settings(folder, tmp_path / "before", steps=2))
    monkeypatch.setattr(training, "_losses", losses)
    train(settings(folder, tmp_path / "run", steps=3, bad_steps=1))
    before, after = last_state(tmp_path / "before"), last_state(tmp_path / "run")
    assert after["step"] == 3 and read_log(tmp_path / "run" / "log.jsonl")[-1]["left_out"] == 1
    for part in ("unet", "optimizer"):
        torch.testing.assert_close(after[part], before[part], atol=0, rtol=0)
    calls.clear()
    with pytest.raises(FloatingPointError, match="the gradient is not finite at step 3"):
        train(settings(folder, tmp_path / "many", steps=4, bad_steps=1))


def test_a_state_is_kept_before_a_sheet_that_fails(folder, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "samples").touch()
    with pytest.raises(OSError, match="samples"):
        train(settings(folder, tmp_path / "run", validate_every=2, validate_steps=1))
    assert last_state(tmp_path / "run")["step"] == 2


def test_an_edited_card_stays_where_nothing_was_trained(folder, tmp_path):
    card = train(settings(folder, tmp_path / "run")) / "README.md"
    card.write_text(card.read_text() + "\nMy own words.\n")
    train(settings(folder, tmp_path / "run", resume=True))
    assert "My own words." in card.read_text()
    train(settings(folder, tmp_path / "run", resume=True, steps=5))
    assert "5 steps" in card.read_text().replace("**", "")


def test_pictures_of_a_run_are_not_trained_on(photo, tmp_path, capsys):
    """Nor are its photographs others than they were, unnoticed."""
    for i in range(5):
        Image.fromarray(photo[i : i + 64, :64]).save(tmp_path / f"{i}.png")
    with pytest.raises(ValueError, match="inside .*, whose images are all trained on"):
        train(settings(tmp_path, tmp_path / "runs" / "a"))
    assert not (tmp_path / "runs").exists()
    data = tmp_path / "data"
    data.mkdir()
    for i in range(5):
        (tmp_path / f"{i}.png").rename(data / f"{i}.png")
    options = dict(tasks="colorization", crop_share=0.0)
    train(settings(data, tmp_path / "run", **options))
    train(settings(data, tmp_path / "run", resume=True, steps=5, **options))
    assert "has other files" not in capsys.readouterr().err
    (data / "0.png").unlink()
    (data / "gone.png").symlink_to(tmp_path / "nowhere.png")  # a broken image like others
    train(settings(data, tmp_path / "run", resume=True, steps=6, **options))
    assert f"warning: {data} has other files than the run had before" in capsys.readouterr().err
    (data / "metadata.csv").write_text("file_name\n1.png\n2.png\n3.png\n4.png\n")  # which alone are read
    train(settings(data, data / "run", **options))


def test_hours_stop_the_run(folder, tmp_path, capsys):
    train(settings(folder, tmp_path / "run", steps=1000, max_hours=1e-9, log_every=1000))
    assert last_state(tmp_path / "run")["step"] == 1
    assert "stopped at step 1 of 1000; to go on: accelerate launch" in capsys.readouterr().out


def test_what_a_run_shows(folder, tmp_path):
    """Log by task and log-SNR, a sheet for every task, a page and a card."""
    final = train(settings(folder, tmp_path / "run", steps=6, validate_every=3, validate_steps=2))
    lines = read_log(tmp_path / "run" / "log.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 7))
    tasks = [value for line in lines for value in line["tasks"].values() if value is not None]
    assert set(lines[0]["tasks"]) == set(TASKS) and len(tasks) > 8 and 0 <= lines[0]["waiting"] <= 1
    sheets = sorted((tmp_path / "run" / "samples").iterdir())
    assert [p.name for p in sheets] == ["step-0000003.png", "step-0000006.png"]
    a, b = (np.asarray(Image.open(p)) for p in sheets)
    assert a.shape == (3 * 4 * 34, 120 + 6 * 34, 3) and (a != b).any()
    originals = slice(2 * 34, 2 * 34 + 32)
    assert np.array_equal(a[originals], b[originals])  # the same images at every step
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<polyline" in page and "samples/step-0000006.png" in page and "colorization" in page
    card = (final / "README.md").read_text()
    assert "library_name: diffusers" in card and "6 steps of 4 samples\n- data: `images`\n" in card
    assert str(tmp_path) not in card


def test_tensorboard_gets_the_losses(folder, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(settings(folder, tmp_path / "run"))
    events = EventAccumulator(str(tmp_path / "run" / "palette")).Reload()
    lines = read_log(tmp_path / "run" / "log.jsonl")
    assert [event.value for event in events.Scalars("loss")] == pytest.approx([line["loss"] for line in lines])
    train(settings(folder, tmp_path / "none", tracker="none"))
    assert not (tmp_path / "none" / "palette").exists()


def test_pairs(tmp_path, photo):
    """A data set with a column of sources: the condition is the source, cropped and flipped as the target."""
    import datasets

    targets = [Image.fromarray(photo[i : i + 60, i : i + 80]) for i in range(8)]
    sources = [Image.fromarray(255 - np.asarray(t)) for t in targets]
    (tmp_path / "pairs").mkdir()
    (tmp_path / "shapes").mkdir()
    features = datasets.Features(target=datasets.Image(), source=datasets.Image(), label=datasets.Value("int64"))
    data = datasets.Dataset.from_dict(dict(target=targets, source=sources, label=[0] * 8), features=features)
    data.to_parquet(tmp_path / "pairs" / "train-0.parquet")
    images = load_images(str(tmp_path / "pairs"))
    pairs = PaletteDataset(images, PaletteScheduler(), ["paired"], size=32, column="target", source_column="source")
    for i in range(10):
        assert (pairs[i]["condition"] + pairs[i]["clean"]).abs().max() < 0.02
    for wrong in ("label", "none"):
        with pytest.raises(ValueError, match="holds no images; those that do: target, source"):
            PaletteDataset(images, PaletteScheduler(), ["paired"], size=32, column="target", source_column=wrong)
    shapes = data.map(lambda row: {"source": row["source"].resize((30, 60))}, features=features)
    shapes.to_parquet(tmp_path / "shapes" / "train-0.parquet")
    with pytest.raises(ValueError, match="is a pair of different shapes: target and source are 80x60 and 30x60"):
        PaletteDataset(load_images(str(tmp_path / "shapes")), PaletteScheduler(), ["paired"], size=32, column="target",
            source_column="source")[0]  # fmt: skip
    run = settings(tmp_path / "pairs", tmp_path / "run", column="target", source_column="source", validate_every=4)
    pipe = PalettePipeline.from_pretrained(train(run))
    assert pipe.config.tasks == ["paired"]
    assert pipe(photo[:40, :50], num_inference_steps=2).images[0].size == (50, 40)


def test_images_that_cannot_be_used_are_counted(tmp_path, photo, folder):
    """Broken and small files are skipped and counted; gray ones only where colour is needed; strict stops."""
    images = load_images(str(folder))
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:2000])
    Image.fromarray(photo[:20, :20]).save(folder / "small.png")
    Image.fromarray(photo[:80, :90]).convert("L").save(folder / "gray.png")
    mixed = load_images(str(folder))
    assert len(mixed) == len(images) + 3
    dataset = PaletteDataset(mixed, PaletteScheduler(), ["colorization"], size=32)
    samples = [dataset[i] for i in range(len(mixed))]  # one epoch
    assert sum(int(s["skipped"]) for s in samples) >= 2 and sum(int(s["gray"]) for s in samples) >= 1
    with pytest.raises(ValueError, match="below 32 pixels|can't be decoded"):
        strict = PaletteDataset(mixed, PaletteScheduler(), ["colorization"], size=32, strict=True)
        for i in range(len(mixed)):
            strict[i]
    with pytest.raises(ValueError, match="below 512 pixels: .*png .and 99 before"):
        PaletteDataset(images, PaletteScheduler(), ["colorization"], size=512)[0]


def test_photographs_for_crops_may_be_broken_or_small_too(folder, photo, monkeypatch):
    from palette_diffusers import data

    images = load_images(str(folder))
    (folder / "a-broken.png").write_bytes((folder / "0.png").read_bytes()[:2000])
    Image.fromarray(photo[:20, :20]).save(folder / "b-small.png")
    monkeypatch.setattr(data, "CACHE", 80 * 90 * 3 * 2)
    dataset = PaletteDataset(images, PaletteScheduler(), ["jpeg_restoration"], crops=load_images(str(folder)), size=32)
    assert sum(int(dataset[i]["skipped"]) for i in range(40)) > 0
    assert len(dataset._cache) == 2  # memory stays bounded
    with pytest.raises(ValueError, match="of the crops"):
        strict = PaletteDataset(
            images, PaletteScheduler(), ["jpeg_restoration"], crops=load_images(str(folder)), size=32, strict=True
        )
        [strict[i] for i in range(40)]


def test_sources_are_mixed_by_weight(tmp_path, photo):
    for name, value in (("dark", 10), ("light", 240)):
        (tmp_path / name).mkdir()
        Image.new("RGB", (40, 40), (value, value + 9, value)).save(tmp_path / name / "0.png")
    data, weights = load_sources(f"{tmp_path / 'dark'}@3,{tmp_path / 'light'}")
    dataset = PaletteDataset(data, PaletteScheduler(), ["inpainting"], size=32, source_weights=weights)
    dark = sum(bool(dataset[i]["clean"].mean() < 0) for i in range(200))
    assert 120 < dark < 180
    with pytest.raises(ValueError, match="PATH@WEIGHT"):
        load_sources(f"{tmp_path / 'dark'}@much")


def test_losses_are_weighted_by_task(folder, tmp_path):
    """A task of weight 0 is drawn and logged, but teaches nothing."""
    both = settings(folder, tmp_path / "a", tasks="colorization,inpainting", loss_weights="colorization=0,inpainting=0")
    train(both)
    state = last_state(tmp_path / "a")
    assert not any(v["exp_avg"].any() for v in state["optimizer"]["state"].values())
    assert all(line["loss"] > 0 for line in read_log(tmp_path / "a" / "log.jsonl"))


def test_condition_dropout(folder):
    images = load_images(str(folder))
    dataset = PaletteDataset(images, PaletteScheduler(), ["jpeg_restoration"], size=32, condition_dropout=0.5)
    dropped = sum(bool(dataset[i]["condition"].abs().max() > 1) for i in range(100))
    assert 30 < dropped < 70

    class Same(Task):
        name = "same"

        def degrade(self, clean, generator=None):
            return Given(known=clean, condition=clean)

    register_task(Same)
    try:
        same_task = PaletteDataset(images, PaletteScheduler(), ["same"], size=32, condition_dropout=0.5)
        assert all(same_task[i]["clean"].abs().max() <= 1 for i in range(20))  # the original is not overwritten
    finally:
        tasks._TASKS.pop("same")


@pytest.mark.parametrize("kind", ["sample", "v_prediction"])
def test_regression_twin(folder, tmp_path, kind):
    final = train(settings(folder, tmp_path / "run", regression=True, prediction_type=kind))
    pipe = PalettePipeline.from_pretrained(final)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.config.default_steps == 1
    image = Image.open(folder / "0.png")
    a, b = (pipe(image, generator=torch.Generator().manual_seed(seed), output_type="pt").images for seed in (0, 1))
    assert torch.equal(a, b)  # no noise: one answer


def test_low_rank_adapters(folder, tmp_path):
    base = train(settings(folder, tmp_path / "base", steps=1))
    tuned = train(settings(folder, tmp_path / "tuned", init=str(base), lora_rank=2, rate=1e-2, steps=4))
    a, b = (PalettePipeline.from_pretrained(path).unet for path in (base, tuned))
    assert a.state_dict().keys() == b.state_dict().keys()  # merged
    changed = {k for k, v in a.state_dict().items() if not torch.equal(v, b.state_dict()[k])}
    assert changed and all("conv" in k or "to_" in k for k in changed)
    assert sum(f.stat().st_size for f in (tuned / "lora").iterdir()) < 200_000
    train(settings(folder, tmp_path / "tuned", init=str(base), lora_rank=2, rate=1e-2, steps=6, resume=True))
    last = dict(init=str(base), lora_rank=2, rate=1e-2, steps=7, resume=True, channels_last=True)
    tuned = train(settings(folder, tmp_path / "tuned", **last))

    # adapters that are gone on with start where they ended, and must fit
    again = dict(init=str(base), lora_init=str(tuned / "lora"), rate=1e-12, steps=1)
    same = train(settings(folder, tmp_path / "again", lora_rank=2, **again))
    c = PalettePipeline.from_pretrained(same).unet.state_dict()
    last = PalettePipeline.from_pretrained(tuned).unet.state_dict()
    assert all(torch.allclose(last[k], c[k], atol=1e-5) for k in c)
    with pytest.raises(ValueError, match="does not fit adapters of rank 3"):
        train(settings(folder, tmp_path / "wrong", lora_rank=3, **again))
    with pytest.raises(ValueError, match="has adapters of layers that the network does not adapt"):
        (tmp_path / "other").mkdir()
        save_file({"nowhere.lora_A.weight": torch.zeros(2, 3)}, tmp_path / "other" / "pytorch_lora_weights.safetensors")
        train(settings(folder, tmp_path / "wrong", lora_rank=2, **again | {"lora_init": str(tmp_path / "other")}))
    merged = {"init": str(tuned), "lora_init": f"{tuned}/lora"}
    with pytest.raises(ValueError, match="have these adapters already: expected the init that they were trained on"):
        train(settings(folder, tmp_path / "twice", lora_rank=2, **merged))


def test_dry_run(folder, tmp_path, capsys):
    train(settings(folder, tmp_path / "run", dry_run=True, batch=8, cuda_graph=True))  # of a run on another machine
    said = capsys.readouterr().out
    assert "0.2M parameters" in said and "GFLOP" in said and "hours to step 4" in said
    assert Image.open(tmp_path / "run" / "batch.png").width > 120 and not list((tmp_path / "run").glob("step-*"))
    (tmp_path / "run" / "step-0000002.pt").touch()
    with pytest.raises(FileExistsError, match="holds a run"):
        train(settings(folder, tmp_path / "run", dry_run=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(loss="l3"), "loss is 'l3', expected one of l2, l1, huber"),
        (dict(steps=0), "steps is 0, expected at least 1"),
        (dict(ema=1.0), "ema is 1.0"),
        (dict(rate=-1.0), "rate is -1.0"),
        (dict(lora_rank=4), "needs a checkpoint"),
        (dict(lora_init="somewhere"), "lora_init is 'somewhere', but there are no adapters"),
        (dict(regression=True, prediction_type="epsilon"), "prediction_type is 'epsilon'"),
        (dict(prediction_type="epsilon", unet=preset("starter-64").unet), "condition_skip needs v_prediction"),
        (dict(tasks=" "), "tasks is empty"),
        (dict(seed=-1), "seed is -1"),
        (dict(init="starter"), "is of 64 pixels, the settings say 32"),
        (dict(accumulate=3, dry_run=True), "batch is 4, expected a multiple of accumulate, 3"),
        (dict(schedule="cosine", decay=2), "decay is 2, but schedule 'cosine' falls by itself"),
        (dict(crops="somewhere", source_column="source"), "crops is 'somewhere', but pairs"),
        (dict(precision="fp16"), "precision is fp16, which a CPU is not trained in"),
        (dict(precision="fp16", dry_run=True), "precision is fp16, which a CPU is not trained in"),
        (dict(unet=[16, 32]), r"unet is \[16, 32\], expected the network's configuration as JSON"),
        (dict(unet=dict(block_out_channels=5)), "of which no network can be made"),
        (dict(unet=dict(dropout="x")), "of which no network can be made"),
        (dict(unet=dict(block_out_chanels=[8])), "unet has 'block_out_chanels', .*did you mean block_out_channels"),
        (dict(task_weights="colorization=x"), "task_weights has 'colorization=x', expected TASK=NUMBER"),
        (dict(loss_weights="inpainting=-1"), "expected a finite number of at least 0"),
        (dict(loss_weights="inpainting=inf"), "expected a finite number of at least 0"),
        (dict(loss_weights="magic=2"), "task is 'magic'"),
        (dict(task_weights="inpainting=2", tasks="colorization"), "task_weights has inpainting, expected tasks of"),
        (dict(task_weights="colorization=0", tasks="colorization"), "expected a task that is drawn"),
        (dict(tasks="colorization,colorization"), "expected each once"),
        (dict(seed=2**63), r"expected below 2\*\*63"),
        (dict(clip=math.nan), "clip is nan, expected a finite number"),
        (dict(rate=math.inf), "rate is inf, expected a finite number"),
        (dict(batch="32"), "batch is '32', expected a whole number"),
        (dict(steps=1.5), "steps is 1.5, expected a whole number"),
        (dict(steps=True), "steps is True, expected a whole number"),
        (dict(data=None), "data is None, expected text"),
        (dict(resume="no"), "resume is 'no', expected a bool"),
        (dict(tasks="colorization,magic"), "task is 'magic'"),
        (dict(tracker="wandb"), "not installed"),
        (dict(shuffle_buffer=8), "nothing streams"),
        (dict(init="./nowhere"), "nowhere"),
        (dict(fused=True), "fused is on, expected channels_last with it and compile off"),
        (dict(fused=True, channels_last=True, compile=True), "compile off"),
        (dict(cuda_graph=True), "expected one plain process on cuda, .* here are cpu, distribution NO"),
        (dict(tracker="wandb", dry_run=True), "not installed"),
    ],
)
def test_bad_settings(folder, tmp_path, changes, message):
    with pytest.raises((ValueError, OSError), match=message):
        train(settings(folder, tmp_path / "run", **changes))
    assert not list(tmp_path.glob("run/step-*"))


def test_a_worker_that_was_killed_is_told(folder, tmp_path):
    run = launch(*options(folder, tmp_path / "run", workers=1, steps=100_000), "--tracker=none")
    try:
        while not (tmp_path / "run" / "log.jsonl").exists():
            assert run.poll() is None, run.stderr.read()[-2000:]
            time.sleep(0.1)
        main = next(p for p in psutil.Process(run.pid).children(recursive=True) if "train_palette" in str(p.cmdline()))
        os.kill(next(p.pid for p in main.children() if p.cmdline() == main.cmdline()), signal.SIGKILL)
        _, said = run.communicate(timeout=100)
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
    assert "killed by signal: Killed" in said and "Was memory short? Fewer workers take less" in said
    assert "exit status 1" in said and said.startswith("error: ")


def test_a_network_is_changed_by_what_is_given(folder, tmp_path):
    """As the error about condition_skip advises; what is not given stays as the preset has it."""
    changes = {"condition_skip": 0, "hole_skip": 0}
    chosen = parse(["--preset", "tiny-64", "--prediction-type", "epsilon", "--unet", json.dumps(changes)])
    assert chosen.unet == preset("tiny-64").unet | changes
    with pytest.raises(ValueError, match="unet is given, but the network is that of init, 'starter'"):
        parse(["--preset", "finetune-64", "--unet", "{}"])
    with pytest.raises(ValueError, match="unet is 3, expected"):
        parse(["--unet", "3"])
    with pytest.raises(ValueError, match="tasks is 'inpainting', but pairs .* have the task 'paired'"):
        parse(["--tasks", "inpainting", "--source-column", "faded"])


def test_accelerates_own_accumulation_is_not_added_to_ours(folder, tmp_path, monkeypatch):
    """It would divide the gradients again."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    with pytest.raises(ValueError, match="Accelerate is configured to accumulate 2 parts, the settings say 1"):
        train(settings(folder, tmp_path / "a"))
    train(settings(folder, tmp_path / "a", accumulate=2))
    monkeypatch.delenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS")
    train(settings(folder, tmp_path / "b", accumulate=2))
    same(last_state(tmp_path / "a"), last_state(tmp_path / "b"))


def test_a_rate_that_is_never_reached_is_told(folder, tmp_path, capsys):
    message = "warning: the learning rate comes to 0.0004 at most, not to 0.0008: warmup 4 and decay 3 leave no room"
    train(settings(folder, tmp_path / "run", warmup=4, decay=3))
    assert message in capsys.readouterr().err
    train(settings(folder, tmp_path / "dry", warmup=4, decay=3, dry_run=True))
    assert message in capsys.readouterr().out
    train(settings(folder, tmp_path / "good", warmup=1, decay=3))
    assert "warning" not in capsys.readouterr().err
    assert [training._tell_rate(preset(name)) for name in PRESETS] == [""] * len(PRESETS)


def test_a_log_ends_where_the_state_does(folder, tmp_path, capsys):
    """A run that died before its first state leaves nothing in the log of the one that begins anew."""
    run = tmp_path / "run"
    (run / "samples").mkdir(parents=True)
    (run / "log.jsonl").write_text("".join(json.dumps({"step": step, "loss": 99.0}) + "\n" for step in range(1, 10)))
    for step in (1, 9):
        (run / "samples" / f"step-{step:07d}.png").touch()
    (run / "samples" / "step-best.png").touch()
    train(settings(folder, run, steps=2, resume=True))
    assert f"{run} has no checkpoint: the run begins at step 0" in capsys.readouterr().err
    assert [line["step"] for line in read_log(run / "log.jsonl")] == [1, 2]
    assert [path.name for path in (run / "samples").iterdir()] == ["step-best.png"]  # a user's own
    assert all(line["loss"] < 99 for line in read_log(run / "log.jsonl"))
    with open(run / "log.jsonl", "a") as log:
        log.write(json.dumps({"step": 3, "loss": 99.0}) + "\n")
    train(settings(folder, run, steps=4, resume=True, log_every=10))  # a short run has a line, too
    assert [line["step"] for line in read_log(run / "log.jsonl")] == [1, 2, 4]
    assert "<polyline" in (run / "report.html").read_text()


def test_the_card_names_all_that_was_trained_on(folder, tmp_path):
    other = tmp_path / "others"
    shutil.copytree(folder, other)
    Image.new("RGB", (8, 8)).save(other / "small.png")
    data = f"{folder}/@3,{other}"
    final = train(settings(folder, tmp_path / "run", data=data, crops=f"{other}/", crop_share=0.2, steps=8))
    card = (final / "README.md").read_text()
    assert "- data: `images` (weight 3), `others`\n" in card and "precision: no\n" in card
    assert "- crops: of `others`: JPEG restoration's samples, 20% of other tasks'\n" in card
    again = train(settings(folder, tmp_path / "more", init=f"{final}/"))
    card = (again / "README.md").read_text()
    assert "from `run`: 4 steps" in card and str(tmp_path) not in card and "datasets:" not in card
    page = (tmp_path / "run" / "report.html").read_text()
    assert "images that could not be used were drawn" in page
    hub = replace(settings(folder, ""), data="USER/photos@2,OTHER/more", crops="USER/large")
    write_card(tmp_path / "card.md", hub, 4, 10)
    text = (tmp_path / "card.md").read_text()
    assert "- data: `USER/photos` (weight 2), `OTHER/more`\n" in text
    assert "datasets:\n- USER/photos\n- OTHER/more\n- USER/large\n" in text


def test_a_licence_goes_on_to_what_is_made(folder, tmp_path):
    """From the folder that was started from, and on from there, wherever it lies."""
    base = train(settings(folder, tmp_path / "a"))
    assert not (base / "LICENSE").exists() and "license" not in (base / "README.md").read_text()
    (base / "LICENSE").write_text("Not for sale.")
    tuned = train(settings(folder, tmp_path / "b", init=str(base)))
    again = train(settings(folder, tmp_path / "c", init=str(tuned)))
    card = (again / "README.md").read_text()
    assert (again / "LICENSE").read_text() == "Not for sale."
    assert "license: other\nlicense_name: see-license-file" in card
    shutil.copytree(again, tmp_path / "elsewhere")
    tree = publish(tmp_path / "elsewhere", "me/tuned", dry_run=tmp_path / "tree")
    assert (Path(tree) / "LICENSE").read_text() == "Not for sale."
    told = json.loads((tmp_path / "c" / "settings.json").read_text())
    (tmp_path / "c" / "settings.json").write_text(json.dumps(told | {"init": "starter"}))
    tree = publish(tmp_path / "c", "me/tuned", dry_run=tmp_path / "other")
    assert (Path(tree) / "LICENSE").read_text() == "Not for sale.", "what lies there, the teacher's terms in it"
    taught = replace(settings(folder, ""), teacher="starter", init="")
    assert licences(taught) == (SHIPPED["starter"] / "LICENSE").read_text() == licences(replace(taught, init="starter"))
    assert licences(replace(taught, init=str(base))).startswith("Not for sale.\n\n")


def test_the_report_has_the_network_and_the_noise_that_there_were(folder, tmp_path):
    twin = settings(folder, tmp_path / "a", regression=True, prediction_type="sample", steps=2)
    twin = replace(twin, unet=twin.unet | {"hole_skip": 0.0, "condition_skip": 0.0})
    base = train(twin)
    last = read_log(tmp_path / "a" / "log.jsonl")[-1]["logsnr"]
    assert last[0] is not None and last[1:] == [None] * 5
    train(replace(twin, output=str(tmp_path / "b"), init=str(base), unet=preset("starter-64").unet))
    page = (tmp_path / "b" / "report.html").read_text()
    assert "&#x27;block_out_channels&#x27;: [16, 32]" in page.replace("(16, 32)", "[16, 32]") and "96, 192" not in page


def test_help_shows_the_values_of_the_preset(capsys):
    for preset_name, batch in (("starter-64", 32), ("palette-256", 1024)):
        with pytest.raises(SystemExit):
            parse(["--preset", preset_name, "--help"])
        assert f"[{batch}]" in " ".join(capsys.readouterr().out.split()).rpartition("--batch BATCH")[2][:120]
    with pytest.raises(SystemExit):
        parse(["--unet", "{bad}"])
    assert "is no JSON" in capsys.readouterr().err
    assert parse(["--streaming"], shuffle_buffer=100).shuffle_buffer == 100, "a script's own default, told with it"


def test_curves_of_a_report():
    """One point is seen, a late leap is in the picture, an early one is not."""
    assert "<circle" in report._chart("Loss", {"all": [(1, 0.5)]})
    steady = [(i, 0.05) for i in range(1, 100)]
    assert 'y="34">5<' in report._chart("Loss", {"all": [*steady, (100, 5.0)]})
    assert 'y="34">0.05<' in report._chart("Loss", {"all": [(0, 5.0), *steady]})


def test_unknown_options_name_the_nearest(capsys):
    for arguments, message in ((["--worker", "3"], "did you mean --workers?"), (["--batch", "x"], "--batch"),
            (["--steps"], "--steps")):  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            parse(arguments)
        assert stop.value.code == 2 and message in capsys.readouterr().err
    with pytest.raises(ValueError, match="did you mean starter-64?"):
        parse(["--preset", "starter64"])
    chosen = parse(["--preset", "palette-64", "--no-compile", "--rate", "3e-4"], seed=7)
    assert chosen.rate == 3e-4 and chosen.seed == 7 and chosen.batch == 256 and not chosen.compile


def test_published_weights_are_the_average(folder, tmp_path):
    final = train(settings(folder, tmp_path / "run"))
    pipe = PalettePipeline.from_pretrained(final)
    state = last_state(tmp_path / "run")
    for p, shadow in zip(pipe.unet.parameters(), state["ema"]["shadow_params"], strict=True):
        assert torch.equal(p, shadow)
    assert not torch.equal(pipe.unet.conv_in.weight, state["unet"]["conv_in.weight"])
    assert pipe.config.tasks == TASKS and pipe.scheduler.config.prediction_type == "v_prediction"
    train(settings(folder, tmp_path / "tuned", init=str(final), steps=1))


def test_a_pipeline_with_another_solver_is_tuned_and_keeps_it(folder, tmp_path):
    pipe = PalettePipeline.from_pretrained(train(settings(folder, tmp_path / "run", steps=1)))
    pipe.scheduler = diffusers.UniPCMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.register_to_config(default_steps=4)
    pipe.save_pretrained(tmp_path / "fast")
    tuned = PalettePipeline.from_pretrained(
        train(settings(folder, tmp_path / "tuned", init=str(tmp_path / "fast"), steps=1))
    )
    assert type(tuned.scheduler).__name__ == "UniPCMultistepScheduler" and tuned.config.default_steps == 4


def test_a_run_by_replayed_steps_is_the_same_run(folder, tmp_path, monkeypatch):
    """The recording is a stand-in's; a GPU's was run by hand."""
    right = last_state(Path(train(settings(folder, tmp_path / "run", steps=4))).parent)
    made = []
    monkeypatch.setattr(training, "_check_graph", lambda *_: None)
    monkeypatch.setattr(
        training, "Replay", lambda work, trained: made.append(Replay(work, trained, record_for(trained))) or made[-1]
    )
    found = last_state(Path(train(settings(folder, tmp_path / "replayed", steps=4, cuda_graph=True))).parent)
    assert len(made) == 1 and made[0]._batch
    for part in ("unet", "ema", "optimizer"):
        torch.testing.assert_close(found[part], right[part], atol=0, rtol=0)


@pytest.mark.filterwarnings("ignore:.*pin_memory")
@pytest.mark.parametrize("processes", [1, 2])
def test_loaders_that_take_turns_give_the_same_batches(folder, tmp_path, monkeypatch, processes):
    chosen = settings(folder, tmp_path, steps=8, workers=3, batch=2 * processes)
    dataset = training._dataset(chosen, training.make_scheduler(chosen), False)
    alone = [list(batches.batches(dataset, chosen, 1, p, processes)) for p in range(processes)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(batches, "WORKERS", 1)
    loaders = batches._loaders(dataset, chosen, 1, 0, processes)
    assert [loader.num_workers for loader in loaders] == [1, 1, 1]
    turns = [list(batches.batches(dataset, chosen, 1, p, processes)) for p in range(processes)]
    assert len(turns[0]) == len(alone[0]) == 7 and "known" not in turns[0][0]
    for a, b in zip(sum(alone, []), sum(turns, []), strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    noises = {sample.numpy().tobytes() for batch in sum(alone, []) for sample in batch["noise"]}
    assert len(noises) == 7 * 2 * processes  # the processes share no sample


def test_dropout_is_not_replayed(folder, tmp_path):
    chosen = settings(folder, tmp_path / "run", cuda_graph=True)
    with pytest.raises(ValueError, match="the network's dropout, 0.1"):
        training._run(replace(chosen, unet=chosen.unet | {"dropout": 0.1}), None, tmp_path)


def test_fused_blocks_train_alike(folder, tmp_path):
    ends = []
    for name, changes in {"plain": {}, "fused": dict(fused=True)}.items():
        train(settings(folder, tmp_path / name, steps=4, precision="bf16", channels_last=True, **changes))
        moments = last_state(tmp_path / name)["optimizer"]["state"].values()
        ends.append(torch.cat([state["exp_avg"].flatten() for state in moments]))
    assert 0 < (ends[0] - ends[1]).norm() < 0.05 * ends[0].norm()  # other roundings: they were in use


def test_learning_rate():
    s = replace(TrainSettings(), rate=1.0, warmup=10, steps=100, decay=20)
    assert learning_rate(s, 4) == pytest.approx(0.5)
    assert learning_rate(s, 50) == 1 and learning_rate(s, 90) == pytest.approx(0.5)


def test_presets_build():
    from palette_diffusers import PaletteUNet2DModel

    for name in PRESETS:
        with torch.device("meta"):
            PaletteUNet2DModel(**preset(name).unet)
    with pytest.raises(ValueError, match="starter-64"):
        preset("starter")


def test_command_line(folder, tmp_path):
    """`accelerate launch`, as the README has it."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", str(TRAIN),
        "--data", str(folder), "--output", str(tmp_path / "run"), "--steps", "1", "--batch", "2",
        "--workers", "1"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "run" / "pipeline" / "model_index.json").exists()


def test_bad_data(tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        (["--data", str(tmp_path / "empty")], "holds no train-*.parquet, no *.tar and no images"),
        (["--data", str(tmp_path / "none")], "is no folder"),
        ([], "data is empty"),
    ):
        monkeypatch.setattr(sys, "argv", [str(TRAIN), *arguments, "--output", str(tmp_path / "run")])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(TRAIN), run_name="__main__")
        assert end.value.code == 2 and message in capsys.readouterr().err


def test_own_task_example_trains_and_is_short(folder, tmp_path):
    """The whole file, without its docstring, is under 25 lines; a model of it mends a picture by the task's name."""
    example = TRAIN.parents[1] / "examples" / "own_task.py"
    code = example.read_text().split('"""')[2]
    assert len([line for line in code.splitlines() if line.strip()]) < 25
    arguments = [a for a in options(folder, tmp_path / "run", steps=2)]
    done = subprocess.run([sys.executable, str(example), *arguments], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    use = f"""
import sys; sys.path.insert(0, {str(example.parent)!r}); import own_task
from palette_diffusers import PalettePipeline
pipe = PalettePipeline.from_pretrained({str(tmp_path / "run" / "pipeline")!r})
print(pipe({str(folder / "0.png")!r}, num_inference_steps=2).images[0].size, pipe.config.default_task)
"""
    done = subprocess.run([sys.executable, "-c", use], capture_output=True, text=True, timeout=240)
    assert done.stdout.strip() == "(90, 80) super_resolution", done.stderr[-2000:]


def test_more_tasks_example(folder, tmp_path, photo, seeded):
    """What its tasks do to a photograph, seeded, and that a model of both trains and mends by name."""
    more = runpy.run_path(str(TRAIN.parents[1] / "examples" / "more_tasks.py"))
    clean = torch.from_numpy(photo[:64, :64].copy()).permute(2, 0, 1)[None] / 127.5 - 1
    for name in ("deblurring", "denoising"):
        task = tasks.get_task(name)
        sources = [task.degrade(clean, seeded(seed)).condition for seed in (1, 1, 2)]
        assert torch.equal(sources[0], sources[1]) and not torch.equal(sources[0], sources[2])
    impulse = torch.zeros(1, 1, 31, 31)
    impulse[..., 15, 15] = 1
    spread = more["gaussian_blur"](impulse, 2.0)[0, 0]
    place = torch.arange(31.0) - 15
    assert spread.sum().item() == pytest.approx(1, abs=1e-5)
    assert (spread.sum(0) * place**2).sum().sqrt().item() == pytest.approx(2, rel=0.02)
    gray = torch.zeros(1, 3, 64, 64)
    noise = [tasks.get_task("denoising").degrade(gray, seeded(seed)).condition.std() * 127.5 for seed in range(20)]
    assert 4 < min(noise) and max(noise) < 53
    final = train(settings(folder, tmp_path / "run", steps=2, tasks="deblurring,denoising"))
    pipe = PalettePipeline.from_pretrained(final)
    assert pipe(photo[:40, :50], task="denoising", num_inference_steps=2).images[0].size == (50, 40)
