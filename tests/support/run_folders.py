"""Makes a run's folder in this process, as the runtime leaves it: trained by the sequential reference."""

import functools
import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from raydmd.config.recipe import Recipe, dump_recipe
from raydmd.data.prompts import PromptTable
from raydmd.evaluation import classifier
from raydmd.methods.local import Figures, train
from raydmd.methods.registry import plan_phases
from raydmd.models.experts import Experts
from raydmd.runs.expert_index import write_index
from raydmd.runs.folders import expert_file
from raydmd.runs.run import Run, recipe_family
from raydmd.sampling.plan import plan_iterations


@functools.cache
def classifier_file() -> bytes:
    """Return the digits' classifier's file, trained once for all tests."""
    with tempfile.TemporaryDirectory() as folder:
        classifier.load_classifier(Path(folder))
        (file,) = Path(folder).iterdir()  # and nothing else is written
        return file.read_bytes()


def put_classifier(run: Run) -> Run:
    """Put the classifier where a run keeps it."""
    folder = run.folder / ".cache"
    folder.mkdir()
    (folder / classifier.CACHE_FILE).write_bytes(classifier_file())
    return run


def draw_run(recipe: Recipe, folder: Path) -> Run:
    """Write recipe and experts, each the teacher with weights of its own drawn onto it, as far as training might go."""
    family, kind = recipe_family(recipe), recipe.method.experts
    phases = plan_phases(recipe, family.schedule.t_max)
    experts = Experts(
        family.load_teacher(), len(phases), kind.kind, kind.rank, kind.alpha, family.lora_targets, recipe.seed,
        [phase.interval for phase in phases],
    )  # fmt: skip
    for index in range(len(phases)):
        experts.start(index)
        draw, size = torch.Generator().manual_seed(index), 0.05 if kind.kind == "lora" else 0.01
        with torch.no_grad():
            for parameter in experts.trainable_parameters().values():
                parameter.add_(size * torch.randn(parameter.shape, generator=draw))
        file = expert_file(folder, index)
        file.parent.mkdir(parents=True)
        save_file(experts.state(index), file, experts.metadata(index))
    (folder / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    write_index(folder)
    return Run(folder)


def make_run(recipe: Recipe, folder: Path, prompts: PromptTable) -> Run:
    """Train ``recipe`` and write recipe, experts, metrics and events."""
    family = recipe_family(recipe)
    ends, lines = [], []
    for length in plan_iterations(recipe, plan_phases(recipe)):
        ends.append(length + (ends[-1] if ends else 0))

    def record(iteration: int, made: Figures) -> None:
        fakes, (figures,) = made["fake"], made["generator"]
        losses = [row["loss_fake"] for fake in fakes for _, row in fake.micro]
        lines.append(
            {
                "phase": 1 + sum(iteration >= end for end in ends), "iteration": iteration,
                "generator_version": figures.version, "fake_version": fakes[-1].version,
                "loss_fake": sum(losses) / len(losses), "generator_grad_norm": figures.norm,
                **figures.micro[0][1],
                "samples": recipe.batch.size, "seconds": 0.5,
                "roles": {
                    role: {"busy_seconds": busy, "workers": 1}
                    for role, busy in (("teacher", 0.1), ("fake", 0.4), ("generator", 0.3))
                },
            }
        )  # fmt: skip

    trained = train(recipe, family, family.load_teacher(), prompts, record)
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    events = [
        {"time": 1000.0, "event": "started", "workers": {"fake": 1}, "seconds": 3.2},
        {"time": 1004.0, "event": "worker-lost", "role": "fake"},
        {"time": 1004.5, "event": "recovered", "role": "fake", "seconds": 0.52, "steps_lost": 0},
        {"time": 1005.0, "event": "checkpoint", "iteration": 2, "bytes": 1000},
        {"time": 1075.0, "event": "finished", "iteration": 4},
    ]
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
    for index, weights in enumerate(trained.experts):
        file = expert_file(folder, index)
        file.parent.mkdir(parents=True)
        metadata = trained.parts["generator"].experts.metadata(index)
        save_file({name: value.contiguous() for name, value in weights.items()}, file, metadata)
    write_index(folder)
    return put_classifier(Run(folder)) if family.name == "digits" else Run(folder)
