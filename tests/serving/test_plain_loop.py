"""The plain loop that serving is compared with: it is honest, and serves what the load generator asks for."""

import asyncio
import io
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import uvicorn
from PIL import Image
from run_folders import make_run

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import plain_loop

from raydmd.bench.arrivals import Mix, Request
from raydmd.bench.load import Answer, Record, closed_loop
from raydmd.bench.targets import HttpTarget
from raydmd.errors import UserError
from raydmd.sampling.noise import initial_noise
from raydmd.serving.contract import GenerationRequest
from raydmd.serving.local import local_pipeline
from raydmd.serving.settings import Serving


@pytest.fixture(scope="module")
def folder(quick, prompts, tmp_path_factory):
    return make_run(quick("digits"), tmp_path_factory.mktemp("runs") / "digits", prompts("digits")).folder


def pixels(image):
    return np.asarray(image, dtype=np.int64)


def test_the_plain_loop_makes_the_same_pictures_of_the_same_noise(folder):
    pipeline = plain_loop.Pipeline(folder)
    noise = initial_noise(pipeline.family, 5, 0, 3)
    theirs = np.stack([pixels(image) for image in pipeline("7", 3, latents=noise)])
    made = asyncio.run(local_pipeline(Serving(run=str(folder))).make(GenerationRequest("7", n=3, seed=5)))
    ours = np.stack([pixels(Image.open(io.BytesIO(file))) for file in made.pictures])
    assert np.abs(theirs - ours).max() <= 1
    other = np.stack([pixels(image) for image in pipeline("7", 3, torch.Generator().manual_seed(5))])
    assert np.abs(other - ours).max() > 1  # the noise is torch's own
    pipeline.sigmas = [sigma * 0.9 for sigma in pipeline.sigmas]
    assert np.abs(np.stack([pixels(image) for image in pipeline("7", 3, latents=noise)]) - ours).max() > 1


def test_the_plain_loop_serves_the_load_generator(folder):
    server = uvicorn.Server(
        uvicorn.Config(plain_loop.make_app(plain_loop.Pipeline(folder)), host="127.0.0.1", port=0, log_level="error")
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        until = threading.Event()
        while not server.started and thread.is_alive():
            until.wait(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]

        async def drive():
            async with HttpTarget(f"http://127.0.0.1:{port}") as target:
                served, record = await target.look(), Record()
                await closed_loop(target, Mix(("3", "5", "7"), n=2), 4, 12, None, record)
                return served, record, await target.ask(Request(0, "a cat", 1, 0, None))

        served, record, unknown = asyncio.run(drive())
    finally:
        server.should_exit = True
        thread.join(20)
    assert served.model == folder.name and served.prompts is None
    assert [(o.answer.kind, o.answer.pictures) for o in record.outcomes] == [("ok", 2)] * 12
    assert unknown == Answer("failed", "HTTP 400")


def test_the_plain_loop_refuses_what_it_does_not_know(folder, tmp_path):
    text = (folder / "recipe.yaml").read_text()
    (tmp_path / "experts").symlink_to(folder / "experts")
    (tmp_path / "recipe.yaml").write_text(text.replace("solver: euler", "solver: renoise"))
    with pytest.raises(UserError, match="Euler steps"):
        plain_loop.Pipeline(tmp_path)
