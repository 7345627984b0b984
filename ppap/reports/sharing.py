"""A run as a repository of the Hugging Face Hub: weights, settings, and a page about it."""

import dataclasses
import shutil
import tempfile
from pathlib import Path, PureWindowsPath
from typing import Any

import huggingface_hub
from huggingface_hub import constants

from ppap import __version__
from ppap.errors import DataError, UsageError
from ppap.escaping import markdown
from ppap.nets.hub import no_connection, offline, repository_name
from ppap.reports.records import FINAL_SCORES
from ppap.runs.checkpoint import Checkpoint, load_checkpoint, write_shared
from ppap.runs.stored import read_sealed
from ppap.settings.config import Config, from_dict, to_dict

CARD = "README.md"
_SCORES = {
    "cluster_accuracy": "cluster accuracy",
    "cluster_miou": "cluster mIoU",
    "linear_accuracy": "linear accuracy",
    "linear_miou": "linear mIoU",
}


def write_repository(run: str, name: str, folder: str) -> list[Path]:
    """Write the files of a run's repository.

    Args:
        run: run directory or checkpoint folder.
        name: OWNER/NAME, for the page.
        folder: new folder.

    Returns:
        Their paths.

    Raises:
        UsageError: no name of a repository, or the folder exists.
        DataError: no such checkpoint, or the disk refuses.
    """
    _check_name(name)
    if Path(folder).exists():
        raise UsageError(f"--folder {folder} exists already; give a new one")
    checkpoint = load_checkpoint(run)
    try:
        Path(folder).mkdir(parents=True)
    except OSError as error:
        raise DataError(f"cannot make {folder} ({error.strerror or error}); give another --folder") from None
    try:
        return _write(checkpoint, Path(run), name, Path(folder))
    except DataError:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def push(run: str, name: str, *, private: bool = False, message: str | None = None) -> str:
    """Send a run to the hub; the address of its page.

    Args:
        run: run directory or checkpoint folder.
        name: OWNER/NAME; the repository is made if it is not there.
        private: of a new repository: whether its owner alone sees it.
        message: of the commit; None = the step that was trained to.

    Raises:
        UsageError: no name of a repository, or nothing may be sent.
        DataError: no such checkpoint, no connection, or the hub refuses.
    """
    _check_name(name)
    checkpoint = load_checkpoint(run)
    if offline():
        raise UsageError("--offline, or HF_HUB_OFFLINE, forbids to send anything; --folder writes the files")
    if (reason := no_connection(constants.ENDPOINT)) is not None:
        raise DataError(f"{name} cannot be sent: {reason}; --folder writes the files")
    with tempfile.TemporaryDirectory() as folder:
        _write(checkpoint, Path(run), name, Path(folder))
        hub = huggingface_hub.HfApi()
        try:
            hub.create_repo(name, private=private, exist_ok=True)
            _check_repository(hub, name, private)
            text = message or f"Trained to step {checkpoint.info['step']}"
            hub.upload_folder(repo_id=name, folder_path=folder, commit_message=text)
        except UsageError:
            raise
        except Exception as error:  # network and hub errors share no base class
            text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise DataError(f"{name} cannot be sent ({text}); log in with: hf auth login") from error
    return f"{constants.ENDPOINT}/{name}"


def _check_repository(hub: huggingface_hub.HfApi, name: str, private: bool) -> None:
    """Refuse a repository that others see where nobody should, and one of something else.

    Raises:
        UsageError: naming it.
    """
    if private and hub.repo_info(name).private is False:
        raise UsageError(f"{name} is there already, and public; give another name, or leave out --private")
    files = set(hub.list_repo_files(name))
    if "manifest.json" not in files and files & {"config.json", "model.safetensors", CARD}:
        raise UsageError(f"{name} holds something that is no run of ppap; give another name")


def _check_name(name: str) -> None:
    found = repository_name(f"hf-hub:{name}", repr(name))
    if found is None or found[1] is not None or name.startswith(("hf-hub:", "https:")):
        raise UsageError(f"{name!r} is no name of a repository; give OWNER/NAME")


def _write(checkpoint: Checkpoint, run: Path, name: str, folder: Path) -> list[Path]:
    write_shared(checkpoint, _public_info(checkpoint.info), folder)
    try:
        (folder / CARD).write_text(card(checkpoint, run, name), encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot write {folder}: {error.strerror or error}; free space") from None
    return sorted(folder.iterdir())


def public_config(config: Config) -> Config:
    """Settings without the names of folders: where data, caches and results lie, and patterns of files."""
    weights = config.model.weights
    if weights is not None and repository_name(weights) is None:
        weights = PureWindowsPath(weights).name  # which knows both kinds of separators
    near = dataclasses.replace(config.eval.neighbours, masks=None)
    nowhere = dict.fromkeys(("root", "images", "labels", "crop_root", "cache_dir"))
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, **nowhere),
        model=dataclasses.replace(config.model, weights=weights),
        eval=dataclasses.replace(config.eval, neighbours=near),
        train=dataclasses.replace(config.train, out=None),
    )


def public_origin(origin: str) -> str:
    """Where a backbone came from, for other people: of a file its name, of a directory that it was one."""
    kind, _, place = origin.partition(" ")
    if kind == "file":
        return f"file {PureWindowsPath(place).name}"
    return "a directory of weights" if kind == "directory" else origin


def _public_info(info: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of itself, for other people."""
    config = public_config(from_dict(info["config"]))
    return {**info, "config": to_dict(config), "origin": public_origin(info["origin"])}


def card(checkpoint: Checkpoint, run: Path, name: str) -> str:
    """The page of a run's repository, in Markdown.

    Args:
        checkpoint: what is shared.
        run: run directory, which may have scores of this checkpoint.
        name: OWNER/NAME.
    """
    info, config = checkpoint.info, checkpoint.info["config"]
    origin = public_origin(info["origin"])
    classes = ", ".join(markdown(one) for one in info["class_names"])
    lines = [
        *("---", "library_name: ppap", "pipeline_tag: image-segmentation"),
        *("tags:", "- unsupervised-semantic-segmentation", "- ppap", "---", ""),
        f"# {markdown(name.partition('/')[2])}",
        "",
        "Semantic segmentation learned without labels by [PPAP](https://arxiv.org/abs/2407.12463) "
        "(Progressive Proxy Anchor Propagation, ECCV 2024): a frozen backbone, and a second stream trained "
        "by contrast between its patches.",
        "",
        "```python",
        "import ppap",
        "",
        f'labels = ppap.load("hf-hub:{name}").predict("photo.jpg")',
        "```",
        "",
        "```bash",
        f"python -m ppap.predict hf-hub:{name} IMAGES --out masks",
        "```",
        "",
        f"- made with ppap {__version__}, an implementation of that paper (not PyPI's package of this name)",
        f"- method `{config['method']}`, preset `{config['preset']}`, {info['step']} steps, "
        f"seed {config['train']['seed']}",
        f"- backbone: {markdown(origin)}; its own terms of use hold for its weights, which are in this "
        "repository",
        f"- {info['classes']} {'classes' if info['assignment'] else 'clusters, never matched to classes'}"
        + (f": {classes}" if info["assignment"] else ""),
    ]
    return "\n".join([*lines, *_scores(checkpoint, run)]) + "\n"


def _scores(checkpoint: Checkpoint, run: Path) -> list[str]:
    """The run's own scores, where they are of this checkpoint."""
    file = run / FINAL_SCORES
    if not file.exists():
        return []
    record = read_sealed(file, "leave it out by giving a checkpoint folder")
    if record["provenance"]["weights"]["sha256"] != checkpoint.sha256:
        return []
    found = {title: record["summary"].get(key) for key, title in _SCORES.items()}
    shown = {title: value for title, value in found.items() if value is not None}
    if not shown:
        return []
    return [
        "",
        "Scores on its validation images, without CRF; clusters matched to classes one to one [%]:",
        "",
        "| " + " | ".join(shown) + " |",
        "|" + "---:|" * len(shown),
        "| " + " | ".join(f"{value:.1f}" for value in shown.values()) + " |",
    ]
