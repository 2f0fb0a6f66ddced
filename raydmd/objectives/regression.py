"""Regression on the teacher's ODE pairs (DMD Eq. 9), which pins the student to the teacher's modes."""

from torch import Tensor

from raydmd.diffusion.schedule import at_least_float32


def regression_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean squared distance of each sample, [B], in at least float32.

    student: the sample made from a noise; teacher: the end of the teacher's probability-flow ODE from the same noise;
    both [B, ...]. DMD measures the distance with LPIPS, which fits images in pixels
    (`raydmd.models.perceptual.lpips`, ``method.regression.distance: lpips``); this is its plain L2 form.
    """
    return (at_least_float32(student) - at_least_float32(teacher)).square().flatten(1).mean(1)
