"""Weights of the hub: whether they can be had from here, offline mode, its cache, repositories by name.

The hub's client asks a host that is not there for a minute and longer before it gives up. Here a connection
is tried first, within seconds; what happens on a connection that stands is left to the client, so that a
hub that answers slowly is not cut off. The hub's own variables hold: ``HF_HUB_OFFLINE``, ``HF_ENDPOINT``,
``HF_HOME``, ``HF_HUB_CACHE``, ``HF_HUB_ETAG_TIMEOUT`` (here the seconds for the connection), and those of
proxies.
"""

import base64
import logging
import os
import queue
import re
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar
from urllib.parse import SplitResult, unquote, urlsplit

import huggingface_hub  # timm requires it
import timm
from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from ppap.errors import DataError, UsageError

SECONDS = 4.0
"""For a connection to stand, names looked up included."""
_GRACE = 0.5
_FILES = ("model.safetensors", "pytorch_model.bin")  # in timm's order
SUFFIXES = {".pth", ".pt", ".bin", ".ckpt", ".tar", ".safetensors", ".npz", ".json"}
"""How files of weights end; whatever does is a path."""
_PORTS = {"http": 80, "https": 443, "socks5": 1080, "socks5h": 1080, "socks4": 1080}
_TRUE = {"1", "ON", "YES", "TRUE"}
_SCHEMES = ("hf-hub:", "hf_hub:", "https://huggingface.co/")
_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")
# Names that people give to folders of their own rather than to repositories.
_LOCAL = {"backbone"}
Result = TypeVar("Result")


def offline() -> bool:
    """Whether nothing may be downloaded: ``--offline``, or the hub's own variable."""
    # The hub reads its variable when it is imported; --offline may have set it since.
    return constants.HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE", "").upper() in _TRUE


def cached_file(name: str) -> Path | None:
    """The file of a timm pretrained model in the hub's cache; None if it is not there."""
    config = timm.get_pretrained_cfg(name)
    if not config.hf_hub_id:
        return None
    repository, _, revision = config.hf_hub_id.partition("@")
    for file in (config.hf_hub_filename,) if config.hf_hub_filename else _FILES:
        found = huggingface_hub.try_to_load_from_cache(repository, file, revision=revision or None)
        if isinstance(found, str):
            return Path(found)
    return None


def unreachable(name: str) -> str | None:
    """Why the host that has a timm pretrained model cannot be reached; None if it can.

    Returns:
        What was tried, within which time and what came of it, for people; no passwords.
    """
    config = timm.get_pretrained_cfg(name)
    return no_connection(constants.ENDPOINT if config.hf_hub_id else config.url or constants.ENDPOINT)


def no_connection(to: str) -> str | None:
    """:func:`unreachable` of a URL."""
    url = urlsplit(to)
    proxy = _proxy(url)
    host, port = _address(proxy or url)
    target = f"the proxy {host}:{port}" if proxy else f"{host}:{port}"
    if "HF_ENDPOINT" in os.environ and not proxy:
        target += " (HF_ENDPOINT)"
    limit = float(constants.HF_HUB_ETAG_TIMEOUT) if "HF_HUB_ETAG_TIMEOUT" in os.environ else SECONDS
    deadline = time.monotonic() + limit
    try:
        found = _first([partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)], deadline)
        then = partial(_tunnel, url, proxy) if proxy else None
        _first([partial(_connect, address, deadline, then) for address in found], deadline)
    except TimeoutError:
        return f"no connection to {target} within {limit:g} s"
    except OSError as error:
        return f"no connection to {target}: {error.strerror or error}"
    return None


class Repository:
    """A repository of the hub, one file at a time: from the network, or without one from the hub's cache."""

    def __init__(self, name: str, revision: str | None = None, what: str = "weights") -> None:
        """Find out once whether the hub can be asked; nothing is downloaded yet.

        Args:
            name: OWNER/NAME.
            revision: branch, tag or commit; None = main.
            what: is wanted of it, in words: ``weights`` of a backbone, or a ``run``.
        """
        self.name, self.revision, self._what = name, revision, what
        self._asked = f"--model.weights {name}" if what == "weights" else f"hf-hub:{name}"
        why = "--offline, or HF_HUB_OFFLINE, forbids downloads"
        self.reason = why if offline() else no_connection(constants.ENDPOINT)
        self._said = False

    def get(self, file: str) -> Path | None:
        """Where a file lies now, in the cache; None if the repository has none of this name.

        Raises:
            DataError: no such repository, no permission, or the download failed.
        """
        if self.reason is not None:
            found = huggingface_hub.try_to_load_from_cache(self.name, file, revision=self.revision)
            if not isinstance(found, str):
                return None
            self._say(f"{self.name} from the hub's cache: {self.reason}")
            return Path(found)
        self._say(f"getting {self.name} from the hub (a network is needed the first time)")
        # The hub's client reports every retry; one error at the end says enough.
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
        try:
            return Path(huggingface_hub.hf_hub_download(self.name, file, revision=self.revision))
        except GatedRepoError:
            page = f"{constants.ENDPOINT}/{self.name}"
            raise DataError(
                f"{self._asked}: its owner wants to be asked first: accept the terms on "
                f"{page}, then log in here with: hf auth login"
            ) from None
        except RepositoryNotFoundError:
            raise DataError(
                f"{self._asked} is no file or directory here, and no public repository of "
                f"{constants.ENDPOINT}; check the name (a private one needs: hf auth login)"
            ) from None
        except Exception as error:  # network, hub and cache errors share no base class
            if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
                return None
            text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise DataError(
                f"{self._asked}: cannot get {file} from the hub ({text}); try again, or copy "
                "the repository's files here and give their directory"
            ) from error

    def _say(self, text: str) -> None:
        """Print once where the files come from."""
        if not self._said:
            print(f"{self._what}: {text}", flush=True)
        self._said = True

    def lacks(self, what: str) -> DataError:
        """The error for a file that :meth:`get` did not find."""
        if self.reason is None:
            return DataError(
                f"--model.weights {self.name}: the repository has no {what}; give one of transformers or "
                "timm, or download the file of weights and give its path"
            )
        return DataError(
            f"--model.weights {self.name} is no file or directory here, and cannot be had from the hub "
            f"({self.reason}, and the hub's cache {constants.HF_HUB_CACHE} lacks its {what}); with no "
            "network, copy the repository's files here and give their directory, or take "
            "--model.weights embedded"
        )


def repository_name(weights: str, asked: str | None = None) -> tuple[str, str | None] | None:
    """Repository and revision that a value of ``--model.weights`` names; None if it names none.

    ``hf-hub:OWNER/NAME`` and an address of the hub always do, ``OWNER/NAME`` does unless it looks like a
    path: a folder OWNER is here, or NAME ends like a file of weights. `asked` is what an error calls it.

    Raises:
        UsageError: a prefix of the hub before something that is no repository.
    """
    scheme = next((prefix for prefix in _SCHEMES if weights.startswith(prefix)), None)
    match = _ID.fullmatch(weights.removeprefix(scheme or "").rstrip("/" if scheme else ""))
    if match is None:
        if scheme is not None:
            asked = asked or f"--model.weights {weights!r}"
            raise UsageError(f"{asked} names no repository; give {scheme}OWNER/NAME")
        return None
    owner, _, name = match["id"].partition("/")
    if scheme is None and (Path(owner).exists() or Path(name).suffix in SUFFIXES or name in _LOCAL):
        return None
    return match["id"], match["revision"]


def _proxy(url: SplitResult) -> SplitResult | None:
    """The proxy that the environment names for a URL, if any."""
    if urllib.request.proxy_bypass(url.hostname or ""):
        return None
    proxies = urllib.request.getproxies()
    named = proxies.get(url.scheme) or proxies.get("all")
    return urlsplit(named if "://" in named else f"http://{named}") if named else None


def _address(url: SplitResult) -> tuple[str, int]:
    return url.hostname or "localhost", url.port or _PORTS.get(url.scheme, 80)


def _first(calls: Sequence[Callable[[], Result]], deadline: float) -> Result:
    """Result of the call that succeeds first; all run at once, for the system may let one wait for minutes.

    Raises:
        TimeoutError: none did by the deadline.
        OSError: all failed; this is the last one's reason.
    """
    answers: queue.Queue[tuple[Result | None, OSError | None]] = queue.Queue()

    def run(call: Callable[[], Result]) -> None:
        try:
            answers.put((call(), None))
        except (OSError, ValueError) as error:  # a name that is none is a UnicodeError
            answers.put((None, error if isinstance(error, OSError) else OSError(str(error))))

    for call in calls:
        threading.Thread(target=run, args=(call,), daemon=True).start()
    failure: OSError | None = None
    for _ in calls:
        try:
            # A little later: a call that keeps to the deadline itself is heard.
            result, failure = answers.get(timeout=max(deadline + _GRACE - time.monotonic(), 0))
        except queue.Empty:
            raise TimeoutError from None
        if failure is None:
            return result
    raise failure or OSError("no address")


def _connect(address: tuple, deadline: float, then: Callable[[socket.socket], None] | None) -> None:
    """Open a connection to one row of ``getaddrinfo``, let `then` use it, and close it."""
    family, kind, protocol, _, where = address
    with socket.socket(family, kind, protocol) as connection:
        connection.settimeout(max(deadline - time.monotonic(), 0.001))
        connection.connect(where)
        if then is not None:
            then(connection)


def _tunnel(url: SplitResult, proxy: SplitResult, connection: socket.socket) -> None:
    """Ask an HTTP proxy for the way to an https URL.

    Raises:
        OSError: it says that there is none. One that says nothing in time, or asks who we are, is left to the
            hub's client.
    """
    if (url.scheme, proxy.scheme) != ("https", "http"):
        return
    host, port = _address(url)
    lines = [f"CONNECT {host}:{port} HTTP/1.1", f"Host: {host}:{port}"]
    if proxy.username:
        login = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}".encode()
        lines.append(f"Proxy-Authorization: Basic {base64.b64encode(login).decode()}")
    try:
        connection.sendall("\r\n".join([*lines, "", ""]).encode())
        status = connection.recv(64).decode("latin-1").split(" ")
    except TimeoutError:
        return
    if len(status) > 1 and status[1][:1] in ("4", "5") and status[1] != "407":
        raise OSError(f"it answers {status[1]} when asked for {host}:{port}")
