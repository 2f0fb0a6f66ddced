"""`raydmd export`: what plain diffusers makes of each format is what the run makes, and what cannot be is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from run_folders import draw_run
from safetensors.torch import load_file, save_file
from test_every_family import recipe_of

from raydmd import cli
from raydmd.config.recipe import dump_recipe
from raydmd.diffusion.solvers import euler_step
from raydmd.diffusion.times import step_grid
from raydmd.errors import RunError, UserError
from raydmd.export import check as checking
from raydmd.export.check import Difference, compare_all
from raydmd.export.export import export_run
from raydmd.export.formats import FORMATS
from raydmd.export.loading_code import call_arguments
from raydmd.export.plan import Plan, choose_sampler, make_plan
from raydmd.methods.loading import load_recipe
from raydmd.models.diffusers.sampler_grid import EULER
from raydmd.models.diffusers.student_sampler import FLOW_MAP, Sampler, euler_shift, euler_stretch, even_shift
from raydmd.models.diffusers.variance_preserving import VariancePreservingFamily
from raydmd.models.experts import Experts
from raydmd.models.registry import FAMILIES as FAMILIES_BY_NAME
from raydmd.models.tiny import TINY_MODELS
from raydmd.models.tiny.cogvideox import TinyCogVideoX15
from raydmd.models.tiny.wan import TinyWan22, TinyWanImageToVideo
from raydmd.runs.expert_index import write_index
from raydmd.runs.run import Run
from raydmd.sampling.student import sample_student

torch.set_num_threads(1)


def own_times(shift: float) -> list[float]:
    """Return the times that Wan's Euler scheduler visits in 4 steps when it is told no other."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(4)
    return [float(f"{t:.7f}") for t in scheduler.sigmas[:-1]]


GRID, BOUNDARY = step_grid(4, 3.0), 0.875
ON_THE_BOUNDARY = (f"method.times=[1, {BOUNDARY}]", "method.steps=2", f"method.boundaries=[{BOUNDARY}]")
KINDS = {  # overrides of the recipe; two LoRA experts of two steps each, but for what they say
    "lora": (), "full": ("method.experts.kind=full",), "one": ("method.phases=1",),
    "one-full": ("method.phases=1", "method.experts.kind=full"),
    "uneven": ("method.phases=1", "method.times=[1.0, 0.8, 0.3]"),
    "lawless": ("method.phases=1", "method.times=[1.0, 0.9, 0.5, 0.45]"),
    "own": (f"method.times={own_times(5.0)}", "method.experts.kind=full"),
    "boundary": ON_THE_BOUNDARY, "boundary-full": (*ON_THE_BOUNDARY, "method.experts.kind=full"),
    "first": ("teacher.options.subfolder=transformer",), "second": ("teacher.options.subfolder=transformer_2",),
}  # fmt: skip
SHIFTED = ("qwen_image", "wan", "wan_i2v", "flux", "flux2_klein", "sd3", "z_image")  # by 3, where no times are given
ALL, PLAIN = tuple(FORMATS), ("diffusers", "lora", "peft")
USUAL = {"lora": ("diffusers",), "one-full": ("diffusers",), "one": ("lora",)}
EXPORTED: dict[str, dict[str, tuple[str, ...]]] = {  # formats by tiny model and kind
    "qwen_image": {"lora": ALL, "full": ("diffusers",), "uneven": ("diffusers",)},
    "wan": {"lora": ALL, "own": ("diffusers",), "uneven": ("diffusers", "lora"), "lawless": ("diffusers",)},
    "wan22": {
        "boundary": ALL, "boundary-full": ("diffusers",), "lora": ALL, "full": ("diffusers",),
        "one": ("diffusers", "lora"), "one-full": ("diffusers",), "first": ("lora",), "second": ("peft",),
    },
    "wan_i2v": {"lora": ("diffusers", "lora"), "full": ("diffusers",), "one": ("diffusers",)},
    "wan22_i2v": {"one": ("diffusers", "peft")},
    **{name: USUAL for name in ("cogvideox", "sd3", "flux", "flux2_klein", "z_image", "sdxl", "stable_diffusion")},
    "cogvideox_15": {"one": ("diffusers",)},
}  # fmt: skip
Key = tuple[str, str, str]


class TinyWan22ImageToVideo(TinyWan22, TinyWanImageToVideo):
    """Wan 2.2's image to video, A14B: two transformers."""

    name = "wan22_i2v"


MODELS = {**TINY_MODELS, "cogvideox_15": TinyCogVideoX15(), "wan22_i2v": TinyWan22ImageToVideo()}


class Exports:
    """Runs on tiny models, and exports of them; what plain diffusers makes of all is found once, in one process."""

    def __init__(self, root: Path) -> None:
        self.runs: dict[tuple[str, str], Run] = {}
        self.folders: dict[Key, Path] = {}
        self.plans: dict[Key, Plan] = {}
        self.root = root
        for name, kinds in EXPORTED.items():
            MODELS[name].save(root / name)
            for kind, formats in kinds.items():
                self.add(name, kind, formats, *KINDS[kind])
        tuned = f"teacher.lora={self.folders['qwen_image', 'lora', 'lora'] / 'phase-1.safetensors'}"
        self.add("qwen_image", "tuned", ("diffusers",), *KINDS["one"], tuned)
        found = compare_all([(self.plans[key], self.folders[key]) for key in self.folders])
        self.found: dict[Key, Difference] = dict(zip(self.folders, found, strict=True))

    def add(self, name: str, kind: str, formats: tuple[str, ...], *overrides: str) -> None:
        """Make a run, and export it."""
        times = any(words.startswith("method.times") for words in overrides)
        shift = ("method.timestep_shift=3",) if name in SHIFTED and not times else ()
        recipe = recipe_of(MODELS[name], self.root / name, *shift, *overrides)
        run = self.runs[name, kind] = draw_run(recipe, self.root / f"{name}-{kind}")
        for format in formats:
            key = name, kind, format
            self.folders[key], self.plans[key] = self.root / "-".join(key), make_plan(run, format)
            export_run(run, format, self.folders[key], checked=False)


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # of the process that samples them, as here
        return Exports(tmp_path_factory.mktemp("exports"))


def test_plain_diffusers_makes_what_the_run_makes(exports: Exports) -> None:
    assert {key[0] for key in exports.found} >= set(TINY_MODELS) - {"edm"}
    for key, found in exports.found.items():
        plan = exports.plans[key]
        assert found.scaled <= 1e-5, (key, found)
        assert found.levels is not None and found.levels <= 1, (key, found)
        assert found.timesteps == pytest.approx(
            plan.family.network_timesteps(torch.tensor(plan.times[:-1])).tolist(), abs=1e-2
        ), key


def test_the_experts_differ_from_the_teacher_and_each_other(exports: Exports) -> None:
    """Else any mistake of the export would be within the limit."""
    first_of = {name: kind for name, kind in reversed(exports.runs)}
    for name, kind in first_of.items():
        run = exports.runs[name, kind]
        plan = next(plan for key, plan in exports.plans.items() if key[:2] == (name, kind))
        conditions, _ = checking._inputs(plan)
        right, teacher = checking._own(plan, conditions), plan.family.load_teacher()
        alone = Experts(teacher, len(plan.phases), "lora", 1, 1.0, plan.family.lora_targets)
        for phase in plan.phases:
            alone.start(phase.index)  # adapters that do nothing
        limit = 1e-3 * max(1.0, float(right.abs().max()))
        ways = [(alone, plan.phases)]
        if len(plan.phases) == 2 and not plan.takes_both:
            first, second = plan.phases
            ways.append((run.experts(plan.family.load_teacher()), [replace(first, index=1), replace(second, index=0)]))
        for experts, phases in ways:
            made = sample_student(plan.family, experts, phases, conditions, 2, seed=checking.SEED).latents
            assert (made - right).abs().max() > limit, (name, kind, len(ways))


HIGH, LOW = "transformer", "transformer_2"


@pytest.mark.parametrize(
    ("key", "ran", "between"),
    [
        (("wan", "lora", "diffusers"), (HIGH, HIGH, LOW, LOW), (GRID[2], GRID[1])),
        (("wan", "own", "diffusers"), (HIGH, HIGH, LOW, LOW), None),
        (("wan", "uneven", "diffusers"), (HIGH,) * 3, None),
        *((("wan22", kind, "diffusers"), (HIGH, LOW), (BOUNDARY, 1.0)) for kind in ("boundary", "boundary-full")),
        *((("wan22", kind, "diffusers"), (HIGH, LOW, LOW, LOW), (0.75, 1.0)) for kind in ("one", "one-full", "lora")),
        (("wan22_i2v", "one", "diffusers"), (HIGH, LOW, LOW, LOW), (0.75, 1.0)),
        *((("wan22", kind, name), (HIGH, LOW, LOW, LOW), None) for kind in ("lora",) for name in ALL[1:]),
        (("wan22", "first", "lora"), (HIGH,) * 4, None), (("wan22", "second", "peft"), (HIGH,) * 4, None),
    ],
)  # fmt: skip
def test_which_network_ran_at_which_step(
    key: Key, ran: tuple[str, ...], between: tuple[float, float] | None, exports: Exports
) -> None:
    found, plan = exports.found[key], exports.plans[key]
    assert list(zip(found.steps, found.calls, strict=True)) == list(enumerate(ran))
    times, changes = plan.times, len(set(ran)) == 2
    if between is None and changes:
        place = ran.index(LOW)
        between = times[place], times[place - 1]
    if key[2] == "diffusers":
        index = json.loads((exports.folders[key] / "model_index.json").read_text())
        assert (between[0] < index["boundary_ratio"] < between[1]) if between else index["boundary_ratio"] is None
    elif between is not None:
        assert plan.boundary_ratio is not None and between[0] < plan.boundary_ratio < between[1]
        assert f"boundary_ratio={plan.boundary_ratio!r}" in FORMATS[key[2]].code(plan)


def plain_wan(exports: Exports, key: Key, **changed: Any) -> tuple[torch.Tensor, list[str]]:
    """Return how far WanPipeline, as the folder has it, is from the run, and the network that ran at each step."""
    plan, ran = exports.plans[key], list[str]()
    pipe = WanPipeline.from_pretrained(exports.folders[key], text_encoder=None, tokenizer=None, **changed)
    pipe.set_progress_bar_config(disable=True)
    for name in (HIGH, LOW):
        if (network := getattr(pipe, name)) is not None:
            network.register_forward_pre_hook(lambda module, given, name=name: ran.append(name))
    conditions, given = checking._inputs(plan)
    noise = checking.initial_noise(plan.family, checking.SEED, 0, checking.SAMPLES)
    made = pipe(**given, **call_arguments(plan), latents=noise, output_type="latent").frames
    return (made - checking._own(plan, conditions)).abs().max(), ran


def test_a_boundary_on_the_other_side_of_a_step_runs_another_network(exports: Exports) -> None:
    for key, moved, right, wrong in (
        (("wan", "lora", "diffusers"), (GRID[2] + GRID[3]) / 2, [HIGH, HIGH, LOW, LOW], [HIGH, HIGH, HIGH, LOW]),
        (("wan22", "boundary", "diffusers"), BOUNDARY, [HIGH, LOW], [HIGH, HIGH]),  # the teacher's own
    ):
        apart, ran = plain_wan(exports, key)
        assert apart <= 1e-5 and ran == right, key
        apart, ran = plain_wan(exports, key, boundary_ratio=moved)
        assert apart > 1e-3 and ran == wrong, key


def test_the_scheduler_in_wans_folder(exports: Exports) -> None:
    """Without the card's lines its samples are the run's where a law has the times; else the lines are needed."""
    for kind, scheduler in (("own", EULER), ("lora", FLOW_MAP), ("uneven", EULER), ("lawless", EULER)):
        key = "wan", kind, "diffusers"
        config = json.loads((exports.folders[key] / "scheduler/scheduler_config.json").read_text())
        assert config["_class_name"] == scheduler
        apart, _ = plain_wan(exports, key)
        assert apart > 1e-2 if kind == "lawless" else apart <= 1e-5, (kind, apart)


def test_the_modular_pipeline_takes_the_trained_times(exports: Exports) -> None:
    """Wan's, with sigmas."""
    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from diffusers.modular_pipelines import Wan22Blocks, WanBlocks

    for name, kind, blocks in (
        ("wan", "lora", Wan22Blocks()), ("wan", "uneven", WanBlocks()), ("wan22", "one-full", Wan22Blocks()),
    ):  # fmt: skip
        plan, folder = exports.plans[name, kind, "diffusers"], exports.folders[name, kind, "diffusers"]
        blocks.sub_blocks.pop("text_encoder")
        pipe = blocks.init_pipeline()
        parts = [HIGH, LOW] if plan.shares_boundary else [HIGH]
        networks = {part: WanTransformer3DModel.from_pretrained(folder / part) for part in parts}
        guiders = {part.replace("transformer", "guider"): pipe.guider.new(guidance_scale=1.0) for part in parts}
        pipe.update_components(
            vae=AutoencoderKLWan.from_pretrained(folder / "vae"), scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
            **networks, **guiders, **({"boundary_ratio": plan.boundary_ratio} if LOW in parts else {}),
        )  # fmt: skip
        pipe.set_progress_bar_config(disable=True)
        conditions, _ = checking._inputs(plan)
        made = pipe(
            prompt_embeds=conditions["prompt_embeds"], negative_prompt_embeds=conditions["negative_prompt_embeds"],
            sigmas=plan.times[:-1], num_inference_steps=len(plan.times) - 1,
            latents=checking.initial_noise(plan.family, checking.SEED, 0, checking.SAMPLES), output="latents",
        )  # fmt: skip
        assert (made - checking._own(plan, conditions)).abs().max() <= 1e-5, (name, kind)


@pytest.mark.parametrize(
    "times", [[1.0, 0.8, 0.3, 0.0], [1.0, 0.2, 0.0], [1.0, 0.875, 2 / 3, 0.25, 0.0], step_grid(8, 3.0)]
)
def test_eulers_own_times_are_stretched_to_the_trained_ones(times: list[float]) -> None:
    config = euler_stretch(times)
    assert config is not None
    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    scheduler.set_timesteps(len(times) - 1)
    assert torch.allclose(scheduler.sigmas, torch.tensor(times), atol=2e-6)
    plain = FlowMatchEulerDiscreteScheduler(shift=config["shift"])
    plain.set_timesteps(len(times) - 1)
    assert not torch.allclose(plain.sigmas, torch.tensor(times), atol=1e-3)
    assert euler_stretch([1.0, 0.9, 0.5, 0.45, 0.0]) is None


def test_each_law_of_times_has_its_scheduler(exports: Exports) -> None:
    family = exports.plans["wan", "lora", "lora"].family
    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    scheduler.set_timesteps(4)
    own = scheduler.sigmas.tolist()
    assert own[1] == pytest.approx(0.910, abs=1e-3)  # and not .9375: it shifts twice
    assert euler_shift(own) == pytest.approx(5.0, abs=1e-4) and euler_shift(GRID) is None
    assert even_shift(GRID) == pytest.approx(3.0) and even_shift(own) is None and even_shift([1.0, 0.0]) == 1.0
    for times, name, sigmas in (
        (own, EULER, ()), (GRID, FLOW_MAP, ()), ([1.0, 0.8, 0.3, 0.0], EULER, ()),
        ([1.0, 0.9, 0.5, 0.45, 0.0], EULER, (1.0, 0.9, 0.5, 0.45)),
    ):  # fmt: skip
        sampler = choose_sampler(family.student_samplers(times), times, family)
        assert (sampler.scheduler, sampler.sigmas) == (name, sigmas)
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
    for family in ("qwen_image", "wan"):
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


def test_an_expert_of_two_networks_has_a_file_of_each(exports: Exports) -> None:
    names = ["phase-1-transformer", "phase-1-transformer_2", "phase-2"]
    for format, ending in (("lora", ".safetensors"), ("peft", "/adapter_model.safetensors")):
        folder = exports.folders["wan22", "lora", format]
        state = exports.runs["wan22", "lora"].expert_state(0)
        for name, own in zip(names, (HIGH, LOW), strict=False):
            tensors = load_file(f"{folder / name}{ending}")
            wanted = {n.removeprefix(f"{own}."): value for n, value in state.items() if n.startswith(f"{own}.")}
            begin = f"{HIGH}." if format == "lora" else "base_model.model."
            assert tensors.keys() == {f"{begin}{layer}" for layer in wanted}
            assert all(torch.equal(tensors[f"{begin}{layer}"], value) for layer, value in wanted.items())
        assert (folder / f"{names[2]}{ending}").is_file()
    files = sorted(file.name for file in exports.folders["wan22", "boundary", "lightning"].glob("*.safetensors"))
    assert files == ["high_noise_model.safetensors", "low_noise_model.safetensors"]


def test_the_card_shows_the_lines_that_were_run(exports: Exports) -> None:
    for key, folder in exports.folders.items():
        card = (folder / "README.md").read_text()
        assert card.startswith("---\nlicense: other #") and "```python" in card
        imports, _, rest = FORMATS[key[2]].code(exports.plans[key]).partition("\n\n")
        assert imports in card and rest in card, key

    def words(*key: str) -> str:
        return (exports.folders[key] / "README.md").read_text()  # type: ignore[index]

    card = words("qwen_image", "lora", "lora")
    assert 'next_expert = {2: "phase-2", 4: "phase-1"}' in card and "true_cfg_scale=1.0" in card
    card = words("wan_i2v", "lora", "lora")
    assert 'image=load_image("first_frame.png")' in card and "pipeline_tag: image-to-video" in card
    assert "    prompt_embeds=prompt_embeds,\n" in words("z_image", "one", "lora")
    assert 'next_experts = {2: ["phase-2"], 4: ["phase-1-transformer_2"]}' in words("wan22", "lora", "peft")


def test_half_precision(exports: Exports, tmp_path: Path) -> None:
    """Adapters whose effect rounding would take are refused when asked for in it, and else written in float32."""
    run = exports.runs["wan", "uneven"]
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

    lora, full = exports.runs["wan", "lora"].folder, exports.runs["wan", "own"].folder
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
    refused("'float8' is not one of 'float32', 'bfloat16'", lora, "--format", "lora", "--dtype", "float8")
    assert exported(lora, "--out", out, "--format", "loras") == 2 and not out.exists()
    assert "'loras' is not one of 'diffusers', 'lora'" in capsys.readouterr().err
    for name in [name for name, kinds in EXPORTED.items() if kinds is USUAL]:
        words = "--format lightning: the names of this family's layers outside diffusers are not known"
        refused(words, exports.runs[name, "one"].folder, "--format", "lightning")
    fresh = shutil.copytree(lora, tmp_path / "fresh")
    method = exports.runs["wan", "lora"].recipe.method.model_copy(update={"solver": "renoise"})
    recipe = exports.runs["wan", "lora"].recipe.model_copy(update={"method": method})
    (fresh / "recipe.yaml").write_text(dump_recipe(recipe))
    refused("method.solver: renoise: steps with fresh noise are not exported", fresh, "--format", "diffusers")
    video = exports.runs["cogvideox", "one"]
    for words, update in (
        ("trained times 1, 0.9, 0.75, 0.5: they lie evenly", {"timestep_shift": 3.0}),
        ("trained times 1, 0.6667, 0.3333: they lie evenly", {"steps": 3}),
    ):
        other = shutil.copytree(video.folder, tmp_path / f"other-{next(iter(update))}")
        recipe = video.recipe.model_copy(update={"method": video.recipe.method.model_copy(update=update)})
        (other / "recipe.yaml").write_text(dump_recipe(recipe))
        refused(words, other, "--format", "diffusers")
    strange = shutil.copytree(exports.runs["wan22", "boundary"].folder, tmp_path / "strange")
    (strange / "experts/phase-2/model.safetensors").unlink()
    shutil.copy(strange / "experts/phase-1/model.safetensors", strange / "experts/phase-2/model.safetensors")
    write_index(strange)
    refused("it has no weights of the pipeline's transformer_2", strange, "--format", "diffusers")
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
    assert checking.difference(exports.runs[key[:2]].folder, exports.folders[key]) == exports.found[key].scaled
    assert (asked[0].format, asked[0].dtype) == ("peft", "float32")
    with pytest.raises(UserError, match="is no export: export.json"):
        checking.difference(exports.runs[key[:2]].folder, tmp_path)
