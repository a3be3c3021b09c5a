"""Finding built-in models by name, and the distribution that carries them."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvprism.errors import BadInput, UnknownName
from kvprism.integrations import tiny

SOURCE = Path(__file__).parents[2] / "kvprism-tiny" / "src"


def make_model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def test_a_named_folder_comes_first_and_earlier_ones_before_later_ones(tmp_path, monkeypatch):
    first, second = make_model(tmp_path / "a" / "mine"), make_model(tmp_path / "b" / "mine")
    other = make_model(tmp_path / "b" / "other")
    monkeypatch.setenv(tiny.VARIABLE, os.pathsep.join([str(tmp_path / "a"), str(tmp_path / "b")]))
    assert tiny.find("mine") == first != second
    assert tiny.find("other") == other
    assert {"mine", "other"} <= set(tiny.names())
    assert tiny.names() == sorted(tiny.names())


def test_a_folder_that_is_not_a_model_has_no_name(tmp_path, monkeypatch):
    (tmp_path / "notes").mkdir()
    monkeypatch.setenv(tiny.VARIABLE, str(tmp_path))
    assert "notes" not in tiny.names()


@pytest.mark.parametrize("name", ["nope", "", "../tiny", "tiny/../tiny", "/etc"])
def test_an_unknown_name_is_refused_with_the_way_out(name):
    with pytest.raises(UnknownName, match=r"pip install 'kvprism\[demo\]'"):
        tiny.find(name)


def test_a_mistyped_folder_in_the_variable_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv(tiny.VARIABLE, str(tmp_path / "typo"))
    with pytest.raises(BadInput, match=r"KVPRISM_MODELS.*typo"):
        tiny.names()


def test_the_installed_distribution_is_found(monkeypatch):
    monkeypatch.delenv(tiny.VARIABLE)
    monkeypatch.syspath_prepend(str(SOURCE))
    assert tiny.find("tiny") == importlib.import_module("kvprism_tiny").path("tiny")


def test_the_distribution_holds_a_complete_checkpoint(monkeypatch):
    monkeypatch.syspath_prepend(str(SOURCE))
    package = importlib.import_module("kvprism_tiny")
    assert package.names() == ["tiny", "tiny-deep", "tiny-gemma2", "tiny-llama31", "tiny-qwen3"]
    whole = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    for name in package.names():
        assert {file.name for file in package.path(name).iterdir()} >= whole
    known = "known: tiny, tiny-deep, tiny-gemma2, tiny-llama31, tiny-qwen3"
    with pytest.raises(ValueError, match=known):
        package.path("huge")


def test_finding_a_model_imports_neither_torch_nor_transformers():
    code = (
        "import sys; from kvprism.integrations import tiny; tiny.find('tiny');"
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
