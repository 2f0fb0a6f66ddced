"""`raydmd export`: what plain diffusers makes of each format is what the run makes, and what cannot be is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from run_folders import make_run
from safetensors.torch import load_file, save_file
from test_every_family import recipe_of

from raydmd import cli
from raydmd.config.recipe import dump_recipe
from raydmd.data.prompts import PromptTable
from raydmd.diffusion.solvers import euler_step
from raydmd.diffusion.times import step_grid
from raydmd.errors import RunError, UserError
from raydmd.export import check as checking
from raydmd.export.check import Difference, compare_all
from raydmd.export.export import export_run
from raydmd.export.formats import FORMATS
from raydmd.export.plan import Plan, choose_sampler, make_plan
from raydmd.methods.loading import load_recipe
from raydmd.models.diffusers.sampler_grid import EULER, UNIPC
from raydmd.models.diffusers.student_sampler import FLOW_MAP, Sampler, euler_shift, even_shift, unipc_config
from raydmd.models.diffusers.variance_preserving import VariancePreservingFamily
from raydmd.models.registry import FAMILIES as FAMILIES_BY_NAME
from raydmd.models.tiny import TINY_MODELS
from raydmd.runs.expert_index import write_index
from raydmd.runs.run import Run, recipe_family

torch.set_num_threads(1)

FAMILIES = ("qwen_image", "wan")
GRID = step_grid(4, 3.0)
KINDS = {  # overrides of the recipe; two experts of two steps each, but for the last
    "lora": ("method.timestep_shift=3",),
    "full": ("method.timestep_shift=3", "method.experts.kind=full"),
    "one": ("method.phases=1", "iterations=1", "method.times=[1.0, 0.8, 0.3]"),
}
EXPORTED = [("lora", name) for name in FORMATS] + [("full", "diffusers"), ("one", "diffusers")]
OTHERS = {  # families of other pipelines, one expert fused: overrides of the recipe
    "flux": ("method.timestep_shift=3",), "flux2_klein": ("method.timestep_shift=3",),
    "sd3": ("method.timestep_shift=3",), "stable_diffusion": (), "sdxl": (),
}  # fmt: skip
Key = tuple[str, str, str]


class Exports:
    """Runs on tiny models, and exports of them; what plain diffusers makes of all is found once, in one process."""

    def __init__(self, root: Path) -> None:
        self.runs: dict[tuple[str, str], Run] = {}
        self.folders: dict[Key, Path] = {}
        self.plans: dict[Key, Plan] = {}
        for family in FAMILIES:
            teacher = TINY_MODELS[family].save(root / family)
            for kind, overrides in KINDS.items():
                common = ("optimizer.generator.lr=0.1", "ema=0", "batch.size=2", "batch.micro=2")
                recipe = recipe_of(TINY_MODELS[family], teacher, *common, *overrides)
                prompts = PromptTable(str(recipe.prompts.path), recipe_family(recipe).condition_columns)
                self.runs[family, kind] = make_run(recipe, root / f"{family}-{kind}", prompts)
            for kind, name in EXPORTED:
                key, run = (family, kind, name), self.runs[family, kind]
                self.folders[key], self.plans[key] = root / "-".join(key), make_plan(run, name)
                export_run(run, name, self.folders[key], checked=False)
        tuned = f"teacher.lora={self.folders['qwen_image', 'lora', 'lora'] / 'phase-1.safetensors'}"
        for family, kind, overrides in [
            *((family, "one", overrides) for family, overrides in OTHERS.items()),
            ("qwen_image", "tuned", ("method.timestep_shift=3", tuned)),
        ]:
            key = (family, kind, "diffusers")
            teacher = root / family if kind == "tuned" else TINY_MODELS[family].save(root / family)
            common = ("method.phases=1", "iterations=1", "optimizer.generator.lr=0.1", "ema=0")
            recipe = recipe_of(TINY_MODELS[family], teacher, *common, *overrides, "batch.size=2", "batch.micro=2")
            prompts = PromptTable(str(recipe.prompts.path), recipe_family(recipe).condition_columns)
            run = self.runs[key[:2]] = make_run(recipe, root / f"{family}-{kind}", prompts)
            self.folders[key], self.plans[key] = root / "-".join(key), make_plan(run, "diffusers")
            export_run(run, "diffusers", self.folders[key], checked=False)
        found = compare_all([(self.plans[key], self.folders[key]) for key in self.folders])
        self.found: dict[Key, Difference] = dict(zip(self.folders, found, strict=True))


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # of the process that samples them, as here
        return Exports(tmp_path_factory.mktemp("exports"))


def test_plain_diffusers_makes_what_the_run_makes(exports: Exports) -> None:
    for key, found in exports.found.items():
        plan = exports.plans[key]
        assert found.latents <= 1e-5 * max(1.0, found.largest), (key, found)
        assert found.levels is not None and found.levels <= 1, (key, found)
        assert found.timesteps == pytest.approx(
            plan.family.network_timesteps(torch.tensor(plan.times[:-1])).tolist(), abs=1e-2
        ), key


def test_the_experts_differ_from_the_teacher_and_each_other(exports: Exports) -> None:
    """Else any mistake of the export would be within the limit."""
    for family in FAMILIES:
        plan = exports.plans[family, "lora", "lora"]
        conditions = checking._conditions(plan)
        right = checking._own(plan, conditions)
        first, second = plan.phases
        network = plan.run.experts(plan.family.load_teacher())
        only = checking.sample_student(
            plan.family, network, [replace(first), replace(second, index=0)], conditions, 2, seed=checking.SEED
        ).latents  # fmt: skip
        assert (only - right).abs().max() > 1e-3
        teacher = plan.family.load_teacher()
        x, t = torch.randn(2, *plan.family.latent_shape), torch.full((2,), 0.5, dtype=torch.float64)
        assert (network.expert(0)(x, t, conditions) - teacher(x, t, conditions)).abs().max() > 1e-3


def test_a_pipeline_of_two_networks_changes_them_at_the_boundary(exports: Exports) -> None:
    for kind in ("lora", "full"):
        assert exports.found["wan", kind, "diffusers"].calls == ["transformer"] * 2 + ["transformer_2"] * 2
        index = json.loads((exports.folders["wan", kind, "diffusers"] / "model_index.json").read_text())
        assert GRID[2] < index["boundary_ratio"] < GRID[1]
    assert exports.found["wan", "one", "diffusers"].calls == ["transformer"] * 3
    index = json.loads((exports.folders["wan", "one", "diffusers"] / "model_index.json").read_text())
    assert index["boundary_ratio"] is None


def test_the_modular_pipeline_takes_the_trained_times(exports: Exports) -> None:
    """Wan's, with sigmas; the scheduler that the plain pipeline is shipped with comes near to it."""
    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from diffusers.modular_pipelines import Wan22Blocks, WanBlocks

    for kind, blocks in (("lora", Wan22Blocks()), ("one", WanBlocks())):
        plan, folder = exports.plans["wan", kind, "diffusers"], exports.folders["wan", kind, "diffusers"]
        blocks.sub_blocks.pop("text_encoder")
        pipe = blocks.init_pipeline()
        parts = ["transformer"] + ["transformer_2"] * (kind == "lora")
        networks = {part: WanTransformer3DModel.from_pretrained(folder / part) for part in parts}
        guiders = {part.replace("transformer", "guider"): pipe.guider.new(guidance_scale=1.0) for part in parts}
        pipe.update_components(
            vae=AutoencoderKLWan.from_pretrained(folder / "vae"), scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
            **networks, **guiders, **({"boundary_ratio": plan.boundary_ratio} if kind == "lora" else {}),
        )  # fmt: skip
        pipe.set_progress_bar_config(disable=True)
        conditions = checking._conditions(plan)
        made = pipe(
            prompt_embeds=conditions["prompt_embeds"], negative_prompt_embeds=conditions["negative_prompt_embeds"],
            sigmas=plan.times[:-1], num_inference_steps=len(plan.times) - 1,
            latents=checking.initial_noise(plan.family, checking.SEED, 0, checking.SAMPLES), output="latents",
        )  # fmt: skip
        assert (made - checking._own(plan, conditions)).abs().max() <= 1e-5, kind


@pytest.mark.parametrize("times", [step_grid(4, 5.0), step_grid(8, 3.0), step_grid(1), [1.0, 0.8, 0.3, 0.0]])
def test_unipc_visits_the_trained_noise_levels(times: list[float]) -> None:
    config = unipc_config(times)
    assert config is not None
    scheduler = UniPCMultistepScheduler(**config)
    scheduler.set_timesteps(len(times) - 1)
    assert torch.allclose(scheduler.sigmas, torch.tensor(times), atol=2e-6)
    plain = UniPCMultistepScheduler(**{**config, "flow_shift": 5.0, "shift_terminal": None})
    plain.set_timesteps(len(times) - 1)
    assert len(times) == 2 or not torch.allclose(plain.sigmas, torch.tensor(times), atol=1e-4)


def test_each_law_of_times_has_its_scheduler(exports: Exports) -> None:
    family = exports.plans["wan", "lora", "lora"].family
    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    scheduler.set_timesteps(4)
    own = scheduler.sigmas.tolist()
    assert own[1] == pytest.approx(0.910, abs=1e-3)  # and not .9375: it shifts twice
    assert euler_shift(own) == pytest.approx(5.0, abs=1e-4) and euler_shift(GRID) is None
    assert even_shift(GRID) == pytest.approx(3.0) and even_shift(own) is None and even_shift([1.0, 0.0]) == 1.0
    for times, name, sigmas, shipped in (
        (own, EULER, (), None), (GRID, FLOW_MAP, (), None),
        ([1.0, 0.8, 0.3, 0.0], EULER, (1.0, 0.8, 0.3), UNIPC),
        ([1.0, 0.9, 0.5, 0.45, 0.0], EULER, (1.0, 0.9, 0.5, 0.45), None),
    ):  # fmt: skip
        sampler = choose_sampler(family.student_samplers(times), times, family)
        assert (sampler.scheduler, sampler.sigmas) == (name, sigmas)
        assert (sampler.shipped and sampler.shipped.scheduler) == shipped
    wrong = Sampler(EULER, {"shift": 3.0}, {"num_inference_steps": 4})
    with pytest.raises(UserError, match="no scheduler that WanPipeline takes visits the trained times 1, 0.9, 0.75"):
        choose_sampler([wrong], GRID, family)


class Discrete(VariancePreservingFamily):
    """A family of a discrete process, of which only the sampler is asked."""

    name = "discrete"
    pipeline_class = "StableDiffusionPipeline"
    process = {
        "_class_name": "DDIMScheduler",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
    }
    defaults = {**VariancePreservingFamily.defaults, "latent_shape": [4, 8, 8]}


def test_a_discrete_process_is_sampled_by_its_own_euler_steps() -> None:
    import diffusers

    family, times = Discrete(), step_grid(4)
    sampler = choose_sampler(family.student_samplers(times), times, family)
    assert sampler.call["timesteps"] == [999.0, 749.0, 499.0, 249.0]
    scheduler = getattr(diffusers, sampler.scheduler)(**sampler.config)
    scheduler.set_timesteps(timesteps=sampler.call["timesteps"])
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 8, 8, generator=draw)
    theirs = x * scheduler.init_noise_sigma
    for t, t_next, timestep in zip(times, times[1:], scheduler.timesteps, strict=False):
        assert torch.allclose(scheduler.scale_model_input(theirs, timestep), x, atol=1e-5)
        eps = torch.randn(x.shape, generator=draw)
        theirs = scheduler.step(eps, timestep, theirs, return_dict=False)[0]
        x = euler_step(family.schedule, eps, x, t, t_next, family.prediction)
    assert torch.allclose(theirs, x, atol=1e-4)
    wrong = Sampler(sampler.scheduler, {**sampler.config, "beta_end": 0.02}, sampler.call)
    with pytest.raises(UserError, match="no scheduler that StableDiffusionPipeline takes visits"):
        choose_sampler([wrong], times, family)


def test_the_files_say_what_their_loaders_need(exports: Exports) -> None:
    for family in FAMILIES:
        run = exports.runs[family, "lora"]
        state = run.expert_state(0)
        lora = exports.folders[family, "lora", "lora"] / "phase-1.safetensors"
        assert {name: tuple(t.shape) for name, t in load_file(lora).items()} == {
            n: tuple(t.shape) for n, t in state.items()
        }
        config = json.loads((exports.folders[family, "lora", "peft"] / "phase-2/adapter_config.json").read_text())
        assert config["r"] == 4 and config["lora_alpha"] == 8
        high = load_file(exports.folders[family, "lora", "lightning"] / "high_noise_model.safetensors")
        name = {"wan": "blocks.0.self_attn.q", "qwen_image": "transformer_blocks.0.attn.to_q"}[family]
        assert float(high[f"diffusion_model.{name}.alpha"]) == 8.0
        assert high[f"diffusion_model.{name}.lora_down.weight"].shape[0] == 4


def test_the_card_shows_the_lines_that_were_run(exports: Exports) -> None:
    for key, folder in exports.folders.items():
        card = (folder / "README.md").read_text()
        assert card.startswith("---\nlicense: other #") and "```python" in card
        imports, _, rest = FORMATS[key[2]].code(exports.plans[key]).partition("\n\n")
        assert imports in card and rest in card, key
    card = (exports.folders["qwen_image", "lora", "lora"] / "README.md").read_text()
    assert 'next_expert = {2: "phase-2", 4: "phase-1"}' in card and "true_cfg_scale=1.0" in card


def test_half_precision(exports: Exports, tmp_path: Path) -> None:
    """Adapters whose effect rounding would take are refused when asked for in it, and else written in float32."""
    run = exports.runs["wan", "one"]
    teacher = run.recipe.teacher.model_copy(update={"options": {**run.recipe.teacher.options, "dtype": "bfloat16"}})
    weak = shutil.copytree(run.folder, tmp_path / "weak")
    (weak / "recipe.yaml").write_text(dump_recipe(run.recipe.model_copy(update={"teacher": teacher})))
    file = weak / "experts" / "phase-1" / "model.safetensors"
    save_file({name: 1e-3 * value for name, value in load_file(file).items()}, file)
    write_index(weak)
    with pytest.raises(UserError, match="--dtype bfloat16: in it, rounding takes too much of the adapters' effect"):
        export_run(Run(weak), "diffusers", tmp_path / "half", "bfloat16", checked=False)
    export_run(Run(weak), "diffusers", tmp_path / "out", checked=False)
    weights = load_file(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}
    assert "dtype = torch.float32" in (tmp_path / "out" / "README.md").read_text()
    export_run(exports.runs["wan", "lora"], "lora", tmp_path / "lora", "bfloat16", checked=False)
    assert {t.dtype for t in load_file(tmp_path / "lora" / "phase-1.safetensors").values()} == {torch.bfloat16}


def exported(*words: str | Path) -> int:
    return cli.run(["export", *map(str, words)])


def test_what_cannot_be_exported_is_refused(
    exports: Exports, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def refused(words: str, run: Path, *more: str | Path) -> None:
        assert exported(run, "--out", out, *more) == 2
        said = capsys.readouterr().err
        assert words in said and said.count("\n") == 1, said
        assert list(tmp_path.glob("*out*")) + list(tmp_path.glob(".*")) == []

    lora, full = exports.runs["wan", "lora"].folder, exports.runs["wan", "full"].folder
    digits = tmp_path / "digits"
    digits.mkdir()
    (digits / "recipe.yaml").write_text(dump_recipe(load_recipe("digits")))
    refused("family 'digits' is this package's own network", digits, "--format", "lora")
    pixels = tmp_path / "edm"
    pixels.mkdir()
    (pixels / "recipe.yaml").write_text(dump_recipe(recipe_of(TINY_MODELS["edm"], pixels)))
    refused("diffusers has no pipeline of family 'edm'", pixels, "--format", "diffusers")
    refused("--format lora: the run's experts are whole networks", full, "--format", "lora")
    refused("--format peft: the run's experts are whole networks", full, "--format", "peft")
    refused("--push x: OWNER/NAME is needed", lora, "--format", "lora", "--push", "x")
    tuned = exports.runs["qwen_image", "tuned"].folder
    refused("--format lora: the experts are adapters of a teacher that teacher.lora", tuned, "--format", "lora")
    refused("no run in", tmp_path / "nothing", "--format", "lora")
    assert exported(lora, "--out", lora, "--format", "lora") == 2
    assert "there is something already" in capsys.readouterr().err

    unfinished = shutil.copytree(lora, tmp_path / "unfinished")
    shutil.rmtree(unfinished / "experts" / "phase-2")
    refused("is not finished: it has 1 of 2 experts", unfinished, "--format", "diffusers")

    empty = shutil.copytree(lora, tmp_path / "empty")
    file = empty / "experts" / "phase-2" / "model.safetensors"
    state = {name: value * 0 if "lora_B" in name else value for name, value in load_file(file).items()}
    save_file(state, file)
    refused("it is not whole", empty, "--format", "lora")  # not the file of the index
    write_index(empty)
    refused("the adapters are empty", empty, "--format", "lora")

    class Other(type(exports.plans["wan", "lora", "lora"].family)):  # type: ignore[misc]
        def student_samplers(self, times):
            return [Sampler(EULER, {"shift": 3.0}, {"num_inference_steps": 4})]

    monkeypatch.setitem(FAMILIES_BY_NAME, "wan", Other)
    refused("no scheduler that WanPipeline takes visits the trained times 1, 0.9, 0.75", lora, "--format", "diffusers")


def test_an_export_that_samples_otherwise_is_not_written(exports: Exports, tmp_path: Path, monkeypatch) -> None:
    found = replace(exports.found["wan", "lora", "lora"], latents=2e-5, largest=0.5)
    monkeypatch.setattr(checking, "compare", lambda plan, folder: found)
    with pytest.raises(RunError, match="samples the export otherwise than the run: latents by 2e-05"):
        export_run(exports.runs["wan", "lora"], "lora", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_difference_of_a_folder(exports: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = ("wan", "lora", "peft")
    asked: list[Plan] = []
    monkeypatch.setattr(checking, "compare", lambda plan, folder: (asked.append(plan), exports.found[key])[1])
    assert checking.difference(exports.runs[key[:2]].folder, exports.folders[key]) == exports.found[key].latents
    assert (asked[0].format, asked[0].dtype) == ("peft", "float32")
    with pytest.raises(UserError, match="is no export: export.json"):
        checking.difference(exports.runs[key[:2]].folder, tmp_path)
