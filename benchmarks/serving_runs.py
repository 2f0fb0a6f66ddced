"""Makes the two runs that serving is measured with, without Ray.

``digits`` is a real one: the shipped recipe distilled in a few iterations, as its speed is all that counts.
``bench`` has a network of the same family that takes about 10 ms a pass, alone on one core, and 40 steps of its teacher
with guidance (80 passes a picture); its weights are random. Its size is fixed; what it takes here is printed.

    python benchmarks/serving_runs.py --json serving_runs.json
"""

import time
from pathlib import Path
from typing import Any

import torch
from common import arguments, console, finish, open_recipe
from rich.table import Table
from safetensors.torch import save_file

from raydmd.config.recipe import Recipe, dump_recipe
from raydmd.methods.loading import load_recipe
from raydmd.methods.local import train
from raydmd.models.base import Denoiser, EmbeddedFamily, save_teacher
from raydmd.runs.folders import expert_file
from raydmd.runs.run import Run, recipe_family
from raydmd.serving.parts import expert_networks

BENCH = {"width": 384, "depth": 5, "heads": 6, "patch": 2, "ratio": 4}  # 13.8 million weights, 16 tokens
NOISE = 0.02  # added to all weights: the network's last layers begin at zero, and every picture would be the same grey
ITERATIONS = 20
BATCHES = (1, 2, 4, 8, 16, 32)


def digits_run(work: Path) -> Run:
    """Return the distilled run in ``work``, made on the first call."""
    folder = work / "serving" / "digits"
    if not (folder / "recipe.yaml").is_file():
        recipe, family, teacher, prompts = open_recipe("digits", work, f"iterations={ITERATIONS}")
        console.print(f"distilling digits for {ITERATIONS} iterations, once", highlight=False)
        experts = train(recipe, family, teacher, prompts).experts
        _write(recipe, teacher, experts, folder)
    return Run(folder)


def bench_run(work: Path) -> Run:
    """Return the run of the larger, random network in ``work``, made on the first call."""
    options = "{" + ", ".join(f"{key}: {value}" for key, value in BENCH.items()) + "}"
    folder = work / "serving" / "bench"
    if not (folder / "recipe.yaml").is_file():
        recipe = load_recipe(
            "digits",
            ["name=bench", f"teacher.options={options}", "teacher.steps=40", "teacher.guidance_scale=1.5"],
        )
        networks = [noisy(recipe, seed) for seed in range(3)]
        _write(recipe, networks[0], [dict(network.state_dict()) for network in networks[1:]], folder)
    return Run(folder)


def noisy(recipe: Recipe, seed: int) -> Denoiser:
    """Return a network of random weights; the same seed gives the same."""
    family = recipe_family(recipe)
    assert isinstance(family, EmbeddedFamily)
    network, generator = family.new_network(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(NOISE * torch.randn(parameter.shape, generator=generator))
    return network


def _write(recipe: Recipe, teacher: Denoiser, experts: list[dict[str, torch.Tensor]], folder: Path) -> None:
    """Write a run's folder; the recipe last, so that an interrupted one is made anew."""
    family = recipe_family(recipe)
    save_teacher(teacher, folder / "teacher", family.name, family.options)
    for index, weights in enumerate(experts):
        file = expert_file(folder, index)
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in weights.items()}, file)
    own = recipe.model_copy(update={"teacher": recipe.teacher.model_copy(update={"path": None})})
    (folder / "recipe.yaml").write_text(dump_recipe(own), encoding="utf-8")


@torch.inference_mode()
def pass_milliseconds(run: Run, batch: int, threads: int = 1, rounds: int = 15) -> float:
    """Return the median time of a pass of the first expert's network, in ms."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        network = expert_networks(run, [0], "fused", torch.device("cpu"))[0]
        x = torch.randn(batch, *run.family.latent_shape)
        at, labels = torch.full((batch,), 0.9, dtype=torch.float64), {"label": torch.arange(batch) % 10}
        times = []
        for _ in range(rounds + 3):
            began = time.perf_counter()
            network(x, at, labels)
            times.append(time.perf_counter() - began)
        return sorted(times[3:])[rounds // 2] * 1e3
    finally:
        torch.set_num_threads(before)


def measure(run: Run, threads: int) -> dict[int, float]:
    """Return the ms of a pass by batch size."""
    return {batch: pass_milliseconds(run, batch, threads) for batch in BATCHES}


def main() -> None:
    options = arguments(__doc__).parse_args()
    figures: dict[str, Any] = {}
    for run in (digits_run(options.work), bench_run(options.work)):
        table = Table("batch", *(str(batch) for batch in BATCHES), title=f"{run.name}: ms a pass and sample")
        for threads in (1, 2):
            times = measure(run, threads)
            figures[f"{run.name}_pass_ms_{threads}"] = times
            table.add_row(f"{threads} thread(s)", *(f"{times[batch] / batch:.2f}" for batch in BATCHES))
        console.print(table)
        figures[f"{run.name}_ms"] = figures[f"{run.name}_pass_ms_1"][1]
        figures[f"{run.name}_folder"] = str(run.folder)
    finish("runs", figures, options.json)


if __name__ == "__main__":
    main()
