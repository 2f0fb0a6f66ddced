"""Real pictures as a family's own latents and conditions."""

import numpy as np
import torch
from torch import Tensor

from raydmd.data.pictures import PictureFolder
from raydmd.errors import UserError
from raydmd.models.base import Conditions, Family
from raydmd.models.encoding import encode


def open_pictures(family: Family, path: str, key: str) -> PictureFolder:
    """Open a folder of pictures of the family's size, with the columns of its conditions.

    Args:
        family: whose latents they are to become.
        path: the folder.
        key: of the recipe, for errors.

    Raises:
        UserError: the family does not encode pictures, or what `PictureFolder` refuses.
    """
    try:
        shape = family.picture_shape
    except UserError as error:
        raise UserError(f"{key}: {error}") from None
    return PictureFolder(path, shape, family.condition_columns, key)


def encode_pictures(
    family: Family, pictures: PictureFolder, numbers: np.ndarray, device: torch.device | str = "cpu"
) -> tuple[Tensor, Conditions]:
    """Return the latents x_0 [count, *latent_shape] and the conditions of pictures by number [count], on a device.

    Raises:
        UserError: a file that cannot be decoded, or a row that the family does not take; the message names it.
    """
    conditions = picture_conditions(family, pictures, numbers)
    latents = family.encode_pixels(pictures.take(numbers).to(device))
    return latents, {name: value.to(device) for name, value in conditions.items()}


def picture_conditions(family: Family, pictures: PictureFolder, numbers: np.ndarray) -> Conditions:
    """Return the conditions of pictures by number [count].

    Raises:
        UserError: a row that the family does not take; the message names the first.
    """
    try:
        return encode(family, pictures.rows(numbers), numbers, str(pictures.path))
    except UserError as error:
        for place, number in enumerate(numbers.tolist()):
            one = numbers[place : place + 1]
            try:
                encode(family, pictures.rows(one), one, str(pictures.path))
            except UserError as own:
                words = str(own).removeprefix("prompts: ")
                raise UserError(f"{pictures.key}: {words} ({pictures.where(number)})") from None
        raise UserError(f"{pictures.key}: {str(error).removeprefix('prompts: ')}") from None
