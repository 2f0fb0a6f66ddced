"""Whether a recipe's method and machines go with its teacher's quantization, told before a run."""

from raydmd.config.recipe import Recipe
from raydmd.errors import UserError
from raydmd.methods.program import trace_method
from raydmd.methods.registry import build_method
from raydmd.models.base import QUANTIZATION_KEY as KEY
from raydmd.models.base import Family
from raydmd.training.score_network import DERIVATIVES
from raydmd.training.teacher import Scorer


def check_quantization(recipe: Recipe, family: Family) -> None:
    """Refuse a ``teacher.quantization`` that cannot be made here, or that the run's method cannot use.

    Raises:
        UserError: no torchao, a dtype, a device or a method that the kind does not go with.
    """
    family.check_quantization()
    if recipe.teacher.quantization != "fp8":
        return
    method = build_method(recipe)
    role = recipe.runtime.of(method.teacher)
    if recipe.runtime.device == "cpu" or (recipe.runtime.device == "auto" and not role.gpus):
        asked = "device: cpu" if recipe.runtime.device == "cpu" else f"{method.teacher}.gpus: {role.gpus:g}"
        raise UserError(f"{KEY}: fp8 needs a GPU of compute capability 8.9 or above, and runtime.{asked} gives the "
                        f"teacher none; int8 runs on CPUs")  # fmt: skip
    if differentiates_through_teacher(recipe, family):
        raise UserError(f"{KEY}: fp8's kernels have no derivative, and method '{method.name}' differentiates through "
                        f"the teacher; int8 has one")  # fmt: skip


def differentiates_through_teacher(recipe: Recipe, family: Family) -> bool:
    """Whether a recipe's method asks a role that scores by the frozen teacher for a derivative."""
    trace, roles = trace_method(recipe, family.schedule.t_max), build_method(recipe).roles
    begins = [0, *trace.ends[:-1]]  # all iterations of a phase make the same calls
    calls = [call for begin in begins for call in trace.iteration(begin).calls]
    return any(call.name in DERIVATIVES and issubclass(roles[call.role].part, Scorer) for call in calls)
