"""names.json: what is read, what is refused, and what masks and scores become under it."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import ppap
from ppap.errors import DataError, UsageError
from ppap.eval import main as evaluate
from ppap.evaluation.names import probe_checksum, read_names
from ppap.predict import main as predict
from tests.runs import tiny_run

CENTRES = torch.arange(12.0).reshape(4, 3)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return tiny_run(tmp_path_factory.mktemp("finished") / "run", "--train.steps=3")


def write(path, centres=CENTRES, **entries):
    clusters = [{"cluster": int(key[1:]), **entry} for key, entry in entries.items()]
    stored = {"kind": "ppap names", "format": 1, "probe": probe_checksum(centres), "clusters": clusters}
    path.write_text(json.dumps(stored))
    return path


def test_merges_equal_names_and_what_is_ignored(tmp_path):
    path = write(
        tmp_path / "names.json",
        c0={"name": "Sky ", "id": 7, "colour": "#102030"},
        c1={"name": "sky"},
        c2={"merge_into": 1},
        c3={"ignore": True, "merge_into": 0},
    )
    names = read_names(path, CENTRES)
    (sky,) = names.regions
    assert (sky.id, sky.name, sky.colour, sky.clusters) == (7, "Sky", (16, 32, 48), (0, 1, 2))
    assert names.id_of() == (7, 7, 7, None)
    assert read_names(write(path, c2={"merge_into": 3}), CENTRES).id_of() == (0, 1, 3, 3)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"c9": {}}, "not one of 0 to 3"),
        ({"c0": {"title": "x"}}, "'title' is unknown; valid: cluster, name"),
        ({"c0": {"colour": "red"}}, "colour is 'red'; give one such as"),
        ({"c0": {"id": 1001}}, "id is 1001; give 0 to 1000"),
        ({"c0": {"id": 2}}, "share the id 2; give one of them another, or merge"),
        ({"c0": {"merge_into": 0}}, "merge_into is 0; give another"),
        ({"c0": {"merge_into": 1}, "c1": {"merge_into": 0}}, "in a circle, 0 -> 1 -> 0"),
        ({f"c{k}": {"ignore": True} for k in range(4)}, "ignores every cluster"),
        ({"c0": {"name": "x" * 101}}, "no text of at most 100"),
    ],
)
def test_what_contradicts_itself_is_refused(tmp_path, entries, words):
    with pytest.raises(DataError, match=words):
        read_names(write(tmp_path / "names.json", **entries), CENTRES)


def test_a_file_of_another_run_is_refused(finished, tmp_path):
    path = write(tmp_path / "names.json")
    with pytest.raises(DataError, match="clusters of another run.*ppap.atlas RUN"):
        ppap.load(finished, device="cpu", names=path)
    for content in ("{", "[]", '{"kind": "ppap names"}'):
        path.write_text(content)
        with pytest.raises(DataError, match="names.json"):
            read_names(path, CENTRES)
    with pytest.raises(DataError, match="none.json cannot be read"):
        read_names(tmp_path / "none.json", CENTRES)


def test_masks_legend_and_scores_have_the_names(finished, tmp_path, capsys):
    plain = ppap.load(finished, device="cpu")
    count = len(plain.engine.cluster.clusters)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3)).astype(np.uint8))
    image = image.resize((60, 40), Image.Resampling.BILINEAR)
    image.save(tmp_path / "a.png")
    classes = plain.class_names
    by_class = {c: k for k, c in enumerate(plain.assignment)}
    given = {f"c{k}": {"name": f"<b>{k}", "id": 100 + k} for k in range(count)}
    given["c0"] = {"merge_into": 1}
    given["c2"] = {"ignore": True}
    given[f"c{by_class[4]}"] = {"name": classes[4].upper(), "id": 50}
    path = write(tmp_path / "names.json", plain.engine.cluster.clusters, **given)
    named = ppap.load(finished, device="cpu", names=path)
    labels = named.predict(image, resolution=32)
    plain.assignment = None  # clusters as such
    clusters = plain.predict(image, resolution=32)
    table = torch.tensor([-1 if i is None else i for i in named.named.id_of()])
    assert torch.equal(labels, table[clusters]) and table[0] == table[1]

    out = tmp_path / "masks"
    arguments = [str(finished), str(tmp_path / "a.png"), f"--out={out}", "--resolution=32", "--device=cpu"]
    predict([*arguments, f"--names={path}"])
    mask = np.asarray(Image.open(out / "a.png")).astype(int)
    legend = json.loads((out / "legend.json").read_text())
    assert np.array_equal(np.where(mask == legend["ignored_id"], -1, mask), labels.numpy())
    assert legend["named_by"]["file"] == str(path)
    assert {entry["name"]: entry["clusters"] for entry in legend["classes"]}["<b>1"] == [0, 1]
    with pytest.raises(UsageError, match="names the ids of other masks|exists already"):
        predict(arguments)
    with pytest.raises(UsageError, match="--names are of clusters"):
        predict([*arguments, f"--names={path}", "--probe=linear"])

    evaluate([str(finished), f"--names={path}", "--eval.crf=none", f"--out={tmp_path / 'e.json'}"])
    record = json.loads((tmp_path / "e.json").read_text())
    assert "clusters by their names: pixel accuracy" in capsys.readouterr().out
    assert record["named"]["cluster"]["assignment"].count(4) == 1
    with pytest.raises(UsageError, match="--frozen does not measure"):
        evaluate([str(finished), f"--names={path}", "--frozen"])


def test_a_file_without_a_checksum_is_not_blamed_on_another_run(tmp_path):
    path = write(tmp_path / "names.json")
    stored = json.loads(path.read_text())
    del stored["probe"]
    path.write_text(json.dumps(stored))
    with pytest.raises(DataError, match="has no probe, the checksum"):
        read_names(path, CENTRES)
