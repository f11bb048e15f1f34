"""Finds and reads the file of `--config`: a Python file, or the config.json of a run.

The recipes of `configs/` are also in the wheel, so their names work in every folder.
"""

import logging
import sys
import traceback
import types
from collections.abc import Iterator
from pathlib import Path

from ml_collections import ConfigDict
from ml_collections.config_dict import MutabilityError, RequiredValueError

import mobilellm_jax
from mobilellm_jax import config as config_lib
from mobilellm_jax.config import Config, ConfigError, near_miss
from mobilellm_jax.config.recipe import Recipe, fixed, recipe_of
from mobilellm_jax.errors import MissingFileError
from mobilellm_jax.storage import file_kind, rundir, strict_json
from mobilellm_jax.storage.user_path import user_path

_log = logging.getLogger(__name__)
_FOLDER = Path("configs")
_KINDS = "a Python file (configs/NAME.py) or the config.json of a run"
# The user writes config files, so these errors in their code are mistakes of the user.
_FILE_ERRORS = (
    ArithmeticError,
    AttributeError,
    ImportError,
    LookupError,
    MutabilityError,
    NameError,
    OSError,
    RequiredValueError,
    SyntaxError,
    TypeError,
    ValueError,
)


def read_recipe(name: str) -> Recipe:
    """Returns the recipe in a file, in a run folder, or of a name in `configs/`.

    Raises:
      MissingFileError: if there is no such file.
      ConfigError: if the file raises an error, or is neither Python nor the config of a run.
    """
    path = _find(name)
    content = path.read_bytes()  # A pipe can be read only once.
    file_kind.refuse_stand_in(f"--config={name}", content[: file_kind.FIRST_BYTES])
    # The first character tells JSON from Python. The file name does not: a copy may have any name.
    if content.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{"):
        return fixed(_recorded(path, content), name)
    return recipe_of(_run(path, content), name)


def _find(name: str) -> Path:
    path = user_path("--config", name)
    if path.is_dir() and (path / rundir.CONFIG).is_file():
        return path / rundir.CONFIG
    if path.exists() and not path.is_dir():
        return path
    wanted = name.removeprefix(f"{_FOLDER}/").removesuffix(".py")
    for folder in (_FOLDER, _packaged()):
        for file in _recipes(folder):
            if wanted in (file.stem, str(file.relative_to(folder).with_suffix(""))):
                _log.info(f"config  {file}")
                return file
    if path.is_dir():
        raise MissingFileError(
            f"--config={name} is a folder without {rundir.CONFIG}; name {_KINDS}."
        )
    if path.is_symlink():
        raise MissingFileError(f"--config={name} {file_kind.absence(path)}.")
    raise MissingFileError(f"--config={name} is not a file.{_near_file(path)}")


def _packaged() -> Path:
    """Returns the folder of our recipes: in the package (wheel) or next to it (checkout)."""
    package = Path(mobilellm_jax.__file__).parent
    inside = package / _FOLDER
    return inside if inside.is_dir() else package.parent / _FOLDER


def _recipes(folder: Path) -> Iterator[Path]:
    yield from sorted(folder.rglob("*.py"))


def _near_file(path: Path) -> str:
    folders = (_packaged(), _FOLDER)
    # The message proposes only our recipes, because --config finds only these by their name.
    files = {file.stem: f"{_FOLDER}/{file.relative_to(f)}" for f in folders for file in _recipes(f)}
    hint = near_miss(path.stem, files)
    for stem, file in files.items():
        hint = hint.replace(f" {stem}?", f" --config={file}?")
    return hint


def _recorded(path: Path, content: bytes) -> Config:
    try:
        values = strict_json.parse(content.removeprefix(b"\xef\xbb\xbf"))
    except strict_json.JsonError as error:
        raise ConfigError(f"--config={path}: {error}") from error
    if "model_type" in values:
        raise ConfigError(
            f"--config={path} describes a Hugging Face model and no training; name {_KINDS}. "
            f"--config.model={path.parent} takes the model from this directory."
        )
    return config_lib.from_object(values, str(path))


def _run(path: Path, content: bytes) -> ConfigDict:
    """Returns the `ConfigDict` of a Python file, which may import files of its folder."""
    module = types.ModuleType("config_file")
    module.__file__ = str(path)
    folder = str(path.parent.absolute())
    # Last, so that a file of the user does not take the place of a library.
    sys.path.append(folder)
    try:
        exec(compile(content, path, "exec"), vars(module))
        config_dict = module.get_config() if hasattr(module, "get_config") else None
    except _FILE_ERRORS as error:
        kind = file_kind.explanation(content[: file_kind.FIRST_BYTES])
        kinds = f". --config must name {_KINDS}." if path.suffix != ".py" else ""
        raise ConfigError(
            f"{_place(path, error)}: {type(error).__name__}: {error}{kind}{kinds}"
        ) from error
    finally:
        sys.path.remove(folder)
    if not isinstance(config_dict, ConfigDict):
        raise ConfigError(f"--config={path} must define a get_config() that returns a ConfigDict.")
    return config_dict


def _place(path: Path, error: BaseException) -> str:
    """Returns `path:line` for the line of the config file that raised the error."""
    if isinstance(error, SyntaxError) and error.lineno is not None:
        return f"{path}:{error.lineno}"
    frames = traceback.walk_tb(error.__traceback__)
    lines = [line for frame, line in frames if frame.f_code.co_filename == str(path)]
    return f"{path}:{lines[-1]}" if lines else str(path)
