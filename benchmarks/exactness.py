"""Is a distillation on Ray the sequential reference's, to the bit?

Runs 20 iterations of the digits recipe (the papers' Adam betas, float32) with the reference trainer and on Ray, with
one worker a role and with 2 generator, 2 fake and 3 scorer workers, and compares every weight: both experts, averaged
as they are kept, and the fake score's last checkpoint.

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
from raydmd.runs.folders import expert_file
from raydmd.runtime.launch import distill

LAYOUTS = {"1": (1, 1, 1), "n": (2, 2, 3)}


def difference(reference: Reference, middle: Reference, folder: Path) -> dict[str, float]:
    """Return the largest difference in each expert, and in the trainers' state in the middle of the last phase."""
    found = {}
    for index, expert in enumerate(reference.experts):
        other = load_file(expert_file(folder, index))
        found[f"expert {index + 1}"] = max(float((expert[name] - other[name]).abs().max()) for name in expert)
    for role, part in middle.parts.items():
        if not hasattr(part, "flat"):
            continue
        (shard,) = (folder / "checkpoints").glob(f"step-*15/{role}.safetensors")
        state, ours = load_file(shard), part.flat.state()
        found[role] = max(float((ours[name] - state[name]).abs().max()) for name in ours)
    return found


def main() -> None:
    """Run all three, compare, print."""
    parser = arguments(__doc__)
    parser.add_argument("--iterations", type=int, default=20, help="iterations in all (default %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)  # as every role has
    settings = [f"iterations={options.iterations}", "batch.micro=16", "monitor.samples_every=0", "checkpoint.every=5"]
    recipe, family, teacher, prompts = open_recipe("digits", options.work, *settings)
    reference = train(recipe, family, teacher, prompts)
    middle = train(recipe, family, family.load_teacher(), prompts, iterations=options.iterations * 3 // 4)
    figures: dict[str, Any] = {"iterations": options.iterations, "betas": list(recipe.optimizer.generator.betas)}
    for name, (generators, fakes, scorers) in LAYOUTS.items():
        folder = options.work / f"exactness-{name}"
        shutil.rmtree(folder, ignore_errors=True)
        workers = [
            f"runtime.generator.max_workers={generators}",
            f"runtime.fake.max_workers={fakes}",
            f"runtime.teacher.max_workers={scorers}",
        ]
        on_ray = load_recipe("digits", [f"teacher.path={recipe.teacher.path}", *settings, *workers])
        distill(on_ray, folder, console=console)
        found = difference(reference, middle, folder)
        figures[f"max_abs_diff_{name}"] = max(found.values())
        figures[f"by_part_{name}"] = found
    finish("Ray against the sequential reference", figures, options.json)


if __name__ == "__main__":
    main()
