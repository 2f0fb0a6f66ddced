"""Every family on a tiny model of diffusers' own classes: does it run as its pipeline does, and what does it take?

For each: two phased iterations with LoRA experts in a process of their own (seconds from the start of loading, the
process' greatest memory), the largest difference between its first teacher step and that of diffusers' own pipeline,
at guidance 1 and 3, and between the student's samples and those of its export by plain diffusers, both in float32;
latents above 1 count relative to the largest in the export's. Null where diffusers has no pipeline.

    python benchmarks/families.py --json families.json
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import arguments, console, finish
from rich.table import Table
from safetensors.torch import save_file

from raydmd.config.recipe import Recipe, dump_recipe
from raydmd.data.prompts import PromptTable, write_prompts
from raydmd.diffusion.solvers import euler_step
from raydmd.export.check import difference
from raydmd.export.export import export_run
from raydmd.methods.loading import load_recipe
from raydmd.methods.local import Reference, train
from raydmd.models.diffusers.pretrained import PretrainedFamily
from raydmd.models.tiny import TINY_MODELS, TinyModel
from raydmd.runs.expert_index import write_index
from raydmd.runs.folders import expert_file
from raydmd.runs.run import Run, recipe_family
from raydmd.training.teacher import Scorer

STEPS = 4
RECIPE = """
iterations: 2
teacher: {{family: {family}, path: {folder}, guidance_scale: 3.0, options: {options}}}
prompts: {{path: {folder}/prompts.parquet}}
method: {{name: phased, fake_updates: 1, experts: {{kind: lora, rank: 4, alpha: 8}}}}
ema: 0
optimizer: {{generator: {{lr: 1.0e-2}}, fake: {{lr: 1.0e-4}}}}
batch: {{size: 4, micro: 2}}
monitor: {{samples_every: 0, tensorboard: false}}
"""


def first_step_difference(tiny: TinyModel, folder: Path, recipe: Recipe) -> float | None:
    """Return the largest difference to the pipeline's latents after its first step, at guidance 1 and 3."""
    family, rows, found = recipe_family(recipe), tiny.rows(2), 0.0
    noise = torch.randn(2, *family.latent_shape, generator=torch.Generator().manual_seed(1))
    scorer, conditions = Scorer(recipe, family, family.load_teacher()), family.conditions(rows)
    t, t_next = family.teacher_times(STEPS)[:2]
    for scale in (1.0, 3.0):
        wanted = tiny.first_step(folder, rows, noise, scale, STEPS)
        if wanted is None:
            return None
        with torch.no_grad():
            prediction = scorer.predict(noise, torch.full((2,), t, dtype=torch.float64), conditions, scale)
        made = euler_step(family.schedule, prediction, noise, t, t_next, family.prediction)
        found = max(found, float((made - wanted).abs().max()))
    return found


def export_difference(recipe: Recipe, trained: Reference, folder: Path) -> float | None:
    """Return the largest difference of latents between the student and its export, sampled by plain diffusers."""
    family = recipe_family(recipe)
    if not (isinstance(family, PretrainedFamily) and family.pipelines):
        return None
    run, out = folder / "run", folder / "export"
    for index, state in enumerate(trained.experts):
        file = expert_file(run, index)
        file.parent.mkdir(parents=True)
        save_file(state, file, trained.parts["generator"].experts.metadata(index))
    (run / "recipe.yaml").write_text(dump_recipe(recipe))
    write_index(run)
    export_run(Run(run), "diffusers", out, checked=False)
    return difference(run, out)


def measure(name: str) -> dict[str, Any]:
    """Measure one family in this process."""
    torch.set_num_threads(1)
    tiny = TINY_MODELS[name]
    with tempfile.TemporaryDirectory() as place:
        folder = tiny.save(Path(place))
        write_prompts(folder / "prompts.parquet", tiny.rows(6))
        file = folder / "tiny.yaml"
        file.write_text(RECIPE.format(family=tiny.family, folder=folder, options=json.dumps(dict(tiny.options))))
        recipe = load_recipe(str(file), [])
        begun = time.perf_counter()
        family = recipe_family(recipe)
        prompts = PromptTable(str(recipe.prompts.path), family.condition_columns)
        trained = train(recipe, family, family.load_teacher(), prompts)
        seconds = time.perf_counter() - begun
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        return {
            "seconds": seconds, "peak_mb": peak, "first_step_diff": first_step_difference(tiny, folder, recipe),
            "export_diff": export_difference(recipe, trained, folder),
        }  # fmt: skip


def main() -> None:
    """Measure every family, each in a process of its own."""
    parser = arguments(__doc__)
    parser.add_argument("--one", choices=sorted(TINY_MODELS), help="measure one family in this process, print its JSON")
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(given.one)))
        return
    results: dict[str, Any] = {}
    table = Table("family", "seconds", "peak MB", "first step's difference", "export's difference")
    for name in TINY_MODELS:
        run = subprocess.run([sys.executable, __file__, "--one", name], check=True, capture_output=True, text=True)
        results[name] = json.loads(run.stdout.splitlines()[-1])
        shown = [results[name][key] for key in ("first_step_diff", "export_diff")]
        table.add_row(name, f"{results[name]['seconds']:.1f}", f"{results[name]['peak_mb']:.0f}",
                      *("none" if value is None else f"{value:.1e}" for value in shown))  # fmt: skip
    console.print(table)
    finish("families", results, given.json)


if __name__ == "__main__":
    main()
