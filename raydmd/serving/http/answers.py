"""What answers look like, for the description of the API; answers themselves are written without these models."""

from typing import Any, Literal

from pydantic import BaseModel, Field


class ErrorObject(BaseModel):
    """OpenAI's error object."""

    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    message: str = Field(description="one sentence")
    param: str | None = Field(description="the field to blame")
    code: str | None = Field(description="for programs, as model_not_found")


class ErrorAnswer(BaseModel):
    """Any answer that is an error."""

    error: ErrorObject


class InputTokens(BaseModel):
    """Tokens of what was read."""

    text_tokens: int
    image_tokens: int


class Usage(BaseModel):
    """Text tokens are rows of the prompts' embeddings, image tokens positions of the latents."""

    input_tokens: int
    input_tokens_details: InputTokens
    output_tokens: int
    total_tokens: int


class Picture(BaseModel):
    """A picture; of several prompts, with its prompt and its number among those of this prompt."""

    b64_json: str | None = Field(None, description="the file, in Base64")
    url: str | None = Field(None, description="for response_format url")
    prompt: str | None = None
    sample: int | None = None


class ImagesAnswer(BaseModel):
    """Pictures."""

    created: int
    data: list[Picture]
    background: Literal["opaque"]
    output_format: Literal["png", "jpeg", "webp"]
    size: str
    seed: int = Field(description="that makes these pictures again")
    model: str
    usage: Usage
    timings: dict[str, float] = Field(description="milliseconds of each stage; queue: all the waiting; total: all")
    batches: dict[str, int] = Field(description="samples in the batch of each stage")
    revision: str = Field(description="of the weights")
    num_inference_steps: int | None = Field(None, description="of the teacher")
    guidance_scale: float | tuple[float, float] | None = Field(
        None, description="of the teacher; of one of two networks, each one's"
    )
    safety_identifier: str | None = None


class Step(BaseModel):
    """A step of the student: from noise level t to t_next."""

    made_by: str
    t: float
    t_next: float


class TeacherCard(BaseModel):
    """The teacher of a model."""

    id: str
    steps: int


class ModelLimits(BaseModel):
    """What a request may ask for."""

    n: int
    prompt_characters: int
    num_inference_steps: int
    image_bytes: int = Field(description="of a first frame's file")
    image_pixels: int = Field(description="of a first frame")


class ModelCard(BaseModel):
    """What a model can do."""

    kind: Literal["image", "video"]
    family: str
    sizes: list[str] = Field(description="the model's own first")
    prompts: list[str] | None = Field(description="the only ones that it knows; null: any text")
    steps: list[Step]
    teacher: TeacherCard | None
    alias_of: str | None
    guidance_scale: float | tuple[float, float]
    negative_prompts: bool
    frames: int
    first_frame: Literal["none", "optional", "required"] = Field(
        description="of a video, as input_reference; optional: a prompt without one is a caption of the run's own"
    )
    fps: int
    layout: str
    revision: str
    export: str | None = Field(description="the format of an export of a run; null: it is a run")
    limits: ModelLimits


class Model(BaseModel):
    """A model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    raydmd: ModelCard


class ModelsAnswer(BaseModel):
    """All models, and further names of theirs."""

    object: Literal["list"]
    data: list[Model]


class HealthAnswer(BaseModel):
    """A server that could serve a request now."""

    status: Literal["ok"]
    model: str
    revision: str
    export: str | None = Field(description="the format of an export of a run; null: it is a run")
    queued: int


class Video(BaseModel):
    """A job that makes a video."""

    id: str
    object: Literal["video"]
    status: Literal["queued", "in_progress", "completed", "failed"]
    progress: int
    model: str
    size: str
    seconds: str
    prompt: str
    seed: int
    created_at: int
    completed_at: int | None
    expires_at: int | None
    error: dict[str, Any] | None
    timings: dict[str, float] | None = None
    batches: dict[str, int] | None = None
    revision: str | None = None


class VideosAnswer(BaseModel):
    """A part of the list of videos."""

    object: Literal["list"]
    data: list[Video]
    has_more: bool
    first_id: str | None
    last_id: str | None


class VideoDeleted(BaseModel):
    """A video that is forgotten."""

    id: str
    object: Literal["video.deleted"]
    deleted: bool
