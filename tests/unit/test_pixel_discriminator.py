"""ADP's discriminator on pixels, and the regression by LPIPS: derivatives against autograd in one graph."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from imagenet_files import cache, features
from test_adversarial import gradient_of_one_update, same
from test_families_diffusers import STATISTICS, VAES
from test_large_families import large_recipe
from torch import Tensor

from raydmd.config.recipe import Recipe
from raydmd.errors import UserError
from raydmd.methods.base import Trained
from raydmd.methods.dmdx import DMDX
from raydmd.methods.local import LocalProgram, train
from raydmd.methods.registry import build_method
from raydmd.objectives.adversarial import discriminator_loss
from raydmd.recipe_check import absolute, check, check_offline
from raydmd.runs.run import recipe_family
from raydmd.sampling.phase import Phase
from raydmd.training.backpropagated import BackpropagatedGenerator
from raydmd.training.messages import BatchId, Cotangents, Noised, Restored
from raydmd.training.pixel_discriminator import PixelDiscriminator

NAN = float("nan")
ALEX = "method.discriminator.pixel={backbone: 'lpips:alex', layers: [relu1, relu3]}"
ADP = ["method.name=adp", "method.adp.pairs=16", "method.discriminator.width=16", "method.adp.pixel_weight=0.15", ALEX]
LPIPS = ["method.name=dmd", "method.regression={weight: 0.5, pairs: 16, distance: lpips, network: alex}"]


@pytest.fixture(autouse=True)
def alex(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """AlexNet's features, with random weights, in torch's cache."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    cache(tmp_path / "torch", "alexnet", features())


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def restored_of(shape: tuple[int, ...], count: int = 4, apart: float = 0.0) -> Restored:
    x, real = (noise(count, *shape, seed=seed) / 2 for seed in (0, 1))
    return Restored(BatchId(0, 2, 0, 0), x + apart, real, {})


def test_the_chain_from_x_0_to_the_verdict(tmp_path: Path) -> None:
    """x_0 -> VAE -> frozen backbone -> heads -> hinge, in float64, on a video's frames."""
    recipe = large_recipe("wan", tmp_path, *ADP[:1], *ADP[2:])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        VAES["wan"](**STATISTICS).save_pretrained(tmp_path / "vae")
    check(recipe)
    family = recipe_family(recipe)
    part = PixelDiscriminator(recipe, family, family.load_teacher(), build_method(recipe).phases(1.0))
    part.start_phase(0, 0)
    vae = family._load_vae().double()
    part.pixel_backbone.double()
    part.heads.double()
    restored = restored_of(family.latent_shape, 2)
    found = part.vjp(0.15, restored)
    assert found.role == "pixel" and set(found.values) == {"x_s"} and found.batch_id == restored.batch_id
    leaf = restored.x.clone().requires_grad_(True)

    def direct(sign: float = -1.0, scaled: bool = True, weight: float = 0.15) -> Tensor:
        mean, std = (torch.tensor(STATISTICS[key], dtype=torch.float64).view(1, -1, 1, 1, 1) for key in STATISTICS)
        made: list[Tensor] = []
        handle = vae.decoder.register_forward_hook(lambda module, given, output: made.append(output))
        vae.decode(leaf * std + mean if scaled else leaf)
        handle.remove()
        frames = torch.cat(made, 2).transpose(1, 2).flatten(0, 1)
        network = part.pixel_backbone.network
        enlarged = torch.nn.functional.interpolate(frames, (64, 64), mode="bilinear")
        maps = network.net(network.scaling_layer(enlarged))
        logits = torch.stack([head(each) for head, each in zip(part.heads, (maps.relu1, maps.relu3), strict=True)], 1)
        loss = sign * weight * logits.reshape(2, -1).mean(1)
        (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        return gradient

    assert family.to_pixels(leaf).shape[1] == family.frames == 5
    expected = found.values["x_s"]
    assert expected.norm() > 0 and (expected - direct()).norm() < 1e-6 * expected.norm()  # Wan upsamples in float32
    for wrong in (direct(sign=1.0), direct(scaled=False), direct(weight=1.0)):
        assert (expected - wrong).norm() > 0.05 * expected.norm()
    frozen = [*vae.parameters(), *part.pixel_backbone.parameters()]
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in frozen)
    assert not any(parameter.grad is not None and parameter.grad.any() for parameter in part.heads.parameters())


def test_its_heads_learn_and_nothing_else(quick: Any) -> None:
    recipe = quick("digits", *ADP, "optimizer={pixel: {lr: 0.01}}", "batch.size=4")
    family = recipe_family(recipe)
    part = PixelDiscriminator(recipe, family, family.load_teacher(), build_method(recipe).phases(1.0))
    part.start_phase(0, 0)
    before = [value.clone() for value in part.pixel_backbone.parameters()]
    restored = restored_of(family.latent_shape, apart=1.0)
    restored = replace(restored, x=restored.x.float(), real=restored.real.float())
    losses = []
    for _ in range(30):
        stats = part.update([restored])
        losses.append(stats.micro[0][1]["loss_pixel"])
    assert list(stats.micro[0][1]) == list(part.figures) and stats.version == part.updates == 30
    assert losses[-1] < 0.5 * losses[0]
    with torch.no_grad():
        logits = [part.logits(x, torch.zeros(4), {}) for x in (restored.real, restored.x)]
        assert float(discriminator_loss(*logits).mean()) < losses[0]  # it is the teacher's that it holds for real
        assert float(discriminator_loss(*reversed(logits)).mean()) > losses[0]
    assert all(torch.equal(a, b) for a, b in zip(before, part.pixel_backbone.parameters(), strict=True))
    seen = part.pixel_backbone(family.to_pixels(restored.real)[:, 0])
    assert not any(each.requires_grad for each in seen)  # of what is trained on no graph is kept
    again = PixelDiscriminator(recipe, family, family.load_teacher(), build_method(recipe).phases(1.0))
    again.start_phase(0, 0)
    other = again.update([restored])
    assert other.micro[0][1]["loss_pixel"] == losses[0]  # the heads' weights follow from the seed


def test_adp_trains_with_it_and_has_the_role_only_with_its_weight(quick: Any, prompts: Any) -> None:
    recipe = quick("digits", *ADP, "iterations=2")
    check(recipe)
    family, seen = recipe_family(recipe), []
    made = train(recipe, family, family.load_teacher(), prompts("digits"), on_iteration=lambda n, f: seen.append(f))
    assert list(made.parts) == ["generator", "latent", "pixel", "teacher"] and len(seen) == 2
    for figures in seen:
        assert {role: len(stats) for role, stats in figures.items()} == {"latent": 1, "pixel": 1, "generator": 1}
        rows = [row for stats in figures.values() for each in stats for _, row in each.micro]
        assert all(torch.tensor(list(row.values())).isfinite().all() for row in rows)
        assert all(each.norm > 0 and not each.zeroed for stats in figures.values() for each in stats)
    without = quick("digits", *ADP, "iterations=2", "method.adp.pixel_weight=0")
    plain = train(without, family, family.load_teacher(), prompts("digits"))
    assert list(plain.parts) == ["generator", "latent", "teacher"]
    assert any(not torch.equal(value, plain.experts[0][name]) for name, value in made.experts[0].items())
    assert "pixel" in DMDX.roles and isinstance(DMDX.roles["pixel"], Trained)
    for weight, there in ((0, False), (0.15, True)):
        dmdx = quick("digits", "method.name=dmdx", f"method.adp.pixel_weight={weight}", ALEX)
        assert ("pixel" in build_method(dmdx).trained()) is there
    with pytest.raises(UserError, match=r"unknown key 'runtime.pixel'"):
        quick("digits", "method.name=adp", "runtime={pixel: {cpus: 1}}")


def test_dmdx_pre_trains_with_it_and_goes_on_without(quick: Any, prompts: Any) -> None:
    recipe = quick("digits", "method.name=dmdx", *ADP[2:], "method.adp.iterations=1", "method.adp.pairs=16",
                   "method.score_margin=0.04", "iterations=2")  # fmt: skip
    family, seen = recipe_family(recipe), []
    train(recipe, family, family.load_teacher(), prompts("digits"), on_iteration=lambda n, f: seen.append(set(f)))
    assert seen == [{"latent", "pixel", "generator"}, {"fake", "discriminator", "generator"}]


def test_the_generator_follows_both_discriminators(quick: Any, prompts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the pixel discriminator adds to the gradient is its loss's derivative, in one graph."""
    program, found = gradient_of_one_update(quick("digits", *ADP), prompts, monkeypatch)
    monkeypatch.undo()
    _, without = gradient_of_one_update(quick("digits", *ADP, "method.adp.pixel_weight=0"), prompts, monkeypatch)
    generator, part = program.parts["generator"], program.parts["pixel"]

    def direct(weight: float) -> Tensor:
        generator.flat.gradient.zero_()
        for batch in program.prompts(0, 0):
            generator.restore(0, batch)
            x_0, _ = generator._kept.pop(batch.start)
            loss = -weight * part.logits(x_0, torch.zeros(len(x_0)), {}).mean(1)
            (loss.sum() / program.method.recipe.batch.size).backward()
        gradient: Tensor = generator.flat.gradient.clone()
        return gradient

    assert (found - without - direct(0.15)).norm() < 1e-3 * direct(0.15).norm()
    for wrong in (-0.15, 1.0, 0.0):
        assert (found - without - direct(wrong)).norm() > 0.1 * direct(0.15).norm()


def test_samples_that_it_breaks_are_laid_to_it(quick: Any) -> None:
    recipe = quick("digits", *ADP)
    family = recipe_family(recipe)
    generator = BackpropagatedGenerator(recipe, family, family.load_teacher(), build_method(recipe).phases(1.0))
    generator.start_phase(0, 0)
    batch_id = BatchId(0, 2, 0, 0)
    x_s, latent, pixel = (torch.ones(4, 1, 8, 8) for _ in range(3))
    x_s[0, 0, 0, 0], pixel[0] = NAN, NAN
    pixel[1:3, 0, 4, 4] = NAN
    latent[2, 0, 0, 0] = NAN
    given = [Cotangents(batch_id, role, {"x_s": x}) for role, x in (("latent", latent), ("pixel", pixel))]
    proposal = Noised(batch_id, x_s, torch.zeros(4, dtype=torch.float64), {})
    gradient, zeroed = generator.objective(x_s, proposal, *given)
    assert zeroed == {"generator": 1, "latent": 1, "pixel": 1}
    assert not gradient[:3].any() and torch.equal(gradient[3], torch.full((1, 8, 8), 2.0 * 64))


# ---- regression


def test_dmds_regression_by_lpips_is_its_derivative(quick: Any, prompts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    program, found = gradient_of_one_update(quick("digits", *LPIPS), prompts, monkeypatch)
    monkeypatch.undo()
    plain = quick("digits", *LPIPS, "method.regression.distance=l2")
    _, by_l2 = gradient_of_one_update(plain, prompts, monkeypatch)
    monkeypatch.undo()
    _, without = gradient_of_one_update(quick("digits", *LPIPS, "method.regression.weight=0"), prompts, monkeypatch)
    generator = program.parts["generator"]
    network = generator.pair_distance.distance

    def direct(distance: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        generator.flat.gradient.zero_()
        for batch in program.prompts(0, 2):
            x_0, target, _ = generator.from_pairs(BatchId(0, 2, batch.start, 0), batch.count)
            (0.5 * distance(x_0, target).sum() / program.method.recipe.batch.size).backward()
        gradient: Tensor = generator.flat.gradient.clone()
        return gradient

    def l2(x: Tensor, y: Tensor) -> Tensor:
        return (x - y).square().flatten(1).mean(1)

    pull = found - without
    assert (pull - direct(network)).norm() < 2e-3 * pull.norm()
    assert (pull - direct(lambda x, y: -network(x, y))).norm() > 0.1 * pull.norm()
    assert (pull - direct(l2)).norm() > 0.1 * pull.norm()
    assert same(by_l2 - without, direct(l2))  # the default is as it was


def test_a_run_with_lpips_is_finite_and_adms_warm_up_has_it_too(quick: Any, prompts: Any) -> None:
    adm = ["method.name=adm", "method.adm.warmup=1", "method.regression={pairs: 16, distance: lpips, network: alex}"]
    for options in (LPIPS, [*adm, "method.score_margin=0.04", "method.discriminator.width=16"]):
        recipe = quick("digits", *options, "iterations=2")
        check(recipe)
        family = recipe_family(recipe)
        made = train(recipe, family, family.load_teacher(), prompts("digits"))
        assert all(value.isfinite().all() for value in made.experts[0].values())
        assert made.parts["generator"].pair_distance.distance.net == "alex"


# ---- before a run


def refused(recipe: Recipe, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        check(recipe)
    assert "\n" not in str(error.value)


def test_what_does_not_go_together_is_refused_before_a_run(quick: Any, tmp_path: Path) -> None:
    pixel = r"^method\.discriminator\.pixel\."
    refused(quick("ring", *ADP), pixel + "backbone: family 'ring' has no pixels")
    refused(quick("ring", *LPIPS), r"^method\.regression\.distance: family 'ring' has no pixels")
    refused(large_recipe("wan", tmp_path, *LPIPS), r"^method\.regression\.distance: the teacher '.*' has no VAE")
    wrong = "method.discriminator.pixel={backbone: 'lpips:alx'}"
    refused(quick("digits", *ADP, wrong), pixel + r"backbone: no 'lpips:alx'; did you mean 'lpips:alex'\?")
    check(quick("digits", *ADP, wrong, "method.adp.pixel_weight=0"))
    refused(quick("digits", *ADP, "method.discriminator.pixel.layers=[relu7]"), pixel + "layers: .* no layer 'relu7'")
    for key, value, near in (("distance", "lpip", "'l2' or 'lpips'"), ("network", "resnet", "'vgg' or 'alex'")):
        with pytest.raises(UserError, match=f"method.regression.{key}: .*{near}"):
            quick("digits", f"method.regression.{key}={value}")
    with pytest.raises(UserError, match="unknown key 'method.discriminator.pixel.layer'; did you mean 'layers'"):
        quick("digits", *ADP, "method.discriminator.pixel.layer=[relu1]")


def test_a_check_without_a_network_says_what_it_cannot_tell(quick: Any, tmp_path: Path) -> None:
    assert check_offline(quick("digits", *ADP)) == check_offline(quick("digits", *LPIPS)) == []
    far = "method.discriminator.pixel={backbone: 'torchvision:resnet18', layers: [layer3]}"
    told = ["method.discriminator.pixel.backbone: the weights of 'torchvision:resnet18' are not on this machine"]
    assert check_offline(quick("digits", *ADP, far)) == told
    assert check_offline(quick("digits", *LPIPS, "method.regression.network=vgg")) in (
        [], ["method.regression.network: the ImageNet weights of vgg16 are not on this machine"],
    )  # fmt: skip


def test_a_backbones_folder_means_the_same_elsewhere(
    quick: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sam").mkdir()
    recipe = quick("digits", *ADP, "method.discriminator.pixel={backbone: 'sam:sam'}")
    monkeypatch.chdir(tmp_path)
    assert absolute(recipe).method.discriminator.pixel.backbone == f"sam:{tmp_path / 'sam'}"  # type: ignore[attr-defined]
    assert absolute(quick("digits", *ADP)).method.discriminator.pixel.backbone == "lpips:alex"  # type: ignore[attr-defined]


def test_a_program_without_the_role_has_no_part_of_it(quick: Any, prompts: Any) -> None:
    recipe = quick("digits", *ADP, "method.adp.pixel_weight=0")
    family = recipe_family(recipe)
    program = LocalProgram(build_method(recipe), family, family.load_teacher(), prompts("digits"))
    assert isinstance(program.phases[0], Phase) and "pixel" not in program.parts
    with pytest.raises(AttributeError):
        _ = program.pixel
