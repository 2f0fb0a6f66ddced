"""Expert files say rank, alpha and targets, so that diffusers gives our output; files without are read as before."""

import json
import pickle
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import safetensors.numpy
import torch
from mortal import expert, manifest, same, shards
from run_folders import make_run
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_families_diffusers import NAMES, family_of, folders, inputs  # noqa: F401
from test_large_families import large_recipe

from raydmd.data.prompts import PromptTable
from raydmd.errors import UserError
from raydmd.models.adapter_files import METADATA_KEY, Adapter, read_adapter
from raydmd.models.experts import Experts, fuse_lora
from raydmd.runs.folders import expert_file
from raydmd.runs.run import Run, recipe_family
from raydmd.runtime.checkpoint.manager import Archive
from raydmd.runtime.checkpoint.shards import LabelledTensors, pieces
from raydmd.runtime.checkpoint.writer import keep_experts
from raydmd.runtime.workers.base import StudentWorker
from raydmd.runtime.workers.wire import to_wire
from raydmd.serving.parts import expert_networks

torch.set_num_threads(1)

RANK, ALPHA = 4, 0.5  # a scale of 1/8, as the papers' 8/64
PIPELINES = {"wan": diffusers.WanPipeline, "qwen_image": diffusers.QwenImagePipeline}


def trained(teacher, family, seed=0):
    """Adapters whose effect shows."""
    experts = Experts(teacher, 1, "lora", RANK, ALPHA, family.lora_targets, 0)
    experts.start(0)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in experts.trainable_parameters().values():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return experts


def write(file, experts):
    """Write an expert as a run does: by the generator's worker and the writer of checkpoints."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"".join(pieces(LabelledTensors(to_wire(experts.state(0)), experts.metadata(0)))))
    return file


@pytest.mark.parametrize("name", NAMES)
def test_diffusers_loads_what_we_trained(name, folders, tmp_path):  # noqa: F811
    family = family_of(name, folders[name])
    teacher = family.load_teacher()
    experts, batch = trained(teacher, family), inputs(family)
    file = write(tmp_path / "experts" / "model.safetensors", experts)
    plain = tmp_path / "plain" / "model.safetensors"
    plain.parent.mkdir()
    save_file(load_file(file), plain)  # as it was written before
    kind = type(teacher.transformer)

    def loaded(path, way):
        transformer = kind.from_pretrained(folders[name], subfolder="transformer")
        if way == "pipeline":
            parts = dict(tokenizer=None, text_encoder=None, vae=None, scheduler=None)
            PIPELINES[name](transformer=transformer, **parts).load_lora_weights(str(path.parent), weight_name=path.name)
        else:
            transformer.load_lora_adapter(str(path.parent), weight_name=path.name, prefix="transformer")
        with torch.no_grad():
            return type(teacher)(transformer)(*batch)

    with torch.no_grad():
        ours, without = experts.expert(0)(*batch), teacher(*batch)
    effect = (ours - without).norm()
    for way in ("pipeline", "model"):
        assert (loaded(file, way) - ours).norm() < 1e-4 * effect, way
        assert (loaded(plain, way) - ours).norm() > effect  # eight times too strong


def test_the_metadata_is_diffusers_own(folders, tmp_path):  # noqa: F811
    family = family_of("wan", folders["wan"])
    experts = trained(family.load_teacher(), family)
    file = write(tmp_path / "ours.safetensors", experts)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    assert metadata["format"] == "pt"
    ours = json.loads(metadata[METADATA_KEY])
    assert ours == {
        "transformer.r": RANK, "transformer.lora_alpha": ALPHA, "transformer.target_modules": family.lora_targets,
    }  # fmt: skip
    layers = {key.removeprefix("transformer.").split(".lora_")[0] for key in load_file(file)}
    assert all(any(layer.endswith(f".{target}") for target in family.lora_targets) for layer in layers)
    assert read_adapter(file) == Adapter(RANK, ALPHA)
    other = tmp_path / "diffusers"
    state = {key.removeprefix("transformer."): value for key, value in load_file(file).items()}
    diffusers.WanPipeline.save_lora_weights(
        str(other), transformer_lora_layers=state, transformer_lora_adapter_metadata={"r": 7, "lora_alpha": 3.0}
    )
    assert read_adapter(other / "pytorch_lora_weights.safetensors") == Adapter(7, 3.0)


def test_a_worker_hands_over_the_metadata(folders):  # noqa: F811
    family = family_of("wan", folders["wan"])
    experts = trained(family.load_teacher(), family)
    sent = StudentWorker.expert(SimpleNamespace(part=SimpleNamespace(experts=experts)), 0)
    received = pickle.loads(pickle.dumps(sent, protocol=5))
    assert isinstance(received, LabelledTensors) and received.metadata == experts.metadata(0)
    assert received.keys() == experts.state(0).keys()
    assert all(isinstance(value, np.ndarray) for value in received.values())


def test_an_expert_from_the_archive_has_the_same_bytes(tmp_path):
    metadata = {"format": "pt", METADATA_KEY: json.dumps({"transformer.r": 2})}
    for name, weights in (("with", LabelledTensors(expert(7), metadata)), ("without", expert(7))):
        archive = Archive(str(tmp_path / name))
        archive.save_expert(0, weights)
        archive.save(manifest(1, experts=1), shards(1))
        (kept,) = (tmp_path / name / "experts").glob("*.safetensors")
        found = Archive(str(tmp_path / name)).newest()
        keep_experts(tmp_path / "run" / name, found.manifest, found.shards)
        file = expert_file(tmp_path / "run" / name, 0)
        assert file.read_bytes() == kept.read_bytes()
        with safe_open(file, "pt") as opened:
            assert (opened.metadata() or {}) == (metadata if name == "with" else {})
        assert same(safetensors.numpy.load_file(file), expert(7))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of Qwen-Image on weights of each precision, LoRA of a scale of 1/8, briefly trained."""
    made = {}
    for dtype in ("float32", "bfloat16"):
        folder = tmp_path_factory.mktemp(dtype)
        recipe = large_recipe(
            "qwen_image", folder, f"teacher.options.dtype={dtype}", f"method.experts.rank={RANK}",
            f"method.experts.alpha={ALPHA}", "optimizer.generator.lr=0.05",
        )  # fmt: skip
        prompts = PromptTable(str(recipe.prompts.path), recipe_family(recipe).condition_columns)
        made[dtype] = make_run(recipe, folder / "run", prompts)
    return made


def test_a_run_says_it_and_reads_what_says_nothing_or_the_same(runs, tmp_path):
    run, file = Run(runs["float32"].folder), expert_file(runs["float32"].folder, 0)
    assert read_adapter(file) == Adapter(RANK, ALPHA)
    kept, state = file.read_bytes(), load_file(file)
    try:
        save_file(state, file)
        assert read_adapter(file) is None
        assert all(torch.equal(value, state[name]) for name, value in run.experts(run.teacher()).state(0).items())
        wrong = json.dumps({"transformer.r": RANK, "transformer.lora_alpha": 8})
        for text, message in ((wrong, "alpha 8, but the run's recipe has .*alpha 0.5"), ("[]", "not a record")):
            save_file(state, file, {METADATA_KEY: text})
            with pytest.raises(UserError, match=message) as error:
                run.experts(run.teacher())
            assert str(file) in str(error.value) and "\n" not in str(error.value)
            with pytest.raises(UserError, match=message):
                expert_networks(run, [0], "fused", torch.device("cpu"))
        file.write_bytes(b"not weights")
        with pytest.raises(UserError, match="not readable as a safetensors file"):
            run.experts(run.teacher())
    finally:
        file.write_bytes(kept)


# --- merging into half precision


def forward(run, networks):
    family = run.family
    prompts = PromptTable(str(run.recipe.prompts.path), family.condition_columns)
    x = torch.randn(2, *family.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return networks(x, torch.full((2,), 0.8, dtype=torch.float64), family.conditions(prompts.rows(0, 2)))


def test_adapters_are_switched_on_half_precision_weights_by_default(runs):
    cpu = torch.device("cpu")
    for dtype, run in runs.items():
        base = forward(run, run.teacher())
        switched = forward(run, expert_networks(run, [0], "switched", cpu)[0])
        default = forward(run, expert_networks(run, [0], None, cpu)[0])
        effect = (switched - base).norm()
        assert effect > 0
        assert (default - switched).norm() < (0.02 * effect if dtype == "float32" else 1e-12)
        if dtype == "float32":
            fused = forward(run, expert_networks(run, [0], "fused", cpu)[0])
            assert torch.equal(default, fused)
        else:
            with pytest.raises(UserError, match=r"weights: fused: .*bfloat16 .* loses \d+%.*weights=switched"):
                expert_networks(run, [0], "fused", cpu)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_merging_is_compared(dtype, folders):  # noqa: F811
    """An effect as large as the weights survives their rounding and is merged; a small one does not, in any layer."""
    family = family_of("wan", folders["wan"], dtype=dtype)
    batch, generator = inputs(family), torch.Generator().manual_seed(0)
    exact = family_of("wan", folders["wan"]).load_teacher()
    teacher = family.load_teacher()
    exact.load_state_dict({name: value.float() for name, value in teacher.state_dict().items()})
    state = {name: torch.randn(value.shape, generator=generator)
             for name, value in trained(teacher, family).state(0).items()}  # fmt: skip
    merged = fuse_lora(family.load_teacher(), state, RANK, ALPHA)
    fuse_lora(exact, state, RANK, ALPHA)
    for (name, value), right in zip(merged.named_parameters(), exact.parameters(), strict=True):
        assert torch.equal(value, right.to(value.dtype)), name  # the float32 sum, rounded once
    assert merged(*batch).isfinite().all()
    small = {name: value * (1e-2 if "lora_B" in name else 1e-1) for name, value in state.items()}
    with pytest.raises(UserError, match="loses"):
        fuse_lora(family.load_teacher(), small, RANK, ALPHA)
    assert fuse_lora(family.load_teacher(), {name: value * 0 for name, value in state.items()}, RANK, ALPHA)
