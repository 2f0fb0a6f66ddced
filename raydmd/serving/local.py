"""All stages in this process: for tests of the HTTP side, and the yardstick of what serving adds."""

from raydmd.serving.card import experts_of, read_card
from raydmd.serving.pipeline import TEACHER_PARTS, Pipeline, stages_of
from raydmd.serving.settings import Serving
from raydmd.serving.stage import Stage


def local_pipeline(serving: Serving, threads: int = 1) -> Pipeline:
    """Load a run's stages into this process.

    Raises:
        UserError: the run cannot be served.
    """
    names = stages_of(serving, experts_of(read_card(serving)))
    stages = {name: Stage(serving, parts, threads) for name, parts in names.items()}
    if serving.teacher:
        stages["teacher"] = Stage(serving, TEACHER_PARTS, threads)
    return Pipeline(serving, stages)
