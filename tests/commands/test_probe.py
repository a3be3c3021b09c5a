"""The probe as a command: calibration, the report, the profile that both ends share."""

import json
from pathlib import Path
from typing import Any

import pytest

from kvprism.commands.probe import Probed, probe_model, run_probe, show_probe
from kvprism.errors import BadInput
from kvprism.evaluate.measure import LoadedModel
from kvprism.profiles import Profile

CONTRACT = {
    *("model", "published", "conditioned", "outlier_layers", "recommended", "reason"),
    *("raw", "ours", "layers", "verdict", "policy", "context", "seed", "commit", "versions"),
}
TABLE_COLUMNS = 120


@pytest.fixture(scope="module")
def subject(tiny: tuple[Any, Any]) -> LoadedModel:
    return LoadedModel("tiny", *tiny)


@pytest.fixture(scope="module")
def said() -> list[str]:
    return []


@pytest.fixture(scope="module")
def probed(subject: LoadedModel, said: list[str]) -> Probed:
    return probe_model(subject, context=512, say=said.append)


def test_the_json_has_the_keys_of_the_contract(probed: Probed) -> None:
    found = json.loads(json.dumps(probed.json))
    assert found.keys() >= CONTRACT
    for name in ("published", "conditioned"):
        assert {"successes", "trials", "int4"} <= found[name].keys()
    assert found["published"]["trials"] == 3
    assert found["profile"] == probed.profile.hash.hex()


def test_the_profile_holds_conditioning_and_verdict(probed: Probed, tmp_path: Path) -> None:
    path = tmp_path / "tiny.profile.json"
    probed.profile.save(path)
    read = Profile.load(path)
    assert read == probed.profile
    assert read.probe is not None and read.conditioning is not None
    assert read.probe.settings == tuple(layer.setting for layer in probed.report.layers)
    assert read.probe.reason == probed.report.reason
    fitted = [each is not None for each in read.conditioning]
    assert fitted == [name != "none" for name in probed.fits]
    assert fitted == [layer.conditioned is not None for layer in probed.report.layers]


def test_progress_is_told(probed: Probed, said: list[str]) -> None:
    assert sum(line.startswith("calibration: prompt") for line in said) == 4
    assert sum(line.startswith("calibration: key conditioning") for line in said) == 4
    assert sum(line.startswith("needle") for line in said) == 3


def test_the_tables_are_readable_in_a_log(
    probed: Probed, capsys: pytest.CaptureFixture[str]
) -> None:
    show_probe(probed)
    shown = capsys.readouterr().out
    assert max(len(line) for line in shown.splitlines() if "  " in line) <= TABLE_COLUMNS
    assert f"recommended: {probed.report.recommended}" in shown
    assert probed.report.reason in shown
    assert "published: greedy, nominal 0.30" in shown


def test_ones_own_text_calibrates(subject: LoadedModel, probed: Probed, tmp_path: Path) -> None:
    text = tmp_path / "own.txt"
    text.write_text("The cat sat on the mat , and the dog did not . " * 600)
    own = probe_model(subject, text, context=512, say=lambda _: None)
    assert (
        own.profile.section_hashes()["conditioning"]
        != (probed.profile.section_hashes()["conditioning"])
    )
    assert own.report.published == probed.report.published


def test_a_text_that_is_too_short_is_refused(subject: LoadedModel, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("A short text .")
    with pytest.raises(BadInput, match=r"short.txt: .* calibration takes 1023 of each"):
        probe_model(subject, short, say=lambda _: None)


def test_an_unreadable_text_is_found_before_the_model_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot read"):
        run_probe("no such model", tmp_path / "missing.txt", say=lambda _: None)
