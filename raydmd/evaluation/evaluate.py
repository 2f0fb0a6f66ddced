"""`raydmd evaluate`: student, phase boundaries and teacher, measured against many-step samples and the data."""

import hashlib
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raydmd.atomic import write_text
from raydmd.config.recipe import Recipe
from raydmd.data import ring
from raydmd.data.digits import CLASSES, load_digits
from raydmd.diffusion.random import Key, normal
from raydmd.errors import UserError
from raydmd.evaluation.chunks import in_chunks, part
from raydmd.evaluation.classifier import DigitsClassifier, held_out_accuracy, load_classifier
from raydmd.evaluation.metrics import (
    accuracy,
    frechet_distance,
    pairwise_cosine_within_class,
    sliced_wasserstein,
    variance_ratio,
    variance_within_class,
)
from raydmd.evaluation.points import ring_metrics
from raydmd.evaluation.prompts import in_turn
from raydmd.models.base import Conditions, Denoiser, Family
from raydmd.models.experts import Experts
from raydmd.runs.run import Run
from raydmd.sampling.noise import starting_latents
from raydmd.sampling.phase import Phase
from raydmd.sampling.student import StudentSamples, sample_student
from raydmd.training.teacher import Scorer

Figures = dict[str, Any]
FEWEST = 2 * CLASSES
EULER = (4, 8)
WITH_FIGURES = ("digits", "ring")


def has_figures(recipe: Recipe) -> bool:
    """Whether a run by ``recipe`` can be measured: its family has figures, and its evaluation enough samples."""
    return recipe.teacher.family in WITH_FIGURES and recipe.evaluation.samples >= FEWEST


class Judge(ABC):
    """Says how good samples of one family are, against the teacher's many-step samples and the data."""

    @abstractmethod
    def figures(self, samples: Tensor) -> Figures:
        """Return the figures of samples [N, ...] for the reference's conditions."""

    @abstractmethod
    def data_figures(self) -> Figures:
        """Return the same of the data itself."""

    @abstractmethod
    def boundary(self, x_s: Tensor, true_x_s: Tensor, completed: Tensor) -> Figures:
        """Return the figures of samples at a phase's end, of the truth there, and of x_s completed by the teacher."""


class DigitsJudge(Judge):
    """Fidelity in a small classifier's features, diversity in pixels.

    - ``fd_teacher``, ``fd_data``: Frechet distance to the teacher's many-step samples and to all the digits, in the
      features of `DigitsClassifier`; 64 is the whole variance of the real digits;
    - ``accuracy``: share that the classifier takes for what was asked;
    - ``pcos``: mean cosine between two pictures of a class after taking away the mean picture of the teacher's samples;
      lower is more diverse;
    - ``variance``: within a class, summed over the 64 pixels (which lie in [-1, 1]); higher is more diverse.
    """

    def __init__(self, samples: Tensor, labels: Tensor, classifier: DigitsClassifier) -> None:
        self.labels, self.classifier, self.center = labels, classifier, samples.mean(0)
        self.data, self.data_labels = load_digits()
        self.teacher_features = classifier.judge(samples)[0]
        self.data_features = classifier.judge(self.data)[0]

    def figures(self, samples: Tensor) -> Figures:
        """Return ``fd_teacher``, ``fd_data``, ``accuracy``, ``pcos`` and ``variance``."""
        return self._figures(samples, self.labels)

    def data_figures(self) -> Figures:
        """Return the same of the digits themselves; the accuracy is that on the digits held out in training."""
        return {**self._figures(self.data, self.data_labels), "accuracy": held_out_accuracy(self.classifier)}

    def boundary(self, x_s: Tensor, true_x_s: Tensor, completed: Tensor) -> Figures:
        """Return ``boundary_fd`` (of the completed to the teacher's), their other figures, ``x_s_variance_ratio``."""
        figures = self.figures(completed)
        return {
            "boundary_fd": figures.pop("fd_teacher"),
            "x_s_variance_ratio": variance_ratio(x_s, true_x_s),
            **figures,
        }

    def _figures(self, samples: Tensor, labels: Tensor) -> Figures:
        features, logits = self.classifier.judge(samples)
        return {
            "fd_teacher": frechet_distance(features, self.teacher_features),
            "fd_data": frechet_distance(features, self.data_features),
            "accuracy": accuracy(logits, labels),
            "pcos": pairwise_cosine_within_class(samples, labels, self.center),
            "variance": variance_within_class(samples, labels),
        }


class RingJudge(Judge):
    """Modes, their weights and their width against the ring's closed form (`ring_metrics`)."""

    def __init__(self, samples: Tensor, seed: int) -> None:
        self.samples = samples
        self.data = ring.sample(len(samples), Key(seed, 0, "evaluation/data", 0))
        self.fresh = ring.sample(len(samples), Key(seed, 0, "evaluation/data", 1))

    def figures(self, samples: Tensor) -> Figures:
        """Return `ring_metrics`, and ``sw_teacher``: sliced Wasserstein distance to the teacher's samples."""
        return {**ring_metrics(samples, self.data), "sw_teacher": sliced_wasserstein(samples, self.samples)}

    def data_figures(self) -> Figures:
        """Return the figures of a second draw of the data: what is left at best."""
        return self.figures(self.fresh)

    def boundary(self, x_s: Tensor, true_x_s: Tensor, completed: Tensor) -> Figures:
        """Return ``boundary_sw``, ``x_s_variance_ratio`` and the completed samples' figures."""
        return {
            "boundary_sw": sliced_wasserstein(x_s, true_x_s),
            "x_s_variance_ratio": variance_ratio(x_s, true_x_s),
            **self.figures(completed),
        }


@dataclass(frozen=True)
class Reference:
    """What the students of one teacher are measured against; made once for a teacher by `make_reference`.

    Attributes:
        conditions: of each sample, the prompts in turn.
        samples: the teacher's many-step samples [N, ...].
        judge: measures samples against them and the data.
        seed: of all that is drawn.
        batch: samples at a time.
    """

    conditions: Conditions
    samples: Tensor
    judge: Judge
    seed: int
    batch: int

    def __len__(self) -> int:
        """Return N."""
        return len(self.samples)

    def truth(self, family: Family, phase: Phase) -> Tensor:
        """Return true samples of x_s at a phase's end: the teacher's many-step samples (ring: the data), diffused."""
        clean = self.judge.data if isinstance(self.judge, RingJudge) else self.samples
        noise = normal(Key(self.seed, 0, "evaluation/truth", phase.index), 0, len(clean), family.latent_shape)
        return family.schedule.diffuse(clean, noise, phase.end)

    def figures(self, samples: Tensor) -> Figures:
        """Return the judge's figures, or ``not_finite``, the share of samples that have diverged, if any has."""
        return _diverged(samples) or self.judge.figures(samples)


def make_reference(
    recipe: Recipe,
    family: Family,
    teacher: Denoiser,
    *,
    samples: int | None = None,
    seed: int | None = None,
    cache: Path | None = None,
) -> Reference:
    """Sample the teacher by Heun's method in ``recipe.teacher.steps`` steps, with guidance, and make its judge.

    Args:
        recipe: gives the guidance, the steps, and the defaults of ``samples`` and ``seed``.
        family: the kind of network.
        teacher: the many-step teacher.
        samples: how many; default ``recipe.evaluation.samples``.
        seed: default the recipe's.
        cache: folder that keeps the digits' classifier; None trains it anew, in seconds.

    Raises:
        UserError: a family that has no figures, or too few samples.
    """
    count = _count(recipe, family, samples)
    seed, batch = recipe.seed if seed is None else seed, recipe.evaluation.batch
    conditions = in_turn(recipe, family, count)
    scorer = Scorer(recipe, family, teacher)
    many = teacher_samples(scorer, conditions, count, "reference", seed=seed, batch=batch)
    if not many.isfinite().all():
        raise UserError(f"teacher.path: the teacher in '{family.path}' makes samples that are not finite")
    judge: Judge
    if family.name == "digits":
        judge = DigitsJudge(many, conditions["label"], load_classifier(cache))
    else:
        judge = RingJudge(many, seed)
    return Reference(conditions, many, judge, seed, batch)


def _count(recipe: Recipe, family: Family, samples: int | None) -> int:
    if family.name not in WITH_FIGURES:
        raise UserError(f"teacher.family: there are figures for digits and ring, not for '{family.name}'")
    count = recipe.evaluation.samples if samples is None else samples
    if count < FEWEST:
        raise UserError(f"evaluation.samples: {count} are too few; at least {FEWEST}")
    return count


def teacher_samples(
    scorer: Scorer,
    conditions: Conditions,
    count: int,
    stream: str,
    *,
    seed: int,
    batch: int,
    steps: int | None = None,
    method: str = "heun",
) -> Tensor:
    """Return the teacher's samples [count, ...] from the noise of one stream of ``seed``."""
    family, steps = scorer.family, steps or scorer.recipe.teacher.steps
    numbers = normal(Key(seed, 0, f"evaluation/{stream}", 0), 0, count, family.latent_shape)
    noise = starting_latents(family, numbers)
    return complete(scorer, noise, conditions, batch=batch, steps=steps, method=method)


def complete(
    scorer: Scorer,
    x: Tensor,
    conditions: Conditions,
    *,
    batch: int,
    steps: int | None = None,
    start: float | None = None,
    method: str = "heun",
) -> Tensor:
    """Return ``x`` [N, ...], which is at time ``start``, taken to t = 0 by the teacher's PF-ODE."""
    steps = steps or scorer.recipe.teacher.steps

    def make(first: int, size: int) -> Tensor:
        rows = part(conditions, first, size)
        return scorer.sample(x[first : first + size], rows, steps=steps, start=start, method=method)[-1].cpu()

    return in_chunks(make, len(x), batch)


def evaluate_teacher(
    recipe: Recipe, family: Family, teacher: Denoiser, reference: Reference, steps: tuple[int, ...] = EULER
) -> Figures:
    """Return the figures of the teacher's own samples, from other noise than the reference's.

    ``teacher`` is the many-step sampler, hence the floor of every distance; ``teacher_euler_4`` and so on are its
    Euler samplers of few steps; ``data`` is the data itself.
    """
    scorer = Scorer(recipe, family, teacher)
    common: dict[str, Any] = {"seed": reference.seed, "batch": reference.batch}
    many = teacher_samples(scorer, reference.conditions, len(reference), "floor", **common)
    rows = {"data": reference.judge.data_figures(), "teacher": reference.figures(many)}
    for few in steps:
        quick = teacher_samples(
            scorer, reference.conditions, len(reference), "floor", steps=few, method="euler", **common
        )
        rows[f"teacher_euler_{few}"] = reference.figures(quick)
    return rows


def evaluate_student(
    recipe: Recipe, family: Family, teacher: Denoiser, experts: Experts, phases: list[Phase], reference: Reference
) -> Figures:
    """Return the figures of a student: ``student``, and ``boundaries``, one entry for each phase that ends above 0.

    A boundary's entry has ``phase`` (from 1), ``s``, and the judge's figures of x_s and of x_s as the teacher's PF-ODE
    completes it. ``student`` is missing while the last phase is not among ``phases``.
    """
    made = student_samples(recipe, family, experts, phases, reference)
    result: Figures = {} if phases[-1].end > 0 else {"student": reference.figures(made.latents)}
    scorer, result["boundaries"] = Scorer(recipe, family, teacher), []
    for phase, x_s in zip(phases, made.boundaries, strict=True):
        if phase.end > 0:
            entry: Figures = {"phase": phase.index + 1, "s": phase.end}
            if not (wrong := _diverged(x_s)):
                completed = complete(scorer, x_s, reference.conditions, start=phase.end, batch=reference.batch)
                wrong = _diverged(completed)
                if not wrong:
                    entry |= reference.judge.boundary(x_s, reference.truth(family, phase), completed)
            result["boundaries"].append(entry | wrong)
    return result


def student_samples(
    recipe: Recipe, family: Family, experts: Experts, phases: list[Phase], reference: Reference
) -> StudentSamples:
    """Return a student's samples for the reference's conditions."""
    parts = []
    for start in range(0, len(reference), reference.batch):  # one after the other: LoRA experts share a backbone
        rows = part(reference.conditions, start, reference.batch)
        count = min(reference.batch, len(reference) - start)
        parts.append(
            sample_student(
                family, experts, phases, rows, count, seed=reference.seed, start=start, solver=recipe.method.solver
            )
        )
    boundaries = [torch.cat([made.boundaries[k] for made in parts]) for k in range(len(phases))]
    return StudentSamples(boundaries[-1], boundaries, [])


def evaluate_run(run: Run, samples: int | None = None, progress: Callable[[str], None] | None = None) -> Figures:
    """Measure a run and write ``evaluation.json`` into its folder; return what it holds.

    Args:
        run: finished, or with its first experts trained.
        samples: how many to measure; default ``recipe.evaluation.samples``.
        progress: told in a word what is being done.

    Raises:
        UserError: no trained expert, no teacher, a family that has no figures, or too few samples.
        StorageError: the disk is full or gone.
    """
    say, since = progress or (lambda words: None), time.perf_counter()
    phases, teacher = run.trained_phases(), run.teacher()
    experts, made_from = run.experts(teacher, finite=False), fingerprint(run)
    _count(run.recipe, run.family, samples)  # refused before anything is told
    say("sampling the teacher")
    reference = make_reference(run.recipe, run.family, teacher, samples=samples, cache=run.folder / ".cache")
    steps = sum(phase.steps for phase in run.phases)
    result: Figures = {"family": run.family.name, "method": run.recipe.method.name, "steps": steps}
    result |= {"samples": len(reference), "seed": reference.seed}
    say("measuring the teacher")
    result |= evaluate_teacher(run.recipe, run.family, teacher, reference, tuple(sorted({*EULER, steps})))
    say("measuring the student")
    result |= evaluate_student(run.recipe, run.family, teacher, experts, phases, reference)
    result |= {"seconds": time.perf_counter() - since, "experts": made_from}
    write_text(run.folder / "evaluation.json", json.dumps(result, indent=2) + "\n")
    return result


def evaluation_of(run: Run, progress: Callable[[str], None] | None = None) -> Figures:
    """Return the run's evaluation: the stored one if it is of the experts that are there now, else a new one."""
    try:
        stored = json.loads((run.folder / "evaluation.json").read_text(encoding="utf-8"))
        if stored["experts"] == fingerprint(run):
            return dict(stored)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return evaluate_run(run, progress=progress)


def fingerprint(run: Run) -> dict[str, str]:
    """Return a short hash of each trained expert's file."""
    files = {f"phase-{phase.index + 1}": run.expert_file(phase.index) for phase in run.trained_phases()}
    return {name: hashlib.blake2b(file.read_bytes(), digest_size=8).hexdigest() for name, file in files.items()}


def _diverged(samples: Tensor) -> Figures:
    """Return ``not_finite``, the share of samples with a value that is no number; nothing when there is none."""
    bad = ~samples.flatten(1).isfinite().all(dim=1)
    return {"not_finite": float(bad.double().mean())} if bad.any() else {}
