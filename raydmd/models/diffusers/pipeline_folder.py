"""Where a diffusers teacher lies, and what its configs say: what the parts of its family read it from."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch

from raydmd.errors import UserError
from raydmd.models.base import Family
from raydmd.models.diffusers.config_files import read_config
from raydmd.models.diffusers.hub import HUB
from raydmd.models.diffusers.teacher_folder import CONFIG, TeacherFolder, find_teacher

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class PipelineFolder(Family):
    """A family whose teacher is in a pipeline's folder, or the network's own, or of the hub.

    Attributes:
        pipeline_class: diffusers' class of the pipeline.
    """

    pipeline_class: ClassVar[str]

    def __init__(self, path: str | None = None, options: Mapping[str, Any] | None = None) -> None:
        super().__init__(path, options)
        self._snapshot: TeacherFolder | None = None

    def teacher_folder(self) -> TeacherFolder:
        """Return where the teacher lies on this machine.

        Raises:
            UserError: no path, or nothing there.
        """
        if self.path is None:
            raise UserError(f"teacher.path: family '{self.name}' needs the teacher's folder, or {HUB}owner/name")
        found = self._snapshot or find_teacher(self.path, self.options["subfolder"], "subfolder" in self.given)
        self._snapshot = None if found.hub is None else found  # the hub is asked once
        return found

    def teacher_revision(self) -> str | None:
        """Return the hub's commit, of a teacher from there."""
        hub = self.teacher_folder().hub
        return None if hub is None else hub.revision

    def _has_part(self, part: str) -> bool:
        """Whether the pipeline's folder has a part beside the network."""
        return (self._root() / part / CONFIG).is_file()

    def _root(self) -> Path:
        """Return the pipeline's folder, which need not have a network."""
        assert self.path is not None
        return self.teacher_folder().root if self.path.startswith(HUB) else Path(self.path)

    def _fetch(self, *patterns: str) -> None:
        """Have parts of the pipeline here, where it is the hub's."""
        if self.path is not None and self.path.startswith(HUB):
            self.teacher_folder().fetch(patterns)

    @cached_property
    def network_config(self) -> Mapping[str, Any]:
        """The network's config.json; empty where there is none yet."""
        if self.path is None:
            return {}
        return read_config(self._root(), self.options["subfolder"]) or read_config(self._root(), "") or {}

    @cached_property
    def scheduler_config(self) -> Mapping[str, Any] | None:
        """The scheduler_config.json beside the network; None where there is none."""
        return None if self.path is None else read_config(self._root(), "scheduler", "scheduler_config.json")
