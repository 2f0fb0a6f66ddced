"""Is a distillation on Ray the local executor's, to the bit?

Runs 10 iterations of the digits recipe (the papers' Adam betas, float32) by every method, in one process and on Ray,
with one worker a role and with 2 of every trained role and 3 teacher workers, and compares every weight: all experts,
averaged as they are kept, and every trained role's weights and moments in the middle of the last phase.

    python benchmarks/exactness.py --json exactness.json
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from common import arguments, console, finish, open_recipe
from safetensors.torch import load_file

from raydmd.methods.loading import load_recipe
from raydmd.methods.local import Reference, train
from raydmd.methods.registry import METHODS, build_method
from raydmd.runs.folders import expert_file
from raydmd.runtime.launch import distill

OPTIONS = {  # of methods, so that each of their parts takes part
    "dmd": ("method.regression.weight=0.25", "method.regression.pairs=256", "method.dmd.reference_samples=true"),
    "dmd2": ("method.dmd2.references=256",),
    "adm": ("method.phases=2",),
    "adp": ("method.adp.pairs=256",),
    "dmdx": ("method.adp.pairs=256", "method.adp.iterations=5"),
    "sid": ("method.phases=2",),
}
LAYOUTS = {"diff_1": (1, 1), "diff_n": (2, 3)}  # workers of each trained role, of each frozen one


def difference(reference: Reference, middle: Reference, folder: Path, at: int, trained: list[str]) -> dict[str, float]:
    """Return the largest difference in each expert, and in each trained role's state after ``at`` iterations."""
    found = {}
    for index, expert in enumerate(reference.experts):
        other = load_file(expert_file(folder, index))
        found[f"expert {index + 1}"] = max(float((expert[name] - other[name]).abs().max()) for name in expert)
    for role in trained:
        (shard,) = (folder / "checkpoints").glob(f"step-*{at}/{role}.safetensors")
        state, ours = load_file(shard), middle.parts[role].flat.state()
        found[role] = max(float((ours[name] - state[name]).abs().max()) for name in ours)
    return found


def main() -> None:
    """Run all, compare, print."""
    parser = arguments(__doc__)
    parser.add_argument("--iterations", type=int, default=10, help="iterations in all (default %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)  # as every role has
    figures: dict[str, Any] = {}
    every = max(options.iterations * 2 // 5, 1)
    for method in METHODS:
        settings = [f"iterations={options.iterations}", "batch.micro=16", "monitor.samples_every=0",
                    f"checkpoint.every={every}", f"method.name={method}", *OPTIONS.get(method, ())]  # fmt: skip
        recipe, family, teacher, prompts = open_recipe("digits", options.work, *settings)
        at, trained = 2 * every, build_method(recipe).trained()
        reference = train(recipe, family, teacher, prompts)
        middle = train(recipe, family, family.load_teacher(), prompts, iterations=at)
        figures[method] = {}
        for name, (trainers, others) in LAYOUTS.items():
            folder = options.work / f"exactness-{method}-{name}"
            shutil.rmtree(folder, ignore_errors=True)
            workers = [
                f"runtime.{role}.max_workers={trainers if role in trained else others}"
                for role in build_method(recipe).roles
            ]
            on_ray = load_recipe("digits", [f"teacher.path={recipe.teacher.path}", *settings, *workers])
            distill(on_ray, folder, console=console)
            found = difference(reference, middle, folder, at, trained)
            figures[method] |= {name: max(found.values()), f"{name}_by_part": found}
            console.print(f"{method} {name}: {max(found.values()):g}", highlight=False)
    worst = {f"{method} {name}": figures[method][name] for method in METHODS for name in LAYOUTS}
    finish("Ray against the local executor: largest difference", worst, None)
    finish("exactness", figures, options.json)


if __name__ == "__main__":
    main()
