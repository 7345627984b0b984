"""Four ways of importing: editable, wheel outside the tree, wheel beside the tree, uninstalled."""

import importlib.metadata
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CHECK = (
    "import ppap, ppap.kernels, ppap.kernels.dispatch as d; from ppap.kernels import ppap_loss; "
    "assert ppap.kernels.available_backends()['torch'] is None; print(ppap.__file__); print(d.__file__)"
)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Wheel and source archive of this tree, built in a copy so that nothing is left behind."""
    out = tmp_path_factory.mktemp("built")
    copy = out / "tree"
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    files = (
        [ROOT / name for name in listed.stdout.splitlines()] if listed.returncode == 0 else ROOT.rglob("*")
    )
    for path in files:
        if path.is_file():
            target = copy / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out / "dist"), str(copy)]
    subprocess.run(build, check=True, capture_output=True)
    return out


def imported_from(cwd: Path, path: list[Path], check: str = CHECK, isolated: bool = False) -> list[str]:
    """Files that `ppap` and `ppap.kernels.dispatch` come from, in a fresh interpreter."""
    code = f"import sys; sys.path[:0] = {[str(p) for p in path]!r}; {check}"
    # -S -I leave site-packages, and with them an editable install of this tree, out of the path.
    flags = ["-I", "-S"] if isolated else ["-I"]
    result = subprocess.run([sys.executable, *flags, "-c", code], cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def site_packages() -> list[Path]:
    """Where torch and the other requirements are, without this project's own install."""
    import torch

    return [Path(torch.__file__).parent.parent]


def test_uninstalled_from_the_root():
    package, kernels = imported_from(ROOT, [ROOT, *site_packages()], isolated=True)
    assert package == str(ROOT / "ppap" / "__init__.py")
    assert kernels == str(ROOT / "kernels" / "dispatch.py")


def test_installed_in_this_environment():
    """Editable after the README's set-up command; whatever it is, the folder `kernels` is `ppap.kernels`."""
    try:
        importlib.metadata.version("ppap")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip('ppap is not installed here: pip install --editable ".[dev]"')
    package, kernels = imported_from(ROOT.parent, [])
    beside = Path(kernels).parent
    assert beside in (Path(package).parent / "kernels", Path(package).parent.parent / "kernels")


def test_wheel_outside_the_tree_and_beside_it(built, tmp_path):
    (wheel,) = (built / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    assert "ppap/kernels/dispatch.py" in names and "ppap/kernels/ppap_loss/torch_impl.py" in names
    assert "ppap/data/folder.py" in names and "ppap/evaluation/metrics.py" in names
    assert {f"ppap/assets/scenes-vit/{name}" for name in ("model.safetensors", "config.json")} <= set(names)
    assert "ppap/assets/paper/tables.json" in names
    assert {f"ppap/assets/atlas/atlas.{kind}" for kind in ("html", "css", "js")} <= set(names)
    assert "ppap/assets/cocostuff/lists.npz" in names and "ppap/preparation/crops.py" in names
    assert {"ppap/kernels/csrc/build.py", "ppap/kernels/csrc/cuda/relation_masks.cu"} <= set(names)
    if shutil.which("g++"):
        assert "ppap/kernels/_cpu.so" in names
    assert re.fullmatch(r"ppap-[\w.]+-py3-none-(?!any)\w+\.whl", wheel.name)
    foreign = [n for n in names if not n.startswith(("ppap/", "ppap-"))]
    assert not foreign, f"the wheel would install {foreign}"
    site = tmp_path / "site"
    for cwd in (tmp_path, ROOT):
        package, kernels = imported_from(cwd, [site, *site_packages()], isolated=True)
        assert package == str(site / "ppap" / "__init__.py")
        assert kernels == str(site / "ppap" / "kernels" / "dispatch.py")


def test_wheel_installed_but_the_root_first_on_the_path(built, tmp_path):
    (wheel,) = (built / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    package, kernels = imported_from(ROOT, [ROOT, tmp_path / "site", *site_packages()], isolated=True)
    assert package == str(ROOT / "ppap" / "__init__.py") and kernels == str(ROOT / "kernels" / "dispatch.py")


def test_source_archive_has_what_a_build_needs(built):
    (archive,) = (built / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {"/".join(name.split("/")[1:]) for name in tar.getnames()}
    assert {"setup.py", "pyproject.toml", "LICENSE", "kernels/dispatch.py", "ppap/train.py"} <= names
    assert {"ppap/assets/scenes-vit/model.safetensors", "ppap/assets/cocostuff/lists.npz"} <= names
    assert {"csrc/build.py", "csrc/cpu/kernels.h", "csrc/cpu/simd.inc", "csrc/cuda/tile.cuh"} <= names


@pytest.mark.parametrize(
    ("spoil", "warning"),
    [
        ("sys.modules['fcntl'] = None", None),
        ("native.build_cpu = fail", "without its native CPU kernels: no place"),
        ("os.environ['PPAP_CACHE_DIR'] = '/dev/null/x'", "without its CUDA kernels"),
    ],
    ids=["no fcntl", "a disk that refuses", "a cache that cannot be written"],
)
def test_an_installation_never_fails_for_the_native_parts(tmp_path, spoil, warning):
    code = f"""
import importlib.util, os, runpy, sys
def fail(out): raise PermissionError('no place')
os.environ.update(PPAP_BUILD_CUDA='1', PPAP_CACHE_DIR={str(tmp_path / "cache")!r})
{spoil if "fcntl" in spoil else ""}
def spoiled(spec, make=importlib.util.module_from_spec):
    load = spec.loader.exec_module
    def exec_module(native):
        load(native)
        native.build_cpu = lambda out: (out.parent.mkdir(parents=True), out.write_text('library'))
        native.build_cuda = lambda out, architectures: out.write_text('library') and 'report'
        {spoil}
    if spec.name == 'ppap_csrc_build':
        spec.loader.exec_module = exec_module
    return make(spec)
importlib.util.module_from_spec = spoiled
sys.argv = ['setup.py', 'build_ext', '--build-lib', {str(tmp_path)!r}, '--build-temp', {str(tmp_path)!r}]
runpy.run_path('setup.py', run_name='__main__')
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (warning or "CUDA library: ") in done.stderr, done.stderr
    assert warning or "ppap is installed without" not in done.stderr


def test_import_is_light():
    code = (
        "import sys, ppap; heavy = {'torch', 'timm', 'numpy', 'matplotlib', 'tyro'} & set(sys.modules); "
        "assert not heavy, heavy; "
        "print('a', 'b')"
    )
    imported_from(ROOT, [ROOT], check=code, isolated=True)


def test_public_names():
    import ppap

    assert callable(ppap.load) and ppap.kernels.propagate
    assert "load" in dir(ppap)
    with pytest.raises(AttributeError, match="public: .*load"):
        _ = ppap.lode
