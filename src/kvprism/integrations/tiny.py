"""The built-in models, found by name on this machine; nothing is ever downloaded.

Three places are searched, the first that has the name wins: the folders named by the environment
variable `KVPRISM_MODELS`, the repository's `models/` (in a source checkout), and the installed
distribution `kvprism-tiny`. A model is a folder with a `config.json`, and its name is the folder's.
"""

import importlib
import importlib.util
import os
from pathlib import Path

from kvprism.errors import BadInput, UnknownName

VARIABLE = "KVPRISM_MODELS"
WAY_OUT = (
    "or the directory of a local checkpoint (the built-in models come with "
    "`pip install 'kvprism[demo]'`, or with `make demo` in a source checkout, where "
    "`scripts/train-tiny NAME --text FILE` trains one from nothing)"
)


def names() -> list[str]:
    """Names of the built-in models that this machine has, sorted.

    Raises:
        BadInput: `KVPRISM_MODELS` names a folder that does not exist.
    """
    return sorted(_models())


def find(name: str) -> Path:
    """The folder of the built-in model `name`, a genuine transformers checkpoint.

    Raises:
        UnknownName: no such model here; says how to get the built-in ones.
        BadInput: `KVPRISM_MODELS` names a folder that does not exist.
    """
    models = _models()
    if name not in models:
        raise UnknownName("model", name, [*sorted(models), WAY_OUT])
    return models[name]


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
