"""TDM's parts: one expert whose samples end at any step of its grid, each with an interval of its own (TDM Sec. 4)."""

from raydmd.config.recipe import MethodOptions
from raydmd.diffusion.random import Key, integer
from raydmd.sampling.phase import Phase, segment_of
from raydmd.training.fake_score import Fake
from raydmd.training.generator import Generator


def drawn_segment(phase: Phase, seed: int, draw: int, method: MethodOptions) -> Phase:
    """Return the segment of a draw: one for the whole global batch, whoever asks."""
    step = 1 + integer(Key(seed, phase.index, "segment", draw), phase.steps)
    return segment_of(phase, step, method)


class TrajectoryGenerator(Generator):
    """Its samples are the student's own latents after a number of steps that each draw has anew."""

    def segment(self, draw: int) -> Phase:
        """Return the way to the drawn step."""
        return drawn_segment(self.phase, self.recipe.seed, draw, self.recipe.method)

    def exit(self, draw: int) -> int:
        """Return the drawn step: the last of its segment."""
        return self.segment(draw).steps


class TrajectoryFake(Fake):
    """Tracks the student's latents at every step of its grid with one network."""

    def segment(self, draw: int) -> Phase:
        """Return the segment that the generator's samples of this draw are of."""
        return drawn_segment(self.phase, self.recipe.seed, draw, self.recipe.method)
