"""Samples an export with plain diffusers: run as a file, by `check.py`, in a process that cannot import raydmd.

Its arguments are folders with ``job.json`` and ``given.safetensors``; in each it writes ``made.safetensors`` and
``made.json``.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


def sample(folder: Path) -> None:
    """Load an export by its card's own lines, call the pipeline on what is given, and write what comes out."""
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    dtype = getattr(torch, job["dtype"])
    card: dict[str, Any] = {"folder": job["folder"], "base": job["base"], "dtype": dtype}
    exec(job["code"], card)  # the lines that the model card shows
    pipe = card["pipe"]
    pipe.set_progress_bar_config(disable=True)
    networks = {id(module): name for name, module in pipe.components.items() if isinstance(module, nn.Module)}
    calls: list[tuple[str, int]] = []
    done = 0  # steps
    for module in pipe.components.values():
        if isinstance(module, nn.Module):
            module.register_forward_pre_hook(lambda module, _: calls.append((networks[id(module)], done)))
    last: list[Tensor] = []

    def after_step(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        nonlocal done
        done, last[:] = step + 1, [tensors["latents"]]
        return card["switch"](pipe, step, timestep, tensors) if "switch" in card else tensors

    given: dict[str, Any] = load_file(folder / "given.safetensors")
    given = {name: value.to(dtype) if value.is_floating_point() else value for name, value in given.items()}
    for name, count in job["lists"].items():
        given[name] = [given.pop(f"{name}.{number}") for number in range(count)]
    decodes = getattr(pipe, "vae", None) is not None
    output = pipe(
        **given, **job["call"], callback_on_step_end=after_step, return_dict=False,
        output_type="np" if decodes else "latent",
    )[0]  # fmt: skip
    samples = {"latents": last[0].float().contiguous()}
    if decodes:
        samples["pixels"] = torch.as_tensor(output).float().contiguous()
    save_file(samples, folder / "made.safetensors")
    visited = [float(t) for t in pipe.scheduler.timesteps]
    (folder / "made.json").write_text(json.dumps({"calls": calls, "timesteps": visited}), encoding="utf-8")


def refuse_raydmd() -> None:
    """Take raydmd away from this process, and make sure that it is: what is not there cannot be leant on.

    Raises:
        RuntimeError: it can.
    """
    sys.modules["raydmd"] = None  # type: ignore[assignment]
    try:
        import raydmd  # noqa: F401
    except ImportError:
        return
    raise RuntimeError("raydmd can be imported here")


if __name__ == "__main__":
    refuse_raydmd()
    for argument in sys.argv[1:]:
        sample(Path(argument))
