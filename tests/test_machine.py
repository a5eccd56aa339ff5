"""What this machine computes fastest with."""

import ast
import sys
import threading
from pathlib import Path

import pytest
import torch

from palette_diffusers.machine import best_layout, without_team


def in_a_thread(function):
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


OPENMP = sys.platform == "linux" and "OpenMP" in torch.__config__.parallel_info()


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.skipif(not OPENMP, reason="computes without OpenMP")
def test_a_thread_without_team_is_the_only_one(two_threads):
    def alone():
        without_team()
        torch.rand(400, 400) @ torch.rand(400, 400)
        return torch.get_num_threads()

    assert in_a_thread(alone) == 1
    assert in_a_thread(torch.get_num_threads) == 2
    without_team()
    assert torch.get_num_threads() == 2, "the main thread is left as it is"


def test_layout():
    network = torch.nn.Conv2d(4, 4, 3)
    kept = torch.nn.Conv2d(4, 4, 3).to(memory_format=best_layout("cuda")).weight
    assert network.to(memory_format=best_layout("cpu")).weight.is_contiguous(memory_format=torch.channels_last)
    assert kept.is_contiguous()


def test_nothing_reads_the_time_of_day():
    """It may be set back; `time.monotonic` never is."""
    for path in (Path(__file__).parents[1] / "palette_diffusers").rglob("*.py"):
        read = {ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)}
        assert not read & {"time.time", "time.time_ns", "datetime.now", "datetime.utcnow", "date.today"}, path
