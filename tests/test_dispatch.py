"""Choice of a backend, and the settings that surround a product."""

import contextlib
import os
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from bench.shapes import clustered
from ppap.kernels import (
    PropagationConfig,
    availability,
    dispatch,
    environment,
    plain_products,
    ppap_loss,
    proxy_average,
    use_backend,
)
from ppap.kernels.plain_products import computing_on
from ppap.kernels.precision import resolve_precision

KEYS = clustered(12, 8, seed=0)


def test_precedence(monkeypatch):
    reasons = dict.fromkeys(availability.FILES) | {"triton": "none here"}
    monkeypatch.setattr(availability, "_reasons", reasons)
    assert dispatch.choose(None, KEYS) == "cpp", "auto on CPU tensors"
    monkeypatch.setenv("PPAP_BACKEND", "torch")
    assert dispatch.choose(None, KEYS) == "torch", "environment"
    with use_backend("cpp"):
        assert dispatch.choose(None, KEYS) == "cpp", "context over environment"
        assert dispatch.choose("torch", KEYS) == "torch", "argument over context"
        with use_backend("auto"):
            assert dispatch.choose(None, KEYS) == "cpp"
    assert dispatch.choose(None, KEYS) == "torch", "the context ends"
    assert dispatch.choose("auto", KEYS.double()) == "torch", "float64"
    assert dispatch.choose("auto", KEYS.to("meta")) == "torch", "other devices"
    with pytest.raises(RuntimeError, match="does not run on cpu"):
        dispatch.choose("cuda", KEYS)
    with pytest.raises(ValueError, match="no float64"):
        dispatch.choose("cpp", KEYS.double())


@pytest.mark.parametrize("how", ["argument", "context", "environment"])
def test_an_explicit_choice_never_falls_back(how, monkeypatch):
    name = "cuda"
    monkeypatch.setitem(availability._reasons, name, "no cuda here")
    if how == "environment":
        monkeypatch.setenv("PPAP_BACKEND", name)
    with pytest.raises(RuntimeError, match=f"'{name}' .* is not available: .*no {name}"):
        if how == "context":
            with use_backend(name):
                ppap_loss(KEYS, KEYS, None, PropagationConfig(), temperature=0.3)
        else:
            impl = name if how == "argument" else None
            ppap_loss(KEYS, KEYS, None, PropagationConfig(), temperature=0.3, impl=impl)


@pytest.mark.parametrize("value", ["Torch", "cudnn", " torch"])
def test_unknown_names_are_refused(value, monkeypatch):
    with pytest.raises(ValueError, match="valid: auto, torch"):
        proxy_average(KEYS, KEYS, torch.zeros(12), impl=value)
    with pytest.raises(ValueError, match="valid: auto, torch"), use_backend(value):
        pass
    monkeypatch.setenv("PPAP_BACKEND", value)
    with pytest.raises(ValueError, match="PPAP_BACKEND is"):
        proxy_average(KEYS, KEYS, torch.zeros(12))


def test_an_empty_variable_means_auto(monkeypatch):
    monkeypatch.setenv("PPAP_BACKEND", "")
    proxy_average(KEYS, KEYS, torch.zeros(12))


def test_unknown_variables_warn(monkeypatch):
    monkeypatch.setenv("PPAP_BAKEND", "torch")
    with pytest.warns(UserWarning, match="PPAP_BAKEND.*PPAP_BACKEND"):
        environment.warn_of_unknown_variables()
    monkeypatch.delenv("PPAP_BAKEND")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        environment.warn_of_unknown_variables()


def test_the_choice_is_logged_once(caplog, monkeypatch):
    monkeypatch.setattr(dispatch, "_logged", set())
    with caplog.at_level("INFO", logger="ppap.kernels"):
        for _ in range(3):
            proxy_average(KEYS, KEYS, torch.zeros(12), impl="torch")
    assert [record.getMessage().split(" (")[0] for record in caplog.records] == [
        "proxy_average runs on the torch backend"
    ]


def test_a_compiled_function_follows_the_context(monkeypatch):
    monkeypatch.setitem(availability._reasons, "cuda", "no cuda here")

    @torch.compile(fullgraph=True, backend="eager")
    def count(keys):
        return proxy_average(keys, keys, torch.zeros(12))[1]

    assert torch.equal(count(KEYS), proxy_average(KEYS, KEYS, torch.zeros(12))[1])
    # The refusal comes from tracing anew; inside a graph it may be wrapped in the compiler's own error.
    with use_backend("cuda"), pytest.raises(Exception, match="not available"):
        count(KEYS)


def test_an_old_gpu_takes_another_backend(monkeypatch):
    gpu = SimpleNamespace(name="Tesla T4", major=7, minor=5)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setitem(availability._reasons, "cuda", "no cuda here")

    class OnGpu:
        device, dtype = torch.device("cuda", 0), torch.float32

    assert dispatch.choose("auto", OnGpu()) == "torch"
    with pytest.raises(RuntimeError, match="'triton' .* 8.0 or later, Tesla T4 has 7.5"):
        dispatch.choose("triton", OnGpu())
    gpu.major = 9
    assert dispatch.choose("auto", OnGpu()) == "triton"


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton interprets here")
def test_an_interpreter_that_comes_too_late_is_said():
    code = (
        "import os, triton; os.environ['TRITON_INTERPRET'] = '1'; import torch, ppap.kernels as k\n"
        "print(k.available_backends()['triton'])\n"
        "k.proxy_average(torch.eye(3), torch.eye(3), torch.zeros(3), impl='triton')\n"
    )
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert "Triton was imported before TRITON_INTERPRET=1 was set" in done.stderr
    assert torch.cuda.is_available() or "imported before" in done.stdout


def test_tensors_on_two_devices():
    with pytest.raises(ValueError, match="meta and cpu; move them to one device"):
        proxy_average(KEYS.to("meta"), KEYS, torch.zeros(12))


@pytest.mark.parametrize(
    ("precision", "dtypes", "wanted"),
    [
        ("auto", (torch.float32,), "fp32"),
        ("auto", (torch.float16, torch.float16), "fp16"),
        ("auto", (torch.float16, torch.bfloat16), "fp32"),
        ("auto", (torch.bfloat16, torch.float64), "fp64"),
        ("fp32", (torch.float64,), "fp64"),
        ("fp32", (torch.bfloat16,), "fp32"),
        ("bf16", (torch.float32,), "bf16"),
    ],
)
def test_precision(precision, dtypes, wanted):
    assert resolve_precision(precision, *(torch.zeros(1, dtype=d) for d in dtypes)) == wanted


def test_autocast_gives_the_precision():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert resolve_precision("auto", torch.zeros(1)) == "bf16"
        assert resolve_precision("fp32", torch.zeros(1)) == "fp32"
        assert resolve_precision("auto", torch.zeros(1).double()) == "fp64"


def test_global_matmul_settings_are_kept_out_and_restored():
    torch.set_float32_matmul_precision("medium")
    try:
        with computing_on(torch.device("cpu")):
            assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def settings() -> tuple[str, str, bool]:
    """Torch's settings of products, which belong to the process."""
    matmul = torch.backends.cuda.matmul
    return matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision, matmul.allow_fp16_accumulation


PLAIN = ("ieee", "ieee", False)


@pytest.mark.parametrize("fails", ["", "first", "second"])
def test_two_threads_in_ops_leave_the_settings_as_they_were(fails):
    """The first enters, the second enters, the first leaves, the second leaves."""
    inside, left, seen = threading.Event(), threading.Event(), []

    def first():
        with computing_on(torch.device("cpu")):
            seen.append(settings())
            inside.set()
            assert overlapping.wait(10)
            if fails == "first":
                raise ArithmeticError

    def run_first():
        with contextlib.suppress(ArithmeticError):
            first()
        left.set()

    overlapping = threading.Event()
    torch.set_float32_matmul_precision("medium")
    before = settings()
    assert before[1] == "bf16"
    try:
        thread = threading.Thread(target=run_first)
        thread.start()
        assert inside.wait(10)
        with contextlib.suppress(ArithmeticError), computing_on(torch.device("cpu")):
            overlapping.set()
            assert left.wait(10)
            seen.append(settings())  # the first has left: the second's products are still as asked for
            if fails == "second":
                raise ArithmeticError
        thread.join()
        assert settings() == before and seen == [PLAIN, PLAIN]
    finally:
        torch.set_float32_matmul_precision("highest")


def test_many_threads_in_ops_leave_the_settings_as_they_were():
    """Each checks within; ops call ops, and some fail."""

    def work(number: int) -> int:
        good = 0
        for i in range(100):
            with contextlib.suppress(ArithmeticError), computing_on(torch.device("cpu")):
                with computing_on(torch.device("cpu")):
                    good += settings() == PLAIN
                good += settings() == PLAIN
                if (i + number) % 7 == 0:
                    raise ArithmeticError
        return good

    torch.set_float32_matmul_precision("medium")
    before, interval = settings(), sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(work, range(8))) == [200] * 8
        assert settings() == before
    finally:
        sys.setswitchinterval(interval)
        torch.set_float32_matmul_precision("highest")


def test_a_setting_that_torch_refuses_leaves_the_others(monkeypatch):
    class Stubborn:
        def __setattr__(self, name, value):
            if value == "ieee":
                raise RuntimeError("unknown")

        def __getattr__(self, name):
            return "bf16"

    torch.set_float32_matmul_precision("medium")
    before = settings()
    try:
        with monkeypatch.context() as patch:
            knobs = (torch.backends.cuda.matmul, Stubborn())
            patch.setattr(plain_products._PlainProducts, "_knobs", lambda self: knobs)
            with pytest.raises(RuntimeError, match="unknown"), computing_on(torch.device("cpu")):
                raise AssertionError("entered")
        assert settings() == before
    finally:
        torch.set_float32_matmul_precision("highest")


def test_sums_are_not_kept_in_sixteen_bits():
    torch.backends.cuda.matmul.allow_fp16_accumulation = True
    try:
        with computing_on(torch.device("cpu")):
            assert not torch.backends.cuda.matmul.allow_fp16_accumulation
        assert torch.backends.cuda.matmul.allow_fp16_accumulation
    finally:
        torch.backends.cuda.matmul.allow_fp16_accumulation = False


def test_launches_go_to_the_gpu_of_the_tensors(monkeypatch):
    """Triton takes the current device, which need not be that of the tensors."""
    entered = []

    class Device:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            entered.append(self.device)

        def __exit__(self, *error):
            entered.append("left")

    monkeypatch.setattr(torch.cuda, "device", Device)
    with computing_on(torch.device("cuda", 1)):
        assert entered == [torch.device("cuda", 1)]
    assert entered[-1] == "left"


def test_a_setting_that_follows_the_general_one_still_does():
    try:
        # An earlier torch.set_float32_matmul_precision leaves a setting of its own here.
        torch.backends.cuda.matmul.fp32_precision = "none"
        torch.backends.fp32_precision = "tf32"
        with computing_on(torch.device("cpu")):
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
        torch.backends.fp32_precision = "ieee"
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
    finally:
        torch.backends.fp32_precision = "none"


def test_kernels_import_neither_the_rest_of_ppap_nor_timm():
    code = (
        "import sys, ppap.kernels;"
        "loaded = [m for m in sys.modules if m.startswith('ppap') and not m.startswith('ppap.kernels')];"
        "assert loaded == ['ppap'], loaded;"
        "assert not {'timm', 'torchvision', 'matplotlib', 'tyro', 'triton'} & set(sys.modules)"
    )
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


def test_kernels_run_where_triton_cannot_be_imported():
    """Not only where it is absent: the sanitized library's tests keep it out."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, ppap.kernels as k\n"
        "assert 'pip install triton' in k.available_backends()['triton']\n"
        "assert k.proxy_average(torch.eye(3), torch.eye(3), torch.zeros(3))[1].tolist() == [1, 1, 1]\n"
    )
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
