"""The pre-shared token: 32 random bytes as hex in a file that only its owner may read."""

import os
import secrets
import stat
from pathlib import Path

from kvprism.errors import BadInput

MIN_TOKEN_NBYTES = 16
_TOKEN_NBYTES = 32
_MAX_FILE_NBYTES = 4096


def create_token(path: Path) -> bytes:
    """A new token, also written to `path` with mode 0600.

    Raises:
        BadInput: the file exists, or cannot be made.
    """
    token = secrets.token_bytes(_TOKEN_NBYTES)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        raise BadInput(f"token file {path} exists already; use it, or remove it first") from error
    except OSError as error:
        raise BadInput(f"token file {path} cannot be made: {error.strerror}") from error
    with open(descriptor, "w", encoding="ascii") as file:
        file.write(token.hex() + "\n")
    return token


def load_token(path: Path) -> bytes:
    """The token that `path` holds.

    Raises:
        BadInput: missing, readable by others, not hex, or shorter than 16 bytes.
    """
    try:
        with open(path, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            text = file.read(_MAX_FILE_NBYTES)
    except OSError as error:
        raise BadInput(
            f"token file {path} cannot be read ({error.strerror}); copy it from the other side"
        ) from error
    if not stat.S_ISREG(mode) or mode & 0o077:
        raise BadInput(
            f"token file {path} has mode {stat.filemode(mode)}, so others may know it; "
            f"run: chmod 600 {path}"
        )
    try:
        token = bytes.fromhex(text.decode("ascii"))
    except ValueError as error:
        raise BadInput(f"token file {path} holds no hex digits; make a new one") from error
    if len(token) < MIN_TOKEN_NBYTES:
        raise BadInput(
            f"token file {path} holds {len(token)} bytes, at least {MIN_TOKEN_NBYTES} needed"
        )
    return token
