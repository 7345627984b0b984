"""``test_gpu.py`` on a bare GPU machine: it is collected there, and what cannot run says why.

Such a machine may have torch, Triton and numpy alone: no option parser, no compiler, no pydensecrf.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COLLECT = """
import sys
import pytest

class Missing:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] in ("tyro", "hypothesis", "pydensecrf"):
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, Missing)
files = ["tests/test_gpu.py", "tests/conftest.py"]
sys.exit(pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", *files]))
"""


@pytest.fixture(scope="module")
def collected(tmp_path_factory) -> list[str]:
    """Names of the tests that are collected without tyro, hypothesis, pydensecrf and any compiler."""
    environment = {key: value for key, value in os.environ.items() if key not in ("CC", "CXX")}
    environment |= {"PATH": str(tmp_path_factory.mktemp("empty")), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-W", "ignore", "-c", COLLECT]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout.splitlines()


@pytest.mark.parametrize("impl", ["torch", "triton", "cuda"])
def test_every_backend_has_its_cases(impl, collected):
    assert any("test_published_results" in line and impl in line for line in collected)


@pytest.mark.parametrize("other", ["cpp", "pydensecrf"])
def test_every_other_form_of_the_crf_has_its_cases(other, collected):
    assert any("test_dense_crf_equals_the_others" in line and other in line for line in collected)


def test_what_cannot_run_is_skipped_with_its_reason():
    from tests.test_gpu import unless

    (mark,) = unless("triton", "install gcc").marks
    assert mark.args == (True,) and mark.kwargs["reason"] == "triton: install gcc"
    (mark,) = unless("torch", None).marks
    assert mark.args == (False,)
