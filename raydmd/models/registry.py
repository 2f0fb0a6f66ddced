"""The families by name."""

from collections.abc import Mapping
from typing import Any

from raydmd.errors import UserError, nearest
from raydmd.models.base import Family
from raydmd.models.diffusers.qwen_image import QwenImageFamily
from raydmd.models.diffusers.wan import WanFamily
from raydmd.models.embedded.digits import DigitsFamily
from raydmd.models.embedded.ring import RingFamily

FAMILIES: dict[str, type[Family]] = {
    family.name: family for family in (DigitsFamily, RingFamily, QwenImageFamily, WanFamily)
}


def build_family(name: str, path: str | None = None, options: Mapping[str, Any] | None = None) -> Family:
    """Build a family.

    Args:
        name: one of ``FAMILIES``.
        path: its teacher's folder; None while there is none.
        options: its own settings (`Family.defaults` names them).

    Raises:
        UserError: an unknown name or option.
    """
    if name not in FAMILIES:
        raise UserError(f"teacher.family: no family '{name}'{nearest(name, FAMILIES)}")
    return FAMILIES[name](path, options)
