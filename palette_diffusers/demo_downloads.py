"""Programs may name a photograph by its address: Gradio fetches it before anything is checked, whole into memory and
without an end. Here it comes within the demo's limits; only public addresses, as Gradio has it."""

import asyncio
import os
import re
import secrets
from pathlib import Path
from urllib.parse import unquote, urljoin, urlparse

import httpx
import safehttpx
from gradio import processing_utils
from gradio.processing_utils import PUBLIC_HOSTNAME_WHITELIST

from .demo_limits import Failed, Limits

SECONDS = 30  # for all of it
REDIRECTS = 5


def bound_downloads(limits: Limits) -> None:
    """Of this process, from now on: Gradio has no setting for it."""

    async def download(url: str, cache_dir: str) -> str:
        return await fetch(url, Path(cache_dir), limits.max_bytes)

    processing_utils.async_ssrf_protected_download = download


async def fetch(url: str, folder: Path, most: int) -> str:
    """The file at a public http(s) address, at most so many bytes, in a folder of its own within `folder`; its path.

    Raises:
        Failed: it does not come, is too large, or lies in a network that is not public; for the visitor.
    """
    own = folder / processing_utils.hash_url(url)
    own.mkdir(parents=True, exist_ok=True)
    part = own / f"{secrets.token_hex(8)}.part"  # two may ask for it at once
    try:
        async with asyncio.timeout(SECONDS):
            await _fetch(url, part, most)
        os.replace(part, target := own / _name(url))
    except Failed:  # which is a ValueError
        raise
    except TimeoutError:
        raise Failed(f"The address took more than {SECONDS} s: upload the photo instead.") from None
    except (OSError, ValueError, httpx.HTTPError, httpx.InvalidURL):
        raise Failed("The address can't be read: upload the photo instead.") from None
    finally:
        part.unlink(missing_ok=True)
    return str(target)


async def _fetch(url: str, target: Path, most: int) -> None:
    for _ in range(REDIRECTS + 1):
        host = urlparse(url).hostname or ""
        trusted = safehttpx.matches_domain_whitelist(host, PUBLIC_HOSTNAME_WHITELIST)
        transport = None if trusted else safehttpx.AsyncSecureTransport(await safehttpx.async_validate_url(host))
        async with (
            httpx.AsyncClient(transport=transport, timeout=SECONDS) as client,
            client.stream("GET", url, headers={"Accept-Encoding": "identity"}, follow_redirects=False) as answer,
        ):
            if answer.has_redirect_location:
                url = urljoin(url, answer.headers["Location"])
                continue
            if answer.status_code != 200:
                raise Failed(f"The address answers {answer.status_code}: upload the photo instead.")
            with target.open("wb") as file:
                async for piece in answer.aiter_raw():  # never unpacked: little may become much
                    if file.tell() + len(piece) > most:
                        raise Failed(f"The file there has more than {most / 1e6:g} MB, which is the limit.")
                    file.write(piece)
            return
    raise Failed(f"The address leads on more than {REDIRECTS} times: upload the photo instead.")


def _name(url: str) -> str:
    return re.sub(r"[^\w.-]+", "_", Path(unquote(urlparse(url).path)).name)[-100:].lstrip(".") or "file"
