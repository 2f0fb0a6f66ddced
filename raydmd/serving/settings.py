"""How a run is served: one typed tree, read from YAML or from the command's options."""

import os
from collections.abc import Iterable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from raydmd.config.overrides import apply_override, blamed, explain
from raydmd.config.recipe import Section
from raydmd.errors import UserError

Positive = Annotated[int, Field(gt=0)]
Seconds = Annotated[float, Field(gt=0)]
Place = Literal["inline", "own"]
Weights = Literal["fused", "switched"]
Alias = Annotated[str, Field(pattern=r"^\S{1,200}$")]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Origin = Annotated[str, Field(pattern=r"^(\*|https?://[^\s/?#]+)$")]
KEY_VARIABLE = "RAYDMD_API_KEY"  # of the environment: a key that is let in


class Replicas(Section):
    """How many replicas a stage has, and what each of them needs."""

    min: Positive = 1
    max: Positive = Field(1, description="above min: Ray Serve scales by the queue")
    cpus: float | None = Field(None, ge=0, description="of a replica; null: as the run's generator workers")
    gpus: float | None = Field(None, ge=0, description="of a replica; null: as the run's generator workers")
    resources: dict[str, float] = Field(default_factory=dict, description="custom Ray resources, each replica")
    labels: dict[str, str] = Field(default_factory=dict, description="Ray label selector")
    threads: Positive = Field(1, description="torch threads of a replica")

    @model_validator(mode="after")
    def _range(self) -> Self:
        if self.max < self.min:
            raise ValueError(f"max ({self.max}) is below min ({self.min})")
        return self


class Light(Replicas):
    """A stage without a network."""

    cpus: float | None = Field(0.1, ge=0)
    gpus: float | None = Field(0.0, ge=0)


class Stages(Section):
    """The stages, each of which scales by itself."""

    api: Light = Light()
    encoder: Light = Light()
    expert: Replicas = Field(Replicas(), description="of each expert if pipelined, of all of them if colocated")
    decoder: Replicas = Replicas()
    teacher: Replicas = Replicas()


class Limits(Section):
    """What one request may ask for."""

    n: Positive = Field(16, description="pictures, of all prompts together")
    teacher_steps: Positive = Field(200, description="of the teacher, where a request says how many")
    prompt_characters: Positive = 4000
    body_bytes: Positive = Field(64 * 1024, description="of a request, beside a first frame")
    image_bytes: Positive = Field(10 * 2**20, description="of a first frame's file")
    image_pixels: Positive = Field(4096 * 4096, description="of a first frame, before it is resized")
    jobs: Positive = Field(64, description="video jobs of a model kept, waiting or done")
    stored_bytes: Positive = Field(
        256 * 2**20, description="of pictures and videos kept for response_format url and jobs"
    )
    stored_seconds: Seconds = Field(3600.0, description="for which they are kept")


class Serving(Section):
    """All that a deployment needs to know."""

    run: str = Field(description="the folder of a run, or of an export of one, readable on every node")
    base: str | None = Field(
        None, description="of an export: its base model's folder, or hf://owner/name; null: where export.json says"
    )
    name: str | None = Field(None, description="the model's id; null: the folder's name")
    aliases: list[Alias] = Field(default_factory=list, description="further ids by which the model can be asked for")
    layout: Literal["colocated", "pipelined"] = Field(
        "colocated", description="all experts in one replica, or each in replicas of its own"
    )
    weights: Weights | None = Field(
        None,
        description="LoRA experts: merged into a copy of the backbone each, or switched on one backbone; null: fused, "
        "but switched where the teacher's weights are of half precision",
    )
    api: Place = Field(
        "own", description="the HTTP side: its own replicas, or (one stage only) inline in the experts': a hop less"
    )
    encoder: Place = Field("inline", description="the text encoder: in the first expert's replicas, or its own")
    decoder: Place = Field("inline", description="the decoder: in the last expert's replicas, or its own")
    teacher: bool = Field(False, description="serve the many-step teacher, too, to compare with")
    teacher_steps: Positive | None = Field(None, description="Euler steps of the teacher; null: the recipe's")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    sizes: list[tuple[Positive, Positive]] = Field(
        default_factory=list, description="width and height of further pictures that may be asked for"
    )
    fps: Positive = Field(16, description="of videos")
    max_batch: Positive = Field(16, description="samples that a network takes at once")
    queue_samples: Positive = Field(256, description="samples of a model that may wait; more are refused with 429")
    queue_seconds: Seconds = Field(30.0, description="a request that would wait longer is refused with 429")
    timeout_seconds: Seconds = Field(300.0, description="a request that takes longer ends with 408")
    reload_seconds: float = Field(
        5.0,
        ge=0,
        description="between looks at the run's folder; newer weights are taken over without a pause. 0: never; "
        "an export's never are",
    )
    api_keys_file: str | None = Field(
        None, description="a file with one API key a line, read again when it changes; null: no file"
    )
    api_key_sha256: list[Digest] = Field(
        default_factory=list, description="SHA-256 digests of further API keys, as --api-key leaves them here"
    )
    log_file: str | None = Field(
        None, description="where replicas write a line a request, and errors; null: raydmd serve chooses one"
    )
    cors_origins: list[Origin] = Field(
        default_factory=list, description="pages of these origins (https://HOST, or *) may call the API from a browser"
    )
    limits: Limits = Limits()
    stages: Stages = Stages()

    @property
    def api_replicas(self) -> int:
        """How many replicas the API may have; what one of them keeps (jobs, pictures for URLs), others do not know."""
        return (self.stages.expert if self.api == "inline" else self.stages.api).max

    @model_validator(mode="after")
    def _one_stage(self) -> Self:
        if self.api == "inline":
            for name, value in (("layout", "colocated"), ("encoder", "inline"), ("decoder", "inline")):
                if getattr(self, name) != value:
                    raise ValueError(f"api: inline goes with {name}: {value}, not {getattr(self, name)}")
        return self


def load_serving(
    run: str, layout: str | None, teacher: bool, fast: bool, overrides: list[str], keys: Iterable[str] = ()
) -> Serving:
    """Return the settings of a command line; ``fast`` puts the API into the experts' replicas where it can be.

    API keys, those of the environment too, become digests: replicas elsewhere know them, and no file tells them.

    Raises:
        UserError: an unknown key or a value out of range.
    """
    tree: dict[str, Any] = {"run": run}
    for override in overrides:
        apply_override(tree, override)
    if layout is not None:
        tree["layout"] = layout
    if teacher:
        tree["teacher"] = True
    if (
        fast
        and "api" not in tree
        and {tree.get("encoder"), tree.get("decoder"), layout} <= {None, "inline", "colocated"}
    ):
        tree["api"] = "inline"
    serving = parse_serving(tree, "--set", overrides)
    if not all(key.strip() for key in keys):
        raise UserError("--api-key: it is empty")
    digests = {*serving.api_key_sha256, *_environment_keys(), *(key_digest(key) for key in keys)}
    return serving.model_copy(update={"api_key_sha256": sorted(digests)})


def parse_serving(tree: dict[str, Any], source: str, overrides: Sequence[str] = ()) -> Serving:
    """Validate a tree of plain values; ``source`` names it in errors.

    Raises:
        UserError: one line that names the first wrong key and the nearest right one.
    """
    try:
        return Serving.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{blamed(error, overrides) or source}: {explain(error, Serving)}") from None


def key_digest(key: str) -> str:
    """Return what is kept of an API key: its SHA-256 in hex. Spaces around it do not belong to it."""
    return sha256(key.strip().encode()).hexdigest()


def _environment_keys() -> set[str]:
    key = os.environ.get(KEY_VARIABLE, "").strip()
    return {key_digest(key)} if key else set()


def read_keys(serving: Serving) -> frozenset[str]:
    """Return the digests of the API keys that are let in, whoever named them; empty: everybody is let in.

    Raises:
        UserError: the file of keys is missing or has no key in it.
    """
    digests = {*serving.api_key_sha256, *_environment_keys()}
    if serving.api_keys_file is not None:
        path = Path(serving.api_keys_file)
        if not path.is_file():
            raise UserError(f"api_keys_file: no file '{path}'")
        try:
            lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"api_keys_file: '{path}' cannot be read ({error})") from None
        keys = {key_digest(line) for line in lines if line and not line.startswith("#")}
        if not keys:
            raise UserError(f"api_keys_file: '{path}' has no key in it")
        digests |= keys
    return frozenset(digests)
