"""The formats by name: a module each, with ``write(plan, folder)``, ``code(plan)`` and ``places(plan)``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from raydmd.export import diffusers_pipeline, lightning_files, lora_files, peft_adapters
from raydmd.export.plan import Plan


class Format(Protocol):
    """A form that experts are written in."""

    def write(self, plan: Plan, folder: Path) -> None:
        """Write the experts into a folder."""
        ...

    def code(self, plan: Plan) -> str:
        """Return the lines of Python that load them with plain diffusers."""
        ...

    def places(self, plan: Plan) -> list[str]:
        """Return where each expert lies in the folder: a file, or a folder of one network or adapter."""
        ...


FORMATS: Mapping[str, Format] = {
    "diffusers": diffusers_pipeline, "lora": lora_files, "peft": peft_adapters, "lightning": lightning_files,
}  # fmt: skip
