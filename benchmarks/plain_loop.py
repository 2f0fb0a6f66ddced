"""The server that one would write without this project: FastAPI, one diffusers-style pipeline, a lock around it.

It serves the same runs over the same API, one request after another: no batches, no stages, no queue that says no. A
request's pictures are made together, as diffusers' ``num_images_per_prompt`` has it. The endpoint is a plain ``def``,
which FastAPI runs in its thread pool.

    python benchmarks/plain_loop.py runs/digits --port 8100
"""

import argparse
import base64
import io
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
import uvicorn
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from fastapi import FastAPI, HTTPException
from PIL import Image
from pydantic import BaseModel, Field
from torch import Tensor

from raydmd.errors import UserError
from raydmd.evaluation.pictures import to_image
from raydmd.evaluation.prompts import from_text
from raydmd.runs.run import Run
from raydmd.serving.parts import expert_networks


class Pipeline:
    """A few-step student in the manner of diffusers: its experts, its scheduler and its steps' noise levels.

    Args:
        folder: of a run whose network predicts a rectified flow and takes Euler steps.

    Raises:
        UserError: it is another run.
    """

    def __init__(self, folder: Path) -> None:
        self.run = run = Run(folder)
        self.family, phases = run.family, run.trained_phases()
        if self.family.prediction != "flow" or run.recipe.method.solver != "euler" or self.family.schedule.t_max != 1:
            raise UserError(f"run '{folder}': this loop knows Euler steps on a rectified flow only")
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.experts = expert_networks(run, [phase.index for phase in phases], "fused", self.device)
        self.sigmas = [t for phase in phases for t in phase.times[:-1]]
        self.boundaries = [phase.end for phase in phases]

    @torch.inference_mode()
    def __call__(
        self, prompt: str, num_images: int = 1, generator: torch.Generator | None = None, latents: Tensor | None = None
    ) -> list[Image.Image]:
        """Make pictures of a prompt, from ``latents`` [num_images, ...] if they are given."""
        conditions = from_text(self.run.recipe, self.family, prompt, num_images, "prompt")
        conditions = {name: value.to(self.device) for name, value in conditions.items()}
        scheduler = FlowMatchEulerDiscreteScheduler()  # it counts steps: a new one for each call
        scheduler.set_timesteps(sigmas=self.sigmas, device=self.device)
        if latents is None:
            latents = torch.randn((num_images, *self.family.latent_shape), generator=generator)
        latents = latents.to(self.device)
        for t in scheduler.timesteps:
            level = float(t) / scheduler.config.num_train_timesteps
            expert = next(i for i, end in enumerate(self.boundaries) if level > end + 1e-6)
            at = torch.full((num_images,), level, dtype=torch.float64, device=self.device)
            flow = self.experts[expert](latents, at, conditions)
            latents = scheduler.step(flow, t, latents, return_dict=False)[0]
        return [to_image(picture) for picture in self.family.decode(latents).float().cpu()]


class ImageRequest(BaseModel):
    prompt: str
    n: int = Field(1, ge=1, le=16)
    seed: int = 0
    size: str | None = None


def make_app(pipeline: Pipeline) -> FastAPI:
    """Return the server."""
    app, lock = FastAPI(), threading.Lock()

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": pipeline.run.name, "object": "model"}]}

    @app.post("/v1/images/generations")
    def generate(request: ImageRequest) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(request.seed)
        try:
            with lock:
                images = pipeline(request.prompt, request.n, generator)
        except UserError as error:
            raise HTTPException(400, str(error)) from None
        if request.size is not None:
            width, _, height = request.size.partition("x")
            images = [image.resize((int(width), int(height)), Image.Resampling.NEAREST) for image in images]
        return {"created": int(time.time()), "data": [{"b64_json": encode(image)} for image in images]}

    return app


def encode(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--port", type=int, default=8100)
    parser.add_argument("--threads", type=int, help="torch threads; default torch's own choice")
    arguments = parser.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    try:
        app = make_app(Pipeline(arguments.run))
    except UserError as error:
        sys.exit(f"plain_loop: {error}")
    uvicorn.run(app, host="127.0.0.1", port=arguments.port, access_log=False)  # uvloop and httptools if they are there


if __name__ == "__main__":
    main()
