"""`raydmd bench serve`: its arrivals, loops, figures and targets."""

import asyncio
import base64
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from aiohttp import web
from images_server import KEY, images_server
from PIL import Image
from run_folders import make_run
from virtual_clock import run as run_virtual

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))


from raydmd import cli
from raydmd.bench.arrivals import Arrival, Mix, Request, parse_sizes, poisson, read_trace
from raydmd.bench.ceiling import client_ceiling
from raydmd.bench.load import Answer, Outcome, Record, closed_loop, open_loop
from raydmd.bench.plot import plot
from raydmd.bench.results import as_json, failures
from raydmd.bench.session import Plan, Session
from raydmd.bench.statistics import Load, summarize
from raydmd.bench.targets import HttpTarget, LocalTarget, read_answer
from raydmd.errors import UserError
from raydmd.serving.local import local_pipeline
from raydmd.serving.settings import Serving

MIX = Mix(("3", "5", "7"))
GOOD = Answer("ok", pictures=1)


@pytest.fixture(scope="module")
def folder(quick, prompts, tmp_path_factory):
    recipe = quick("digits")
    return make_run(recipe, tmp_path_factory.mktemp("runs") / "digits", prompts("digits")).folder


class Queue:
    """A server that does one request after another, each in ``seconds``, and stops for a while at one of them."""

    def __init__(self, seconds, stall=None, stalled_at=None):
        self.seconds, self.stall, self.stalled_at = seconds, stall, stalled_at
        self.lock, self.begun = asyncio.Lock(), 0

    async def ask(self, request):
        async with self.lock:
            self.begun += 1
            await asyncio.sleep(self.stall if self.begun == self.stalled_at else self.seconds)
        return GOOD


def test_poisson_arrivals_have_their_rate_and_belong_to_the_seed():
    at = np.array([arrival.at for arrival in poisson(20.0, 20001, seed=3)])
    gaps = np.diff(at)
    assert at[0] == 0.0 and (gaps >= 0).all()
    assert gaps.mean() == pytest.approx(1 / 20, rel=0.03)
    assert gaps.std() == pytest.approx(1 / 20, rel=0.05)  # exponential; a regular clock would have 0
    assert poisson(20.0, 50, seed=3) == poisson(20.0, 50, seed=3)
    assert poisson(20.0, 50, seed=3) != poisson(20.0, 50, seed=4)
    assert [2 * a.at for a in poisson(20.0, 50, 3)] == pytest.approx([a.at for a in poisson(10.0, 50, 3)])


def test_requests_belong_to_seed_and_number():
    mix = Mix(("3", "5"), n=2, sizes=parse_sizes("8x8:3,16x16:1"), seed=1)
    requests = [mix.request(i) for i in range(400)]
    assert requests[123] == mix.request(123)
    assert requests[123] != dataclasses.replace(mix, seed=2).request(123)
    assert len({r.seed for r in requests}) > 390
    small = sum(r.size == (8, 8) for r in requests) / 400
    assert 0.65 < small < 0.85 and {r.size for r in requests} == {(8, 8), (16, 16)}
    assert {r.prompt for r in requests} == {"3", "5"} and all(r.n == 2 for r in requests)


def test_a_stall_is_seen_by_all_who_would_have_come_meanwhile():
    arrivals = [Arrival(0.1 * i) for i in range(100)]

    async def both():
        opened, closed = Record(), Record()
        await open_loop(Queue(0.01, stall=5.0, stalled_at=11), MIX, arrivals, opened)
        await closed_loop(Queue(0.01, stall=5.0, stalled_at=11), MIX, 1, 100, None, closed)
        return opened, closed

    opened, closed = run_virtual(both())
    late = sorted((o.latency for o in opened.outcomes), reverse=True)
    assert late[0] == pytest.approx(5.0)
    assert late[1] == pytest.approx(4.91)  # scheduled a tenth of a second into the stall
    assert sum(latency > 1.0 for latency in late) == 45
    assert summarize(Load("open", 10), opened).latency.percentiles[50] < 1.0
    assert summarize(Load("open", 10), opened).latency.percentiles[90] > 3.0
    # the closed loop waits with the server and sees it once: that is what it hides
    assert sum(o.latency > 1.0 for o in closed.outcomes) == 1
    assert summarize(Load("closed", 1), closed).latency.percentiles[90] == pytest.approx(0.01)


def test_the_open_loop_holds_no_request_back_and_says_when_it_is_late_itself():
    class Overloaded(Queue):
        async def ask(self, request):
            if request.number == 3:  # what holds the client up: its clock goes on, and it sends nothing
                asyncio.get_running_loop().now += 2.0
            return await super().ask(request)

    async def drive(target):
        record = Record()
        await open_loop(target, MIX, [Arrival(float(i)) for i in range(8)], record)
        return record

    quiet = run_virtual(drive(Queue(100.0)))
    assert [o.sent for o in quiet.outcomes] == pytest.approx(range(8))
    assert summarize(Load("open", 1), quiet).most == 8
    held = summarize(Load("open", 1), run_virtual(drive(Overloaded(0.01))))
    assert held.late.max == pytest.approx(1.0)  # request 4 was for second 4 and left at 5
    assert held.latency.max == pytest.approx(2.01)
    assert summarize(Load("open", 1), quiet).late.max == pytest.approx(0.0)


def test_the_closed_loop_keeps_to_its_concurrency_count_and_seconds():
    async def drive(concurrency, count, seconds):
        record = Record()

        class Each:
            async def ask(self, request):
                await asyncio.sleep(1.0)
                return GOOD

        await closed_loop(Each(), MIX, concurrency, count, seconds, record)
        return record

    counted = run_virtual(drive(4, 10, None))
    assert sorted(o.request.number for o in counted.outcomes) == list(range(10))
    assert counted.seconds == pytest.approx(3.0) and summarize(Load("closed", 4), counted).most == 4
    assert len(run_virtual(drive(4, None, 4.5)).outcomes) == 20
    assert len(run_virtual(drive(4, 6, 4.5)).outcomes) == 6


def outcomes():
    random = np.random.default_rng(0)
    latencies = random.exponential(1.0, 200)
    rows = [
        Outcome(Request(i, "3", 2, i, None), Answer("ok", "", 2, {"expert-1": float(x) / 2}, {"expert-1": i % 4}),
                i / 10, i / 10, i / 10 + x)
        for i, x in enumerate(latencies.tolist())
    ]  # fmt: skip
    ask = Request(0, "3", 2, 0, None)
    rows += [Outcome(ask, Answer("rejected", "HTTP 429"), 1.0, 1.5, 1.6)] * 3
    rows += [
        Outcome(ask, Answer("failed", "HTTP 500"), 1.0, 1.0, 2.0),
        Outcome(ask, Answer("failed", "timeout"), 2, 2, 40),
    ]
    return rows, latencies


def test_statistics_are_numpys():
    rows, latencies = outcomes()
    figures = summarize(Load("open", 10), Record(rows, 41.0), slo=0.5, price=3.6)
    assert figures.duration == 40.0 and figures.offered == 205
    assert (figures.completed, figures.rejected, figures.failed, figures.images) == (200, 3, 2, 400)
    assert figures.failures == {"HTTP 429": 3, "HTTP 500": 1, "timeout": 1}
    assert figures.latency.mean == pytest.approx(latencies.mean()) and figures.latency.std == pytest.approx(
        latencies.std()
    )
    for p in (50, 90, 95, 99):
        assert figures.latency.percentiles[p] == pytest.approx(np.percentile(latencies, p))
    assert figures.latency.max == pytest.approx(latencies.max())
    good = int((latencies <= 0.5).sum())
    assert figures.goodput == pytest.approx(good / 40) and figures.good_share == pytest.approx(good / 205)
    assert figures.requests_per_second == 5.0 and figures.images_per_second == 10.0
    assert figures.cost_per_image == pytest.approx(1e-4)
    assert figures.rejection.percentiles[99] == pytest.approx(0.6) and figures.late.max == pytest.approx(0.5)
    assert figures.stages["expert-1"].mean == pytest.approx(latencies.mean() / 2)
    assert figures.batches == {"expert-1": pytest.approx(1.5)}
    assert figures.most < 200
    assert summarize(Load("open", 10), Record(rows, 41.0)).goodput is None


def test_json_has_the_names_of_the_other_harnesses():
    rows, latencies = outcomes()
    tree = as_json(summarize(Load("closed", 16), Record(rows, 41.0), slo=0.5, price=3.6))
    json.dumps(tree, allow_nan=False)
    assert tree["max_concurrency"] == 16 and tree["request_rate"] == "inf" and tree["duration"] == 40.0
    assert tree["completed"] == tree["completed_requests"] == 200
    assert tree["failed"] == tree["failed_requests"] == 5 and tree["rejected"] == 3
    assert tree["request_throughput"] == tree["throughput_qps"] == 5.0
    assert tree["request_goodput"] == pytest.approx((latencies <= 0.5).sum() / 40)
    assert tree["median_e2el_ms"] == tree["p50_e2el_ms"] == pytest.approx(1e3 * np.median(latencies))
    assert tree["mean_e2el_ms"] == pytest.approx(1e3 * tree["latency_mean"])
    assert tree["p99_e2el_ms"] == pytest.approx(1e3 * tree["latency_p99"])
    assert tree["latency_median"] == tree["latency_p50"]
    assert tree["slo_attainment_rate"] == pytest.approx((latencies <= 0.5).sum() / 205)
    assert tree["stage_durations_mean"]["expert-1"] == pytest.approx(latencies.mean() / 2)
    opened = as_json(summarize(Load("open", 10), Record(rows, 41.0)))
    assert opened["request_rate"] == 10 and opened["max_concurrency"] is None and opened["request_goodput"] is None
    nothing = as_json(summarize(Load("open", 10), Record([], 0.0)))
    json.dumps(nothing, allow_nan=False)
    assert nothing["completed"] == 0 and nothing["p99_e2el_ms"] is None and nothing["latency_mean"] is None


def test_warmup_is_of_the_same_mix_and_level_and_does_not_count():
    class Seen:
        def __init__(self):
            self.requests, self.now, self.most = [], 0, 0

        async def ask(self, request):
            self.requests.append(request)
            self.now += 1
            self.most = max(self.most, self.now)
            await asyncio.sleep(0.1)
            self.now -= 1
            return GOOD

    for load, warm in ((Load("closed", 4), 10), (Load("closed", 8), 16), (Load("open", 20.0), 10)):
        target = Seen()
        session = Session(target, Plan([load], MIX, requests=100))
        run_virtual(session.run())
        assert len(target.requests) == 100 + warm and session.done[0].offered == 100
        assert [r.number for r in target.requests[:warm]] == list(range(warm))
        measured = {r.seed for r in target.requests[warm:]}
        assert measured == {MIX.request(i).seed for i in range(100)}
        assert not measured & {r.seed for r in target.requests[:warm]}
        if load.kind == "closed":
            assert target.most == load.level
    target = Seen()
    run_virtual(Session(target, Plan([Load("closed", 4)], MIX, requests=20, warmup=0)).run())
    assert len(target.requests) == 20


def test_an_open_load_by_seconds_has_all_that_come_within_them():
    plan = Plan([], MIX, seconds=30.0)
    arrivals = plan.schedule(Load("open", 20.0))
    assert arrivals == [a for a in poisson(20.0, 2000, 0) if a.at < 30.0]
    assert 500 < len(arrivals) < 700


def test_the_local_target_makes_the_runs_pictures(folder):
    async def drive():
        pipeline = local_pipeline(
            Serving(run=str(folder), layout="pipelined", max_batch=4, teacher=True, queue_samples=8)
        )
        record = Record()
        await closed_loop(LocalTarget(pipeline), dataclasses.replace(MIX, n=2), 3, 12, None, record)
        teacher = await LocalTarget(pipeline, "teacher").ask(MIX.request(0))
        unknown = await LocalTarget(pipeline).ask(Request(0, "a cat", 1, 0, None))
        wide = await asyncio.gather(*(LocalTarget(pipeline).ask(Request(i, "3", 4, i, None)) for i in range(6)))
        return record, teacher, unknown, wide

    record, teacher, unknown, wide = asyncio.run(drive())
    figures = summarize(Load("closed", 3), record)
    assert (figures.completed, figures.images) == (12, 24)
    assert {"queue", "expert-1", "expert-2", "decode", "total"} <= set(figures.stages)
    assert figures.batches["expert-1"] >= 2
    assert teacher.kind == "ok" and "teacher" in teacher.seconds
    assert (unknown.kind, unknown.error) == ("failed", "BadRequest") and "prompt a cat" in unknown.why
    assert [answer.kind for answer in wide].count("rejected") == 4  # 8 samples may wait, and each brings 4


def ask_http(url, requests=1, **options):
    async def drive():
        async with HttpTarget(url, **options) as target:
            served = await target.look()
            return served, [await target.ask(MIX.request(i)) for i in range(requests)]

    return asyncio.run(drive())


def test_the_http_target_reads_pictures_timings_and_batches():
    with images_server() as server:
        served, (answer,) = ask_http(server.url)
        assert served.model == "digits" and served.prompts == ("3", "5")
        assert (answer.kind, answer.pictures) == ("ok", 1)
        assert answer.seconds["expert-2"] == pytest.approx(0.02) and answer.batches == {"expert-1": 4, "expert-2": 2}
        request = MIX.request(0)
        assert server.bodies == [{"prompt": request.prompt, "n": 1, "seed": request.seed, "model": "digits",
                                  "response_format": "b64_json"}]  # fmt: skip
        ask_http(f"{server.url}/v1/", model="digits-teacher", extra={"seed": None, "num_inference_steps": 4})
        assert server.bodies[1]["model"] == "digits-teacher" and server.bodies[1]["num_inference_steps"] == 4
        assert "seed" not in server.bodies[1]


@pytest.mark.parametrize(
    ("answer", "kind", "error"),
    [
        (lambda: web.json_response({}, status=429), "rejected", "HTTP 429"),
        (lambda: web.json_response({}, status=503), "rejected", "HTTP 503"),
        (lambda: web.json_response({}, status=500), "failed", "HTTP 500"),
        (lambda: web.json_response({"data": []}), "failed", "0 pictures instead of 1"),
        (lambda: web.json_response({"data": [{"b64_json": "bm8gcGljdHVyZQ=="}]}), "failed", "no picture"),
        (lambda: web.json_response({"data": [{"url": "http://x"}]}), "failed", "no pictures in base64"),
        (lambda: web.json_response([1]), "failed", "no pictures in base64"),
        (lambda: web.Response(text="hello"), "failed", "no JSON"),
    ],
)
def test_rejections_and_failures_are_told_apart_and_never_raised(answer, kind, error):
    with images_server(lambda body: answer()) as server:
        _, (got,) = ask_http(server.url)
    assert (got.kind, got.error) == (kind, error)


def test_failures_are_told_with_their_reasons_and_rejections_are_none():
    def said(kind, error, why=""):
        return Outcome(MIX.request(0), Answer(kind, error, why=why), 0.0, 0.0, 1.0)

    full = [said("ok", ""), said("rejected", "HTTP 429", "no room")]
    assert failures([Record(full)]) is None
    broken = [said("failed", "HTTP 500", "the teacher\n is gone")] * 3 + [said("failed", "timeout")]
    assert failures([Record(full), Record(broken)]) == (
        "4 of 6 requests failed: 3 x HTTP 500: the teacher is gone; 1 x timeout"
    )


def test_a_silent_server_is_a_timeout_and_a_dead_one_a_failure():
    let_go = threading.Event()

    def wait(body):
        let_go.wait(20)

    async def ask(timeout):
        async with HttpTarget(server.url, model="digits", timeout=timeout) as target:
            return await target.ask(MIX.request(0))

    with images_server(wait) as server:
        silent = asyncio.run(ask(0.3))
        let_go.set()
    assert (silent.kind, silent.error) == ("failed", "timeout")
    dead = asyncio.run(ask(60.0))
    assert (dead.kind, dead.error) == ("failed", "ClientConnectorError") and "Cannot connect" in dead.why


def test_answers_of_other_servers_may_say_other_things():
    picture = base64.b64encode(b"\xff\xd8\xff\xe0 a JPEG's start").decode()
    answer = read_answer({"data": [{"b64_json": picture}], "timings": [1], "batches": {"a": None, "b": True}}, 1)
    assert answer == GOOD


def bench(capsys, *arguments):
    code = cli.run(["bench", "serve", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command_on_a_server(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("THE_KEY", KEY)
    trouble = iter([500, 429, 429])

    def some(body):
        error = {"error": {"message": "it fell\nover"}}
        return web.json_response(error, status=next(trouble)) if len(server.bodies) in (30, 40, 50) else None

    with images_server(some, locked=True) as server:
        code, out, err = bench(
            capsys, "--url", server.url, "--api-key-env", "THE_KEY", "--concurrency", "2,4", "--requests", 40,
            "--size", "8x8,16x16:2", "--slo", 5, "--json", tmp_path / "out" / "f.json", "--save-detailed",
            "--plot", tmp_path / "f.png", "--warmup", 3, "--price-per-hour", 2, "--client-ceiling",
        )  # fmt: skip
    assert (code, err) == (1, "raydmd: 1 of 80 requests failed: 1 x HTTP 500: it fell over\n")
    tree = json.loads((tmp_path / "out" / "f.json").read_text())
    first, second = tree["runs"]
    assert KEY not in out and KEY not in json.dumps(tree)
    assert "p99 (ms)" in out and "HTTP 429" in out and "expert-2" in out and "cost an image" in out
    assert len(server.bodies) == 2 * 43 and {body["size"] for body in server.bodies} == {"8x8", "16x16"}
    assert {body["prompt"] for body in server.bodies} == {"3", "5"}
    assert (first["completed"], first["rejected"], first["failed_otherwise"]) == (38, 1, 1)
    assert (second["completed"], second["rejected"]) == (39, 1)
    assert first["client_cpu_seconds"] > 0 and tree["client_requests_per_second"] > 0
    assert len(first["requests"]) == 40 and "completed" not in tree
    assert Image.open(tmp_path / "f.png").size[0] > 1000


def test_the_command_in_process_with_a_trace(capsys, tmp_path, folder):
    trace = tmp_path / "trace.jsonl"
    trace.write_text('0\n# a comment\n\n0.01\n{"timestamp": 0.02, "prompt": "9", "n": 2}\n0.015\n')
    (tmp_path / "prompts.txt").write_text("4\n\n6\n")
    code, _, err = bench(
        capsys, "--run", folder, "--trace", trace, "--prompts", tmp_path / "prompts.txt", "--json", tmp_path / "f.json",
        "--save-detailed", "--maker", "student", "--layout", "pipelined", "--max-batch", 4,
    )  # fmt: skip
    assert (code, err) == (0, "")
    tree = json.loads((tmp_path / "f.json").read_text())
    rows = sorted(tree["requests"], key=lambda row: row["number"])
    assert [row["scheduled"] for row in rows] == [0, 0.01, 0.015, 0.02]
    assert (rows[3]["prompt"], rows[3]["n"]) == ("9", 2) and {row["prompt"] for row in rows[:3]} <= {"4", "6"}
    assert tree["completed"] == tree["runs"][0]["completed"] == 4 and tree["images"] == 5
    assert tree["client_cpu_seconds"] is None


def test_bad_input_is_one_line(capsys, tmp_path, folder, monkeypatch):
    (tmp_path / "empty").write_text("\n\n")
    (tmp_path / "trace").write_text("0\n1\nsoon\n")
    (tmp_path / "line").write_text('0\n{"timestamp": 1, "size": "8by8"}\n')
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with images_server() as server, images_server(locked=True) as locked:
        gone = "http://127.0.0.1:9"
        url, run = ("--url", server.url), ("--run", folder)
        cases = [
            ((), "--url, --run: give one"),
            ((*url, *run), "--url, --run: give one"),
            (("--url", gone), f"--url {gone}: no server answers there"),
            (("--url", "localhost:8000"), "--url localhost:8000: http://HOST:PORT is needed"),
            (("--url", locked.url), "--api-key-env NAME"),
            ((*url, "--model", "digit"), "did you mean 'digits'?"),
            ((*url, "--layout", "pipelined"), "--layout: goes with --run only"),
            ((*run, "--model", "x"), "--model: goes with --url only"),
            ((*url, "--api-key-env", "NO_SUCH_KEY"), "no variable NO_SUCH_KEY"),
            ((*url, "--extra-body", "[1]"), "--extra-body: a JSON object"),
            ((*url, "--concurrency", "1", "--rate", "2"), "--concurrency, --rate: give one of them"),
            ((*url, "--concurrency", "1,0"), "--concurrency 1,0: whole numbers above 0"),
            ((*url, "--rate", "1,x"), "--rate 1,x: numbers above 0"),
            ((*url, "--trace", tmp_path / "trace"), "trace: line 3: neither a number of seconds"),
            ((*url, "--trace", tmp_path / "line"), "line: line 2: size: WIDTHxHEIGHT"),
            ((*url, "--trace", tmp_path / "empty"), "empty: no arrival in it"),
            ((*url, "--trace", tmp_path / "none"), "--trace: no file"),
            ((*url, "--prompts", tmp_path / "empty"), "has no prompt in it"),
            ((*url, "--size", "8"), "WIDTHxHEIGHT in pixels is needed, as 512x512, not '8'"),
            ((*url, "--size", "8x8:0"), "a weight is a number above 0"),
            ((*run, "--size", "9x9"), "not 9x9"),
            ((*url, "--plot", "load.txt"), "--plot load.txt: it ends in"),
            ((*url, "--save-detailed"), "give --json FILE"),
            ((*url, "--json", tmp_path), "cannot be written"),
            (("--run", tmp_path), "neither recipe.yaml nor export.json"),
            ((*url, "--requests", "0"), "--requests"),
        ]  # fmt: skip
        for arguments, words in cases:
            code, _, err = bench(capsys, *arguments)
            assert code == 2 and words in err and err.count("\n") == 1, (arguments, err)
        assert not server.bodies and not locked.bodies
        assert bench(capsys, *url, "--requests", 3)[0] == 0  # and what is right goes through


def test_trace_times_are_numbers(tmp_path):
    for line in ('"1"', "true", "1e999", '{"at": 1}', '{"timestamp": 1, "n": 0}', "[1]"):
        (tmp_path / "t").write_text(f"5\n{line}\n")
        with pytest.raises(UserError, match="line 2"):
            read_trace(tmp_path / "t")
    (tmp_path / "t").write_text("7\n5.5\n")
    assert read_trace(tmp_path / "t") == [Arrival(0.0), Arrival(1.5)]


def test_ctrl_c_prints_what_there_is(tmp_path):
    seen = threading.Event()

    def count(body):
        if len(server.bodies) > 60:
            seen.set()

    with images_server(count) as server:
        command = [sys.executable, "-c", "from raydmd.cli import main; main()", "bench", "serve",
                   "--url", server.url, "--rate", "100", "--duration", "99", "--warmup", "2",
                   "--json", str(tmp_path / "f.json")]  # fmt: skip
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                   env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])})  # fmt: skip
        assert seen.wait(120)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "p99 (ms)" in out and "interrupted" in err and "Traceback" not in err
    tree = json.loads((tmp_path / "f.json").read_text())
    assert tree["interrupted"] and 0 < tree["completed"] <= len(server.bodies)


def test_the_client_says_what_it_can_do_at_most():
    assert asyncio.run(client_ceiling(dataclasses.replace(MIX, n=2), 4, seconds=0.1)) > 0


def test_a_plot_of_a_load_that_nothing_came_through(tmp_path):
    lost = Outcome(MIX.request(0), Answer("failed", "timeout"), 0.0, 0.0, 1.0)
    plot([summarize(Load("open", 5), Record([lost], 1.0), slo=1.0)], tmp_path / "f.svg", "lost")
    assert (tmp_path / "f.svg").stat().st_size > 1000
