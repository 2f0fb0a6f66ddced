"""The families by name."""

from collections.abc import Mapping
from typing import Any

from raydmd.errors import UserError, nearest
from raydmd.models.digits import DigitsFamily
from raydmd.models.points import RingFamily
from raydmd.models.protocol import Family
from raydmd.models.qwen_image import QwenImageFamily
from raydmd.models.wan import WanFamily

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
