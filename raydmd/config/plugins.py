"""Code of a user's own: modules and files that register methods and families when they are imported.

A recipe names them under ``plugins``, the command line with ``--plugin``. They are imported before the recipe is read,
in the driver and, through the environment variable that `workers_environment` sets, in every actor. A run's folder
names them, too, but nothing imports them from there: a stranger's folder must not run code.
"""

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from raydmd.errors import UserError

VARIABLE = "RAYDMD_PLUGINS"  # modules, separated by commas, that every actor imports
SUFFIX = ".py"

_imported: list[str] = []  # as sys.modules: what this process has, in order


def import_plugins(names: Sequence[str]) -> None:
    """Import modules by name, and files; what is imported already stays as it is.

    Raises:
        UserError: there is none, or it cannot be imported; its own error is named.
    """
    for name in names:
        if name.endswith(SUFFIX):
            if not Path(name).is_file():
                raise UserError(f"plugins: no file '{name}'")
            _importing(name, partial(_import_file, Path(name)))
        else:
            _importing(name, partial(importlib.import_module, name))
        if name not in _imported:
            _imported.append(name)


def import_in_actor() -> None:
    """Import what the driver has imported, where this process is an actor of a run."""
    import_plugins([name for name in os.environ.get(VARIABLE, "").split(",") if name])


def module_name(plugin: str) -> str:
    """Return the name under which a plugin is imported: a file's is its own without the ending."""
    return Path(plugin).stem if plugin.endswith(SUFFIX) else plugin


def workers_environment() -> dict[str, Any]:
    """Return Ray's ``runtime_env`` that brings this process' plugins to every actor: files, and what to import."""
    if not _imported:
        return {}
    files = [str(Path(name).resolve()) for name in _imported if name.endswith(SUFFIX)]
    variables = {VARIABLE: ",".join(module_name(name) for name in _imported)}
    return {"env_vars": variables, **({"py_modules": files} if files else {})}


def nodes_environment() -> dict[str, str]:
    """Return the variables with which processes that have this machine's files import this process' plugins."""
    names = [str(Path(name).resolve()) if name.endswith(SUFFIX) else name for name in _imported]
    return {VARIABLE: ",".join(names)} if names else {}


def load_entry_point(group: str, name: str) -> Any:
    """Return what an installed package offers under a name; None: none does.

    Args:
        group: ``raydmd.methods`` or ``raydmd.families``.
        name: of the method or family.

    Raises:
        UserError: it cannot be imported.
    """
    found = list(entry_points(group=group, name=name))
    return _importing(found[0].value, found[0].load) if found else None


def offered(group: str) -> list[str]:
    """Return the names that installed packages offer in a group."""
    return [entry.name for entry in entry_points(group=group)]


def _import_file(path: Path) -> Any:
    name = module_name(str(path))
    known = sys.modules.get(name)
    if known is not None:
        if Path(getattr(known, "__file__", None) or "").resolve() != path.resolve():
            raise UserError(f"plugins: '{path}': a module '{name}' is there already; rename the file")
        return known
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _importing(name: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except UserError:
        raise
    except ModuleNotFoundError as error:
        if error.name == name:
            raise UserError(f"plugins: no module '{name}'; a file is named with its ending, '{name}.py'") from None
        raise UserError(f"plugins: '{name}' cannot be imported: {error}") from None
    except Exception as error:  # whatever a user's own code raises
        told = " ".join(str(error).split())
        raise UserError(f"plugins: '{name}' cannot be imported: {type(error).__name__}: {told}") from None
