"""A pipeline's folder as diffusers' ``from_pretrained`` reads it: the teacher's own parts beside new ones."""

import inspect
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raydmd.atomic import writing
from raydmd.export.plan import Plan
from raydmd.models.diffusers.config_files import read_config
from raydmd.models.diffusers.weight_files import read_json, variant_of

INDEX = "model_index.json"
OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".onnx", ".gguf", ".h5")


def write_pipeline(plan: Plan, folder: Path, networks: Mapping[str, str], config: Mapping[str, Any]) -> None:
    """Write all of a pipeline but its networks: model_index.json, the scheduler, the teacher's other parts.

    Files of the teacher are hard-linked where they can be, else copied.

    Args:
        plan: of the export.
        folder: where to, made if it is not there.
        networks: diffusers' class by part, of the networks that the folder has or will have.
        config: further entries of model_index.json.

    Raises:
        UserError: the teacher's parts cannot be fetched.
        StorageError: the disk is full or gone.
    """
    import diffusers

    folder.mkdir(parents=True, exist_ok=True)
    root = plan.family.teacher_folder().root
    arguments = inspect.signature(getattr(diffusers, plan.pipeline)).parameters
    own = read_json(root / INDEX) if (root / INDEX).is_file() else {}
    index: dict[str, Any] = {
        name: value for name, value in own.items() if not isinstance(value, list) and not name.startswith("_")
    }
    index |= {"_class_name": plan.pipeline, "_diffusers_version": diffusers.__version__}
    for part, argument in arguments.items():
        if part in (*networks, plan.component, plan.family.second_network, "scheduler"):
            continue
        kind = own.get(part) or _kind_of(plan, root, part)
        if isinstance(kind, list) and kind[-1] is not None:
            plan.family.teacher_folder().fetch([f"{part}/*"])
            link_part(root / part, folder / part, plan.family.options["variant"])
            index[part] = kind
        elif argument.default is inspect.Parameter.empty:
            index[part] = [None, None]  # diffusers' form of a part that is not there
    index |= {part: ["diffusers", kind] for part, kind in networks.items()}
    sampler = plan.sampler
    index |= {"scheduler": ["diffusers", sampler.scheduler], **config}
    with writing(folder / INDEX):
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        scheduler = getattr(diffusers, sampler.scheduler)(**sampler.config)
        scheduler.save_pretrained(folder / "scheduler")


def absent_parts(plan: Plan) -> list[str]:
    """Return the parts that the pipeline needs and the teacher has not, as text encoders where prompts are a table.

    They are named as None where the pipeline is loaded.
    """
    import diffusers

    root, kind = plan.family.teacher_folder().root, getattr(diffusers, plan.pipeline)
    own = read_json(root / INDEX) if (root / INDEX).is_file() else {}
    found = []
    for part, argument in inspect.signature(kind).parameters.items():
        if argument.default is not inspect.Parameter.empty or part in (plan.component, "scheduler"):
            continue
        said = own.get(part) or _kind_of(plan, root, part) or [None]
        if said[-1] is None and part not in kind._optional_components:
            found.append(part)
    return found


def link_part(source: Path, target: Path, variant: str) -> None:
    """Hard-link, or copy, a part's folder.

    Of a variant's weights (``model.fp16.safetensors``) the name goes without it. Weights in other formats than
    safetensors, beside these, stay behind.

    Raises:
        StorageError: the disk is full or gone.
    """
    files = [file for file in sorted(source.rglob("*")) if file.is_file()]
    safe = any(file.suffix == ".safetensors" for file in files)
    middle = f".{variant}" if variant_of(source, variant) else ""
    for file in files:
        name, shard = file.name, file.suffix == ".safetensors" or ".safetensors.index." in file.name
        if safe and file.suffix in OTHER_WEIGHTS:
            continue
        if middle and shard:
            if f"{middle}." not in name and f"{middle}-" not in name:
                continue  # the same weights without the variant
            name = name.replace(middle, "", 1)
        place = target / file.relative_to(source).with_name(name)
        with writing(place):
            place.parent.mkdir(parents=True, exist_ok=True)
            if middle and name.endswith(".json") and shard:
                place.write_text(file.read_text(encoding="utf-8").replace(middle, ""), encoding="utf-8")
            else:
                link_file(file, place)


def link_file(file: Path, place: Path) -> None:
    """Give a file a second name, or copy it where its file system does not allow that."""
    file = file.resolve()  # the hub's cache has links
    try:
        os.link(file, place)
    except OSError:
        shutil.copy2(file, place)


def _kind_of(plan: Plan, root: Path, part: str) -> list[str] | None:
    """Return library and class of a part that model_index.json does not name; None where there is none."""
    plan.family.teacher_folder().fetch([f"{part}/*.json"])
    if (config := read_config(root, part)) is not None:
        if "_class_name" in config:
            return ["diffusers", config["_class_name"]]
        if names := config.get("architectures"):
            return ["transformers", names[0]]
    for name, key in (
        ("tokenizer_config.json", "tokenizer_class"), ("preprocessor_config.json", "image_processor_type"),
    ):  # fmt: skip
        if (config := read_config(root, part, name)) is not None and key in config:
            return ["transformers", config[key]]
    return None
