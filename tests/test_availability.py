"""Which backends can be used, and why not; looked at when they are first asked for."""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from ppap.kernels import availability, available_backends


def test_available_backends_give_a_reason_or_none():
    reasons = available_backends()
    assert set(reasons) == {"torch", "triton", "cuda", "cpp"}
    assert reasons["torch"] is None
    assert all(reason is None or "ppap" in reason or "no GPU" in reason for reason in reasons.values())


def test_triton_without_a_c_compiler(monkeypatch):
    monkeypatch.setattr(availability, "INTERPRETED", False)
    monkeypatch.setattr(availability.shutil, "which", lambda command: None)
    monkeypatch.setattr(availability.importlib.metadata, "version", lambda package: "3.6.0")
    assert "install gcc or clang" in availability._probe("triton")
    monkeypatch.setattr(availability.importlib.metadata, "version", lambda package: "3.10.1+git")
    assert availability._probe("triton") is None


def no_metadata(package):
    raise importlib.metadata.PackageNotFoundError(package)


def test_triton_without_metadata_of_that_name(monkeypatch):
    """ROCm's wheels hold the module under another distribution's name."""
    monkeypatch.setattr(availability, "INTERPRETED", False)
    monkeypatch.setattr(availability.importlib.metadata, "version", no_metadata)
    monkeypatch.setattr(availability.shutil, "which", lambda command: None)
    fake = SimpleNamespace(__version__="3.10.0+rocm7")
    monkeypatch.setitem(sys.modules, "triton", fake)
    monkeypatch.setattr(availability.importlib.util, "find_spec", lambda name: SimpleNamespace(origin="here"))
    assert availability._triton_version() == (3, 10) and availability._probe("triton") is None
    for version in ("3.6.0", "of my own", None):
        fake.__version__ = version
        assert "install gcc or clang" in availability._probe("triton"), "an unknown version may be an old one"
    monkeypatch.setitem(sys.modules, "triton", None)  # it cannot be imported
    assert availability._triton_version() is None
    monkeypatch.setattr(availability.importlib.util, "find_spec", lambda name: SimpleNamespace(origin=None))
    assert "not installed" in availability._probe("triton"), "a folder of that name is no package"


@pytest.mark.parametrize(
    "lacking",
    [
        "real = m.version\ndef version(name):\n    if name == 'triton': raise m.PackageNotFoundError(name)\n"
        "    return real(name)\nm.version = version",
        "sys.modules['fcntl'] = None",
    ],
    ids=["triton's metadata", "fcntl"],
)
def test_the_import_survives_a_lack(lacking):
    code = f"import importlib.metadata as m, sys\n{lacking}\n"
    code += "import ppap.kernels as k, ppap.analysis.study\nfrom ppap.doctor import report\n"
    code += "assert k.available_backends()['torch'] is None\nprint(report()['packages']['triton'])\n"
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    assert importlib.util.find_spec("triton") is None or done.stdout[0].isdigit(), done.stdout


def test_no_library_is_loaded_before_it_is_asked_for():
    """Nor by a compiled function's first call, whose choice is traced."""
    code = (
        "import torch, ppap.kernels as k\n"
        "from ppap.kernels import availability, native, native_cuda\n"
        "loaded = [x.library.cache_info().currsize for x in (native, native_cuda)]\n"
        "assert loaded == [0, 0] and not availability._reasons, loaded\n"
        "count = lambda x: k.proxy_average(x, x, torch.zeros(3))[1]\n"
        "count = torch.compile(count, fullgraph=True, backend='eager')\n"
        "assert count(torch.eye(3)).tolist() == [1, 1, 1]\n"
        "assert 'cpp' in availability._reasons\n"
    )
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
