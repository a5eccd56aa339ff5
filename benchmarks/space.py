"""The demo under load, on this machine's loopback only:  python benchmarks/space.py --clients 64 --seconds 45

Every client sends pictures of its own size, so that an answer that was meant for another is seen. Needs `[demo]`.
"""

import argparse
import base64
import io
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager

import psutil
import requests
from PIL import Image


@contextmanager
def server():
    """`palette demo` in a process of its own: (address, process)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "palette_diffusers.cli", "demo", "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}/"
    try:
        while True:
            try:
                requests.get(f"{url}health", timeout=1)
                break
            except requests.ConnectionError:
                if process.poll() is not None:
                    raise RuntimeError(f"the server ended with code {process.returncode}") from None
                time.sleep(0.2)
        yield url, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(20)


def picture(width: int, height: int) -> str:
    buffer = io.BytesIO()
    Image.effect_noise((width, height), 60).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def colorize(url: str, width: int, height: int, steps: int = 8) -> str:
    """One request => "answered", "turned away", "mixed up" or what else came."""
    image = {"url": picture(width, height), "meta": {"_type": "gradio.FileData"}}
    asked = requests.post(f"{url}gradio_api/call/colorize", json={"data": [image, 0, steps]}, timeout=60)
    if asked.status_code == 503 and "full" in asked.text.lower():
        return "turned away"
    if not asked.ok:
        return f"status {asked.status_code}"
    with requests.get(f"{url}gradio_api/call/colorize/{asked.json()['event_id']}", timeout=120) as events:
        last = [line for line in events.text.splitlines() if line.startswith("data: ")][-1]
    if '"path"' not in last:
        return f"lost: {last[:60]}"
    path = last.split('"url": "')[1].split('"')[0]
    answer = Image.open(io.BytesIO(requests.get(path, timeout=60).content))
    return "answered" if answer.size == (width, height) else "mixed up"


def load(url: str, clients: int, seconds: float) -> tuple[Counter, list[float], float]:
    """Clients that ask again and again: (outcomes, seconds of those that were answered, seconds in all)."""
    outcomes: Counter = Counter()
    times: list[float] = []
    begun = time.monotonic()

    def visit(i: int) -> None:
        while time.monotonic() - begun < seconds:
            start = time.monotonic()
            try:
                outcome = colorize(url, 64 + i, 64)
            except requests.RequestException as error:
                outcome = f"lost: {type(error).__name__}"
            outcomes[outcome] += 1
            if outcome == "answered":
                times.append(time.monotonic() - start)
            else:
                time.sleep(0.5)  # as someone who was turned away would

    threads = [threading.Thread(target=visit, args=(i,)) for i in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes, times, time.monotonic() - begun


def page_share(url: str, number: int = 9) -> tuple[float, float]:
    """Median seconds of a picture by the pipeline alone, in this process, and by the endpoint."""
    import torch

    from palette_diffusers.demo import load as load_pipe

    pipe, direct, served = load_pipe(), [], []
    image = Image.effect_noise((256, 256), 60)
    for _ in range(number):
        start = time.monotonic()
        pipe(image, task="jpeg_restoration", generator=torch.Generator().manual_seed(0))
        direct.append(time.monotonic() - start)
    body = {"url": picture(256, 256), "meta": {"_type": "gradio.FileData"}}
    for _ in range(number):
        start = time.monotonic()
        asked = requests.post(f"{url}gradio_api/call/restore_jpeg", json={"data": [body, 0, 8]}, timeout=60).json()
        requests.get(f"{url}gradio_api/call/restore_jpeg/{asked['event_id']}", timeout=60)
        served.append(time.monotonic() - start)
    return statistics.median(direct), statistics.median(served)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=45)
    args = parser.parse_args()
    with server() as (url, process):
        first = [requests.get(url, stream=True, timeout=5).elapsed.total_seconds() for _ in range(20)]
        print(
            f"first byte of the page: median {statistics.median(first) * 1000:.0f} ms, most {max(first) * 1000:.0f} ms"
        )
        direct, served = page_share(url)
        print(f"256x256 JPEG: pipeline {direct:.2f} s, endpoint {served:.2f} s, {served / direct - 1:+.0%}")
        load(url, 1, 5)
        before = process.memory_info().rss
        for clients in (1, 8, args.clients):
            outcomes, times, spent = load(url, clients, args.seconds if clients == args.clients else 10)
            rate = outcomes["answered"] / spent
            middle = statistics.median(times) if times else float("nan")
            print(f"{clients} clients, {spent:.0f} s: {dict(outcomes)}")
            print(f"    {rate:.1f} pictures a second, median {middle:.1f} s from asking to having")
        after = process.memory_info().rss
        print(f"memory: {before / 2**20:.0f} MiB idle, {after / 2**20:.0f} MiB after, {after / before:.2f} times")
        print(f"health: {requests.get(f'{url}health', timeout=5).json()}, cores: {os.cpu_count()}")


if __name__ == "__main__":
    main()
