"""EDM networks: the preconditioning and the sampler of Karras et al. 2022, by its formulas and diffusers' scheduler."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EDMEulerScheduler, UNet2DModel
from test_every_family import inputs, recipe_of

from raydmd.errors import UserError
from raydmd.models.base import Family
from raydmd.models.features import read_features
from raydmd.models.tiny import TINY_MODELS
from raydmd.models.tiny.edm import CLASSES
from raydmd.objectives.distribution_matching import distribution_matching_gradient
from raydmd.sampling.noise import initial_noise
from raydmd.training.teacher import Scorer

torch.set_num_threads(1)

TINY = TINY_MODELS["edm"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TINY.save(tmp_path_factory.mktemp("edm"))


def family_of(folder: Path, **options: Any) -> Family:
    return TINY.build(folder, **options)


def coefficients(sigma: float, data: float = 0.5) -> tuple[float, float, float, float]:
    """c_skip, c_out, c_in, c_noise: the last column of Table 1."""
    root = math.sqrt(sigma**2 + data**2)
    return data**2 / (sigma**2 + data**2), sigma * data / root, 1 / root, math.log(sigma) / 4


def test_the_preconditioning_is_the_papers(folder: Path) -> None:
    family = family_of(folder)
    teacher: Any = family.load_teacher()
    network = UNet2DModel.from_pretrained(folder / "unet").eval()
    x, _, conditions = inputs(TINY, family)
    label = conditions["label"]
    for sigma in (0.02, 0.5, 7.0, 80.0):
        c_skip, c_out, c_in, c_noise = coefficients(sigma)
        noisy = x * sigma
        made = teacher(noisy, torch.full((3,), sigma, dtype=torch.float64), conditions)

        def denoised(skip: float, out: float, into: float, noise: float, x: torch.Tensor = noisy) -> torch.Tensor:
            with torch.no_grad():
                return skip * x + out * network(into * x, torch.full((3,), noise), label).sample

        error = (made - denoised(c_skip, c_out, c_in, c_noise)).abs().max()
        assert error <= 1e-5 * (1 + made.abs().max())
        wrong = {  # the other columns of Table 1, and slips
            "VE: no scale of the input": (c_skip, c_out, 1.0, c_noise),
            "VE: no skip's scale": (1.0, c_out, c_in, c_noise),
            "VE: c_out = sigma": (c_skip, sigma, c_in, c_noise),
            "c_noise = ln(sigma) / 2": (c_skip, c_out, c_in, 2 * c_noise),
            "c_noise = sigma": (c_skip, c_out, c_in, sigma),
            "a deviation of 1": coefficients(sigma, 1.0),
        }
        for name, values in wrong.items():
            if "c_noise = ln" in name and abs(c_noise) < 0.2:
                continue
            assert (made - denoised(*values)).abs().max() > 10 * error + 1e-6, (name, sigma)
    one = family_of(folder, sigma_data=1.0).load_teacher()
    t = torch.full((3,), 0.5, dtype=torch.float64)
    assert not torch.allclose(one(x, t, conditions), teacher(x, t, conditions), atol=1e-3)


def test_the_networks_input_and_target_have_a_deviation_of_one() -> None:
    """Karras et al. Appendix B.6: what c_in, c_out and c_skip are made for, of data with a deviation of .5."""
    generator = torch.Generator().manual_seed(0)
    y, n = (torch.randn(200_000, generator=generator, dtype=torch.float64) for _ in range(2))
    for sigma in (0.1, 1.0, 20.0):
        c_skip, c_out, c_in, _ = coefficients(sigma)
        noisy = 0.5 * y + sigma * n
        assert (c_in * noisy).std() == pytest.approx(1.0, abs=0.01)
        assert ((0.5 * y - c_skip * noisy) / c_out).std() == pytest.approx(1.0, abs=0.01)


def test_the_noise_levels_are_the_papers(folder: Path) -> None:
    family = family_of(folder)
    for steps in (2, 18, 256):
        wanted = [(80 ** (1 / 7) + i / (steps - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(steps)]
        times = family.teacher_times(steps)
        assert times == pytest.approx([*wanted, 0.0], rel=1e-12) and times[0] == family.schedule.t_max == 80.0
        scheduler = EDMEulerScheduler()
        scheduler.set_timesteps(steps)
        assert torch.allclose(torch.tensor(times), scheduler.sigmas, rtol=1e-4)
        off = [(80 ** (1 / 7) + i / steps * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(steps)]
        assert not np.allclose(times[:-1], off, rtol=1e-2)
    assert family.teacher_times(1) == [80.0, 0.0]
    assert family_of(folder, sigma_max=10).teacher_times(3)[0] == 10.0
    with pytest.raises(UserError, match="steps: 0 is not possible"):
        family.teacher_times(0)


def test_samples_are_those_of_diffusers_scheduler(folder: Path) -> None:
    """From noise of deviation 80 to a picture, with guidance; diffusers has EDM's Euler steps, if no pipeline."""
    recipe = recipe_of(TINY, folder)
    family = family_of(folder)
    teacher = family.load_teacher()
    scorer, rows, steps = Scorer(recipe, family, teacher), TINY.rows(2), 4
    conditions = family.conditions(rows)
    noise = initial_noise(family, 5, 0, 2)
    assert 60 < noise.std() < 100
    network = UNet2DModel.from_pretrained(folder / "unet").eval()
    scheduler = EDMEulerScheduler()
    scheduler.set_timesteps(steps)
    x = noise * scheduler.init_noise_sigma / 80.0  # sqrt(80^2 + 1) there
    labels = conditions["label"], torch.full((2,), CLASSES)

    def end(guidance_scale: float) -> torch.Tensor:
        at = x
        scheduler.set_timesteps(steps)
        for t in scheduler.timesteps:
            scaled = scheduler.scale_model_input(at, t)
            with torch.no_grad():
                given, null = (network(scaled, t, label).sample for label in labels)
            at = scheduler.step(null + guidance_scale * (given - null), t, at).prev_sample
        return at

    made = scorer.sample(x, conditions, steps=steps, method="euler")[-1]
    assert (made - end(3.0)).abs().max() < 2e-4 * made.abs().max()
    assert (made - end(1.0)).abs().max() > 1e-2 * made.abs().max()
    assert family.decode(made).shape == (2, 3, 8, 12)


def test_a_network_without_classes(tmp_path: Path) -> None:
    network = UNet2DModel(
        block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, in_channels=1, out_channels=1,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    network.save_pretrained(tmp_path)  # alone, not in `unet`
    family = family_of(tmp_path, classes=0, latent_shape=[1, 8, 8])
    teacher = family.load_teacher()
    assert family.condition_columns == [] and family.conditions({}) == {}
    x = torch.randn(2, 1, 8, 8)
    assert teacher(x, torch.ones(2, dtype=torch.float64), {}).shape == x.shape
    assert family.picture_shape == (1, 8, 8) and family.decode(x).shape == x.shape


def test_labels(folder: Path) -> None:
    family = family_of(folder)
    conditions = family.conditions({"label": np.array([0, CLASSES - 1])})
    assert conditions["label"].dtype == torch.int64
    assert family.unconditional(conditions)["label"].tolist() == [CLASSES, CLASSES]
    for labels, message in (([0, CLASSES], "outside 0..4, e.g. 5"), ([-1], "e.g. -1"), ([0.5], "whole numbers 0..4")):
        with pytest.raises(UserError, match=f"column 'label' .*{message}"):
            family.conditions({"label": np.array(labels)})
    with pytest.raises(UserError, match="no column 'label'"):
        family.conditions({})
    whole = family_of(folder, classes=CLASSES + 1)  # every one a class: none is left for guidance
    whole.check_teacher()
    with pytest.raises(UserError, match=r"teacher.guidance_scale: .* no label of none"):
        whole.unconditional(conditions)


REFUSED = [
    (dict(num_class_embeds=9), {}, "teacher.options.classes: the teacher has 9 classes, not 5; set it to 9, or 8"),
    (dict(num_class_embeds=None), {}, "teacher.options.classes: the teacher has 0 classes, not 5; set it to 0"),
    ({}, dict(classes=0), "teacher.options.classes: the teacher has 6 classes, not 0; set it to 6, or 5"),
    (dict(time_embedding_type="fourier"), {}, "time_embedding_type fourier"),
    (dict(class_embed_type="timestep"), {}, "class_embed_type"),
    (dict(in_channels=4), {}, "takes 4 channels and gives 3"),
    ({}, dict(latent_shape=[3, 7, 8]), r"latent_shape: \[7, 8\] is not divisible by 2"),
    ({}, dict(latent_shape=[4, 8, 8]), r"latent_shape: \[1 or 3, H, W\]"),
    ({}, dict(sigma_data=0), "sigma_data: a number above 0"),
    ({}, dict(sigma_max="80"), "sigma_max: a number above 0 is needed, not '80'"),
    ({}, dict(sigma_min=90.0), "sigma_min: 90 is not below sigma_max 80"),
]


@pytest.mark.parametrize(("change", "options", "message"), REFUSED)
def test_what_does_not_fit_is_refused(
    change: dict[str, Any], options: dict[str, Any], message: str, folder: Path, tmp_path: Path
) -> None:
    config = json.loads((folder / "unet" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UserError, match=message) as error:
        family_of(tmp_path, **options).check_teacher()
    assert "\n" not in str(error.value)


def test_pickles_and_pipelines_are_refused(folder: Path, tmp_path: Path) -> None:
    official = tmp_path / "edm-cifar10-32x32-cond-vp.pkl"
    official.write_bytes(b"not looked at")
    for path in (official, tmp_path):
        with pytest.raises(UserError, match=rf"teacher.path: {official.name} is a pickle.*UNet2DModel") as error:
            family_of(path).check_teacher()
        assert "\n" not in str(error.value)
    (tmp_path / "whole" / "unet").mkdir(parents=True)
    for file in (folder / "unet").iterdir():
        (tmp_path / "whole" / "unet" / file.name).symlink_to(file)
    family_of(tmp_path / "whole").check_teacher()
    (tmp_path / "whole" / "model_index.json").write_text('{"_class_name": "DDPMPipeline"}')
    with pytest.raises(UserError, match="is a pipeline's, .*without EDM's preconditioning"):
        family_of(tmp_path / "whole").check_teacher()


def test_features_and_the_gradient_at_the_noisiest(folder: Path) -> None:
    family = family_of(folder)
    teacher: Any = family.load_teacher()
    x_s, _, conditions = inputs(TINY, family)
    t = torch.full((3,), family.schedule.t_max, dtype=torch.float64)
    x_t = family.schedule.diffuse(x_s, torch.randn(x_s.shape, generator=torch.Generator().manual_seed(2)), t)
    assert 60 < x_t.std() < 100
    prediction, features = read_features(teacher, ["down_blocks.0", "mid_block"], x_t, t, conditions)
    assert [tuple(each.shape[1:]) for each in features] == [(8, 4, 6), (16, 4, 6)]
    with torch.no_grad():
        fake = teacher(x_t, t, family.unconditional(conditions))
    for weight in ("normalized", "raw", "sigma_over_alpha", "sigma_cubed_over_alpha"):
        gradient, broken = distribution_matching_gradient(
            family.schedule, x_s, x_t, prediction, fake, t, 0.0, "x0", weight
        )
        assert not broken.any() and gradient.isfinite().all() and gradient.any()
