"""The table of end-to-end rates on a few tiny pictures."""

import json

import pytest

from bench.pipeline import main


def test_every_stage_has_a_rate_and_a_share(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PPAP_CACHE_DIR", str(tmp_path / "cache"))
    small = ["--resolution=32", "--images=2", "--batch=1", "--rounds=1", "--weights=embedded"]
    main([*small, f"--json={tmp_path / 'rates.json'}"])
    printed = capsys.readouterr().out
    rows = json.loads((tmp_path / "rates.json").read_text())["rows"]["32"]
    assert {"caching features", "training from the cache", "evaluation", "prediction"} <= {
        row["stage"] for row in rows
    }
    for row in rows:
        assert row["images/s"] > 0 and (row["share"] is None) == (row["floor"] is None)
        assert f"| {row['stage']} | {row['images/s']:.1f} |" in printed


@pytest.mark.parametrize("wrong", [["--images=5", "--batch=2"], ["--batch=0"], ["--rounds=0"]])
def test_what_does_not_fit_is_refused(wrong, capsys):
    with pytest.raises(SystemExit):
        main(wrong)
    assert wrong[0].split("=")[0] in capsys.readouterr().err
