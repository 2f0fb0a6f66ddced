"""The methods by name: those of this package, of installed ones, and of plugins."""

from raydmd.config.plugins import import_in_actor, load_entry_point, offered
from raydmd.config.recipe import Recipe
from raydmd.errors import UserError, nearest
from raydmd.methods.adm import ADM
from raydmd.methods.adp import ADP
from raydmd.methods.base import Method
from raydmd.methods.dmd import DMD
from raydmd.methods.dmd2 import DMD2
from raydmd.methods.dmd_fewstep import FewStepDMD
from raydmd.methods.dmd_sgts import TruncatedDMD
from raydmd.methods.dmdx import DMDX
from raydmd.methods.phased import PhasedDMD
from raydmd.methods.sid import SiD
from raydmd.methods.tdm import TDM
from raydmd.sampling.phase import Phase

OWN = (DMD, FewStepDMD, TruncatedDMD, PhasedDMD, DMD2, TDM, SiD, ADM, ADP, DMDX)
METHODS: dict[str, type[Method]] = {method.name: method for method in OWN}
GROUP = "raydmd.methods"  # of entry points


def register_method(method: type[Method]) -> type[Method]:
    """Make a method known by its name; a plugin calls it when it is imported.

    Raises:
        UserError: another method has the name.
    """
    known = METHODS.setdefault(method.name, method)
    if (known.__module__, known.__qualname__) != (method.__module__, method.__qualname__):
        raise UserError(f"plugins: there is a method '{method.name}' already ({known.__module__}.{known.__qualname__})")
    METHODS[method.name] = method
    return method


def find_method(name: str) -> type[Method]:
    """Return a method by name.

    Raises:
        UserError: there is none.
    """
    if name not in METHODS:
        import_in_actor()
    if name not in METHODS and (found := load_entry_point(GROUP, name)) is not None:
        register_method(found)
    if name not in METHODS:
        raise UserError(f"method.name: no method '{name}'{nearest(name, [*METHODS, *offered(GROUP)])}")
    return METHODS[name]


def build_method(recipe: Recipe) -> Method:
    """Return the recipe's method.

    Raises:
        UserError: an unknown ``method.name``.
    """
    return find_method(recipe.method.name)(recipe)


def plan_phases(recipe: Recipe, t_max: float = 1.0) -> list[Phase]:
    """Return the recipe's phases in the order in which they are trained.

    Raises:
        UserError: an unknown method, or options that do not go together.
    """
    return build_method(recipe).phases(t_max)
