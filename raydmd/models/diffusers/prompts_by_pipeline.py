"""A diffusers teacher's prompts: embeddings to conditions, and texts to embeddings by the pipeline's own encoders."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from raydmd.errors import UserError
from raydmd.models.base import IMAGE_COLUMN, Conditions, require_column
from raydmd.models.diffusers.loading import ENCODER, load_text_pipeline
from raydmd.models.diffusers.pipeline_folder import DTYPES, PipelineFolder
from raydmd.models.diffusers.teacher_folder import CONFIG

NEGATIVE = "negative_"  # before the name of a column of the null prompt


class PromptsByPipeline(PipelineFolder):
    """A family whose prompts are embeddings by the text encoders of a diffusers pipeline.

    Attributes:
        widths: of columns of the prompts: the key of the network's config that says it.
        text_tokens: of a prompt, that its one text encoder reads; None: not told.
        optional_encoders: parts that encode prompts, and that the pipeline can do without.
    """

    widths: ClassVar[Mapping[str, str]]
    text_tokens: ClassVar[int | None] = None
    optional_encoders: ClassVar[tuple[str, ...]] = ()
    _config: Any  # the network's, since `check_teacher`

    def __init__(self, path: str | None = None, options: Mapping[str, Any] | None = None) -> None:
        super().__init__(path, options)
        self._pipeline: Any = None  # text encoder and tokenizer alone
        self._null: dict[str, np.ndarray] = {}
        if not self.options.get("null_prompt", True):
            self.condition_columns = [name for name in self.condition_columns if not name.startswith(NEGATIVE)]

    def _encode(self, pipeline: Any, prompts: list[str]) -> dict[str, np.ndarray]:
        """Return ``prompt_embeds`` [B, L, D], float32, and what belongs to it."""
        raise NotImplementedError

    def _encode_null(self, pipeline: Any) -> dict[str, np.ndarray]:
        """Return the same of the null prompt, for one row."""
        return self._encode(pipeline, [self.options["negative_prompt"]])

    def conditions(self, rows: Mapping[str, np.ndarray]) -> Conditions:
        """Return the prompts' embeddings [B, L, D] and, where given, the null prompt's.

        Columns with a mask are padded with zeros, and masked, to one length.
        """
        conditions = {name: self._embeddings(rows, name) for name in self.condition_columns if name in rows}
        for name in self.widths:
            require_column(rows, name)
        masked = [name for name in conditions if f"{name}_mask" in self.condition_columns]
        length = max((conditions[name].shape[1] for name in masked), default=0)
        for name in masked:
            mask = f"{name}_mask"
            require_column(rows, mask)
            if conditions[mask].shape != conditions[name].shape[:2]:
                raise UserError(f"prompts: column '{mask}' is {list(conditions[mask].shape)}, but '{name}' "
                                f"{list(conditions[name].shape)}")  # fmt: skip
            extra = length - conditions[name].shape[1]
            conditions[name] = F.pad(conditions[name], (0, 0, 0, extra))
            conditions[mask] = F.pad(conditions[mask], (0, extra))
        for name, null in conditions.items():
            own = conditions.get(name.removeprefix(NEGATIVE))
            if own is not None and own.shape != null.shape:
                raise UserError(f"prompts: '{name}' is {list(null.shape)} and '{name.removeprefix(NEGATIVE)}' "
                                f"{list(own.shape)}; pad both with zeros to one length")  # fmt: skip
        return conditions

    def unconditional(self, conditions: Conditions) -> Conditions:
        """Return the same with the null prompt in the prompt's place; what has no null stays.

        Raises:
            UserError: the prompts came without it.
        """
        if not self.options.get("null_prompt", True):
            raise UserError("teacher.options.null_prompt: guidance (teacher.guidance_scale other than 1) needs the "
                            "null prompt; set it to true")  # fmt: skip
        nulls = [name for name in self.condition_columns if name.startswith(NEGATIVE)]
        if missing := [name for name in nulls if name not in conditions]:
            raise UserError(f"prompts: guidance needs the null prompt in column '{missing[0]}'")
        return {**conditions, **{name.removeprefix(NEGATIVE): conditions[name] for name in nulls}}

    def check_conditions(self, conditions: Conditions) -> None:
        """Hold the prompts' widths against the network's; `check_teacher` has been called."""
        for column, key in self.widths.items():
            width = self._config[key]
            for name in (column, f"{NEGATIVE}{column}"):
                if name in conditions and conditions[name].shape[-1] != width:
                    raise UserError(f"prompts: column '{name}' is of width {conditions[name].shape[-1]}, but the "
                                    f"teacher takes {width}")  # fmt: skip

    def _embeddings(self, rows: Mapping[str, np.ndarray], name: str) -> Tensor:
        """Return one column as a tensor: masks [B, L] bool, all else float32."""
        values = rows[name]
        if name.endswith("_mask"):
            return torch.from_numpy(values.astype(bool))
        pooled = "pooled" in name
        if values.dtype.kind != "f" or (values.ndim != 2 if pooled else values.ndim < 3):
            form = "an embedding [width]" if pooled else "embeddings [tokens, width]"
            raise UserError(f"prompts: column '{name}' needs {form}, not {list(values.shape[1:])} {values.dtype}")
        with np.errstate(over="ignore"):  # a value that float32 cannot hold is refused by whoever has the row's number
            return torch.from_numpy(values.astype(np.float32))

    @property
    def reads_text(self) -> bool:
        """Whether there is a text encoder beside the network."""
        return self.path is not None and self._has_part("text_encoder")

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str], device: torch.device | str = "cpu") -> dict[str, np.ndarray]:
        """Return the columns of some texts and of ``negative_prompt``, as diffusers' own pipeline encodes them.

        Args:
            prompts: the texts.
            device: to which the text encoder is moved.

        Raises:
            UserError: the teacher's folder has no text encoder, or one that cannot be loaded.
        """
        if self._pipeline is None:
            self._pipeline = self._load_text_pipeline()
        pipeline = self._pipeline.to(device)
        if not self._null and self.options.get("null_prompt", True):
            self._null = {f"{NEGATIVE}{name}": rows for name, rows in self._encode_null(pipeline).items()}
        null = {name: np.repeat(rows, len(prompts), axis=0) for name, rows in self._null.items()}
        return {**self._encode(pipeline, list(prompts)), **null}

    def check_encoder(self, key: str) -> None:
        """Refuse texts where the teacher's folder has no text encoder beside the network."""
        if self.path is None or not self._has_part("text_encoder"):
            raise UserError(f"{key}: it holds texts, and the teacher '{self.path}' has no text_encoder/{CONFIG} to "
                            f"encode them with")  # fmt: skip
        if IMAGE_COLUMN in self.condition_columns:
            self.check_pixels(key)

    def encoder_files(self) -> dict[str, Path]:
        """Return the configs and weights of all text encoders and tokenizers; with pictures, the VAE's, too."""
        self.check_encoder("teacher.path")
        patterns = [*ENCODER, "vae/*"] if IMAGE_COLUMN in self.condition_columns else [*ENCODER]
        self._fetch(*patterns)
        root = self._root()
        found = [file for pattern in patterns for file in root.glob(pattern) if file.is_file()]
        return {file.relative_to(root).as_posix(): file for file in found if not file.name.startswith(".")}

    def cut_prompts(self, prompts: Sequence[str]) -> int | None:
        """Return how many texts have more tokens than `text_tokens`, by the pipeline's tokenizer."""
        if self.text_tokens is None:
            return None
        if self._pipeline is None:
            self._pipeline = self._load_text_pipeline()
        read = self._pipeline.tokenizer(list(prompts)).input_ids
        return sum(len(tokens) > self.text_tokens for tokens in read)

    def _load_text_pipeline(self) -> Any:
        if self.path is None or not self._has_part("text_encoder"):
            raise UserError(f"teacher.path: '{self.path}' has no text_encoder/config.json to encode prompts with")
        self._fetch(*ENCODER)
        dtype, variant = DTYPES[self.options["dtype"]], self.options["variant"]
        absent = [part for part in self.optional_encoders if not self._has_part(part)]
        return load_text_pipeline(self.pipeline_class, self._root(), variant, dtype, absent)
