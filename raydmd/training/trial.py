"""One forward pass on one row of prompts, before training: what does not fit is found in the first seconds."""

from typing import Any

import torch

from raydmd.diffusion.random import Key, normal
from raydmd.errors import RunError, UserError
from raydmd.models.base import Conditions, one_line
from raydmd.models.buckets import Buckets
from raydmd.training.fake_score import Fake
from raydmd.training.generator import Generator
from raydmd.training.teacher import Scorer


@torch.no_grad()
def try_row(part: Any, role: str, row: Conditions) -> None:
    """Call a role's network once, for the teacher also with the null prompt; nothing that training uses changes.

    Of several buckets the largest is tried.

    Args:
        part: a `Generator`, `Fake` or `Scorer`; others are left alone.
        role: its name, for errors.
        row: the conditions of one row, each [1, ...].

    Raises:
        UserError: the row lacks what the role needs.
        RunError: the network does not take it, or gives another shape than it was given.
    """
    if not isinstance(part, Generator | Fake | Scorer):
        return
    network = part.network if isinstance(part, Scorer) else part.teacher
    family, device = Buckets(part.recipe, part.family).largest(), part.device
    key = Key(part.recipe.seed, 0, "trial", 0)
    try:
        network.to(device)
        x = normal(key, 0, 1, family.latent_shape).to(device)
        t = torch.full((1,), 0.5 * family.schedule.t_max, dtype=torch.float64, device=device)
        networks = network.parts
        conditions = {name: value.to(device) for name, value in family.for_size(row).items()}
        rows = [conditions]
        if isinstance(part, Scorer) and set(part.recipe.teacher.guidance_scales) != {1.0} and conditions:
            rows.append(family.unconditional(conditions))
        shapes = [one(x, t, each).shape for one in networks for each in rows]
    except (UserError, RunError):
        raise
    except Exception as error:  # whatever the layers of a network raise
        size = f" at latents of {list(family.latent_shape)}" if part.recipe.prompts.buckets else ""
        raise RunError(f"{role}: its network does not take a row of the prompts{size}: {one_line(error)}") from error
    finally:
        if isinstance(part, Fake):  # which keeps it beside the copy that it trains
            network.to("cpu")
    if any(shape != x.shape for shape in shapes):
        raise RunError(f"{role}: its network gives {list(shapes[0][1:])} for latents of {list(x.shape[1:])}")
