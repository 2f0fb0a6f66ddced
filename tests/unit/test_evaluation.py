"""The digits' classifier, the ring's figures, `raydmd evaluate` and `raydmd generate`."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import train_teacher
from PIL import Image
from run_folders import classifier_file, make_run
from safetensors.torch import load_file, save_file
from torch import Tensor

from raydmd.config.recipe import Recipe
from raydmd.data import ring
from raydmd.data.digits import load_digits
from raydmd.data.prompts import write_prompts
from raydmd.diffusion.random import Key, normal
from raydmd.errors import UserError
from raydmd.evaluation import classifier, pictures, prompts
from raydmd.evaluation.chunks import in_chunks
from raydmd.evaluation.evaluate import (
    RingJudge,
    complete,
    evaluate_run,
    evaluate_student,
    evaluate_teacher,
    evaluation_of,
    make_reference,
)
from raydmd.evaluation.metrics import frechet_distance
from raydmd.evaluation.points import ring_metrics
from raydmd.generate import generate
from raydmd.methods.loading import load_recipe
from raydmd.methods.registry import plan_phases
from raydmd.models.experts import Experts
from raydmd.models.registry import build_family
from raydmd.pipeline import StudentPipeline
from raydmd.runs.run import Run, recipe_family
from raydmd.training.teacher import Scorer


@pytest.fixture(scope="session")
def digits_run(quick, prompts, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run on digits, two phases of two steps."""
    recipe = quick("digits", "evaluation.samples=100", "evaluation.batch=40", "teacher.steps=8")
    return make_run(recipe, tmp_path_factory.mktemp("runs") / "digits", prompts("digits"))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A folder with the digits' classifier."""
    (tmp_path / classifier.CACHE_FILE).write_bytes(classifier_file())
    return tmp_path


def copy_of(run: Run, folder: Path) -> Run:
    shutil.copytree(run.folder, folder)
    return Run(folder)


# ---------------------------------------------------------------- the classifier


def test_classifier_is_good(cache: Path) -> None:
    network = classifier.load_classifier(cache)
    assert classifier.held_out_accuracy(network) >= 0.97
    assert classifier.held_out_accuracy(classifier.DigitsClassifier()) < 0.5  # negative control: untrained


def test_classifier_is_the_same_each_time_and_a_damaged_cache_is_made_again(cache: Path) -> None:
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    file = cache / classifier.CACHE_FILE
    file.write_bytes(b"half a file")
    classifier.load_classifier(cache)
    assert list(cache.iterdir()) == [file] and file.read_bytes() == classifier_file()
    assert torch.equal(before, torch.get_rng_state()) and threads == torch.get_num_threads()


def test_classifier_features_have_unit_variance_and_see_what_is_wrong(cache: Path) -> None:
    network = classifier.load_classifier(cache)
    images, _ = load_digits()
    features, logits = network.judge(images, batch=700)
    assert features.shape == (len(images), classifier.FEATURES) and logits.shape == (len(images), 10)
    assert float(features.var(0).sum()) == pytest.approx(classifier.FEATURES, rel=1e-4)
    torch.testing.assert_close(network(images[:7]), logits[:7])
    torch.testing.assert_close(network.features(images[:7]), features[:7])
    halves = frechet_distance(features[::2], features[1::2])
    one_class = network.judge(images[load_digits()[1] == 3])[0]
    noisy = network.judge(images + 0.5 * normal(Key(0, 0, "test", 0), 0, len(images), (1, 8, 8)))[0]
    assert halves < 0.5 < frechet_distance(noisy, features) < frechet_distance(one_class, features)


# ---------------------------------------------------------------- points


def test_ring_metrics_know_the_data_from_its_failures() -> None:
    data, fresh = ring.sample(8000, 0), ring.sample(8000, 1)
    good = ring_metrics(fresh, data)
    assert good["modes"] == 8 and good["mode_tv"] < 0.03 and good["sliced_wasserstein"] < 0.04
    assert good["within_3_sigma"] == pytest.approx(0.989, abs=0.005) and good["spread"] == pytest.approx(1, abs=0.03)

    means = ring.mode_means().float()
    even = means[torch.arange(8000) % 8] + ring.STD * normal(Key(2, 0, "test", 0), 0, 8000, (2,))
    uneven_tv = 0.5 * float((ring.mode_weights() - 1 / 8).abs().sum())
    assert ring_metrics(even, data)["mode_tv"] == pytest.approx(uneven_tv, abs=0.01)  # all modes, wrong weights

    one = ring_metrics(means[:1].expand(8000, 2), data)
    assert one["modes"] == 1 and one["spread"] < 1e-5 and one["mode_tv"] == pytest.approx(1 - ring.WEIGHTS[0])
    wide = ring_metrics(fresh + 2 * ring.STD * normal(Key(3, 0, "test", 0), 0, 8000, (2,)), data)
    assert wide["within_3_sigma"] < 0.7 and wide["spread"] > 1.2
    assert ring_metrics(torch.full((10, 2), 50.0), data)["within_3_sigma"] == 0


# ---------------------------------------------------------------- evaluation


def test_a_student_that_is_its_teacher_measures_as_the_teacher(tmp_path: Path) -> None:
    learnt = [
        "teacher.options={width: 64, depth: 2}",
        "pretrain.iterations=600",
        "pretrain.batch=256",
        "pretrain.ema=0",
    ]
    folder = train_teacher(load_recipe("ring", [*learnt, "pretrain.micro=256"]), tmp_path)
    recipe = load_recipe("ring", [f"teacher.path={folder}", "evaluation.samples=3000", "evaluation.batch=1000"])
    family = recipe_family(recipe)
    teacher, phases = family.load_teacher(), plan_phases(recipe)
    reference = make_reference(recipe, family, teacher)
    rows = evaluate_teacher(recipe, family, teacher, reference, steps=(1, 4))
    experts = untrained(recipe)
    figures = evaluate_student(recipe, family, teacher, experts, phases, reference)
    # untrained experts follow the teacher's Euler path of 4 steps, from other noise
    assert figures["student"]["sw_teacher"] == pytest.approx(rows["teacher_euler_4"]["sw_teacher"], abs=0.03)
    assert rows["teacher"]["sw_teacher"] < 0.04 and rows["teacher_euler_1"]["sw_teacher"] > 0.5
    assert rows["data"]["modes"] == 8 and rows["teacher"]["modes"] > rows["teacher_euler_1"]["modes"]
    (boundary,) = figures["boundaries"]
    assert (boundary["phase"], boundary["s"]) == (1, 0.5)
    assert boundary["boundary_sw"] < 0.15 and boundary["x_s_variance_ratio"] == pytest.approx(
        0.75, abs=0.1
    )  # Euler contracts

    with torch.no_grad():  # negative control: experts that are not the teacher
        for network in experts.networks.values():
            network.layers[-1].weight.mul_(2.0)
    broken = evaluate_student(recipe, family, teacher, experts, phases, reference)
    assert broken["boundaries"][0]["boundary_sw"] > 2 * boundary["boundary_sw"]
    assert abs(broken["boundaries"][0]["x_s_variance_ratio"] - 1) > 0.25


def test_the_truth_at_a_boundary_is_its_own_floor(quick) -> None:
    recipe = quick("ring", "evaluation.samples=4000", "evaluation.batch=4000")
    family = recipe_family(recipe)
    reference = make_reference(recipe, family, family.load_teacher())
    phase = plan_phases(recipe)[0]
    truth = reference.truth(family, phase)
    noise = normal(Key(9, 0, "test", 0), 0, 4000, (2,))
    right = family.schedule.diffuse(ring.sample(4000, 9), noise, phase.end)
    assert isinstance(reference.judge, RingJudge)
    good = reference.judge.boundary(right, truth, reference.samples)
    # x_s that was taken for x_0 and diffused again has the wrong mean and spread
    bad = reference.judge.boundary(family.schedule.diffuse(right, noise.flip(0), phase.end), truth, reference.samples)
    assert good["boundary_sw"] < 0.04 < 0.1 < bad["boundary_sw"]
    assert good["x_s_variance_ratio"] == pytest.approx(1, abs=0.05) and abs(bad["x_s_variance_ratio"] - 1) > 0.1


def test_evaluate_run_writes_every_figure(digits_run: Run, tmp_path: Path) -> None:
    run, said = copy_of(digits_run, tmp_path / "run"), []
    result = evaluate_run(run, progress=said.append)
    stored = json.loads((run.folder / "evaluation.json").read_text())
    assert stored == result and len(said) >= 3
    for row in ("data", "teacher", "teacher_euler_4", "teacher_euler_8", "student"):
        assert list(result[row]) == ["fd_teacher", "fd_data", "accuracy", "pcos", "variance"], row
    assert result["teacher"]["fd_teacher"] < result["teacher_euler_4"]["fd_teacher"]
    assert result["data"]["fd_data"] == pytest.approx(0, abs=1e-6) and result["data"]["accuracy"] >= 0.97
    (boundary,) = result["boundaries"]
    assert {"phase", "s", "boundary_fd", "x_s_variance_ratio", "accuracy", "pcos", "variance"} <= set(boundary)
    assert not [path for path in run.folder.iterdir() if path.name.startswith(".evaluation")]

    again = evaluate_run(run)
    assert {**again, "seconds": 0} == {**result, "seconds": 0}  # to the bit
    assert evaluate_run(run, samples=60)["samples"] == 60


def test_evaluation_is_made_again_when_the_experts_change(digits_run: Run, tmp_path: Path) -> None:
    run = copy_of(digits_run, tmp_path / "run")
    first = evaluation_of(run)
    said: list[str] = []
    assert evaluation_of(run, said.append) == first and not said  # taken from the file
    weights = load_file(run.expert_file(1))
    save_file({name: value * 1.05 for name, value in weights.items()}, run.expert_file(1))
    second = evaluation_of(run)
    assert second["student"] != first["student"] and second["boundaries"] == first["boundaries"]
    (run.folder / "evaluation.json").write_text("{")
    assert evaluation_of(run)["student"] == second["student"]


def test_unfinished_and_diverged_runs(digits_run: Run, tmp_path: Path) -> None:
    run = copy_of(digits_run, tmp_path / "run")
    save_file({name: value * float("nan") for name, value in load_file(run.expert_file(1)).items()}, run.expert_file(1))
    result = evaluate_run(run)
    assert result["student"] == {"not_finite": 1.0} and "boundary_fd" in result["boundaries"][0]
    run.expert_file(1).unlink()
    result = evaluate_run(run)
    assert "student" not in result and len(result["boundaries"]) == 1
    run.expert_file(0).unlink()
    with pytest.raises(UserError, match="no trained expert"):
        evaluate_run(run)


def test_lora_experts_are_evaluated(quick, prompts, tmp_path: Path) -> None:
    recipe = quick("digits", "method.experts.kind=lora", "method.experts.rank=4", "evaluation.samples=40")
    run = make_run(recipe, tmp_path / "lora", prompts("digits"))
    result = evaluate_run(run)
    assert result["student"]["fd_teacher"] > 0 and result["boundaries"][0]["boundary_fd"] > 0


def test_evaluation_refuses_what_it_has_no_figures_for(quick) -> None:
    recipe = quick("ring")
    family = recipe_family(recipe)
    with pytest.raises(UserError, match=r"evaluation\.samples: 3 are too few"):
        make_reference(recipe, family, family.load_teacher(), samples=3)
    wan = build_family("wan", None, {"latent_shape": [16, 1, 4, 4]})
    with pytest.raises(UserError, match="figures for digits and ring, not for 'wan'"):
        make_reference(recipe, wan, family.load_teacher())


def test_chunks_do_not_show(quick) -> None:
    recipe = quick("ring")
    family = recipe_family(recipe)
    scorer = Scorer(recipe, family, family.load_teacher())
    x = normal(Key(0, 0, "test", 0), 0, 50, (2,))
    torch.testing.assert_close(complete(scorer, x, {}, batch=50, steps=3), complete(scorer, x, {}, batch=7, steps=3))
    assert in_chunks(lambda start, count: torch.arange(start, start + count), 10, 3).tolist() == list(range(10))


# ---------------------------------------------------------------- pictures


def test_grid_puts_every_picture_in_its_place() -> None:
    shades = torch.arange(7).div(6).view(7, 1, 1, 1).expand(7, 1, 8, 8)
    image = pictures.grid(shades, columns=3, tile=16)
    assert image.mode == "L" and image.size == (3 * 16 + 2 * pictures.GAP, 3 * 16 + 2 * pictures.GAP)
    for number in range(7):
        at = (number % 3 * (16 + pictures.GAP) + 8, number // 3 * (16 + pictures.GAP) + 8)
        assert image.getpixel(at) == pytest.approx(number / 6 * 255, abs=0.51)
    color = pictures.grid(np.random.default_rng(0).random((2, 3, 100, 60)), tile=16)
    assert color.mode == "RGB" and color.size == (60 * 2 + pictures.GAP, 100)  # large ones are not enlarged
    assert pictures.grid(ring.sample(100)).size == (360, 360)  # points are scattered
    with pytest.raises(ValueError, match="N > 0"):
        pictures.grid(torch.zeros(0, 1, 8, 8))
    with pytest.raises(ValueError, match="1 or 3"):
        pictures.grid(torch.zeros(1, 2, 8, 8))


def test_pictures_outside_their_range_are_clipped() -> None:
    image = pictures.to_image(torch.tensor([[[-1.0, 0.5, 2.0, 1.0]]]))
    assert list(np.asarray(image)[0]) == [0, 128, 255, 255]


def test_a_picture_that_is_not_finite_is_crossed_out_not_black() -> None:
    for bad in (float("nan"), float("inf")):
        picture = torch.zeros(3, 8, 8)
        picture[0, 3, 3] = bad
        values = np.asarray(pictures.to_image(picture))
        assert values.shape == (8, 8, 3) and set(np.unique(values)) == {128, 255}
    assert not np.asarray(pictures.to_image(torch.zeros(3, 8, 8))).any()


def test_side_by_side_and_scatter() -> None:
    wide = pictures.side_by_side({"teacher": torch.rand(4, 1, 8, 8), "student": torch.rand(4, 1, 8, 8)}, columns=2)
    one = pictures.side_by_side({"teacher": torch.rand(4, 1, 8, 8)}, columns=2)
    assert wide.width > 1.8 * one.width and wide.height == one.height
    points = torch.tensor([[0.0, 0.0], [float("nan"), 1.0], [1.0, 1.0]])
    assert np.asarray(pictures.scatter(points).convert("L")).min() < 200  # something is drawn
    empty = pictures.scatter(torch.full((3, 2), float("inf")))
    assert np.asarray(empty.convert("L")).min() == 255
    with pytest.raises(ValueError, match="no panels"):
        pictures.side_by_side({})


def test_generate_gives_the_same_bytes_alone_and_among_others(digits_run: Run, tmp_path: Path) -> None:
    many = generate(StudentPipeline(digits_run), "7", 5, 3, tmp_path / "many")
    assert [path.name for path in many] == [f"7-3-{i}.png" for i in range(5)]
    assert sorted(path.name for path in (tmp_path / "many").iterdir()) == sorted(path.name for path in many)
    few = generate(StudentPipeline(digits_run), "7", 2, 3, tmp_path / "few")
    assert [path.read_bytes() for path in few] == [path.read_bytes() for path in many[:2]]
    assert few[0].read_bytes() != few[1].read_bytes()
    (other_seed,) = generate(StudentPipeline(digits_run), "7", 1, 4, tmp_path / "seed")
    (other_class,) = generate(StudentPipeline(digits_run), "1", 1, 3, tmp_path / "class")
    assert len({path.read_bytes() for path in (few[0], other_seed, other_class)}) == 3
    with Image.open(few[0]) as image:
        assert image.size == (256, 256) and image.format == "PNG"


def test_generate_draws_points_as_one_picture(quick, prompts, tmp_path: Path) -> None:
    run = make_run(quick("ring"), tmp_path / "run", prompts("ring"))
    (path,) = generate(StudentPipeline(run), "any thing/../at all", 200, 0, tmp_path / "out")
    assert path.parent == tmp_path / "out" and path.name == "any-thing-at-all-0-0.png"


@pytest.mark.parametrize(
    ("prompt", "words"),
    [("12", "takes 0, 1, .. or 9"), ("-1", "takes 0"), ("cat", "takes 0"), ("", "takes 0"), ("²", "takes 0"),
     ("Seven", "by figure: 7")],
)  # fmt: skip
def test_generate_refuses_other_prompts(digits_run: Run, tmp_path: Path, prompt: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        generate(StudentPipeline(digits_run), prompt, 1, 0, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_generate_refuses_what_it_cannot_do(digits_run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="a folder is needed"):
        generate(StudentPipeline(digits_run), "1", 1, 0, tmp_path / "file")
    run = copy_of(digits_run, tmp_path / "run")
    run.expert_file(1).unlink()
    with pytest.raises(UserError, match="1 of 2 phases"):
        generate(StudentPipeline(run), "1", 1, 0, tmp_path / "out")


def test_prompts_of_encoded_tables(quick, tmp_path: Path) -> None:
    embeds = np.random.default_rng(0).random((3, 4, 8), dtype=np.float32)
    table = {"prompt_embeds": embeds, "prompt_embeds_mask": np.ones((3, 4), bool)}
    table |= {"negative_prompt_embeds": embeds * 0, "negative_prompt_embeds_mask": np.ones((3, 4), bool)}
    path = write_prompts(tmp_path / "p.parquet", {**table, "prompt": ["a cat", "a dog", "a fox"]})
    bare = write_prompts(tmp_path / "bare.parquet", table)
    family = build_family("qwen_image", None, {"latent_shape": [4, 1, 4, 4]})
    recipe = quick("ring", f"prompts.path={path}")

    def first(conditions: dict[str, Tensor]) -> Tensor:
        return conditions["prompt_embeds"]

    assert torch.equal(first(prompts.in_turn(recipe, family, 5)), torch.from_numpy(embeds[[0, 1, 2, 0, 1]]))
    expected = torch.from_numpy(embeds[[1, 1]])
    assert torch.equal(first(prompts.from_text(recipe, family, "a dog", 2)), expected)
    assert torch.equal(first(prompts.from_text(recipe, family, "1", 2)), expected)
    with pytest.raises(UserError, match="did you mean 'a dog'"):
        prompts.from_text(recipe, family, "a dock", 1)
    with pytest.raises(UserError, match=r"rows 0\.\.2"):
        prompts.from_text(recipe, family, "3", 1)
    with pytest.raises(UserError, match="give a row's number"):
        prompts.from_text(quick("ring", f"prompts.path={bare}"), family, "a dog", 1)
    with pytest.raises(UserError, match="needs a Parquet file"):
        prompts.in_turn(quick("ring"), family, 1)


def untrained(recipe: Recipe) -> Experts:
    """Experts that are still the teacher."""
    family = recipe_family(recipe)
    phases = plan_phases(recipe)
    experts = Experts(family.load_teacher(), len(phases))
    for phase in phases:
        experts.start(phase.index)
    return experts.requires_grad_(False)
