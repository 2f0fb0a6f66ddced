"""The times of the teacher's own sampler are those of the model's: held against diffusers' pipelines' schedulers."""

import json

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift, retrieve_timesteps
from local_serving import serving
from run_folders import make_run
from test_large_families import large_recipe

from raydmd.data.prompts import PromptTable
from raydmd.diffusion.times import step_grid
from raydmd.errors import UserError
from raydmd.models.registry import build_family
from raydmd.recipe_check import check, notes
from raydmd.runs.run import recipe_family
from raydmd.serving.parts import Noise, teacher_steps
from raydmd.training.teacher import Scorer

torch.set_num_threads(1)

SHAPES = {"qwen_image": [[4, 1, 8, 6], [4, 64, 64], [4, 1, 166, 166]], "wan": [[4, 3, 8, 6], [4, 21, 60, 104]]}
QWEN = dict(  # Qwen-Image's own scheduler_config.json
    use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, base_image_seq_len=256, max_image_seq_len=8192,
    shift_terminal=0.02,
)  # fmt: skip
FLOW = dict(prediction_type="flow_prediction", use_flow_sigmas=True)
SCHEDULERS = {
    "qwen_image": {
        "its own": FlowMatchEulerDiscreteScheduler(**QWEN),
        "linear": FlowMatchEulerDiscreteScheduler(**{**QWEN, "time_shift_type": "linear"}),
        "no terminal": FlowMatchEulerDiscreteScheduler(**{**QWEN, "shift_terminal": None}),
        "two experts": FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=float(np.log(3)), max_shift=float(np.log(3))
        ),
        "fixed": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "fixed, terminal": FlowMatchEulerDiscreteScheduler(shift=3.0, shift_terminal=0.1),
        "unipc": UniPCMultistepScheduler(**FLOW, use_dynamic_shifting=True),
    },
    "wan": {
        "its own": UniPCMultistepScheduler(**FLOW, flow_shift=3.0),
        "720p": UniPCMultistepScheduler(**FLOW, flow_shift=5.0),
        "unshifted": UniPCMultistepScheduler(**FLOW),
        "terminal": UniPCMultistepScheduler(**FLOW, flow_shift=5.0, shift_terminal=0.05),
        "euler": FlowMatchEulerDiscreteScheduler(shift=5.0),
        "euler, unshifted": FlowMatchEulerDiscreteScheduler(),
    },
}
CASES = [(name, kind) for name, kinds in SCHEDULERS.items() for kind in kinds]


def pipelines_sigmas(name, scheduler, steps, shape):
    """Call the scheduler as QwenImagePipeline.__call__ and WanPipeline.__call__ do, with their own functions."""
    if name == "wan":
        scheduler.set_timesteps(steps, device="cpu")
        return scheduler.sigmas.double()
    config = scheduler.config
    mu = calculate_shift(
        shape[-2] // 2 * (shape[-1] // 2),
        config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096),
        config.get("base_shift", 0.5), config.get("max_shift", 1.15),
    )  # fmt: skip
    sigmas = np.linspace(1.0, 1 / steps, steps)
    retrieve_timesteps(scheduler, steps, "cpu", sigmas=sigmas, mu=mu)
    return scheduler.sigmas.double()


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_the_times_are_those_of_diffusers_scheduler(name, kind, tmp_path):
    scheduler = SCHEDULERS[name][kind]
    scheduler.save_pretrained(tmp_path / "scheduler")
    different = 0
    for shape in SHAPES[name]:
        family = build_family(name, str(tmp_path), {"latent_shape": shape})
        for steps in (2, 4, 25):
            wanted = pipelines_sigmas(name, scheduler, steps, shape)
            times = torch.tensor(family.teacher_times(steps), dtype=torch.float64)
            assert times.shape == wanted.shape and times[0] == 1.0 and times[-1] == 0.0
            assert (times.diff() < 0).all()
            assert torch.allclose(times, wanted, atol=3e-6), (times - wanted).abs().max()
            even = torch.tensor(step_grid(steps), dtype=torch.float64)
            different += bool((even - wanted).abs().max() > (1e-4 if "unshifted" in kind else 1e-2))
    assert different >= len(SHAPES[name]), "a uniform grid would pass, too"


def test_dynamic_shifting_goes_by_the_size_of_a_sample(tmp_path):
    SCHEDULERS["qwen_image"]["its own"].save_pretrained(tmp_path / "scheduler")
    family = build_family("qwen_image", str(tmp_path), {"latent_shape": [4, 1, 8, 6]})
    large = (4, 1, 128, 128)
    wanted = pipelines_sigmas("qwen_image", SCHEDULERS["qwen_image"]["its own"], 5, large)
    assert torch.allclose(torch.tensor(family.teacher_times(5, shape=large)).double(), wanted, atol=3e-6)
    assert max(abs(a - b) for a, b in zip(family.teacher_times(5), wanted.tolist(), strict=True)) > 1e-2


def test_one_step_begins_at_noise(tmp_path):
    for name, kind in CASES:
        SCHEDULERS[name][kind].save_pretrained(tmp_path / name / kind / "scheduler")
        family = build_family(name, str(tmp_path / name / kind), {"latent_shape": SHAPES[name][0]})
        assert family.teacher_times(1) == [1.0, 0.0]


def test_a_shift_in_the_recipe_comes_first_and_no_scheduler_is_uniform(tmp_path):
    family = build_family("qwen_image", str(tmp_path), {"latent_shape": [4, 1, 8, 6]})
    assert family.teacher_times(7) == step_grid(7)
    SCHEDULERS["qwen_image"]["its own"].save_pretrained(tmp_path / "scheduler")
    family = build_family("qwen_image", str(tmp_path), {"latent_shape": [4, 1, 8, 6]})
    assert family.teacher_times(7, 3.0) == step_grid(7, 3.0) != family.teacher_times(7)
    for embedded in ("digits", "ring"):
        family = build_family(embedded)
        assert family.teacher_times(25) == step_grid(25, t_max=family.schedule.t_max)  # to the bit
        assert family.teacher_times(4, 5.0) == step_grid(4, 5.0, family.schedule.t_max)
    with pytest.raises(UserError, match="steps: 0"):
        family.teacher_times(0)


WRONG = [
    ("wan", dict(use_karras_sigmas=True), "use_karras_sigmas True"),
    ("qwen_image", dict(use_beta_sigmas=True), "use_beta_sigmas True"),
    ("qwen_image", dict(use_exponential_sigmas=True), "use_exponential_sigmas True"),
    ("qwen_image", dict(invert_sigmas=True), "invert_sigmas True"),
    ("wan", dict(_class_name="DPMSolverMultistepScheduler"), "_class_name 'DPMSolverMultistepScheduler'"),
    ("wan", dict(_class_name=None), "_class_name 'None'"),
    ("wan", dict(use_flow_sigmas=False), "use_flow_sigmas False"),
    ("wan", dict(prediction_type="epsilon"), "prediction_type epsilon"),
    ("wan", dict(final_sigmas_type="sigma_min"), "final_sigmas_type sigma_min"),
    ("wan", dict(use_dynamic_shifting=True), "no mu"),
    ("wan", dict(num_train_timesteps=100), "num_train_timesteps 100"),
    ("wan", dict(flow_shift="5"), "flow_shift '5'"),
    ("wan", dict(flow_shift=0), "flow_shift 0"),
    ("qwen_image", dict(time_shift_type="cubic"), "time_shift_type 'cubic'"),
    ("qwen_image", dict(base_image_seq_len=8192), "are both 8192"),
    ("qwen_image", dict(shift_terminal=1.5), "shift_terminal 1.5"),
    ("qwen_image", dict(time_shift_type="linear", base_shift=-1.0, max_shift=-1.0), "the shift is -1"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "message"), WRONG)
def test_a_sampler_that_is_not_followed_is_refused_by_name(name, change, message, tmp_path):
    SCHEDULERS[name]["its own"].save_pretrained(tmp_path / "scheduler")
    file = tmp_path / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    family = build_family(name, str(tmp_path), {"latent_shape": SHAPES[name][0]})
    with pytest.raises(UserError, match=message) as error:
        family.teacher_times(4)
    assert "\n" not in str(error.value) and "teacher.timestep_shift" in str(error.value)
    assert family.teacher_times(4, 5.0) == step_grid(4, 5.0)  # as the message says


def test_a_broken_file_is_named(tmp_path):
    file = tmp_path / "scheduler" / "scheduler_config.json"
    file.parent.mkdir()
    for text in ("{", "[]", "\ufffe"):
        file.write_text(text)
        with pytest.raises(UserError, match="scheduler_config.json is not a diffusers"):
            build_family("wan", str(tmp_path), {"latent_shape": SHAPES["wan"][0]}).teacher_times(4)


@pytest.mark.parametrize("name", ["qwen_image", "wan"])
def test_training_evaluation_and_serving_use_them(name, tmp_path):
    """The networks are asked at the model's times: by ODE pairs, from a phase's end on, and by a served teacher."""
    scheduler = SCHEDULERS[name]["its own"]
    recipe = large_recipe(name, tmp_path, "teacher.steps=3", "iterations=2")
    scheduler.save_pretrained(tmp_path / "scheduler")
    family = recipe_family(recipe)
    prompts = PromptTable(str(recipe.prompts.path), family.condition_columns)
    conditions = family.conditions(prompts.rows(0, 1))
    scorer, asked = Scorer(recipe, family, family.load_teacher()), []
    wanted = pipelines_sigmas(name, scheduler, 3, family.latent_shape).tolist()

    def spied(predict):
        def call(x, t, conditions):
            asked.extend(t.tolist())
            return predict(x, t, conditions)

        return call

    scorer.predict = spied(scorer.predict)
    scorer.pairs(0, 1, conditions)
    assert sorted(set(asked), reverse=True) == pytest.approx(wanted[:-1], abs=3e-6)
    asked.clear()
    scorer.sample(torch.zeros(1, *family.latent_shape), conditions, steps=3, start=wanted[1] - 0.01, method="euler")
    assert asked == pytest.approx([wanted[1] - 0.01, wanted[2]], abs=3e-6)
    run = make_run(recipe, tmp_path / "run", prompts)
    walk = teacher_steps(run, serving(tmp_path / "run").teacher_steps, torch.device("cpu"))
    shape = (*family.latent_shape[:-2], 40, 40)
    wanted = pipelines_sigmas(name, scheduler, 3, shape).tolist()
    moves = list(walk.walk(torch.zeros(1, *shape), conditions, [Noise(0, 0)]))
    assert [move.t for move in moves] == pytest.approx(wanted[:-1], abs=3e-6)
    assert moves[-1].t_next == 0.0 and moves[-1].number == 3 == walk.steps


def test_a_run_is_refused_before_it_begins(tmp_path):
    recipe = large_recipe("wan", tmp_path)
    check(recipe)
    (note,) = notes(recipe)
    assert "has no scheduler/scheduler_config.json" in note
    assert notes(large_recipe("wan", tmp_path, "teacher.timestep_shift=5")) == []
    SCHEDULERS["wan"]["its own"].save_pretrained(tmp_path / "scheduler")
    assert notes(large_recipe("wan", tmp_path)) == []
    DPMSolverMultistepScheduler(**FLOW, flow_shift=5.0).save_pretrained(tmp_path / "scheduler")
    with pytest.raises(UserError, match="DPMSolverMultistepScheduler"):
        check(recipe)
    check(large_recipe("wan", tmp_path, "teacher.timestep_shift=5"))
