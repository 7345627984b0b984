"""Weights of timm without a network: refused within seconds, or from the cache; a slow hub is waited for."""

import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import timm

from ppap import cli
from ppap.errors import DataError
from ppap.nets import hub
from ppap.nets.backbone import build_backbone
from ppap.settings.config import ModelConfig

ROOT = Path(__file__).parent.parent
NAME = "vit_small_patch16_224.dino"
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture(autouse=True)
def hub_of_our_own(monkeypatch, tmp_path):
    """Nothing of the caller's: an empty cache, no proxy, and a network is allowed."""
    for name in (*PROXIES, *(name.upper() for name in PROXIES), "HF_ENDPOINT", "HF_HUB_ETAG_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@contextmanager
def listening(answer=None):
    """A port of this machine; `answer` gets each connection, None = nobody ever speaks."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    answer(connection)

        if answer is not None:
            threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)  # or a thread that waits in accept() would hold it open


def closed_port() -> int:
    with listening() as port:
        return port


def small_weights(path: Path) -> Path:
    """A file as the hub has it, of one block."""
    path.parent.mkdir(parents=True, exist_ok=True)
    vit = timm.create_model("vit_small_patch16_224", depth=1, num_classes=0)
    safetensors.torch.save_file(vit.state_dict(), path)
    return path


def put_in_cache(cache: Path) -> None:
    """What a download leaves."""
    folder = cache / f"models--timm--{NAME}"
    small_weights(folder / "snapshots" / "0" / "model.safetensors")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0")


def build():
    return build_backbone(ModelConfig(weights=NAME, depth=1))


def test_the_command_ends_within_seconds(tmp_path):
    """The whole command, from a process whose hub is asked at a closed port."""
    command = ["train", "demo", f"--model.weights={NAME}", f"--train.out={tmp_path / 'run'}"]
    code = (
        "import sys, time, ppap.train\nfrom ppap.cli import main\n"
        f"began = time.monotonic()\ncode = main({command!r})\n"
        "print(time.monotonic() - began)\nsys.exit(code)\n"
    )
    endpoint = f"http://127.0.0.1:{closed_port()}"
    own = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home"), "no_proxy": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **own}, capture_output=True, text=True
    )
    assert done.returncode == 3, done.stderr
    assert float(done.stdout.splitlines()[-1]) < 10
    assert f"no connection to {endpoint.removeprefix('http://')} (HF_ENDPOINT)" in done.stderr
    assert "--model.weights FILE.pth" in done.stderr and "--model.weights embedded" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("endpoint", "message"),
    [
        ("http://127.0.0.1:{closed}", r"no connection to 127.0.0.1:\d+: Connection refused"),
        ("https://no-such-host.invalid", "no connection to no-such-host.invalid:443: "),
        ("https://" + "a" * 70 + ".b", "no connection to a+.b:443"),
    ],
    ids=["closed port", "unknown name", "impossible name"],
)
def test_a_host_that_is_not_there(monkeypatch, endpoint, message):
    monkeypatch.setattr(hub.constants, "ENDPOINT", endpoint.format(closed=closed_port()))
    began = time.monotonic()
    with pytest.raises(DataError, match=message) as error:
        build()
    assert time.monotonic() - began < 10 and "\n" not in str(error.value)


def hang(*args, **kwargs):
    time.sleep(60)


@pytest.mark.parametrize("what", ["getaddrinfo", "connection"])
def test_a_network_that_says_nothing(monkeypatch, what):
    """Names that are never answered, packets that are dropped: whichever the system waits for."""
    if what == "getaddrinfo":
        monkeypatch.setattr(hub.socket, "getaddrinfo", hang)
    else:
        monkeypatch.setattr(hub, "_connect", hang)
    monkeypatch.setattr(hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr(hub, "SECONDS", 0.3)
    began = time.monotonic()
    assert hub.unreachable(NAME) == "no connection to 127.0.0.1:1 within 0.3 s"
    assert time.monotonic() - began < 3
    # The hub's own variable: whoever lets it wait longer for a slow network waits here too.
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "1")
    monkeypatch.setattr(hub.constants, "HF_HUB_ETAG_TIMEOUT", 1)
    assert hub.unreachable(NAME).endswith("within 1 s")


def test_one_address_of_several_is_enough(monkeypatch):
    """A host of many addresses of which most are dropped on the way, such as those of IPv6."""
    with listening() as port:
        real = socket.getaddrinfo("127.0.0.1", port, type=socket.SOCK_STREAM)
        monkeypatch.setattr(hub.socket, "getaddrinfo", lambda *a, **k: [None] * 7 + real)
        connect = hub._connect
        monkeypatch.setattr(hub, "_connect", lambda a, *rest: hang() if a is None else connect(a, *rest))
        monkeypatch.setattr(hub.constants, "ENDPOINT", f"http://127.0.0.1:{port}")
        assert hub.unreachable(NAME) is None


def test_a_host_that_accepts_and_keeps_silent_is_not_cut_off(monkeypatch):
    with listening() as port:
        monkeypatch.setattr(hub.constants, "ENDPOINT", f"http://127.0.0.1:{port}")
        began = time.monotonic()
        assert hub.unreachable(NAME) is None and time.monotonic() - began < 2


class SlowHub(http.server.BaseHTTPRequestHandler):
    """Serves one file, and takes its time for each answer."""

    def __init__(self, file, seconds, *args):
        self.file, self.seconds = file, seconds
        super().__init__(*args)

    def do_HEAD(self):
        time.sleep(self.seconds)
        if not self.path.endswith("/resolve/main/model.safetensors"):
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("ETag", '"abc"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(self.file.stat().st_size))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(self.file.read_bytes())

    do_GET = do_HEAD

    def log_message(self, *args):
        pass


def test_a_slow_hub_is_waited_for_and_fills_the_cache(tmp_path):
    """Each answer takes longer than the look at the host may; afterwards the hub is not needed."""
    file = small_weights(tmp_path / "model.safetensors")
    code = (
        "import json, sys\nfrom ppap.nets import hub\nfrom ppap.cli import run\n"
        "from tests.test_hub import build\n"
        "hub.SECONDS = 0.2\n"
        "sys.exit(run(lambda argv: print(json.dumps(build().origin)), sys.argv[1:]))\n"
    )
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(SlowHub, file, 0.8))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    own = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "home")}
    own["no_proxy"] = "127.0.0.1"

    def loaded(*argv):
        command, env = [sys.executable, "-c", code, *argv], {**os.environ, **own}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout.splitlines()[-1]).startswith(f"timm pretrained {NAME}")
        return done.stdout

    try:
        began = time.monotonic()
        assert "getting" in loaded() and time.monotonic() - began > 1.6
    finally:
        server.shutdown()
        server.server_close()
    assert "from the hub's cache: no connection to 127.0.0.1" in loaded()
    assert "from the hub's cache: --offline" in loaded("--offline")


@pytest.mark.parametrize("lack", ["network", "permission"])
def test_the_cache_serves_without_a_network(tmp_path, monkeypatch, capsys, lack):
    put_in_cache(tmp_path / "hub")
    monkeypatch.setattr(hub.constants, "ENDPOINT", f"http://127.0.0.1:{closed_port()}")
    if lack == "permission":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.setattr(hub, "_first", None)  # nothing is tried
    assert build().origin == f"timm pretrained {NAME}, with depth 1"
    assert "from the hub's cache" in capsys.readouterr().out
    tensors = safetensors.torch.load_file(
        tmp_path / f"hub/models--timm--{NAME}/snapshots/0/model.safetensors"
    )
    assert (build().vit.state_dict()["norm.weight"] == tensors["norm.weight"]).all()


def test_offline_asks_nobody(monkeypatch):
    monkeypatch.setattr(hub, "_first", None)
    for value in ("1", "true", "YES"):
        monkeypatch.setenv("HF_HUB_OFFLINE", value)
        with pytest.raises(DataError, match="--offline, or HF_HUB_OFFLINE, forbids.*cache .*hub lacks them"):
            build()


@pytest.mark.parametrize("before", [None, "0"])
@pytest.mark.parametrize("argv", [["--offline", "doctor"], ["doctor", "--offline"], ["doctor"]])
def test_the_option_is_a_variable_while_the_command_runs(monkeypatch, argv, before):
    seen = []
    monkeypatch.delenv("HF_HUB_OFFLINE")
    if before is not None:
        monkeypatch.setenv("HF_HUB_OFFLINE", before)
    monkeypatch.setattr(
        "ppap.doctor.main", lambda rest: seen.append((rest, os.environ.get("HF_HUB_OFFLINE")))
    )
    assert cli.main(argv) == 0
    assert seen == [([], "1" if "--offline" in argv else before)]
    assert os.environ.get("HF_HUB_OFFLINE") == before


def test_proxies_of_the_environment(monkeypatch):
    monkeypatch.setattr(hub.constants, "ENDPOINT", "https://hub.invalid")
    port = closed_port()
    monkeypatch.setenv("HTTPS_PROXY", f"http://me:secret@127.0.0.1:{port}")
    assert hub.unreachable(NAME) == f"no connection to the proxy 127.0.0.1:{port}: Connection refused"
    monkeypatch.setenv("NO_PROXY", "hub.invalid")
    assert "no connection to hub.invalid:443" in hub.unreachable(NAME)


@pytest.mark.parametrize(
    ("status", "reason"),
    [("503 Service Unavailable", "it answers 503 when asked for hub.invalid:443"), ("200 OK", None)]
    + [("407 Who are you", None), ("", None)],
    ids=["no way", "a way", "login", "silent"],
)
def test_what_a_proxy_says(monkeypatch, status, reason):
    asked = []

    def answer(connection):
        asked.append(connection.recv(1000).decode())
        if status:
            connection.sendall(f"HTTP/1.1 {status}\r\n\r\n".encode())
        else:
            time.sleep(0.6)

    monkeypatch.setattr(hub.constants, "ENDPOINT", "https://hub.invalid")
    monkeypatch.setattr(hub, "SECONDS", 0.3 if not status else 5)
    with listening(answer) as port:
        monkeypatch.setenv("https_proxy", f"http://me:s%20t@127.0.0.1:{port}")
        found = hub.unreachable(NAME)
    assert found == (reason and f"no connection to the proxy 127.0.0.1:{port}: {reason}")
    assert asked[0].startswith("CONNECT hub.invalid:443 HTTP/1.1\r\n")
    assert "Proxy-Authorization: Basic bWU6cyB0\r\n" in asked[0]
