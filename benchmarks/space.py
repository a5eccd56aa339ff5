"""The demo under load, on this machine's loopback only:  python benchmarks/space.py --clients 64 --seconds 45

`--batches ROUNDS` compares instead: eight clients with photographs of one size, whose jobs share the network or work
one at a time, in alternating rounds.

Every client sends pictures of its own size, so that an answer that was meant for another is seen. Temporary files are
kept for 20 seconds here. Needs `[demo]`; the first preview is timed where playwright and Debian's Chromium are.
"""

import argparse
import base64
import io
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import psutil
import requests
from PIL import Image

# task, endpoint, pixels a side
SHARES = (
    ("jpeg_restoration", "restore_jpeg", 512),
    ("jpeg_restoration", "restore_jpeg", 256),
    ("colorization", "colorize", 64),
)


@contextmanager
def server(**settings: str):
    """`palette demo` in a process of its own: (address, process, folder of its temporary files)."""
    folder = Path(tempfile.mkdtemp())
    environment = os.environ | {"GRADIO_TEMP_DIR": str(folder), "PALETTE_KEEP_SECONDS": "20"} | settings
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "palette_diffusers.cli", "demo", "--port", str(port)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
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
        yield url, psutil.Process(process.pid), folder
    finally:
        process.terminate()
        process.wait(20)
        shutil.rmtree(folder)


def picture(width: int, height: int) -> str:
    buffer = io.BytesIO()
    Image.effect_noise((width, height), 60).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def colorize(url: str, width: int, height: int, steps: int = 8) -> str:
    """One request => "answered", "turned away", "mixed up" or what else came."""
    image = {"url": picture(width, height), "meta": {"_type": "gradio.FileData"}}
    asked = requests.post(f"{url}gradio_api/call/colorize", json={"data": [image, 0, steps, "Standard"]}, timeout=60)
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


def load(url: str, clients: int, seconds: float, sizes: int = 64) -> tuple[Counter, list[float], float]:
    """Clients that ask again and again, in so many sizes: (outcomes, seconds of those that were answered, seconds in
    all)."""
    outcomes: Counter = Counter()
    times: list[float] = []
    begun = time.monotonic()

    def visit(i: int) -> None:
        while time.monotonic() - begun < seconds:
            start = time.monotonic()
            try:
                outcome = colorize(url, 64 + i % sizes, 64)
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


def page_share(url: str, process: psutil.Process, rounds: int = 5) -> dict[str, list[float]]:
    """What the server adds to the pipeline's own time, turn by turn with the pipeline in this process: (median seconds
    by the pipeline, by the endpoint, median of the rounds' ratios, and of their ratios in processor time)."""
    import torch

    from palette_diffusers.demo import load as load_pipe

    (pipe, _), shares = load_pipe(), {}
    for task, endpoint, side in SHARES:
        image, seen = Image.effect_noise((side, side), 60), []
        given = {"data": [{"url": picture(side, side), "meta": {"_type": "gradio.FileData"}}, 0, 8, "Standard"]}
        for _ in range(rounds + 1):
            start, work = time.monotonic(), time.process_time()
            pipe(image, task=task, generator=torch.Generator().manual_seed(0))
            direct, direct_work = time.monotonic() - start, time.process_time() - work
            start, work = time.monotonic(), sum(process.cpu_times()[:2])
            asked = requests.post(f"{url}gradio_api/call/{endpoint}", json=given, timeout=60).json()
            requests.get(f"{url}gradio_api/call/{endpoint}/{asked['event_id']}", timeout=60)
            served, served_work = time.monotonic() - start, sum(process.cpu_times()[:2]) - work
            seen.append((direct, served, served / direct, served_work / direct_work))
        # the first warms up
        shares[f"{side}x{side} {task}"] = [statistics.median(column) for column in zip(*seen[1:], strict=True)]
    return shares


def first_previews(url: str, number: int = 5) -> list[float]:
    """Seconds from the click to the first preview in a browser: a photograph of 512 pixels, colorized in 50 steps."""
    from playwright.sync_api import sync_playwright

    times = []
    with sync_playwright() as library, tempfile.NamedTemporaryFile(suffix=".png") as file:
        Image.effect_noise((512, 512), 60).save(file.name)
        browser = library.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for _ in range(number):
            page = browser.new_page()
            page.goto(url)
            page.set_input_files("#photo input[type=file]", file.name)
            page.locator("#facts").get_by_text("512x512").wait_for()
            page.get_by_role("button", name="Advanced").click()
            page.get_by_label("number input for Steps").fill("50")
            page.get_by_label("number input for Steps").press("Tab")
            page.wait_for_timeout(500)
            start = time.monotonic()
            page.get_by_role("button", name="Colorize", exact=True).click()
            page.locator("#preview img").wait_for()
            times.append(time.monotonic() - start)
            page.locator("#status").get_by_text("Done").wait_for()
            page.close()
    return times


def batches(rounds: int, seconds: float = 10, clients: int = 8) -> None:
    """Pictures a second, and seconds of the processor for each, with a shared network and one job at a time."""
    rates: dict[str, list[float]] = {"1": [], "8": []}
    costs: dict[str, list[float]] = {"1": [], "8": []}
    with server(PALETTE_MAX_JOBS="1") as one, server(PALETTE_MAX_JOBS="8") as eight:
        for _ in range(rounds):
            for jobs, (url, process, _) in {"1": one, "8": eight}.items():
                load(url, clients, 1, 1)
                before = sum(process.cpu_times()[:2])
                outcomes, _, spent = load(url, clients, seconds, 1)
                assert set(outcomes) == {"answered"}, outcomes
                rates[jobs].append(outcomes["answered"] / spent)
                costs[jobs].append((sum(process.cpu_times()[:2]) - before) / outcomes["answered"])
    for jobs in rates:
        rate, cost = statistics.median(rates[jobs]), statistics.median(costs[jobs])
        print(f"{clients} clients, {jobs} at work: {rate:.2f} pictures a second, {cost:.2f} s of the processor each")
    gains = [more / less for less, more in zip(rates["1"], rates["8"], strict=True)]
    print(f"shared network: {statistics.median(gains):.2f} times the throughput, {min(gains):.2f} to {max(gains):.2f}")


def held(process: psutil.Process, folder: Path) -> str:
    files = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    memory = process.memory_info().rss / 2**20
    return f"{memory:.0f} MiB of memory, {len(files)} temporary files of {sum(files) / 2**20:.1f} MiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=45)
    parser.add_argument("--batches", type=int, default=0, metavar="ROUNDS")
    args = parser.parse_args()
    if args.batches:
        batches(args.batches)
        return
    with server() as (url, process, folder):
        first = [requests.get(url, stream=True, timeout=5).elapsed.total_seconds() for _ in range(20)]
        print(
            f"first byte of the page: median {statistics.median(first) * 1000:.0f} ms, most {max(first) * 1000:.0f} ms"
        )
        for what, (direct, served, ratio, work) in page_share(url, process).items():
            print(f"{what}: pipeline {direct:.2f} s, endpoint {served:.2f} s, {ratio - 1:+.0%}; work {work - 1:+.0%}")
        if shutil.which("chromium"):
            times = first_previews(url)
            print(f"first preview in a browser: median {statistics.median(times):.2f} s, most {max(times):.2f} s")
        load(url, 1, 5)
        before = process.memory_info().rss
        print(f"idle: {held(process, folder)}")
        for clients in (1, 8, args.clients):
            seconds = args.seconds if clients == args.clients else 10
            halfway = threading.Timer(seconds / 2, lambda: print(f"halfway: {held(process, folder)}"))
            halfway.start()
            outcomes, times, spent = load(url, clients, seconds)
            rate = outcomes["answered"] / spent
            middle = statistics.median(times) if times else float("nan")
            print(f"{clients} clients, {spent:.0f} s: {dict(outcomes)}")
            print(f"    {rate:.1f} pictures a second, median {middle:.1f} s from asking to having")
            print(f"    then: {held(process, folder)}")
        after = process.memory_info().rss
        print(f"memory: {before / 2**20:.0f} MiB idle, {after / 2**20:.0f} MiB after, {after / before:.2f} times")
        time.sleep(45)
        print(f"45 s later: {held(process, folder)}")
        print(f"health: {requests.get(f'{url}health', timeout=5).json()}, cores: {os.cpu_count()}")


if __name__ == "__main__":
    main()
