"""A run's figures and sample grids in Weights & Biases, beside TensorBoard; the package is optional.

The run there has one id for one folder, so that a run that is continued goes on in it. What a recovery makes again is
the same to the bit and is not sent twice. Nothing that fails there ends the run here.
"""

import importlib
import importlib.util
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from raydmd.config.overrides import HIDDEN
from raydmd.config.recipe import Recipe
from raydmd.errors import UserError
from raydmd.models.base import one_line
from raydmd.runtime.observability.metrics import run_label

KEY = "monitor.wandb"
STEP = "iteration"


def is_wanted(recipe: Recipe) -> bool:
    """Whether a recipe has its run shown there."""
    return recipe.monitor.wandb.project is not None and recipe.monitor.wandb.mode != "disabled"


def check_wandb(recipe: Recipe) -> None:
    """Refuse a recipe that needs the package where it is not installed.

    Raises:
        UserError: ``monitor.wandb: ...``: says what to install.
    """
    if is_wanted(recipe):
        spec = importlib.util.find_spec("wandb")
        if spec is None or spec.origin is None:  # a folder of that name, as the package itself makes one, is none
            raise UserError(f"{KEY}: the package wandb is not installed here: pip install 'raydmd[wandb]', or leave "
                            f"{KEY}.project out")  # fmt: skip


def shown_settings(value: Any) -> Any:
    """Return a recipe's values as they may be sent: without texts that are, or hold, an address or credentials."""
    if isinstance(value, dict):
        return {key: shown_settings(part) for key, part in value.items()}
    if isinstance(value, list):
        return [shown_settings(part) for part in value]
    return "(not sent)" if isinstance(value, str) and HIDDEN.search(value) else value


class WandbRun:
    """The run, as it is shown there.

    Args:
        recipe: the run's recipe, whose ``monitor.wandb`` names a project.
        folder: the run's folder, where the package keeps its own files.
        say: told, once, that nothing more is sent.

    Raises:
        UserError: the package is not installed, or the run cannot be begun there.
    """

    def __init__(self, recipe: Recipe, folder: Path, say: Callable[[str], None]) -> None:
        check_wandb(recipe)
        self._wandb: Any = importlib.import_module("wandb")
        self._say, settings = say, recipe.monitor.wandb
        identity = re.sub(r"[^\w-]", "-", run_label(folder))
        try:
            self._run: Any = self._wandb.init(
                project=settings.project,
                entity=settings.entity,
                name=settings.name or folder.resolve().name,
                mode=settings.mode,
                id=identity,
                resume="allow",
                dir=str(folder),
                config=shown_settings(recipe.model_dump(mode="json")),
                settings=self._wandb.Settings(console="off", save_code=False),
            )
            self._run.define_metric(STEP)
            self._run.define_metric("*", step_metric=STEP)
            sent = self._run.summary.get(STEP)
        except Exception as error:  # whatever the package raises: no account, no network, no such entity
            raise UserError(f"{KEY}: the run cannot be begun there: {one_line(error)}; {KEY}.mode: offline keeps it "
                            f"here for `wandb sync`") from None  # fmt: skip
        self._sent = int(sent) if isinstance(sent, int | float) and math.isfinite(sent) else -1

    def figures(self, iteration: int, figures: Mapping[str, float]) -> None:
        """Send an iteration's figures, unless they were sent before it was made again."""
        if iteration > self._sent:
            self._sent = iteration
            self._try(lambda: self._run.log({STEP: iteration, **figures}))

    def picture(self, name: str, image: np.ndarray, iteration: int) -> None:
        """Send a grid.

        Args:
            name: under which it is shown.
            image: [H, W, 3], 0 to 255.
            iteration: after which it was drawn.
        """
        self._try(lambda: self._run.log({STEP: iteration, f"samples/{name}": self._wandb.Image(image)}))

    def close(self) -> None:
        """Finish sending."""
        self._try(lambda: self._run.finish())

    def _try(self, send: Callable[[], Any]) -> None:
        if self._run is None:
            return
        try:
            send()
        except Exception as error:  # its service is gone, or the network
            self._run = None
            self._say(f"{KEY}: nothing more is sent: {one_line(error)}")
