"""The families by name."""

from collections.abc import Mapping
from typing import Any

from raydmd.config.plugins import import_in_actor, load_entry_point, offered
from raydmd.errors import UserError, nearest
from raydmd.models.base import Family
from raydmd.models.diffusers.edm import EDMFamily
from raydmd.models.diffusers.flux import FluxFamily
from raydmd.models.diffusers.flux2_klein import Flux2KleinFamily
from raydmd.models.diffusers.qwen_image import QwenImageFamily
from raydmd.models.diffusers.sd3 import SD3Family
from raydmd.models.diffusers.sdxl import SDXLFamily
from raydmd.models.diffusers.stable_diffusion import StableDiffusionFamily
from raydmd.models.diffusers.wan import WanFamily
from raydmd.models.diffusers.z_image import ZImageFamily
from raydmd.models.embedded.digits import DigitsFamily
from raydmd.models.embedded.ring import RingFamily

FAMILIES: dict[str, type[Family]] = {
    family.name: family
    for family in (
        DigitsFamily,
        RingFamily,
        EDMFamily,
        FluxFamily,
        Flux2KleinFamily,
        QwenImageFamily,
        SD3Family,
        SDXLFamily,
        StableDiffusionFamily,
        WanFamily,
        ZImageFamily,
    )
}


GROUP = "raydmd.families"  # of entry points


def register_family(family: type[Family]) -> type[Family]:
    """Make a family known by its name; a plugin calls it when it is imported.

    Raises:
        UserError: another family has the name.
    """
    known = FAMILIES.setdefault(family.name, family)
    if (known.__module__, known.__qualname__) != (family.__module__, family.__qualname__):
        raise UserError(f"plugins: there is a family '{family.name}' already ({known.__module__}.{known.__qualname__})")
    FAMILIES[family.name] = family
    return family


def build_family(name: str, path: str | None = None, options: Mapping[str, Any] | None = None) -> Family:
    """Build a family.

    Args:
        name: of this package, of an installed one that offers it, or of a plugin.
        path: its teacher's folder; None while there is none.
        options: its own settings (`Family.defaults` names them).

    Raises:
        UserError: an unknown name or option.
    """
    if name not in FAMILIES:
        import_in_actor()
    if name not in FAMILIES and (found := load_entry_point(GROUP, name)) is not None:
        register_family(found)
    if name not in FAMILIES:
        raise UserError(f"teacher.family: no family '{name}'{nearest(name, [*FAMILIES, *offered(GROUP)])}")
    return FAMILIES[name](path, options)
