"""The HTTP API for videos: jobs on a real tiny Wan with its VAE, by OpenAI's client and by plain requests."""

import asyncio
import io
from contextlib import contextmanager

import av
import httpx
import numpy as np
import openai
import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from PIL import Image
from safetensors.torch import save_file
from served import LONG, api, until

from raydmd.config.recipe import dump_recipe
from raydmd.data.prompts import write_prompts
from raydmd.methods.loading import load_recipe
from raydmd.models.experts import Experts
from raydmd.runs.folders import expert_file
from raydmd.runs.run import Run
from raydmd.serving import pipeline as pipeline_module
from raydmd.serving.contract import GenerationRequest
from raydmd.serving.local import local_pipeline
from raydmd.serving.settings import Serving
from raydmd.serving.stage import NoRevision

WIDTH, LENGTH = 16, 5
LATENT = (4, 3, 4, 4)
FRAMES, SIDE, STEPS = 9, 32, 4


def make_video_run(folder, latent=LATENT, prompts=3):
    """Write a run on a tiny Wan whose experts are LoRA adapters with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
            text_dim=WIDTH, freq_dim=32, ffn_dim=32, num_layers=2, rope_max_seq_len=32,
        ).save_pretrained(folder / "wan" / "transformer")  # fmt: skip
        AutoencoderKLWan(
            base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
            latents_mean=[0.3, -0.2, 0.1, 0.5], latents_std=[1.5, 0.7, 2.0, 1.1],
        ).save_pretrained(folder / "wan" / "vae")  # fmt: skip
    rng = np.random.default_rng(0)
    rows = {f"{kind}prompt_embeds": rng.standard_normal((prompts, LENGTH, WIDTH)).astype(np.float32) * 3
            for kind in ("", "negative_")}  # fmt: skip
    write_prompts(folder / "prompts.parquet", rows)
    (folder / "plan.yaml").write_text(f"""
iterations: 2
teacher: {{family: wan, path: {folder}/wan, guidance_scale: 4.0, options: {{latent_shape: {list(latent)}}}}}
prompts: {{path: {folder}/prompts.parquet}}
method: {{name: phased, experts: {{kind: lora, rank: 2, alpha: 4}}}}
""")
    run = folder / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(dump_recipe(load_recipe(str(folder / "plan.yaml"))))
    made = Run(run)
    experts = Experts(made.teacher(), len(made.phases), "lora", 2, 4.0, made.family.lora_targets, 0)
    for phase in made.phases:
        experts.start(phase.index)
        file = expert_file(run, phase.index)
        file.parent.mkdir(parents=True)
        save_file({name: value.detach().contiguous() for name, value in experts.state(phase.index).items()}, file)
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_video_run(tmp_path_factory.mktemp("video"))


@pytest.fixture(scope="module", params=["shape", "prompts"])
def unlike(request, tmp_path_factory):
    """A run whose requests the first cannot do."""
    more = {"latent": (4, 2, 4, 4)} if request.param == "shape" else {"prompts": 5}
    return make_video_run(tmp_path_factory.mktemp(request.param), **more)


@pytest.fixture(scope="module")
def served(run):
    with api(run, teacher=True, teacher_steps=LONG, limits={"jobs": 8}) as (url, backend):
        yield url, backend


@pytest.fixture
def http(served):
    """A client that finds no job and leaves none."""
    with httpx.Client(base_url=served[0], timeout=60) as client:
        yield client
        for video in client.get("/v1/videos").json()["data"]:
            client.delete(f"/v1/videos/{video['id']}")


def begin(http, **body):
    answer = http.post("/v1/videos", json={"prompt": "0", **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def ended(http, job):
    """Wait for a job's end; return it."""
    now = {}

    def over():
        now.update(http.get(f"/v1/videos/{job['id']}").json())
        return now["status"] in ("completed", "failed")

    until(over, "the video is made")
    return now


@contextmanager
def no_table(run):
    """Have a run's table of prompts away, so that a prompt which was not asked for before is found out by its job."""
    table = run.parent / "prompts.parquet"
    away = table.rename(table.with_suffix(".away"))
    try:
        yield
    finally:
        away.rename(table)


def content(http, job, **headers):
    return http.get(f"/v1/videos/{job['id']}/content", headers=headers)


def refused(answer, status, param=None):
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    return error["message"]


def frames(data):
    with av.open(io.BytesIO(data)) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_openais_client_is_given_a_video(served):
    with openai.OpenAI(base_url=f"{served[0]}/v1", api_key="none", max_retries=0) as ai:
        job = ai.videos.create_and_poll(
            prompt="1", model="tiny", size=f"{SIDE}x{SIDE}", poll_interval_ms=20, extra_body={"seed": 3}
        )
        assert job.status == "completed" and job.progress == 100 and job.error is None
        assert job.object == "video" and job.model == "tiny" and job.size == f"{SIDE}x{SIDE}" and job.seconds == "0.56"
        assert job.completed_at >= job.created_at and job.expires_at > job.completed_at
        data = ai.videos.download_content(job.id).read()
        assert [video.id for video in ai.videos.list(limit=1)] == [job.id]
        assert ai.videos.delete(job.id).deleted
        with pytest.raises(openai.NotFoundError):
            ai.videos.retrieve(job.id)
        picture = io.BytesIO()
        Image.new("RGB", (SIDE, SIDE)).save(picture, format="PNG")
        with pytest.raises(openai.BadRequestError, match="input_reference: 'tiny' takes no first frame here"):
            ai.videos.create(prompt="1", input_reference=("a.png", picture.getvalue(), "image/png"))
    shown = frames(data)
    assert len(shown) == FRAMES and shown[0].shape == (SIDE, SIDE, 3)
    assert not np.array_equal(shown[0], shown[-1])


def test_a_seed_is_a_video(http):
    """The same bytes, though the jobs share batches as it happens."""
    jobs = [begin(http, seed=seed) for seed in (1, 1, 2)]
    assert all(ended(http, job)["status"] == "completed" for job in jobs)
    one, again, other = (content(http, job) for job in jobs)
    assert one.headers["content-type"] == "video/mp4"
    assert one.content == again.content and one.content != other.content
    free = begin(http)
    assert free["seed"] != begin(http)["seed"]


def test_ranges_of_a_video(http):
    job = ended(http, begin(http, seed=1))
    whole = content(http, job).content
    size = len(whole)
    for asked, start, end in (("0-0", 0, 1), ("5-9", 5, 10), ("10-", 10, size), ("-7", size - 7, size),
                              (f"3-{size * 9}", 3, size)):  # fmt: skip
        part = content(http, job, range=f"bytes={asked}")
        assert part.status_code == 206 and part.content == whole[start:end]
        assert part.headers["content-range"] == f"bytes {start}-{end - 1}/{size}"
    for odd in ("bytes=0-1,4-5", "lines=0-1", "bytes=5-2", "bytes=-", "bytes=x"):
        answer = content(http, job, range=odd)
        assert answer.status_code == 200 and answer.content == whole
    beyond = content(http, job, range=f"bytes={size}-")
    assert refused(beyond, 416) and beyond.headers["content-range"] == f"bytes */{size}"
    refused(http.get(f"/v1/videos/{job['id']}/content?variant=thumbnail"), 400, "variant")


def test_a_job_on_its_way_is_seen_and_stopped(served, http):
    backend = served[1]
    job = begin(http, model="tiny-teacher", seconds="0.5")
    assert job["status"] in ("queued", "in_progress") and job["completed_at"] is None
    until(lambda: http.get(f"/v1/videos/{job['id']}").json()["status"] == "in_progress", "the teacher begins")
    assert "in_progress" in refused(content(http, job), 400)
    neighbour = ended(http, begin(http, seed=1))
    assert neighbour["status"] == "completed" and content(http, neighbour).status_code == 200
    assert backend.queued() == 1 and not backend.links["teacher"]._working.done()
    assert http.delete(f"/v1/videos/{job['id']}").json() == {
        "id": job["id"], "object": "video.deleted", "deleted": True
    }  # fmt: skip
    until(lambda: backend.queued() == 0 and backend.links["teacher"]._working.done(), "it is left undone")
    refused(http.get(f"/v1/videos/{job['id']}"), 404)
    refused(http.delete(f"/v1/videos/{job['id']}"), 404)
    assert content(http, neighbour).status_code == 200


def test_a_job_that_fails_says_why(http, run):
    with no_table(run):
        job = ended(http, begin(http, prompt="2"))
    assert job["status"] == "failed" and job["error"]["param"] == "prompt" and "no file" in job["error"]["message"]
    assert "it failed" in refused(content(http, job), 400)


def test_a_prompt_that_is_not_the_runs_makes_no_job(http):
    """Its table is looked at before the job begins; the words are those of a request for pictures."""
    for maker in ("tiny", "tiny-teacher"):
        for prompt, words in (("17", "'prompts.parquet' has rows 0..2"), ("a fox", "has no column of texts")):
            answer = http.post("/v1/videos", json={"prompt": prompt, "model": maker})
            assert words in refused(answer, 400, "prompt")
    assert http.get("/v1/videos").json()["data"] == []


def test_a_list_of_jobs(http):
    ids = [begin(http, seed=seed)["id"] for seed in range(4)]

    def listed(**query):
        answer = http.get("/v1/videos", params=query).json()
        return [video["id"] for video in answer["data"]], answer["has_more"]

    assert listed() == (ids[::-1], False)
    assert listed(order="asc", limit=3) == (ids[:3], True)
    assert listed(after=ids[2]) == ([ids[1], ids[0]], False)
    refused(http.get("/v1/videos?limit=0"), 400, "limit")
    refused(http.get("/v1/videos?limit=x"), 400, "limit")
    refused(http.get("/v1/videos?after=none"), 400, "after")
    refused(http.get("/v1/videos?sort=asc"), 400, "sort")


def test_jobs_are_forgotten(run):
    with api(run, limits={"stored_seconds": 2.0}) as (url, _), httpx.Client(base_url=url, timeout=60) as http:
        job = begin(http)
        until(lambda: http.get(f"/v1/videos/{job['id']}").status_code == 404, "it is forgotten")


def test_jobs_of_a_model_are_bounded_and_the_first_that_ended_makes_room(run):
    with (
        api(run, teacher=True, teacher_steps=LONG, limits={"jobs": 2}) as (url, _),
        httpx.Client(base_url=url, timeout=60) as http,
    ):
        long, second = (begin(http, model="tiny-teacher") for _ in range(2))
        full = http.post("/v1/videos", json={"prompt": "0", "model": "tiny-teacher"})
        assert "2 videos are on their way" in refused(full, 429) and int(full.headers["retry-after"]) >= 1

        def kept():
            return {video["id"] for video in http.get("/v1/videos").json()["data"]}

        with no_table(run):
            failed = ended(http, begin(http, prompt="2"))  # the student's do not wait for the teacher's
        made = ended(http, begin(http))
        assert (failed["status"], made["status"]) == ("failed", "completed")
        assert kept() == {long["id"], second["id"], failed["id"], made["id"]}
        third = ended(http, begin(http))
        assert kept() == {long["id"], second["id"], made["id"], third["id"]}
        refused(content(http, failed), 404)
        http.delete(f"/v1/videos/{second['id']}")
        assert begin(http, model="tiny-teacher")["id"] in kept()


def test_the_oldest_video_makes_room(run):
    with api(run, limits={"stored_bytes": 4000}) as (url, _), httpx.Client(base_url=url, timeout=60) as http:
        first = ended(http, begin(http, seed=1))
        size = len(content(http, first).content)
        assert 2000 < size < 4000  # so that one is kept, and not two
        second = ended(http, begin(http, seed=2))
        assert content(http, second).status_code == 200
        assert "room" in refused(content(http, first), 404)
    with api(run, limits={"stored_bytes": 1000}) as (url, _), httpx.Client(base_url=url, timeout=60) as http:
        assert "larger" in ended(http, begin(http))["error"]["message"]


def test_a_job_waits_for_room(run):
    """More than the queue takes is refused to a request, and waited for by a job."""
    with api(run, queue_samples=1) as (url, _), httpx.Client(base_url=url, timeout=60) as http:
        jobs = [begin(http, seed=seed) for seed in range(3)]
        assert [ended(http, job)["status"] for job in jobs] == ["completed"] * 3


def test_a_key_sees_its_own_videos(run):
    mine, yours = ({"authorization": f"Bearer {key}"} for key in ("mine", "yours"))
    with api(run, "mine", "yours") as (url, _), httpx.Client(base_url=url, timeout=60) as http:
        job = http.post("/v1/videos", json={"prompt": "0"}, headers=mine).json()
        path = f"/v1/videos/{job['id']}"
        refused(http.get(path), 401)
        refused(http.get(path, headers=yours), 404)
        refused(http.get(f"{path}/content", headers=yours), 404)
        refused(http.delete(path, headers=yours), 404)
        assert http.get("/v1/videos", headers=yours).json()["data"] == []
        assert [video["id"] for video in http.get("/v1/videos", headers=mine).json()["data"]] == [job["id"]]
        assert http.delete(path, headers=mine).status_code == 200


def test_what_is_wrong_is_named(http):
    wrong = [
        ({"prompt": ""}, "prompt"), ({}, "prompt"), ({"prompt": "0", "size": "720x1280"}, "size"),
        ({"prompt": "0", "seconds": "8"}, "seconds"), ({"prompt": "0", "seconds": "nan"}, "seconds"),
        ({"prompt": "0", "seconds": 10**400}, "seconds"), ({"prompt": "0", "seconds": "long"}, "seconds"),
        ({"prompt": "0", "seed": "1"}, "seed"), ({"prompt": "0", "lenght": 1}, "lenght"),
        ({"prompt": "0", "input_reference": "x"}, "input_reference"), ({"prompt": "0", "image": "x"}, "image"),
        ({"prompt": "0", "guidance_scale": [4, 3]}, "guidance_scale"),
    ]  # fmt: skip
    for body, param in wrong:
        refused(http.post("/v1/videos", json=body), 400, param)
    refused(http.post("/v1/videos", json={"prompt": "0", "model": "tine"}), 404, "model")
    refused(http.post("/v1/videos", content=b"prompt=0"), 415)
    assert "/v1/videos" in refused(http.post("/v1/images/generations", json={"prompt": "0"}), 400, "model")
    assert http.get("/v1/models/tiny").json()["raydmd"]["frames"] == FRAMES


def test_forms(http):
    made = http.post("/v1/videos", files={"prompt": (None, "0"), "seed": (None, "12")})
    assert made.status_code == 200 and made.json()["seed"] == 12
    refused(http.post("/v1/videos", files={"prompt": (None, "0"), "seed": (None, "1.5")}), 400, "seed")
    refused(http.post("/v1/videos", files={"prompt": (None, "0"), "x": (None, "1")}), 400, "x")
    for name, words in (("input_reference", "takes no first frame"), ("mask", "it is a file")):
        picture = {"prompt": (None, "0"), name: ("x.png", b"x", "image/png")}
        assert words in refused(http.post("/v1/videos", files=picture), 400, name)
    refused(http.post("/v1/videos", files={f"f{i}": (None, "0") for i in range(100)}), 400)
    kind = "multipart/form-data; boundary="
    good = b'--b\r\ncontent-disposition: form-data; name="prompt"\r\n\r\n0\r\n--b--\r\n'
    assert http.post("/v1/videos", content=good, headers={"content-type": f"{kind}b"}).status_code == 200
    field = b'--b\r\ncontent-disposition: form-data; name="input_reference"'
    for ending in (b'; filename=""\r\ncontent-type: application/octet-stream', b""):  # of a browser, empty
        nothing = field + ending + b"\r\n\r\n\r\n" + good
        assert http.post("/v1/videos", content=nothing, headers={"content-type": f"{kind}b"}).status_code == 200
    other_site = {"content-type": f"{kind}b", "sec-fetch-site": "cross-site"}
    refused(http.post("/v1/videos", content=good, headers=other_site), 403)
    nasty = [
        b"", b"--b", b"--b\r\n\r\n", good[:-9], good.replace(b'name="prompt"', b""), good.replace(b"0", b"\xff\xfe"),
        good.replace(b"prompt", b"\xff"), b"\0" * 1000, good.replace(b"form-data;", b""), good * 2,
        good.replace(b":", b""),
    ]  # fmt: skip
    tails = (f"{kind}b", kind, kind[:19], f"{kind}b; charset=undefined", f"{kind}{'b' * 300}", f'{kind}"')
    for body in nasty:
        for tail in tails:
            answer = http.post("/v1/videos", content=body, headers={"content-type": tail})
            if answer.status_code == 200:  # some parts of them are a whole prompt
                http.delete(f"/v1/videos/{answer.json()['id']}")
            else:
                assert answer.status_code == 400 and answer.json()["error"]["message"], (body, tail, answer.text)


class Between:
    """A stage; while it is asked for the first time, a link is pointed at another run, and the API goes over to it."""

    def __init__(self, pipeline, link, run):
        self.pipeline, self.link, self.other = pipeline, link, run
        self.stage, self.asked = pipeline.links["experts"], []

    async def run(self, stage_batch):
        self.asked.append(stage_batch.revision)
        if len(self.asked) == 1:
            self.link.unlink()
            self.link.symlink_to(self.other)
            assert await self.pipeline.refresh() == stage_batch.revision  # until the stage holds the other
            assert await self.stage.refresh() == await self.pipeline.refresh() != stage_batch.revision
            raise NoRevision(stage_batch.revision)
        return await self.stage.run(stage_batch)

    async def offers(self, served):
        return await self.stage.offers(served)


def test_weights_of_another_kind_do_not_stand_in(run, unlike, tmp_path, monkeypatch):
    """Requests of before are finished by the weights of before; those that come then are made by the others."""
    monkeypatch.setattr(pipeline_module, "PAUSE", 0.0)
    link = tmp_path / "link"
    link.symlink_to(run)
    pipeline = local_pipeline(Serving(run=str(link)))
    before, stage = pipeline.card().revision, Between(pipeline, link, unlike)
    pipeline.links = {"experts": stage}

    async def test():
        right = await stage.stage.run(pipeline._stage_batches(GenerationRequest("0", output_format="mp4"))[0])
        made = await pipeline.make(GenerationRequest("0", output_format="mp4"))
        assert stage.asked == [before] * 2 and made.pictures == right.files
        newer = GenerationRequest("4" if unlike.parent.name.startswith("prompts") else "0", output_format="mp4")
        assert (await pipeline.make(newer)).revision == pipeline.card().revision != before
        assert before not in stage.asked[2:]

    asyncio.run(test())
