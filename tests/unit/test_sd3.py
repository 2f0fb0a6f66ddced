"""Stable Diffusion 3 and 3.5: its sampler's times with a shift by the tokens, and the variants of its network."""

from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, UniPCMultistepScheduler
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift, retrieve_timesteps

from raydmd.diffusion.times import step_grid
from raydmd.errors import UserError
from raydmd.models.registry import build_family
from raydmd.models.tiny import TINY_MODELS

torch.set_num_threads(1)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("steps", [2, 4, 28])
def test_the_times_are_those_of_diffusers_scheduler(dynamic: bool, steps: int, tmp_path: Path) -> None:
    """The pipeline gives its scheduler mu and no sigmas; times that end in 1/steps, as Flux's, are others."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic)
    scheduler.save_pretrained(tmp_path / "scheduler")
    for shape in ([16, 128, 128], [16, 64, 96]):
        mu = {"mu": calculate_shift(shape[1] // 2 * (shape[2] // 2))} if dynamic else {}
        retrieve_timesteps(scheduler, steps, "cpu", **mu)
        times = torch.tensor(build_family("sd3", str(tmp_path), {"latent_shape": shape}).teacher_times(steps))
        assert torch.allclose(times, scheduler.sigmas, atol=3e-6)
        for wrong in (step_grid(steps), step_grid(steps, 3.0)):
            assert (torch.tensor(wrong) - scheduler.sigmas).abs().max() > 1e-2


def test_a_sampler_that_the_pipeline_would_not_run_so_is_refused(tmp_path: Path) -> None:
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, use_dynamic_shifting=True
    )
    scheduler.save_pretrained(tmp_path / "scheduler")
    with pytest.raises(UserError, match="use_dynamic_shifting true: .* gives UniPCMultistepScheduler no sigmas"):
        build_family("sd3", str(tmp_path)).teacher_times(4)


@pytest.mark.parametrize(
    "changes", [{}, {"qk_norm": "rms_norm"}, {"qk_norm": "rms_norm", "dual_attention_layers": [0, 1]}]
)
def test_medium_large_and_3_5_are_loaded_whole(changes: dict[str, object], tmp_path: Path) -> None:
    """3 has neither normed queries nor second attention, 3.5 Large the first, 3.5 Medium both."""
    tiny = TINY_MODELS["sd3"]
    small = dict(
        sample_size=8, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=12, pos_embed_max_size=8,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        SD3Transformer2DModel(**small, **changes).save_pretrained(tmp_path / "transformer")
    family = tiny.build(tmp_path)
    teacher = family.load_teacher()
    names = {name.split(".")[-2] for name, _ in teacher.named_parameters()}
    assert ("norm_q" in names) == ("qk_norm" in changes)
    assert any(".attn2." in name for name, _ in teacher.named_parameters()) == ("dual_attention_layers" in changes)
    x = torch.randn(1, *family.latent_shape, generator=torch.Generator().manual_seed(0))
    t, conditions = torch.tensor([0.4]), family.conditions(tiny.rows(1))
    y = teacher(x, t, conditions)

    def by_hand(timestep: torch.Tensor) -> torch.Tensor:
        embeds, pooled = conditions["prompt_embeds"], conditions["pooled_prompt_embeds"]
        return teacher.network(x, embeds, pooled, timestep).sample

    assert torch.allclose(y, by_hand(1000 * t), atol=1e-6)
    assert (y - by_hand(t)).abs().max() > 1e-4
