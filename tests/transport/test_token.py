"""Token files: made private, and refused when they are not."""

import stat
from pathlib import Path

import pytest

from kvprism.errors import BadInput
from kvprism.transport.token import create_token, load_token


def test_a_made_token_is_loaded(tmp_path: Path) -> None:
    token = create_token(tmp_path / "token")
    assert len(token) == 32
    assert load_token(tmp_path / "token") == token
    assert create_token(tmp_path / "other") != token


def test_only_the_owner_may_read_it(tmp_path: Path) -> None:
    create_token(tmp_path / "token")
    assert stat.S_IMODE((tmp_path / "token").stat().st_mode) == 0o600


def test_an_existing_file_is_not_overwritten(tmp_path: Path) -> None:
    token = create_token(tmp_path / "token")
    with pytest.raises(BadInput, match="exists already"):
        create_token(tmp_path / "token")
    assert load_token(tmp_path / "token") == token


def test_a_link_to_another_file_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BadInput):
        create_token(tmp_path / "link")
    assert not (tmp_path / "elsewhere").exists()


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot be made"):
        create_token(tmp_path / "nowhere" / "token")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"token.*cannot be read"):
        load_token(tmp_path / "token")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o644])
def test_a_file_that_others_may_use_is_refused(tmp_path: Path, mode: int) -> None:
    create_token(tmp_path / "token")
    (tmp_path / "token").chmod(mode)
    with pytest.raises(BadInput, match="chmod 600"):
        load_token(tmp_path / "token")


@pytest.mark.parametrize(
    ("text", "complaint"), [("", "0 bytes"), ("ab" * 15, "15 bytes"), ("xyz", "hex"), ("é", "hex")]
)
def test_a_file_that_holds_no_token_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "token"
    path.write_text(text, encoding="utf-8")
    path.chmod(0o600)
    with pytest.raises(BadInput, match=complaint):
        load_token(path)


def test_a_folder_is_no_token(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    with pytest.raises(BadInput):
        load_token(tmp_path)
