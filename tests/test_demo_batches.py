"""Jobs that share the network: each gets what it gets alone, whatever the others do."""

import base64
import io
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

gr = pytest.importorskip("gradio")
from gradio_client import Client, handle_file  # noqa: E402

from palette_diffusers import canvas, demo  # noqa: E402
from palette_diffusers.demo_batches import SharedNetwork, Stopped  # noqa: E402
from palette_diffusers.demo_handlers import Handlers, Settings  # noqa: E402
from palette_diffusers.demo_jobs import SOLVERS, Step, watch, with_solver  # noqa: E402
from palette_diffusers.demo_limits import Limits  # noqa: E402

HOLE = {"mask_image": "20,20,50,50"}
JOBS = [
    ("colorization", "The model's own", 3, {}), ("colorization", "UniPC", 6, {}), ("colorization", "Euler", 4, {}),
    ("inpainting", "The model's own", 4, HOLE), ("inpainting", "DPM-Solver++", 3, HOLE),
    ("uncropping", "The model's own", 3, {"right": 8}), ("jpeg_restoration", "DDIM", 3, {}),
    ("jpeg_restoration", "Heun", 3, {}),
]  # fmt: skip


def at_once(functions):
    """What each returns or raises, run together."""
    results = [None] * len(functions)

    def run(i):
        try:
            results[i] = functions[i]()
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


@pytest.fixture
def batches(monkeypatch):
    """The number of samples of every batch that was made of several jobs' asks."""
    seen, as_one = [], SharedNetwork._as_one

    def counted(self, together):
        seen.append(sum(len(asked.sample) for asked in together))
        return as_one(self, together)

    monkeypatch.setattr(SharedNetwork, "_as_one", counted)
    return seen


def restored(pipe, photo, seed, job, shared=None):
    task, solver, steps, options = job
    return list(watch(
        with_solver(pipe, SOLVERS[solver]), canvas.read(photo), threading.Event(), shared, task=task,
        num_inference_steps=steps, generator=torch.Generator().manual_seed(seed), **options,
    ))  # fmt: skip


def test_jobs_of_any_task_solver_and_steps_equal_those_alone(pipe, photo, batches):
    photos = [np.ascontiguousarray(photo[i : i + 40, i : i + 40]) for i in range(len(JOBS))]
    photos[3:5] = [np.ascontiguousarray(photo[i : i + 64, i : i + 64]) for i in range(2)]
    alone = [restored(pipe, *one) for one in zip(photos, range(8), JOBS, strict=True)]
    assert not batches
    shared = SharedNetwork(pipe, 10**6)
    together = at_once([
        lambda i=i: restored(pipe, photos[i], i, JOBS[i], shared) for i in range(len(JOBS))
    ])  # fmt: skip
    assert batches and max(batches) > 2
    for one, other, job in zip(alone, together, JOBS, strict=True):
        one, other = np.asarray(one[-1]).astype(int), np.asarray(other[-1]).astype(int)
        assert one.shape == other.shape and abs(one - other).max() <= 1, job
    assert all(isinstance(step, Step) for job in together for step in job[:-1])


def test_one_alone_waits_for_nobody(pipe):
    shared, given = SharedNetwork(pipe, 10**6), []
    shared._evaluate = lambda network, *asked: given.append(asked) or asked[0]
    asked = torch.randn(40, 3, 32, 32), torch.tensor(0.5), torch.randn(40, 3, 32, 32)
    with shared.job(pipe, 1, lambda: False):
        begun = time.monotonic()
        for _ in range(20):
            pipe._predict(*asked)
        assert time.monotonic() - begun < 20 * 0.004
    assert all(mine is its for mine, its in zip(asked, given[0], strict=True)), "what it asks is passed on as it is"
    assert "_predict" not in vars(pipe)


def test_a_large_job_asks_in_parts_while_others_work(pipe):
    shared, given = SharedNetwork(pipe, 10**6), []
    shared._evaluate = lambda network, *asked: given.append(len(asked[0])) or asked[0] + 1
    sample = torch.randn(40, 3, 32, 32)
    with shared.job(pipe, 1, lambda: False), shared.job(with_solver(pipe, None), 1, lambda: False):
        assert (shared.predict(pipe.unet, sample, torch.tensor(0.5), sample) == sample + 1).all()
    assert given == [16, 16, 8]


def test_a_batch_that_fails_fails_for_one_alone(pipe):
    shared = SharedNetwork(pipe, 10**6)

    def evaluate(network, sample, gamma, condition):
        if sample.isnan().any():
            raise MemoryError("no memory")
        return sample * gamma.reshape(-1, 1, 1, 1)

    shared._evaluate = evaluate
    samples = [torch.full((1, 3, 8, 8), value) for value in (1.0, float("nan"), 3.0)]

    def ask(sample, gamma):
        with shared.job(with_solver(pipe, None), 1, lambda: False):
            ready.wait()
            return shared.predict(pipe.unet, sample, torch.tensor(gamma), sample)

    ready = threading.Barrier(3)
    first, second, third = at_once([lambda s=s, g=g: ask(s, g) for s, g in zip(samples, (0.5, 0.5, 0.25), strict=True)])
    assert (first == 0.5).all() and (third == 0.75).all() and isinstance(second, MemoryError)


def test_photographs_that_memory_does_not_hold_wait_in_line(pipe):
    shared, order = SharedNetwork(pipe, 100), []
    gone = threading.Event()

    def work(name, pixels, stopped):
        try:
            with shared.job(with_solver(pipe, None), pixels, stopped):
                order.append(name)
                time.sleep(0.05)
        except Stopped:
            order.append("gone")

    with shared.job(with_solver(pipe, None), 60, lambda: False):
        threads = []
        for job in (
            ("large", 70, lambda: False), ("stopped", 50, gone.is_set), ("small", 20, lambda: False),
            ("all", 999, lambda: False),
        ):  # fmt: skip
            threads.append(threading.Thread(target=work, args=job))
            threads[-1].start()
            time.sleep(0.02)
        assert order == [], "the small one doesn't overtake"
        with shared.job(with_solver(pipe, None), 6, lambda: False):
            order.append("tiny")
            asked = []
            with pytest.raises(Stopped), shared.job(with_solver(pipe, None), 41, lambda: True, lambda: asked.append(1)):
                pass
            assert asked == [1], "who waits is told, once"
        gone.set()
        time.sleep(0.3)
        assert order == ["tiny", "gone"]
    for thread in threads:
        thread.join(5)
    assert order[2:] == ["large", "small", "all"]


def data_url(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return {"url": f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"}


def test_stopping_one_lets_the_others_go_on(pipe, photo, batches):
    forward = pipe.unet.forward
    pipe.unet.forward = lambda *args, **options: time.sleep(0.01) or forward(*args, **options)
    handlers, payload = Handlers(pipe, Limits()), data_url(Image.fromarray(photo))
    given = Settings.checked(Limits(), 1, False, 1, 40, "DDIM", "Standard")
    seen = {}

    def visit(session):
        seen[session] = 0
        moments = []
        for moment in handlers.moments("colorization", payload, handlers.photo(payload), given, session):
            moments.append(moment)
            seen[session] += 1
            if session == "stops" and seen[session] == 3:
                handlers.stops.stop("stops")
        return moments[-1]

    one, two, three = at_once([lambda s=s: visit(s) for s in ("stops", "a", "b")])
    assert isinstance(one, Stopped) and seen["stops"] <= 4
    two, three = np.asarray(two.after).astype(int), np.asarray(three.after).astype(int)
    assert two.shape == three.shape == (150, 200, 3)
    assert abs(two - three).max() <= 1, "their places in a batch may round otherwise"
    assert {2, 3} <= set(batches), "three, then two"
    assert handlers.shared._jobs == 0 and handlers.shared._large.held == handlers.shared._small.held == 0


def test_eight_clients_at_once_each_get_their_own_picture(tmp_path, photo, batches):
    app, url, _ = demo.launch(host="127.0.0.1", prevent_thread_lock=True, quiet=True)
    try:
        clients = [Client(url, verbose=False, download_files=str(tmp_path / f"{i}")) for i in range(8)]
        for i in range(8):
            Image.fromarray(np.ascontiguousarray(photo[:, i : i + 150])).save(tmp_path / f"{i}.png")

        def ask(i):
            out = clients[i].predict(handle_file(tmp_path / f"{i}.png"), seed=i, steps=4, api_name="/colorize")
            return np.asarray(Image.open(out).convert("RGB")).astype(int)

        alone = [ask(i) for i in range(8)]
        assert not batches
        together = at_once([lambda i=i: ask(i) for i in range(8)])
        assert max(batches) > 2
        for one, other in zip(alone, together, strict=True):
            assert abs(one - other).max() <= 1
    finally:
        app.get_blocks().close()
