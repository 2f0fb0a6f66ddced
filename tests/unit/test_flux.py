"""Flux.1: guidance inside the network, what of the network adapts, schnell."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel, UniPCMultistepScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps
from test_every_family import recipe_of

from raydmd.config.recipe import Recipe
from raydmd.data.pair_shards import PairIndex
from raydmd.data.prompts import write_prompts
from raydmd.diffusion.solvers import euler_step
from raydmd.errors import UserError
from raydmd.methods.pairs import pair_facts
from raydmd.models.diffusers.flux import FluxDenoiser, picture_ids
from raydmd.models.experts import Experts
from raydmd.models.registry import build_family
from raydmd.models.tiny import TINY_MODELS
from raydmd.models.tiny.flux import TinyFlux
from raydmd.recipe_check import check
from raydmd.training.teacher import Scorer

torch.set_num_threads(1)

TINY = TINY_MODELS["flux"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TINY.save(tmp_path_factory.mktemp("flux"))


def test_the_embedded_guidance_is_the_pipelines(folder: Path) -> None:
    """At guidance_scale 1 the first step is FluxPipeline's with that guidance_scale, and no null prompt is there."""
    assert isinstance(TINY, TinyFlux)
    rows = TINY.rows(2)
    family = TINY.build(folder, embedded_guidance=2)
    scorer = Scorer(recipe_of(TINY, folder), family, family.load_teacher())
    noise = torch.randn(2, *family.latent_shape, generator=torch.Generator().manual_seed(1))
    conditions = family.conditions({key: value for key, value in rows.items() if not key.startswith("negative_")})
    t, t_next = family.teacher_times(4)[:2]
    prediction = scorer.predict(noise, torch.full((2,), t, dtype=torch.float64), conditions, 1.0)
    made = euler_step(family.schedule, prediction, noise, t, t_next, family.prediction)
    right, wrong = (TINY.embedded_step(folder, rows, noise, 1.0, 4, scale) for scale in (2.0, 3.5))
    assert (made - right).abs().max() <= 1e-5
    assert (made - wrong).abs().max() > 1e-3
    with pytest.raises(UserError, match="guidance needs the null prompt in column 'negative_prompt_embeds'"):
        scorer.predict(noise, torch.full((2,), t, dtype=torch.float64), conditions, 3.0)


def test_prompts_without_the_null_prompt_do_at_a_scale_of_1(folder: Path, tmp_path: Path) -> None:
    """With null_prompt false its columns are not asked for; guidance is then refused before anything is started."""
    rows = {key: value for key, value in TINY.rows(3).items() if not key.startswith("negative_")}
    write_prompts(tmp_path / "prompts.parquet", rows)

    def recipe(scale: float, null: bool) -> Recipe:
        return recipe_of(
            TINY, folder, f"prompts.path={tmp_path}/prompts.parquet", f"teacher.guidance_scale={scale}",
            f"teacher.options.null_prompt={str(null).lower()}",
        )  # fmt: skip

    check(recipe(1.0, False))
    with pytest.raises(UserError, match="teacher.options.null_prompt: guidance .* needs the null prompt"):
        check(recipe(3.0, False))
    with pytest.raises(UserError, match="has no column 'negative_prompt_embeds'"):
        check(recipe(1.0, True))


def test_pairs_are_of_one_embedded_guidance(folder: Path) -> None:
    """ODE pairs of a teacher that was told another scale are refused by the option's name."""
    two, other, again = (
        pair_facts(recipe_of(TINY, folder), TINY.build(folder, embedded_guidance=scale), None)
        for scale in (2, 3.5, 2.0)
    )
    assert two.difference(again) is None
    assert other.difference(two) == "teacher.options: embedded_guidance 2 there, embedded_guidance 3.5 here"
    wan = TINY_MODELS["wan"].build(folder)
    assert wan.constant_inputs == {} and "inputs" not in PairIndex(replace(two, inputs=""), 1).text()


def sigmas_of(scheduler: Any, steps: int, tokens: int) -> torch.Tensor:
    """Call a scheduler as FluxPipeline does."""
    sigmas = None if scheduler.config.get("use_flow_sigmas") else np.linspace(1.0, 1 / steps, steps)
    retrieve_timesteps(scheduler, steps, "cpu", sigmas=sigmas, mu=calculate_shift(tokens))
    return scheduler.sigmas.double()


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),  # dev's
        FlowMatchEulerDiscreteScheduler(shift=1.0),  # schnell's
        UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    ],
)
def test_the_times_are_those_of_diffusers_scheduler(scheduler: Any, tmp_path: Path) -> None:
    scheduler.save_pretrained(tmp_path / "scheduler")
    for height, width in ((128, 128), (64, 96)):
        family = build_family("flux", str(tmp_path), {"latent_shape": [16, height, width]})
        for steps in (4, 28):
            times = torch.tensor(family.teacher_times(steps), dtype=torch.float64)
            assert torch.allclose(times, sigmas_of(scheduler, steps, height * width // 4), atol=3e-6)
            if scheduler.config.get("use_dynamic_shifting"):
                assert not torch.allclose(times, sigmas_of(scheduler, steps, height * width), atol=1e-2)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_students_and_fake_score_are_told_the_same_guidance(kind: str, folder: Path) -> None:
    """What is trained begins as the teacher does: as the guided network of that scale, and of no other."""
    made = []
    for scale in (2.0, 3.5):
        family = TINY.build(folder, embedded_guidance=scale)
        teacher = family.load_teacher()
        x = torch.randn(1, *family.latent_shape, generator=torch.Generator().manual_seed(0))
        given = x, torch.tensor([0.6]), family.conditions(TINY.rows(1))
        own = teacher(*given)
        experts = Experts(teacher, 1, kind, 4, 8.0, family.lora_targets, 0)
        experts.start(0)
        assert torch.allclose(experts.expert(0)(*given), own, atol=1e-6)
        made.append(own)
    assert (made[0] - made[1]).abs().max() > 1e-3


def test_a_network_without_guidance_is_given_none(tmp_path: Path, folder: Path) -> None:
    """Schnell's."""
    FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=12, axes_dims_rope=(4, 6, 6),
    ).save_pretrained(tmp_path / "transformer")  # fmt: skip
    family = TINY.build(tmp_path)
    schnell, dev = family.load_teacher(), TINY.build(folder).load_teacher()
    assert isinstance(schnell, FluxDenoiser) and isinstance(dev, FluxDenoiser)
    assert schnell.guidance is None and dev.guidance == 3.5
    x = torch.randn(1, *family.latent_shape, generator=torch.Generator().manual_seed(0))
    assert schnell(x, torch.tensor([0.6]), family.conditions(TINY.rows(1))).isfinite().all()


def test_the_last_layer_is_not_adapted(folder: Path) -> None:
    """Though it is called proj_out, as a layer of the blocks of one stream is."""
    family = TINY.build(folder)
    experts = Experts(family.load_teacher(), 1, "lora", 4, 8.0, family.lora_targets, 0)
    experts.start(0)
    adapted = {name.split(".lora_")[0] for name in experts.trainable_parameters() if ".proj_out." in name}
    assert len(adapted) == 1 and "single_transformer_blocks.0.proj_out" in adapted.pop()


def test_positions_are_the_pipelines() -> None:
    wanted = FluxPipeline._prepare_latent_image_ids(1, 4, 3, torch.device("cpu"), torch.float32)
    ids = picture_ids(4, 3, torch.device("cpu"))
    assert torch.equal(ids.float(), wanted)
    assert not torch.equal(picture_ids(3, 4, torch.device("cpu")).float(), wanted)
