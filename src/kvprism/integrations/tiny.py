"""The built-in models, found by name on this machine; nothing is ever downloaded.

Three places are searched, the first that has the name wins: the folders named by the environment
variable `KVPRISM_MODELS`, the repository's `models/` (in a source checkout), and the installed
distribution `kvprism-tiny`. A model is a folder with a `config.json`, and its name is the folder's.

Where `tiny` is found, the models that `derive.py` makes of it have names too. One of them is made
when it is first asked for, and kept in `$KVPRISM_CACHE`, else `$XDG_CACHE_HOME/kvprism`, else
`~/.cache/kvprism`, in a folder named by what it was made of: other weights or another recipe make
another folder, and the old ones can be deleted at any time.
"""

import hashlib
import importlib
import importlib.util
import os
import re
import tempfile
from pathlib import Path

from kvprism.errors import BadInput, UnknownName

VARIABLE = "KVPRISM_MODELS"
CACHE_VARIABLE = "KVPRISM_CACHE"
WAY_OUT = (
    "or the directory of a local checkpoint (the built-in models come with "
    "`pip install 'kvprism[demo]'`, or with `make demo` in a source checkout, where "
    "`scripts/train-tiny NAME --text FILE` trains one from nothing)"
)
CACHE_WAY_OUT = f"name a folder that can be written to in {CACHE_VARIABLE}"
SOURCE = "tiny"
DERIVED = (
    "tiny-mistral",
    "tiny-qwen2",
    "tiny-qwen2-bias",
    "tiny-qwen2-bias-300",
    "tiny-qwen2-fragile",
    "tiny-qwen2-mixed",
    "tiny-qwen2-spiky",
)
SEEDED = re.compile(r"(tiny-qwen2-mixed)-(0|[1-9][0-9]{0,17})")


def names() -> list[str]:
    """Names of the built-in models that this machine has or can derive, sorted.

    A seed may follow `tiny-qwen2-mixed`, as in `tiny-qwen2-mixed-7`; it is 0 otherwise.

    Raises:
        BadInput: `KVPRISM_MODELS` names a folder that does not exist.
    """
    models = _models()
    return sorted({*models, *(DERIVED if SOURCE in models else ())})


def find(name: str) -> Path:
    """The folder of the built-in model `name`, a genuine transformers checkpoint.

    A derived model is made first if this is the first use; only then is torch imported.

    Raises:
        UnknownName: no such model here; says how to get the built-in ones.
        BadInput: `KVPRISM_MODELS` names a folder that does not exist, or a derived model cannot be
            made or kept; says where it was to be kept.
        Unsupported: no model can be derived from what is called `tiny` here.
    """
    models = _models()
    if name in models:
        return models[name]
    recipe, seed = _recipe_of(name)
    if recipe not in DERIVED or SOURCE not in models:
        raise UnknownName("model", name, [*names(), WAY_OUT])
    cache, source = _cache(), models[SOURCE]
    folder = cache / f"{name}-{_digest(source)}"
    if not folder.is_dir():
        try:
            _make(recipe, seed, source, folder)
        except OSError as error:
            raise BadInput(
                f"cannot keep the derived model {name!r} in {str(cache)!r}: {error}; "
                f"{CACHE_WAY_OUT}"
            ) from error
    return folder


def _recipe_of(name: str) -> tuple[str, int]:
    """What to derive, and the seed, from a name that may end with one."""
    seeded = SEEDED.fullmatch(name)
    return (seeded[1], int(seeded[2])) if seeded else (name, 0)


def _make(recipe: str, seed: int, source: Path, folder: Path) -> None:
    """Derive aside, then rename: whoever finds the folder finds all of it."""
    from kvprism.integrations.derive import derive  # torch, and only when there is something to do

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".deriving-") as scratch:
        made = Path(scratch) / "model"
        made.mkdir()
        derive(recipe.removeprefix(f"{SOURCE}-"), seed, source, made)
        try:
            made.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was first, with the same model
                raise


def _cache() -> Path:
    named, xdg = os.environ.get(CACHE_VARIABLE), os.environ.get("XDG_CACHE_HOME")
    if named:
        return Path(named)
    if xdg:
        return Path(xdg) / "kvprism"
    try:
        return Path.home() / ".cache" / "kvprism"
    except RuntimeError as error:
        raise BadInput(f"no place for derived models: {error}; {CACHE_WAY_OUT}") from error


def _digest(source: Path) -> str:
    """Of all that a derived model is made of: its source's files, and the text of the recipes."""
    files = [Path(__file__).with_name("derive.py"), *sorted(source.iterdir())]
    digest = hashlib.sha256()
    for file in (file for file in files if file.is_file()):
        for part in (file.name.encode(), file.read_bytes()):
            digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:16]


def _models() -> dict[str, Path]:
    found = [*_named_folders(), *_checkout_folder(), *_installed_folder()]
    return {
        path.parent.name: path.parent
        for folder in reversed(found)  # the first place that has a name wins
        for path in folder.glob("*/config.json")
    }


def _named_folders() -> list[Path]:
    folders = [Path(entry) for entry in os.environ.get(VARIABLE, "").split(os.pathsep) if entry]
    for folder in folders:
        if not folder.is_dir():
            raise BadInput(f"{VARIABLE} names {str(folder)!r}, which is not a folder of models")
    return folders


def _checkout_folder() -> list[Path]:
    root = Path(__file__).parents[3]
    return [root / "models"] if (root / "kvprism-tiny").is_dir() else []


def _installed_folder() -> list[Path]:
    if importlib.util.find_spec("kvprism_tiny") is None:
        return []
    package = importlib.import_module("kvprism_tiny")
    return list({package.path(name).parent for name in package.names()})
