"""Packages that only some commands need: the extras of the installation."""

from importlib import import_module

from raydmd.errors import UserError

EXTRAS = {  # name of the extra: modules of its packages
    "serve": ("fastapi", "starlette", "uvicorn", "python_multipart", "aiohttp"),
    "video": ("av",),
}


def require_extra(extra: str, what: str) -> None:
    """Refuse what needs an extra that is not installed.

    Args:
        extra: its name.
        what: the command, option or setting that needs it.

    Raises:
        UserError: one line that says how to install it.
    """
    for module in EXTRAS[extra]:
        try:
            import_module(module)
        except ImportError:
            how = f"pip install 'raydmd[{extra}]'"
            raise UserError(f"{what}: the package {module} is not installed here: {how}") from None
