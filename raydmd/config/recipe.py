"""The recipe: one typed tree, read from YAML, validated, overridable with ``--set key.path=value``."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializeAsAny, model_validator

from raydmd.config.buckets import read_buckets
from raydmd.config.overrides import with_new_names
from raydmd.errors import UserError, nearest
from raydmd.locations import parse_location
from raydmd.strict_yaml import StrictLoader

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Guidance = Annotated[float, Field(ge=0)]
Quantization = Literal["none", "int8", "fp8"]


VERSION = 1  # of the recipe's form


def in_miniature(value: Any) -> dict[str, Any]:
    """Return what a field is to carry (``json_schema_extra``) whose value in miniature is this, or less."""
    return {"miniature": value}


class Section(BaseModel):
    """A part of the recipe: unknown keys are refused, values are fixed once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Teacher(Section):
    """The many-step diffusion model to distil."""

    family: str = Field(
        "digits", description="kind of network: digits, ring, qwen_image, wan, sd3, flux, sdxl ... (docs/models.md)"
    )
    path: str | None = Field(
        None,
        description="a folder of `raydmd pretrain` or of a diffusers model, or hf://owner/name@revision; null: the run "
        "makes its own; tiny: a random tiny one, and the whole recipe in miniature",
    )
    tiny: str | None = Field(
        None, description="which random tiny model the run makes for itself where there is no path; null: path: tiny "
        "takes the family's usual one",
    )  # fmt: skip
    guidance_scale: Guidance | tuple[Guidance, Guidance] = Field(
        1.5, description="w in u + w (c - u); 1: no guidance (the w of Self-Forcing and CausVid is this less 1); of a "
        "teacher of two networks (Wan 2.2 A14B) also [w of the one for much noise, w of the other]",
    )  # fmt: skip
    guidance_rescale: Literal["none", "norm"] | None = Field(
        None, description="norm: each token of the guided prediction gets the conditional's norm; null: as the "
        "model's own pipeline has it (norm for qwen_image, none for all others)",
    )  # fmt: skip
    steps: Positive = Field(
        25,
        description="steps of its own many-step sampler, for evaluation and ODE pairs",
        json_schema_extra=in_miniature(4),
    )
    timestep_shift: Rate | None = Field(
        None, description="shift of that sampler's times; null: as its scheduler_config.json says, 1 without one"
    )
    options: dict[str, Any] = Field(default_factory=dict, description="what the family's network takes")
    lora: str | None = Field(
        None, description="LoRA file, or folder with one, that is fused into a diffusers teacher: a fine-tuned one",
        json_schema_extra=in_miniature(None),
    )  # fmt: skip
    quantization: Quantization = Field(
        "none", description="of the linear layers of a diffusers teacher, where it scores and samples: int8 or fp8; "
        "what is trained starts from its own weights (docs/models.md)",
    )  # fmt: skip

    @property
    def is_made(self) -> bool:
        """Whether the run makes a random tiny one for itself."""
        return self.path is None and self.tiny is not None

    @property
    def guidance_scales(self) -> tuple[float, ...]:
        """The guidance scale, or that of each of the teacher's two networks."""
        return self.guidance_scale if isinstance(self.guidance_scale, tuple) else (self.guidance_scale,)


class Pretrain(Section):
    """Training of an embedded teacher by denoising score matching (`raydmd pretrain`)."""

    iterations: Positive = Field(3000, description="optimizer steps")
    batch: Positive = Field(128, description="samples of a step, over all workers")
    micro: Positive | None = Field(64, description="samples of a micro-batch; null: the whole batch is one")
    lr: Rate = Field(4e-3, description="highest learning rate; it falls by a cosine after the warm-up")
    warmup: NonNegative = Field(100, description="steps in which lr rises from 0")
    ema: float = Field(0.999, ge=0, lt=1, description="decay of the averaged weights, which are the teacher's")
    label_dropout: float = Field(0.1, ge=0, le=1, description="share of samples that learn the null prompt")
    checkpoint_every: Positive = Field(500, description="steps between checkpoints")
    min_workers: Positive = Field(1, description="Ray Train goes on with as few as these")
    max_workers: Positive = Field(2, description="and takes as many as these when there is room")
    cpus: float = Field(1.0, gt=0, description="CPUs of a worker")

    @model_validator(mode="after")
    def _micro_divides(self) -> Self:
        if self.micro is not None and self.batch % self.micro:
            raise ValueError(f"pretrain.micro ({self.micro}) must divide pretrain.batch ({self.batch})")
        if self.max_workers < self.min_workers:
            raise ValueError(f"pretrain.max_workers ({self.max_workers}) is below min_workers ({self.min_workers})")
        return self


class Regression(Section):
    """DMD's regression on the teacher's ODE pairs (DMD Eq. 9); weight 0 leaves it out."""

    weight: float = Field(0.0, ge=0, description="of the regression in the generator's loss; 0 leaves it out")
    pairs: Positive = Field(
        1024,
        description="number of (noise, teacher's result) pairs made before training",
        json_schema_extra=in_miniature(8),
    )
    distance: Literal["l2", "lpips"] = Field(
        "l2", description="l2: of latents; lpips: of decoded pictures, DMD's own", json_schema_extra=in_miniature("l2")
    )
    network: Literal["vgg", "alex"] = Field("vgg", description="trunk of lpips; DMD's is vgg, alex is quicker")


class Experts(Section):
    """How the generator's experts are held."""

    kind: Literal["full", "lora"] = Field(
        "full", description="full: all of the network's weights; lora: low-rank adapters beside the teacher's"
    )
    rank: Positive = Field(64, description="of the adapters")
    alpha: Rate = Field(8.0, description="of the adapters: their output is multiplied by alpha / rank")


class MethodOptions(Section):
    """Which distillation; the switches are the papers' ablations. A method may have further options of its own."""

    folders: ClassVar[tuple[str, ...]] = ()
    """Dotted keys below ``method`` that hold folders, which a run takes by their absolute paths."""

    name: str = Field(description="which method: a file in raydmd/methods, or a plugin's (docs/methods.md)")
    steps: Positive | None = Field(None, description="network calls of the student; null: 4, or 1 for dmd")
    phases: Positive | None = Field(None, description="experts of `phased`; null: 2, or 1 for the others")
    gradient: Literal["sgts", "vanilla"] | None = Field(None, description="null: what the method's name says")
    solver: Literal["euler", "renoise"] = Field(
        "euler", description="from one step to the next: euler along the ODE, or x0 with fresh noise"
    )
    timestep_shift: Rate = Field(1.0, description="shift of the student's step grid")
    times: tuple[Share, ...] | None = Field(
        None, min_length=1, description="the student's times as shares of the noisiest, falling from 1; null: by steps"
    )
    boundaries: tuple[Share, ...] | None = Field(
        None, min_length=1, description="times at which an expert hands over to the next, falling; null: by step count"
    )
    score_interval: Literal["nested", "disjoint", "fixed"] = Field(
        "nested", description="the scores' t: nested: from the phase's end to the noisiest; disjoint: to the phase's "
        "own begin; fixed: at fixed_t",
    )  # fmt: skip
    fixed_t: float | None = Field(None, description="the t of score_interval: fixed", gt=0, le=1)
    score_shift: Rate = Field(1.0, description="timestep shift of the law of the scores' t")
    score_distribution: Literal["uniform", "logit_normal"] = Field(
        "uniform", description="law of the scores' t before its shift"
    )
    score_margin: float = Field(0.02, ge=0, lt=0.5, description="t keeps this far above the phase's end")
    fake_target: Literal["subinterval", "naive"] = Field(
        "subinterval", description="what the fake score learns from x_s: the unbiased target, or the one of x_s as x0"
    )
    clamp: float | None = Field(10.0, description="largest 1/sigma_{t|s}^2 in the fake score's loss", gt=0)
    gradient_weight: Literal["normalized", "raw", "sigma_over_alpha", "sigma_cubed_over_alpha"] = Field(
        "normalized", description="weight over t of the generator's gradient; normalized: by mean|x - x0 of the "
        "teacher| of each sample",
    )  # fmt: skip
    fake_updates: Positive = Field(5, description="fake-score updates to one of the generator")
    regression: Regression = Regression()
    experts: Experts = Experts()
    init: str | None = Field(
        None,
        description="a run's folder, one of its experts/phase-K, or a file of weights or LoRA, where all machines see "
        "it: the student that experts start from; null: the teacher",
        json_schema_extra=in_miniature(None),
    )

    def absolute(self) -> Self:
        """Return the options with local paths made absolute; by default they have none."""
        return self

    @model_validator(mode="after")
    def _times_fall(self) -> Self:
        if self.times is not None:
            if self.times[0] != 1.0:
                raise ValueError(f"method.times: it begins at {self.times[0]:g}, not at 1, the noisiest")
            _check_falling("method.times", (*self.times, 0.0))
            if self.timestep_shift != 1.0:
                raise ValueError("method.timestep_shift: method.times are taken as they are; leave one of the two out")
        if self.boundaries is not None:
            _check_falling("method.boundaries", (1.0, *self.boundaries, 0.0))
        return self

    @model_validator(mode="after")
    def _fixed_t_goes_with_fixed(self) -> Self:
        if (self.fixed_t is not None) != (self.score_interval == "fixed"):
            raise ValueError("method.fixed_t is given exactly when method.score_interval is fixed")
        return self


def _check_falling(key: str, times: Sequence[float]) -> None:
    for before, after in pairwise(times):
        if not after < before:
            raise ValueError(f"{key}: {after:g} is not below {before:g}; times fall, between 1 and 0")


class Optimizer(Section):
    """AdamW; the papers' betas are (0, 0.999)."""

    lr: Rate = Field(description="learning rate")
    betas: tuple[Decay, Decay] = Field((0.0, 0.999), description="AdamW's decays of its two moments")
    eps: Rate = Field(1e-8, description="AdamW's epsilon")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay")
    clip: float | None = Field(1.0, description="largest norm of the whole gradient; null: no clipping", gt=0)
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="of lr over the role's updates in a phase; it begins anew with each phase"
    )
    final: Share = Field(0.0, description="share of lr that linear and cosine fall to by the phase's end")
    warmup: NonNegative = Field(
        0, description="updates of the role in which lr rises from 0, in each phase", json_schema_extra=in_miniature(1)
    )


class GeneratorOptimizer(Optimizer):
    """AdamW of the generator."""

    lr: Rate = Field(5e-4, description="learning rate")


class FakeOptimizer(Optimizer):
    """AdamW of the fake score, and of further roles."""

    lr: Rate = Field(1e-3, description="learning rate")


class Optimizers(Section):
    """One optimizer for each trained role; roles of other methods have the fake score's where they are not named."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, FakeOptimizer] = Field(init=False)

    generator: GeneratorOptimizer = GeneratorOptimizer()
    fake: FakeOptimizer = FakeOptimizer()

    def of(self, role: str) -> Optimizer:
        """Return a role's."""
        found: Optimizer = getattr(self, role, None) or FakeOptimizer()
        return found


class Batch(Section):
    """The fixed global batch, cut into fixed micro-batches that workers share out."""

    size: Positive = Field(
        64, description="samples of an update, whatever the workers", json_schema_extra=in_miniature(2)
    )
    micro: Positive | None = Field(
        None, description="samples of a micro-batch; null: the whole batch is one", json_schema_extra=in_miniature(1)
    )

    @model_validator(mode="after")
    def _micro_divides(self) -> Self:
        if self.micro is not None and self.size % self.micro:
            raise ValueError(f"batch.micro ({self.micro}) must divide batch.size ({self.size})")
        return self

    @property
    def micros(self) -> int:
        """How many micro-batches make a batch."""
        return self.size // (self.micro or self.size)


class Bucket(Section):
    """A size of samples: each global batch is of one."""

    size: tuple[int, ...] = Field(description="[height, width] or [frames, height, width] in pixels")
    weight: Rate = Field(1.0, description="how often it is drawn, against the others' weights")

    @property
    def frames(self) -> int | None:
        """Frames of a sample; None: as many as ``teacher.options.latent_shape`` has."""
        return self.size[0] if len(self.size) == 3 else None

    @property
    def sides(self) -> tuple[int, int]:
        """Height and width."""
        return self.size[-2], self.size[-1]


class Prompts(Section):
    """What is generated: texts, which the teacher's own text encoder encodes, or rows of a Parquet file of embeddings.

    The fake score's rollouts, the generator's batches and the ODE pairs each walk all rows, once an epoch, in an order
    that follows from the seed.
    """

    path: str | None = Field(
        None, description="texts (.txt, .csv, .jsonl, .parquet, a folder of captioned pictures) or a Parquet file of "
        "embeddings; null: those that ship with the embedded family, or with a tiny teacher",
        json_schema_extra=in_miniature(None),
    )  # fmt: skip
    column: str | None = Field(
        None, description="of the texts; null: the one of text, prompt, caption that is there",
        json_schema_extra=in_miniature(None),
    )  # fmt: skip
    cache: str | None = Field(
        None, description="folder or URI of embeddings that were made of texts; null: ~/.cache/raydmd/prompts"
    )
    cache_mb: NonNegative = Field(256, description="encoded prompts are kept when they fit in this many MB of memory")
    stream_workers: Positive = Field(
        1, description="actors that turn rows into what the network takes, where all rows do not fit in cache_mb"
    )
    buckets: Annotated[tuple[Bucket, ...] | None, BeforeValidator(read_buckets)] = Field(
        None, description="sizes of the samples, one of which each global batch is of: [height, width] or [frames, "
        "height, width] each, or {size, weight}; or the name of a list that ships (qwen-image, sdxl, wan-t2v ...); "
        "null: the size of teacher.options.latent_shape",
    )  # fmt: skip


class PairsFolder(Section):
    """Where the teacher's ODE pairs come from."""

    path: str | None = Field(
        None,
        description="a folder of `raydmd pairs`, where all machines see it; null: the run has its teacher make them",
        json_schema_extra=in_miniature(None),
    )

    @model_validator(mode="after")
    def _path_is_a_folder(self) -> Self:
        if self.path is not None and (not self.path.strip() or "://" in self.path):
            raise ValueError("pairs.path: a folder on storage that all machines share is needed, not a URI")
        return self


class Role(Section):
    """Where a role's workers may run and how many there are."""

    min_workers: Positive = Field(1, description="as few as these go on", json_schema_extra=in_miniature(1))
    max_workers: Positive = Field(
        1, description="as many as these when there is room", json_schema_extra=in_miniature(1)
    )
    cpus: float = Field(1.0, ge=0, description="CPUs that a worker claims", json_schema_extra=in_miniature(0.25))
    gpus: float = Field(0.0, ge=0, description="GPUs that a worker claims", json_schema_extra=in_miniature(0.0))
    resources: dict[str, float] = Field(
        default_factory=dict, description="custom Ray resources, each worker", json_schema_extra=in_miniature({})
    )
    labels: dict[str, str] = Field(
        default_factory=dict, description="Ray label selector, e.g. ray.io/market-type: spot",
        json_schema_extra=in_miniature({}),
    )  # fmt: skip
    fallbacks: list[dict[str, str]] = Field(
        default_factory=list, description="label selectors to try next", json_schema_extra=in_miniature([])
    )
    threads: Positive = Field(1, description="torch threads of a worker", json_schema_extra=in_miniature(1))

    @model_validator(mode="after")
    def _range(self) -> Self:
        if self.max_workers < self.min_workers:
            raise ValueError(f"max_workers ({self.max_workers}) is below min_workers ({self.min_workers})")
        return self


class EncoderPool(Section):
    """Workers that encode texts before training starts; when they are done, the roles get their place."""

    workers: Positive = Field(
        1, description="as many as these when there is room, and one at least", json_schema_extra=in_miniature(1)
    )
    cpus: float = Field(1.0, ge=0, description="CPUs that a worker claims", json_schema_extra=in_miniature(1.0))
    gpus: float = Field(0.0, ge=0, description="GPUs that a worker claims", json_schema_extra=in_miniature(0.0))
    resources: dict[str, float] = Field(
        default_factory=dict, description="custom Ray resources, each worker", json_schema_extra=in_miniature({})
    )
    labels: dict[str, str] = Field(
        default_factory=dict, description="Ray label selector", json_schema_extra=in_miniature({})
    )  # fmt: skip
    threads: Positive = Field(1, description="torch threads of a worker")
    batch: Positive = Field(32, description="prompts that are encoded at once, and are one file of the result")

    def role(self) -> Role:
        """Return the workers as those of a role."""
        shared = {name: getattr(self, name) for name in ("cpus", "gpus", "resources", "labels", "threads")}
        return Role(max_workers=self.workers, **shared)


class Runtime(Section):
    """The Ray side; roles of other methods are further sections, like the three that are named."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Role] = Field(init=False)

    teacher: Role = Role()
    fake: Role = Role()
    generator: Role = Role()
    encoder: EncoderPool = EncoderPool()
    max_staleness: NonNegative = Field(0, description="versions that the fake's rollouts may lag; 0 is exact")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="where roles compute; auto: on a GPU where their workers claim one"
    )
    object_store_mb: Positive = Field(512, description="object store of a Ray that raydmd starts itself")
    placement_timeout: Rate = Field(600.0, description="seconds to wait for every role's min_workers")
    dead_after: Rate = Field(300.0, description="seconds without an answer, or in one call: the worker counts as dead")
    max_failures: Positive = Field(3, description="failures of workers, without a step between, that end the run")

    def of(self, role: str) -> Role:
        """Return a role's section."""
        found: Role = getattr(self, role, None) or Role()
        return found


class Checkpoint(Section):
    """Manifests: one atomic record of the whole run."""

    every: Positive = Field(25, description="iterations between manifests")
    keep: Positive = Field(2, description="manifests that are kept, the newest")
    path: str | None = Field(
        None, description="folder or URI (s3://, gs://) of the manifests; null: RUN/checkpoints",
        json_schema_extra=in_miniature(None),
    )  # fmt: skip

    @model_validator(mode="after")
    def _path_can_be_read(self) -> Self:
        if self.path is not None:
            try:
                parse_location(self.path)
            except UserError as error:  # begins with the key, so that the value, which may hold a secret, is not shown
                raise ValueError(str(error)) from None
        return self


def _check_prompts(value: Any) -> Any:
    """Refuse what is neither a file's path nor a list of texts and rows' numbers."""
    if isinstance(value, list | tuple):
        if not value:
            raise ValueError("at least one prompt is needed; null: the table's first rows")
        for each in value:
            if not (isinstance(each, str) and each.strip()) and not (type(each) is int and each >= 0):
                raise ValueError(f"each is a text or a row's number, 0 or more, not {each!r}")
    elif value is not None and not (isinstance(value, str) and value.strip()):
        raise ValueError(f"a list of texts or rows' numbers is needed, or a file of texts, not {value!r}")
    return value


class Wandb(Section):
    """Weights & Biases (the extra ``wandb``); its key comes from its own login or WANDB_API_KEY, never from here."""

    project: str | None = Field(None, min_length=1, description="that the run is shown in; null: nothing is sent",
                                json_schema_extra=in_miniature(None))  # fmt: skip
    entity: str | None = Field(None, min_length=1, description="user or team; null: the account's own")
    name: str | None = Field(None, min_length=1, description="of the run there; null: its folder's")
    mode: Literal["online", "offline", "disabled"] = Field(
        "online", description="offline: into the run's folder, for `wandb sync`; disabled: nowhere"
    )


class Monitor(Section):
    """What is seen while it trains."""

    samples_every: NonNegative = Field(50, description="iterations between sample grids; 0: none")
    samples: Positive = Field(40, description="pictures of a grid", json_schema_extra=in_miniature(4))
    prompts: Annotated[str | tuple[str | int, ...] | None, BeforeValidator(_check_prompts)] = Field(
        None,
        description="of the grids, in turn: texts or rows' numbers, or a file of texts; null: the table's first rows",
        json_schema_extra=in_miniature(None),
    )
    tensorboard: bool = Field(True, description="whether curves are written for TensorBoard")
    wandb: Wandb = Wandb()
    zeroed_warn_share: Share = Field(
        0.01, description="of an iteration's samples: more without a finite gradient are left out with a warning"
    )
    zeroed_end_share: Share = Field(0.5, description="more than this share left out end the run; 1: never")


class Evaluation(Section):
    """`raydmd evaluate`."""

    samples: Positive = Field(2000, description="pictures to compare", json_schema_extra=in_miniature(64))
    batch: Positive = Field(500, description="pictures that are made at once", json_schema_extra=in_miniature(64))


class Recipe(Section):
    """All that a run needs to know."""

    name: str = Field(description="of the run's folder where --out does not say it; by default the file's")
    version: Positive = Field(
        VERSION, description="of the recipe's form; one that this raydmd does not know is refused"
    )
    seed: NonNegative = Field(0, description="of all random numbers")
    iterations: Positive | list[Positive] = Field(
        200,
        description="generator updates in all, shared out evenly between phases, or a list, one a phase",
        json_schema_extra=in_miniature(2),
    )
    ema: float = Field(0.99, ge=0, lt=1, description="decay of the generator's averaged weights; 0: none")
    teacher: Teacher = Teacher()
    pretrain: Pretrain = Pretrain()
    method: SerializeAsAny[MethodOptions]
    optimizer: Optimizers = Optimizers()
    batch: Batch = Batch()
    prompts: Prompts = Prompts()
    pairs: PairsFolder = PairsFolder()
    runtime: Runtime = Runtime()
    checkpoint: Checkpoint = Checkpoint()
    monitor: Monitor = Monitor()
    evaluation: Evaluation = Evaluation()
    plugins: list[str] = Field(
        default_factory=list, description="modules and files.py that register methods or families when imported"
    )


def recipes_folder() -> Path:
    """Return the folder of the shipped recipes, in an installed package or a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "jobs" / "recipes"


def shipped_recipes() -> dict[str, Path]:
    """Return the shipped recipes by name."""
    return {path.stem: path for path in sorted(recipes_folder().glob("*.yaml"), key=lambda path: path.stem)}


def listed_recipes() -> list[str]:
    """Return the shipped recipes by family, a line each: the family's name, then its recipes' names and summaries."""
    families = dict[str, list[str]]()
    shipped = shipped_recipes()
    width = max(map(len, shipped), default=0)
    for name, path in shipped.items():
        text = path.read_text(encoding="utf-8")
        family = yaml.load(text, Loader=StrictLoader)["teacher"]["family"]  # noqa: S506  (a SafeLoader)
        families.setdefault(family, []).append(f"  {name:{width}}  {text.splitlines()[0].lstrip('# ')}")
    return [line for family, lines in sorted(families.items()) for line in (family, *lines)]


def read_tree(name_or_path: str) -> tuple[dict[str, Any], str]:
    """Read a recipe's plain values by file or shipped name.

    Returns:
        The values, and the file's path.

    Raises:
        UserError: no such file or name, YAML that cannot be read.
    """
    path = Path(name_or_path)
    if not path.is_file():
        shipped = shipped_recipes()
        if name_or_path not in shipped:
            raise UserError(
                f"no recipe '{name_or_path}': neither a file nor a shipped one{nearest(name_or_path, shipped)}"
            )
        path = shipped[name_or_path]
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=StrictLoader)  # noqa: S506  (a SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if tree is None:
        raise UserError(f"{path}: nothing in it")
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a recipe is a mapping of keys, not a {type(tree).__name__}")
    tree.setdefault("name", path.stem)
    tree = with_new_names(tree, str(path))
    return tree, str(path)


def dump_recipe(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
