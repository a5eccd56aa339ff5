import math
import os
import sys

import pytest
import torch
from conftest import toy_unet
from torch._inductor import config

from palette_diffusers import winograd
from palette_diffusers.cli import _load
from palette_diffusers.optimize import ALIKE, GAIN, LOSS, optimize, worth
from palette_diffusers.sizes import TILES


def test_what_is_kept_is_faster_and_alike(pipe, photo, seeded, caplog):
    def run():
        return pipe(photo, generator=seeded(), output_type="pt").images

    before = run()
    report = pipe.optimize()
    assert {trial.name for trial in report.trials} >= {"channels_last"}
    assert report.after * report.after_tile <= report.before * report.before_tile
    assert all(t.kept == (worth(t.speedup, t.speedup_tiles) and t.psnr >= ALIKE) for t in report.trials)
    assert not caplog.text
    error = (run() - before).square().mean()
    assert error < 4 / 10**4 and str(report).count("\n") == len(report.trials)


def test_what_gains_for_large_photographs_alone_is_kept(pipe, monkeypatch):
    """bfloat16 on a CPU with AMX: 0.96 times as fast for one picture, 2.3 times for a batch of tiles."""
    assert worth(0.96, 2.3) and worth(1.04, 1.04) and not worth(LOSS - 0.01, 9) and not worth(1.0, GAIN)
    numbers = []

    def seconds(networks, given, rounds, number=1):
        numbers.append(number)
        half = [network.dtype == torch.bfloat16 for network in networks]
        return [(1.04 if x else 1.0) if number == 1 else (0.4 if x else 1.0) * number for x in half]

    monkeypatch.setattr("palette_diffusers.optimize.best_dtype", lambda device: torch.bfloat16)
    monkeypatch.setattr("palette_diffusers.optimize.ALIKE", 20.0)  # random weights: 26 dB
    monkeypatch.setattr("palette_diffusers.optimize._seconds", seconds)
    report = optimize(pipe)
    half, layout, *_ = report.trials
    assert half.kept and (round(half.speedup, 2), round(half.speedup_tiles, 2)) == (0.96, 2.5) and not layout.kept
    assert pipe.unet.dtype == torch.bfloat16 and set(numbers) == {1, TILES * 64**2 // pipe.unet.config.sample_size**2}
    assert (report.before_tile, report.after_tile) == (1000, 400) and "tile 400.0, before 1000.0" in str(report)


def test_a_way_that_changes_the_pictures_is_left_out(pipe, monkeypatch):
    """However fast it is."""
    monkeypatch.setattr("palette_diffusers.optimize.best_dtype", lambda device: torch.bfloat16)
    monkeypatch.setattr("palette_diffusers.optimize.ALIKE", 200.0)
    half, *_ = optimize(pipe, rounds=1).trials
    assert not half.kept and half.psnr < 200 and pipe.unet.dtype == torch.float32


def test_a_precision_that_overflows_is_not_possible_here(pipe, monkeypatch):
    monkeypatch.setattr("palette_diffusers.optimize.best_dtype", lambda device: torch.float16)
    with torch.no_grad():
        pipe.unet.conv_in.weight.mul_(3e5)
    half, *_ = optimize(pipe, rounds=1).trials
    assert half.name == "float16" and not half.kept and "not possible here (the sample is not finite" in str(half)
    assert pipe.unet.dtype == torch.float32


def test_dropout_is_not_taken_for_a_loss(pipe, monkeypatch):
    """And the modes are afterwards as they were."""
    monkeypatch.setattr("palette_diffusers.optimize.GAIN", 0.0)
    monkeypatch.setattr("palette_diffusers.optimize._seconds", lambda networks, *rest: [1.0] * len(networks))
    monkeypatch.setattr("palette_diffusers.optimize.best_dtype", lambda device: torch.float32)
    found = pipe.unet = toy_unet(dropout=0.5).train()
    found.mid_block.eval()
    modes = [module.training for module in found.modules()]
    layout, *_ = optimize(pipe, rounds=1).trials
    assert layout.kept and layout.psnr > 60 and pipe.unet is not found
    for network in (found, pipe.unet):
        assert [module.training for module in network.modules()] == modes


def test_a_network_whose_weights_come_and_go_is_refused(pipe):
    pipe.enable_sequential_cpu_offload(device="cpu")
    with pytest.raises(ValueError, match="the network is offloaded"):
        pipe.optimize()


def test_wide_convolutions_take_winograds_way(pipe, monkeypatch):
    """In float32 only; the toy's are narrow."""
    assert "no 3x3 convolution is wide enough" in str(pipe.optimize())
    monkeypatch.setattr(winograd, "WIDE", 1)
    monkeypatch.setattr("palette_diffusers.optimize.GAIN", 0.0)
    monkeypatch.setattr("palette_diffusers.optimize.LOSS", 0.0)
    *_, trial = optimize(pipe, rounds=1).trials
    assert trial.name == "winograd" and trial.kept and 60 < trial.psnr < math.inf
    pipe.unet.bfloat16()
    assert "it is for float32, the network is in bfloat16" in str(optimize(pipe, rounds=1))


def test_without_a_compiler_that_is_said(pipe):
    network = pipe.unet
    with config.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}):
        report = optimize(pipe, compile=True, rounds=1)
    last = report.trials[-1]
    assert last.name == "torch.compile" and not last.kept and "not possible here" in str(last)
    assert pipe.unet._compiled_call_impl is None and network.config == pipe.unet.config


def test_eight_bits_are_tried_on_request(pipe, monkeypatch):
    quantization = pytest.importorskip("torchao.quantization", exc_type=ImportError)
    monkeypatch.setattr("palette_diffusers.optimize.GAIN", 0.0)
    monkeypatch.setattr("palette_diffusers.optimize.LOSS", 0.0)
    trials = {trial.name: trial for trial in optimize(pipe, int8=True, rounds=1).trials}
    assert trials["int8 weights"].kept and 40 < trials["int8 weights"].psnr < math.inf
    assert "quantized already" in trials["int8 weights and activations"].failed and quantization


def test_without_torchao_that_is_said(pipe, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    text = str(optimize(pipe, int8=True, rounds=1))
    assert text.count("not possible here (import of torchao") == 2 and "int8" not in str(optimize(pipe, rounds=1))


def test_what_is_prepared_by_shape_is_bounded(monkeypatch):
    """Or a folder of photographs of every size fills memory; who sets a limit, keeps it."""
    name = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
    monkeypatch.delenv(name, raising=False)
    _load(None, "cpu", "float32")
    assert int(os.environ[name]) == 128
    monkeypatch.setenv(name, "7")
    _load(None, "cpu", "float32")
    assert os.environ[name] == "7"
