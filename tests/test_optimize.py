import math
import os
import sys

import pytest
import torch
from torch._inductor import config

from palette_diffusers import winograd
from palette_diffusers.cli import _load
from palette_diffusers.optimize import ALIKE, GAIN, optimize


def test_what_is_kept_is_faster_and_alike(pipe, photo, seeded, caplog):
    def run():
        return pipe(photo, generator=seeded(), output_type="pt").images

    before = run()
    report = pipe.optimize()
    assert {trial.name for trial in report.trials} >= {"channels_last"} and report.after <= report.before
    assert all(trial.kept == (trial.speedup >= GAIN and trial.psnr >= ALIKE) for trial in report.trials)
    assert not caplog.text
    error = (run() - before).square().mean()
    assert error < 4 / 10**4 and str(report).count("\n") == len(report.trials)


def test_a_way_that_changes_the_pictures_is_left_out(pipe, monkeypatch):
    """However fast it is."""
    monkeypatch.setattr("palette_diffusers.optimize.best_dtype", lambda device: torch.bfloat16)
    monkeypatch.setattr("palette_diffusers.optimize.ALIKE", 200.0)
    half, *_ = optimize(pipe, rounds=1).trials
    assert not half.kept and half.psnr < 200 and pipe.unet.dtype == torch.float32


def test_wide_convolutions_take_winograds_way(pipe, monkeypatch):
    """In float32 only; the toy's are narrow."""
    assert "no 3x3 convolution is wide enough" in str(pipe.optimize())
    monkeypatch.setattr(winograd, "WIDE", 1)
    monkeypatch.setattr("palette_diffusers.optimize.GAIN", 0.0)
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
