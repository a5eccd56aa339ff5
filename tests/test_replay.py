import copy

import pytest
import torch
from torch import nn

from palette_diffusers.replay import Replay, ReplayedForward


def record_for(parameters):
    """What CUDA does, without a GPU: the same memory is written again at every replay."""

    def record(compute, clear):
        for _ in range(2):
            clear()
            result = compute()
        tensors = [p.grad for p in parameters]

        def replay():
            clear()
            result.copy_(compute())
            for kept, p in zip(tensors, parameters, strict=True):
                kept.copy_(p.grad)

        return replay, result

    return record


def steps(replayed):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
    parameters = list(network.parameters())

    def step(batch):
        losses = (network(batch["x"]) - batch["y"]).square().flatten()
        losses.mean().backward()
        return losses.detach()

    step, out = Replay(step, parameters, record_for(parameters)) if replayed else step, []
    for _ in range(5):
        losses = step({"x": torch.randn(6, 4), "y": torch.randn(6, 1)})
        out.append(losses.clone())
        nn.utils.clip_grad_norm_(network.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack(out), copy.deepcopy(network.state_dict())


def test_replayed_steps_train_as_steps_do():
    (losses, weights), (right, others) = steps(True), steps(False)
    assert torch.equal(losses, right) and all(torch.equal(weights[name], others[name]) for name in others)


def test_a_batch_of_another_shape_is_an_error():
    weight = nn.Parameter(torch.ones(3))

    def step(batch):
        (batch["x"] * weight).sum().backward()
        return batch["x"].sum()

    replayed = Replay(step, [weight], record_for([weight]))
    assert replayed({"x": torch.ones(2, 3)}).item() == 6
    with pytest.raises(ValueError, match=r"x is \(1, 3\), expected \(2, 3\) as in the first batch"):
        replayed({"x": torch.ones(1, 3)})
    for batch, names in (({"x": torch.ones(2, 3), "z": torch.ones(1)}, "x, z"), ({}, "")):
        with pytest.raises(ValueError, match=f"the batch has {names}, expected x as in the first batch"):
            replayed(batch)


def record_forward(compute, clear):
    result = compute()
    return lambda: result.copy_(compute()), result


def test_a_replayed_forward_pass_fills_batches_up():
    made, shapes = [], set()

    def predict(x, level):
        shapes.add((len(x), len(level)))
        return x * level[:, None]

    def record(compute, clear):
        made.append(compute)
        return record_forward(compute, clear)

    replayed = ReplayedForward(predict, rows=4, record=record)
    batches = [torch.randn(count, 3) for count in (3, 4, 5, 1, 8)]
    outs = [replayed(x, torch.tensor(2.0)) for x in batches]
    for x, out in zip(batches, outs, strict=True):  # what came first is not written over
        assert torch.equal(out, 2 * x)
    each = torch.rand(5)
    assert torch.equal(replayed(batches[2], each), batches[2] * each[:, None])
    assert shapes == {(4, 4), (8, 8)} and len(made) == 2


def test_other_shapes_are_recorded_apart():
    made = []

    def record(compute, clear):
        made.append(compute)
        return record_forward(compute, clear)

    replayed = ReplayedForward(lambda x, level: x * level[:, None, None], rows=4, record=record)
    for shape in ((2, 3, 4), (2, 1, 4), (2, 3, 8), (3, 3, 4)):
        x = torch.randn(shape)
        assert torch.equal(replayed(x, torch.tensor(2.0)), 2 * x)
    assert len(made) == 3
    with pytest.raises(ValueError, match=r"the tensors are \(3, 3, 4\), \(1,\), expected batches of the same size"):
        replayed(x, torch.ones(1))


def test_what_is_replayed_lies_where_the_first_tensor_does():
    devices = []

    def predict(x, level):  # a level may come in the processor's memory, which a recording cannot read
        devices.append(level.device.type)
        return x * level[:, None]

    out = ReplayedForward(predict, rows=4, record=record_forward)(torch.empty(3, 3, device="meta"), torch.tensor(2.0))
    assert set(devices) == {"meta"} and out.shape == (3, 3)
