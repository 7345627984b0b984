"""The atlas: its page, the script in it, and the way from typed names to masks with them."""

import json
import re
import shutil
import subprocess
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ppap
from ppap.atlas import main
from ppap.errors import DataError, UsageError
from ppap.evaluation.names import default_colours, read_names
from ppap.predict import main as predict
from ppap.reports import regions
from ppap.reports.atlas import LIMIT, _as_uri, page
from tests.browser import CHROMIUM, open_page
from tests.runs import make_folder, tiny_run

SCRIPT = Path(ppap.__file__).parent / "assets" / "atlas" / "atlas.js"
NODE = shutil.which("node")
EVIL = "</script><img src=http://x.test/a onerror=alert(1)><!--"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return tiny_run(tmp_path_factory.mktemp("finished") / "run", "--train.steps=3")


@pytest.fixture(scope="module")
def atlas(finished):
    main([str(finished), "--device=cpu"])
    return finished / "atlas.html"


class Elements(HTMLParser):
    """Tags with their attributes, and the text of the data."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.inside, self.data = [], None, ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.inside = dict(attributes).get("id") if tag == "script" else self.inside

    def handle_endtag(self, tag):
        self.inside = None if tag == "script" else self.inside

    def handle_data(self, data):
        self.data += data if self.inside == "data" else ""


def test_the_page_is_whole_and_loads_nothing(atlas, finished):
    text = atlas.read_text()
    found = Elements(text)
    assert [tag for tag, _ in found.tags].count("script") == 2, "no name has ended the data"
    addresses = [a[key] for _, a in found.tags for key in ("src", "href", "action") if key in a]
    assert addresses == ["#clusters"] and "@import" not in text and "url(" not in text
    controls = [a for tag, a in found.tags if tag == "input"]
    assert len(controls) == 5 and all("tabindex" not in a for a in controls)
    data = json.loads(found.data)
    predictor = ppap.load(finished, device="cpu")
    assert len(data["clusters"]) == len(predictor.engine.cluster.clusters)
    assert sum(one["share"] for one in data["clusters"]) == pytest.approx(1)
    shown = [one for one in data["clusters"] if one["share"]]
    assert all(1 <= len(one["typical"]) <= 12 and one["class"]["name"] for one in shown)
    assert all(uri.startswith("data:image/jpeg;base64,") for one in shown for uri in one["typical"])


def test_names_of_others_stay_text():
    cluster = {"share": 1.0, "colour": "#000000", "class": {"name": EVIL, "share": 1.0}, "near": []}
    cluster |= {"typical": [], "doubtful": [], "merges": []}
    html = page({"about": EVIL, "warning": None, "probe": "x", "clusters": [cluster]})
    found = Elements(html)
    assert json.loads(found.data)["about"] == EVIL
    assert "img" not in [tag for tag, _ in found.tags]


def test_a_page_of_27_clusters_has_less_than_ten_megabytes():
    noise = np.random.default_rng(0).integers(0, 255, (regions.THUMB, regions.THUMB, 3)).astype(np.uint8)
    most = LIMIT // (27 * 16)
    assert 27 * 16 * len(_as_uri(noise, most)) < LIMIT, "even of noise"


def test_images_of_a_folder_and_refusals(finished, atlas, tmp_path, capsys):
    root = make_folder(tmp_path / "data", labels=False)
    (root / "images" / "train" / "broken.png").write_bytes(b"no image")
    before = atlas.read_bytes()
    arguments = [str(finished), str(root), "--resolution=32", "--device=cpu"]
    with pytest.raises(UsageError, match="atlas.html exists already.*--overwrite"):
        main(arguments)
    main([*arguments, f"--out={tmp_path / 'a.html'}", "--most=13"])
    assert "left out:" in capsys.readouterr().out and atlas.read_bytes() == before
    data = json.loads(Elements((tmp_path / "a.html").read_text()).data)
    assert "in 12 images" in data["about"]
    with pytest.raises(DataError, match="no image or folder"):
        main([str(finished), str(tmp_path / "none"), f"--out={tmp_path / 'b.html'}"])


def test_regions_are_found_counted_and_outlined():
    labels = np.zeros((40, 40), int)
    labels[10:30, 10:30] = 1
    found = regions.Gathered(np.zeros(3, int), np.zeros((3, 3), int), np.zeros((3, 2), int), None)
    regions._count(found, labels, np.where(labels, 0, -1))
    assert found.pixels.tolist() == [1200, 400, 0] and found.borders[0, 1] == 80
    assert found.classes.tolist() == [[0, 0], [400, 0], [0, 0]]
    thumb = regions.crop(np.full((40, 40, 3), 100, np.uint8), labels == 1, (slice(10, 30), slice(10, 30)))
    values = set(np.unique(thumb))
    assert thumb.shape == (regions.THUMB,) * 2 + (3,) and {0, 50, 100, 255} <= values


@pytest.mark.skipif(NODE is None, reason="there is no node to run the page's script with")
def test_the_script_resolves_names_as_python_does(finished, tmp_path):
    """Random files of names: the page and the reader agree on regions, and on what is wrong."""
    predictor = ppap.load(finished, device="cpu")
    centres = predictor.engine.cluster.clusters
    from ppap.evaluation.names import probe_checksum

    rng, count, probe = np.random.default_rng(0), len(centres), probe_checksum(centres)
    colours = ["#" + bytes(rgb.tolist()).hex() for rgb in default_colours(count)]
    cases = []
    for _ in range(60):
        clusters = []
        for k in range(count):
            target = int(rng.integers(0, count))
            entry = {"cluster": k, "name": str(rng.choice(["", "", "Sky", "sky ", "road"]))}
            entry |= {"id": int(rng.integers(0, 40)) if rng.random() < 0.3 else None, "colour": colours[k]}
            entry["merge_into"] = target if rng.random() < 0.25 and target != k else None
            clusters.append({**entry, "ignore": bool(rng.random() < 0.15)})
        cases.append({"kind": "ppap names", "format": 1, "probe": probe, "clusters": clusters})
    code = (
        f"const a = require({json.dumps(str(SCRIPT))}); const {{data, cases}} = JSON.parse("
        "require('fs').readFileSync(0)); console.log(JSON.stringify(cases.map(c => { const e = "
        "a.fromFile(data, c); return {heads: a.heads(e).map(h => h === null || e[h].ignore ? null : h), "
        "wrong: a.problems(e).length, file: a.toFile(data, e)}; })))"
    )
    data = {"probe": probe, "clusters": [{"colour": colour} for colour in colours]}
    given = json.dumps({"data": data, "cases": cases})
    ran = subprocess.run([NODE, "-e", code], input=given, capture_output=True, text=True, check=True)
    path, right = tmp_path / "names.json", 0
    for case, found in zip(cases, json.loads(ran.stdout), strict=True):
        path.write_text(json.dumps(case))
        try:
            names = read_names(path, centres)
        except DataError:
            assert found["wrong"]
            continue
        right += 1
        groups = [None if h is None else found["heads"].index(h) for h in found["heads"]]
        wanted = [None if r is None else names.region_of.index(r) for r in names.region_of]
        assert groups == wanted and not found["wrong"]
        path.write_text(json.dumps(found["file"]))
        assert read_names(path, centres).regions == names.regions
    assert 5 < right < 55


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt-get install chromium")
def test_named_in_a_browser_by_keyboard(atlas, finished, tmp_path):
    with open_page(atlas, tmp_path, width=400) as browser:
        assert browser.js("document.documentElement.scrollWidth <= innerWidth"), "no sideways scrolling"
        first = browser.js("document.querySelector('article').id.split('-')[1]")
        browser.tab_to(f"#cluster-{first} .name")
        browser.type("sky & <b>clouds</b>")
        browser.tab_to(f"#cluster-{first} .id")
        browser.type("42")
        other = browser.js("document.querySelectorAll('article')[1].id.split('-')[1]")
        browser.tab_to(f"#cluster-{other} .merge")
        while browser.js("document.activeElement.value") != first:
            browser.key("ArrowDown", "ArrowDown", 40)
        third = browser.js("document.querySelectorAll('article')[2].id.split('-')[1]")
        browser.tab_to(f"#cluster-{third} .ignore")
        browser.key(" ", "Space", 32)
        assert browser.js(f"document.querySelector('#cluster-{first} .title b') === null")
        assert "not saved" in browser.js("document.querySelector('#status').textContent")
        browser.js("document.querySelector('#save').focus()")
        browser.key("s", "KeyS", 83, modifiers=2)
        assert "not saved" not in browser.js("document.querySelector('#status').textContent")
        end = time.monotonic() + 30
        while not (tmp_path / "names.json").exists():
            assert time.monotonic() < end
            time.sleep(0.05)
        loaded = [url for url in browser.requests if not re.match("data:|about:|blob:", url)]
        assert loaded == [atlas.resolve().as_uri()]
    first, other, third = int(first), int(other), int(third)
    names = ppap.load(finished, device="cpu", names=tmp_path / "names.json").named
    region = next(region for region in names.regions if region.id == 42)
    assert region.name == "sky & <b>clouds</b>" and region.clusters == tuple(sorted((first, other)))
    assert names.region_of[third] is None
    Image.fromarray(np.full((40, 50, 3), 90, np.uint8)).save(tmp_path / "a.png")
    arguments = [f"--names={tmp_path / 'names.json'}", f"--out={tmp_path / 'masks'}", "--resolution=32"]
    predict([str(finished), str(tmp_path / "a.png"), *arguments, "--device=cpu"])
    legend = json.loads((tmp_path / "masks/legend.json").read_text())
    assert {"id": 42, "name": region.name}.items() <= next(
        entry for entry in legend["classes"] if entry["id"] == 42
    ).items()
