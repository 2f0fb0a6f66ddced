"""raydmd: distils diffusion models into few-step experts on a Ray cluster, and serves them.

    import raydmd

    recipe = raydmd.load_recipe("digits", {"iterations": 20})
    run = raydmd.distill(recipe, "runs/digits")
    figures = raydmd.evaluate(run)
    pictures = raydmd.StudentPipeline.from_run("runs/digits")("7", num_images=4, seed=0)

What is public is in ``__all__``; it is imported when it is first used, so that ``import raydmd`` takes no time.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from raydmd.api import distill, evaluate, load_recipe
    from raydmd.errors import RunError, StorageError, UserError
    from raydmd.methods.registry import register_method
    from raydmd.models.registry import register_family
    from raydmd.pipeline import StudentPipeline
    from raydmd.runs.run import Run

__all__ = [
    "Run",
    "RunError",
    "StorageError",
    "StudentPipeline",
    "UserError",
    "__version__",
    "distill",
    "evaluate",
    "load_recipe",
    "register_family",
    "register_method",
]

_HOME = {
    "Run": "raydmd.runs.run",
    "RunError": "raydmd.errors",
    "StorageError": "raydmd.errors",
    "StudentPipeline": "raydmd.pipeline",
    "UserError": "raydmd.errors",
    "distill": "raydmd.api",
    "evaluate": "raydmd.api",
    "load_recipe": "raydmd.api",
    "register_family": "raydmd.models.registry",
    "register_method": "raydmd.methods.registry",
}


def __getattr__(name: str) -> Any:
    """Import a public name from where it lives."""
    if name not in _HOME:
        raise AttributeError(f"module 'raydmd' has no attribute '{name}'")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
