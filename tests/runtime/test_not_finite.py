"""A picture that is not finite is an error of its own request; it is not black, and its neighbours are whole."""

import asyncio
import shutil
from pathlib import Path

import httpx
import pytest
import torch
from local_serving import pixels, serving
from safetensors.torch import load_file, save_file
from served import api

from raydmd.cli import run
from raydmd.errors import RunError
from raydmd.generate import generate
from raydmd.pipeline import StudentPipeline
from raydmd.runs.expert_index import write_index
from raydmd.runs.folders import expert_file
from raydmd.serving.contract import GenerationRequest, NotFinite
from raydmd.serving.local import local_pipeline

torch.set_num_threads(1)

BAD, GOOD = "3", "4"


@pytest.fixture(scope="module")
def broken(served_runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose last expert makes what is no number of one of the prompts."""
    folder = tmp_path_factory.mktemp("broken") / "run"
    shutil.copytree(served_runs["full"], folder)
    weights = load_file(expert_file(folder, 1))
    weights["label.weight"][int(BAD)] = torch.finfo(torch.float32).max  # finite itself
    save_file(weights, expert_file(folder, 1))
    write_index(folder)
    return folder


@pytest.mark.parametrize("way", [{"layout": "colocated"}, {"layout": "pipelined", "decoder": "own"}])
def test_a_request_fails_and_those_in_its_batch_do_not(broken: Path, served_runs: dict[str, Path], way: dict) -> None:
    async def test() -> None:
        pipeline, whole = local_pipeline(serving(broken, **way)), local_pipeline(serving(served_runs["full"], **way))
        asks = [GenerationRequest(prompt, 2, seed) for seed, prompt in enumerate([GOOD, BAD, GOOD, BAD])]
        made = await asyncio.gather(*map(pipeline.make, asks), return_exceptions=True)
        for number, (ask, result) in enumerate(zip(asks, made, strict=True)):
            if ask.prompt == BAD:
                assert isinstance(result, NotFinite) and f"picture 0 of seed {number} is not finite" in str(result)
            else:
                right = await whole.make(ask)
                for one, two in zip(result.pictures, right.pictures, strict=True):
                    assert abs(pixels(one) - pixels(two)).max() <= 1
        with pytest.raises(NotFinite):
            async for _ in pipeline.watch(GenerationRequest(BAD, 1, 0, previews=True)):
                pass
        assert pipeline.queued() == 0

    asyncio.run(test())


def test_the_api_answers_an_error(broken: Path) -> None:
    with api(broken) as (url, _), httpx.Client(base_url=url, timeout=60) as http:
        answer = http.post("/v1/images/generations", json={"prompt": BAD, "seed": 5})
        assert answer.status_code == 500
        error = answer.json()["error"]
        assert error["type"] == "server_error" and error["code"] == "not_finite"
        assert "picture 0 of seed 5 is not finite" in error["message"] and "\n" not in error["message"]
        assert http.post("/v1/images/generations", json={"prompt": GOOD, "seed": 5}).status_code == 200


def test_generate_says_it_in_a_line(broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RunError, match="picture 0 of seed 7 is not finite"):
        generate(StudentPipeline.from_run(broken), BAD, 2, 7, tmp_path / "out")
    assert not list(tmp_path.rglob("*.png"))
    assert len(generate(StudentPipeline.from_run(broken), GOOD, 2, 7, tmp_path / "out")) == 2
    code = run(["generate", str(broken), "--prompt", BAD, "-n", "1", "--out", str(tmp_path / "other")])
    said = capsys.readouterr()
    assert code == 1 and "is not finite" in said.err and len(said.err.strip().splitlines()) == 1
    assert not (tmp_path / "other").exists()
