"""Runs on the hub: what is sent, what is not, and what comes back."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch

import ppap
from ppap import cli
from ppap.errors import DataError, UsageError
from ppap.nets import hub
from ppap.push import main
from ppap.reports import sharing
from ppap.runs.checkpoint import load_checkpoint
from ppap.settings.presets import preset
from ppap.train import main as train
from tests.runs import make_folder, tiny_run

NAME = "me/rocks-and-sand"
IMAGE = torch.randint(0, 256, (40, 56, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on a folder with labels, whose name nobody else should learn."""
    place = tmp_path_factory.mktemp("secret-project")
    make_folder(place / "data")
    options = ["--data.kind=folder", f"--data.root={place / 'data'}", "--data.ignore-ids", "9", "255"]
    return tiny_run(place / "run", "--train.steps=2", "--train.val-every=0", *options)


@pytest.fixture
def cached(trained, tmp_path, monkeypatch):
    """The run's repository, as it lies in the hub's cache after a download."""
    main([str(trained), NAME, f"--folder={tmp_path / 'repository'}"])
    folder = tmp_path / "hub" / f"models--{NAME.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    shutil.copytree(tmp_path / "repository", folder / "snapshots" / ("0" * 40))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return folder / "snapshots" / ("0" * 40)


def test_what_is_shared_predicts_alike(cached, trained, capsys):
    shared = ppap.load(f"hf-hub:{NAME}", device="cpu")
    assert torch.equal(shared.predict(IMAGE), ppap.load(trained, device="cpu").predict(IMAGE))
    assert capsys.readouterr().out.count(f"run: {NAME} from the hub's cache: --offline") == 1


def test_the_commands_take_it(cached, trained, tmp_path):
    picture = next((trained.parent / "data" / "images" / "val").iterdir())
    out = tmp_path / "masks"
    assert cli.main(["predict", f"hf-hub:{NAME}", str(picture), "--out", str(out), "--device=cpu"]) == 0
    assert (out / f"{picture.stem}.png").exists()
    root = f"--data.root={trained.parent / 'data'}"
    assert cli.main(["eval", f"hf-hub:{NAME}", root, "--device=cpu"]) == 2  # no folder for the results
    results = tmp_path / "results.json"
    assert cli.main(["eval", f"hf-hub:{NAME}", root, "--device=cpu", f"--out={results}"]) == 0
    assert "cluster_miou" in json.loads(results.read_text())["summary"]


def test_no_folder_of_this_machine_and_nothing_pickled_is_sent(cached, trained):
    assert {path.name for path in cached.iterdir()} == {
        *("README.md", "config.json", "manifest.json", "model.safetensors")
    }
    for path in (cached / "config.json", cached / "README.md"):
        text = path.read_text()
        assert "secret" not in text and str(trained.parent) not in text, path
    page = (cached / "README.md").read_text()
    assert page.startswith("---\nlibrary_name: ppap\n") and f'ppap.load("hf-hub:{NAME}")' in page
    assert "| cluster accuracy | cluster mIoU |" in page


@pytest.mark.parametrize(
    "path",
    ["/home/Jo Doe/acme work/dino.pth", "clients/acme/dino.pth", "C:\\acme\\dino.pth", "~me/acme/dino.pth"],
)
def test_paths_are_told_by_their_last_part(path):
    assert sharing.public_origin(f"file {path}") == "file dino.pth"
    config = preset("folder")
    config = replace(
        config,
        model=replace(config.model, weights=path),
        data=replace(config.data, root="/srv/acme", images="acme/*.jpg", crop_root="/srv/acme"),
    )
    assert "acme" not in str(sharing.public_config(config))
    assert sharing.public_config(config).model.weights == "dino.pth"


@pytest.mark.parametrize("name", ["vit_small_patch16_224.dino", "facebook/dinov2-small", "embedded"])
def test_public_names_stay(name):
    config = preset("folder")
    config = replace(config, model=replace(config.model, weights=name))
    assert sharing.public_config(config).model.weights == name
    assert sharing.public_origin(f"hub {name}") == f"hub {name}"
    assert sharing.public_origin("directory /home/acme/vit") == "a directory of weights"


def test_it_cannot_be_trained_on(cached):
    with pytest.raises(DataError, match="was shared without its optimisers"):
        load_checkpoint(cached).state()
    with pytest.raises(DataError):
        train(["--resume", str(cached)])


def test_a_damaged_one_is_refused(cached):
    file = cached / "config.json"
    file.write_text(file.read_text().replace('"steps": 2', '"steps": 3'))
    with pytest.raises(DataError, match="differs from its checksum"):
        ppap.load(f"hf-hub:{NAME}", device="cpu")


def test_what_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(DataError, match=r"hf-hub:me/nothing has no manifest.json .*not in the hub's cache"):
        ppap.load("hf-hub:me/nothing")
    with pytest.raises(UsageError, match="names no repository"):
        ppap.load("hf-hub:nothing")


class Hub:
    """What stands for the hub's client."""

    def __init__(self, monkeypatch):
        self.made, self.sent, self.private, self.files = [], {}, True, [".gitattributes"]
        monkeypatch.delenv("HF_HUB_OFFLINE")
        monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(sharing, "no_connection", lambda url: None)
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: self)

    def create_repo(self, name, private, exist_ok):
        self.made.append((name, private, exist_ok))

    def repo_info(self, name):
        return SimpleNamespace(private=self.private)

    def list_repo_files(self, name):
        return self.files

    def upload_folder(self, repo_id, folder_path, commit_message):
        from pathlib import Path

        self.sent = {path.name: path.stat().st_size for path in Path(folder_path).iterdir()}
        self.message = commit_message


def test_pushing(trained, monkeypatch, capsys):
    there = Hub(monkeypatch)
    main([str(trained), NAME, "--private"])
    assert there.made == [(NAME, True, True)] and there.message == "Trained to step 2"
    assert set(there.sent) == {"README.md", "config.json", "manifest.json", "model.safetensors"}
    assert f'ppap.load("hf-hub:{NAME}")' in capsys.readouterr().out

    main([str(trained), NAME])  # once more, now that it is there
    there.private = False
    with pytest.raises(UsageError, match="is there already, and public"):
        main([str(trained), NAME, "--private"])
    there.files = ["config.json", "README.md"]
    with pytest.raises(UsageError, match="no run of ppap"):
        main([str(trained), NAME])

    def refused(*arguments, **options):
        raise OSError("401 Unauthorized")

    monkeypatch.setattr(there, "create_repo", refused)
    with pytest.raises(DataError, match="401 Unauthorized.*hf auth login"):
        main([str(trained), NAME])


def test_what_cannot_be_pushed_is_refused_before_anything_is_sent(trained, tmp_path):
    with pytest.raises(UsageError, match="--offline, or HF_HUB_OFFLINE, forbids"):
        main([str(trained), NAME])
    for wrong in ("rocks", "a/b/c", "me/rocks@v1", "hf-hub:me/rocks"):
        with pytest.raises(UsageError, match="repository"):
            main([str(trained), wrong, f"--folder={tmp_path / 'x'}"])
    with pytest.raises(UsageError, match="exists already"):
        main([str(trained), NAME, f"--folder={tmp_path}"])
    with pytest.raises(DataError, match="there is no checkpoint"):
        main([str(tmp_path / "none"), NAME, f"--folder={tmp_path / 'x'}"])
    assert not (tmp_path / "x").exists()
