"""`raydmd serve` as users start it: both layouts, both proxies, replicas killed under load, newer weights, the end."""

import base64
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import yaml
from local_serving import expected, newer, pixels, serving
from ports import free_ports
from ray.serve.schema import ServeDeploySchema
from run_folders import make_run
from served import until
from worker_forks import PRELOADED, descendants

from raydmd.cli import run as command
from raydmd.config.recipe import Recipe
from raydmd.runs.expert_index import write_index
from raydmd.runs.folders import expert_file
from raydmd.serving.app import build
from raydmd.serving.contract import GenerationRequest
from raydmd.serving.local import local_pipeline

ROOT = Path(__file__).parents[2]
START = 400.0  # seconds, on a loaded machine


class Server:
    """`raydmd serve` in a process of its own."""

    def __init__(self, run: Path, log: Path, *arguments: str, **variables: str) -> None:
        (self.port,) = free_ports(1)
        environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        environment |= {"PYTHONPATH": f"{PRELOADED}:{ROOT}", "OMP_NUM_THREADS": "1"}
        environment |= {"RAY_ADDRESS": "", **variables}  # blank: unset
        self.log, self.url = log, f"http://127.0.0.1:{self.port}"
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-c", "from raydmd.cli import main; main()", "serve", str(run),
                 "--port", str(self.port), *arguments],
                stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True,
            )  # fmt: skip

    def wait_until_ready(self) -> None:
        end = time.monotonic() + START
        while f":{self.port} (Ctrl-C stops)" not in self.log.read_text():
            assert self.process.poll() is None and time.monotonic() < end, self.log.read_text()
            time.sleep(0.05)

    def family(self) -> list[psutil.Process]:
        return [psutil.Process(self.process.pid), *descendants(psutil.Process(self.process.pid))]

    def replicas(self, name: str) -> list[int]:
        """Return the processes of a deployment's replicas."""
        found = []
        for process in self.family():
            try:
                if f"ServeReplica:raydmd:{name}" in " ".join(process.cmdline()):
                    found.append(process.pid)
            except psutil.NoSuchProcess:
                pass
        return found

    def known_to_haproxy(self) -> list[str]:
        """Return the lines of the API's replicas in HAProxy's file."""
        (file,) = {
            line[line.index("-f") + 1] for process in self.family() if "-f" in (line := process.cmdline())
            if process.name() == "haproxy"
        }  # fmt: skip
        return [line for line in Path(file).read_text().splitlines() if "server SERVE_REPLICA" in line]

    def stop(self, number: int = signal.SIGTERM, group: bool = False) -> tuple[int, list[psutil.Process]]:
        """End it as a service manager does, alone or with its process group; return its code and what outlived it."""
        family = self.family()
        (os.killpg if group else os.kill)(self.process.pid, number)
        code = self.process.wait(180)
        _, alive = psutil.wait_procs(family, timeout=120)
        return code, alive


@contextmanager
def server(run: Path, log: Path, *arguments: str, **variables: str) -> Iterator[Server]:
    started = Server(run, log, *arguments, **variables)
    try:
        started.wait_until_ready()
        yield started
    finally:
        if started.process.poll() is None:
            family = started.family()
            started.process.kill()
            for process in family:
                try:
                    process.kill()
                except psutil.NoSuchProcess:
                    pass


def ask(url: str, digit: int | str, seed: int, n: int = 1, **more: Any) -> httpx.Response:
    body = {"prompt": str(digit), "n": n, "seed": seed, **more}
    return httpx.post(f"{url}/v1/images/generations", json=body, timeout=60)


class Load:
    """Clients that ask without a pause and look at every answer."""

    def __init__(self, url: str, right: dict[int, list[np.ndarray]], clients: int = 3) -> None:
        self.url, self.right = url, right
        self.made, self.wrong = 0, [""][:0]
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(clients)]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join(60)

    def _ask(self, number: int) -> None:
        with httpx.Client(timeout=60) as client:
            while not self._stopped.is_set():
                digit = number % 10
                try:
                    answer = client.post(
                        f"{self.url}/v1/images/generations", json={"prompt": str(digit), "seed": digit}
                    )
                    if answer.is_success and self._is_right(digit, answer):
                        self.made += 1
                    else:
                        self.wrong.append(f"{answer.status_code} {answer.text[:200]}")
                except httpx.HTTPError as error:
                    self.wrong.append(repr(error))
                number += 1

    def _is_right(self, digit: int, answer: httpx.Response) -> bool:
        got = pixels(base64.b64decode(answer.json()["data"][0]["b64_json"]))
        return any(abs(got - want).max() <= 1 for want in self.right[digit])

    def more(self, count: int) -> None:
        """Wait until as many further answers have come."""
        enough = self.made + count
        until(lambda: self.made >= enough or self.wrong, f"{count} answers")


def pictures_of(run: Path) -> dict[int, list[np.ndarray]]:
    """Return each digit's picture of the seed of its own number, as serving in this process makes it."""
    import asyncio

    pipeline = local_pipeline(serving(run))

    async def make() -> dict[int, list[np.ndarray]]:
        return {
            digit: [pixels((await pipeline.make(GenerationRequest(str(digit), 1, digit))).pictures[0])]
            for digit in range(10)
        }

    return asyncio.run(make())


@pytest.fixture(scope="module")
def folder(quick: Callable[..., Recipe], prompts: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("serve")
    make_run(quick("digits"), root / "run", prompts("digits"))
    return root / "run"


def listening_elsewhere(started: Server) -> list[tuple[str, str, int]]:
    found = []
    for process in started.family():
        try:
            for connection in process.net_connections("inet"):
                here = ip_address(connection.laddr.ip.removeprefix("::ffff:")).is_loopback
                if connection.status == psutil.CONN_LISTEN and not here:
                    found.append((process.name(), connection.laddr.ip, connection.laddr.port))
        except psutil.NoSuchProcess:
            pass
    return found


def send_what_serve_obeys(url: str) -> None:
    """Headers that mean something to Ray Serve, from a stranger: they do nothing, and the answer has one id."""
    names = (b"x-request-id", b"x-session-id", b"serve_multiplexed_model_id", b"x-request-timeout-seconds")
    for headers in ([(name, b"\xff") for name in names], [(names[3], b"0.000001"), (names[0], b"mine")]):
        answer = httpx.post(
            f"{url}/v1/images/generations", json={"prompt": "7", "seed": 21}, headers=headers, timeout=60
        )
        assert answer.status_code == 200 and len(answer.headers.get_list("x-request-id")) == 1
    assert answer.headers["x-request-id"] == "mine"


MANY = ["--set", "stages.expert.min=2", "--set", "stages.expert.max=2", "--set", "reload_seconds=0.5"]
SLOW_TEACHER = ["--teacher", "--set", "teacher_steps=20000"]


def watch_the_teacher_and_leave(url: str) -> None:
    """See its first steps; when the client has left, its work ends, long before the last step."""
    asked = {"prompt": "7", "model": "run-teacher", "stream": True, "step_previews": True}
    with httpx.stream("POST", f"{url}/v1/images/generations", json=asked, timeout=60) as stream:
        events = (json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: "))
        first = [next(events) for _ in range(3)]
    assert [(event["made_by"], event["step"], event["steps"]) for event in first] == [
        ("teacher", number, 20000) for number in (1, 2, 3)
    ]

    def figures() -> str:
        return httpx.get(f"{url}/metrics", timeout=60).text

    gone = 'raydmd_http_requests_total{route="/v1/images/generations",status="499"} 1.0'
    until(lambda: gone in figures() and "raydmd_queued_samples 0.0" in figures(), "its work has ended")


def test_pipelined_experts(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(folder, run)
    longer = tmp_path / "longer"  # the same run after some more training
    shutil.copytree(folder, longer)
    newer(longer, 1.1)
    old, new = pictures_of(run), pictures_of(longer)
    right = {digit: old[digit] + new[digit] for digit in old}
    assert all(abs(old[digit][0] - new[digit][0]).max() > 1 for digit in old)
    with server(run, tmp_path / "log", "--layout", "pipelined", *SLOW_TEACHER, *MANY) as started:
        url = started.url
        want = expected(run, 7, 21, 5)
        answer = ask(url, 7, 21, 5).json()
        for each, pixel in zip(answer["data"], want, strict=True):
            assert abs(pixels(base64.b64decode(each["b64_json"])) - pixel).max() <= 1
        assert {"expert-1", "expert-2", "decode", "queue", "total"} <= set(answer["timings"])
        card = httpx.get(f"{url}/v1/models").json()["data"]
        assert [each["id"] for each in card] == ["run", "run-teacher"] and card[0]["raydmd"]["layout"] == "pipelined"

        asked = {"prompt": "7", "seed": 21, "stream": True, "step_previews": True, "output_format": "webp"}
        with httpx.stream("POST", f"{url}/v1/images/generations", json=asked, timeout=60) as stream:
            events = [json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: ")]
        assert [event.get("made_by") for event in events[:-1]] == ["expert-1"] * 2 + ["expert-2"] * 2
        assert all(base64.b64decode(event["pictures"][0]).startswith(b"RIFF") for event in events[:-1])
        assert base64.b64decode(events[-1]["b64_json"]).startswith(b"RIFF")
        watch_the_teacher_and_leave(url)
        refused = ask(url, 7, 21, size="9x9")
        until(lambda: refused.headers["x-request-id"] in started.log.read_text(), "a line for the request is shown")
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "size"
        for model in ("run", "run-teacher"):
            unknown = ask(url, "elephant", 21, model=model)
            error = unknown.json()["error"]
            assert unknown.status_code == 400 and error["param"] == "prompt" and "elephant" in error["message"], error
        assert listening_elsewhere(started) == []
        assert any(process.name() == "haproxy" for process in started.family())

        with Load(url, right) as load:
            load.more(20)
            for name in ("expert-1", "expert-2"):  # what was on it is made by the other
                victim = started.replicas(name)[0]
                os.kill(victim, signal.SIGKILL)
                load.more(60)
                until(lambda v=victim, n=name: len([p for p in started.replicas(n) if p != v]) == 2, "another starts")
            served = httpx.get(f"{url}/v1/models").json()["data"][0]["raydmd"]["revision"]
            newer(run, 1.1)
            until(lambda: ask(url, 1, 1).json()["revision"] != served, "the newer weights are served")
            load.more(30)
        assert load.wrong == [] and load.made > 100
        assert httpx.get(f"{url}/health").json()["status"] == "ok"
        for victim in started.replicas("expert-2"):
            os.kill(victim, signal.SIGKILL)
        assert httpx.get(f"{url}/health", timeout=60).status_code == 503  # until there is one again
        until(lambda: httpx.get(f"{url}/health", timeout=60).is_success, "the second expert is there again")
        fresh = expected(run, 7, 21, 1)
        assert abs(fresh[0] - want[0]).max() > 1
        assert abs(pixels(base64.b64decode(ask(url, 7, 21).json()["data"][0]["b64_json"])) - fresh[0]).max() <= 1
        began = time.monotonic()
        code, alive = started.stop(group=True)
        assert time.monotonic() - began < 50  # not Ray's patience with a cluster that is gone, which is a minute
    assert code == 0 and alive == [] and not listens(started.port)
    assert "Traceback" not in started.log.read_text()


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def kill_haproxy(started: Server) -> None:
    """Within 3 s of its end, HAProxy answers again (with some more for a loaded machine)."""
    for process in started.family():
        if process.name() == "haproxy":
            process.kill()
    began = time.monotonic()

    def answers() -> bool:
        try:
            return ask(started.url, 7, 21).is_success
        except httpx.TransportError:
            return False

    until(answers, "HAProxy answers again")
    assert time.monotonic() - began < 6


def test_the_api_in_the_experts_replicas(folder: Path, tmp_path: Path) -> None:
    """Open to others, in a place of long paths; killed in the end."""
    right = pictures_of(folder)
    (long := tmp_path / ("long" * 30)).mkdir()
    arguments = ["--fast", "--host", "0.0.0.0", "--no-keys", *MANY]
    with server(folder, tmp_path / "log", *arguments, TMPDIR=str(long)) as started:
        assert listening_elsewhere(started) == [("haproxy", "0.0.0.0", started.port)]
        want = expected(folder, 7, 21, 1)[0]
        assert abs(pixels(base64.b64decode(ask(started.url, 7, 21).json()["data"][0]["b64_json"])) - want).max() <= 1
        send_what_serve_obeys(started.url)
        until(lambda: len(started.known_to_haproxy()) == 2, "HAProxy knows both replicas")
        with Load(started.url, right) as load:
            load.more(50)
            os.kill(started.replicas("api")[0], signal.SIGKILL)
            load.more(300)
        # sent again by HAProxy, but for an answer of which the first half was already sent
        assert len(load.wrong) <= 1 and all("without sending complete message body" in wrong for wrong in load.wrong)
        with socket.create_connection(("127.0.0.1", started.port)) as stranger:
            stranger.sendall(b"no HTTP\r\n\r\n")
        until(lambda: '"by": "haproxy"' in started.log.read_text(), "what HAProxy answers itself is logged")
        kill_haproxy(started)
        code, alive = started.stop(signal.SIGKILL)
    assert code == -signal.SIGKILL and alive == [] and not listens(started.port)


@pytest.fixture
def plugins_run(folder: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A run whose method is a plugin's, and the plugin's file."""
    plugin, run = tmp_path / "own_phased.py", Path(shutil.copytree(folder, tmp_path / "run"))
    plugin.write_text(
        "from raydmd.methods.phased import PhasedDMD\nfrom raydmd.methods.registry import register_method\n\n\n"
        "@register_method\nclass Own(PhasedDMD):\n    name = 'own-phased'\n"
    )
    tree = yaml.safe_load((run / "recipe.yaml").read_text())
    tree["method"]["name"], tree["plugins"] = "own-phased", [str(plugin)]
    (run / "recipe.yaml").write_text(yaml.safe_dump(tree))
    return run, plugin


def test_behind_serves_own_proxy_and_more_replicas_when_there_is_a_queue(
    folder: Path, plugins_run: tuple[Path, Path], tmp_path: Path
) -> None:
    """With a plugin's method, whose file is given: the replicas import it, too, for Ray sends it to them."""
    right, (run, plugin) = pictures_of(folder), plugins_run
    growing = ["--set", "stages.expert.max=2", "--set", "max_batch=1", "--set", "stages.expert.cpus=0.1"]
    public = ["--host", "0.0.0.0", "--no-keys"]
    arguments = ["--plugin", str(plugin), "--proxy", "serve", *public, *growing]
    with server(run, tmp_path / "log", *arguments) as started:
        ((_, host, port),) = listening_elsewhere(started)
        assert (host, port) == ("0.0.0.0", started.port)
        assert not any(process.name() == "haproxy" for process in started.family())
        want = expected(folder, 7, 21, 1)[0]
        assert abs(pixels(base64.b64decode(ask(started.url, 7, 21).json()["data"][0]["b64_json"])) - want).max() <= 1
        assert httpx.get(f"{started.url}/nowhere").json()["error"]["type"] == "invalid_request_error"
        send_what_serve_obeys(started.url)
        stranger = {"x-forwarded-for": "9.9.9.9", "forwarded": "for=9.9.9.9", "x-request-id": "a-stranger"}
        assert httpx.get(f"{started.url}/v1/models", headers=stranger).is_success
        until(lambda: "a-stranger" in started.log.read_text(), "the request is logged")
        (line,) = [line for line in started.log.read_text().splitlines() if "a-stranger" in line]
        assert "127.0.0.1" in line and "9.9.9.9" not in line
        assert len(started.replicas("experts")) == 1
        with Load(started.url, right, clients=12) as load:
            until(lambda: len(started.replicas("experts")) == 2 or load.wrong, "another replica starts")
        assert load.wrong == []
        os.killpg(started.process.pid, signal.SIGINT)  # as Ctrl-C on a terminal
        assert started.process.wait(180) == 0


def test_a_config_for_serve_deploy(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "serve.yaml"
    arguments = ["serve", str(folder), "--layout", "pipelined", "--set", "stages.expert.max=3", "--port", "8123"]
    assert command([*arguments, "--config-out", str(file)]) == 0
    config = ServeDeploySchema.model_validate(yaml.safe_load(file.read_text()))
    assert config.http_options.port == 8123 and config.http_options.host == "127.0.0.1"
    (application,) = config.applications
    assert application.import_path == "raydmd.serving.app:build"
    built = build(application.args)  # type: ignore[arg-type]
    assert built._bound_deployment.name == "api"
    assert application.args["run"] == str(folder) and application.args["stages"] == {"expert": {"max": 3}}


def test_a_config_names_a_plugins_file_for_nodes_that_have_it(plugins_run: tuple[Path, Path], tmp_path: Path) -> None:
    run, plugin = plugins_run
    words = ["serve", str(run), "--plugin", str(plugin), "--config-out", str(tmp_path / "serve.yaml")]
    assert command(words) == 0
    config = ServeDeploySchema.model_validate(yaml.safe_load((tmp_path / "serve.yaml").read_text()))
    assert config.applications[0].runtime_env == {"env_vars": {"RAYDMD_PLUGINS": str(plugin)}}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], ["no run in", "nowhere"]),
        (["{run}", "--set", "max_bach=4"], ["max_bach", "did you mean 'max_batch'"]),
        (["{run}", "--set", "max_batch=abc"], ["--set max_batch=abc: max_batch", "valid integer"]),
        (["{run}", "--set", "stages=4"], ["--set stages=4: 'stages' is a section", "its keys: api, encoder, expert"]),
        (["{run}", "--port", "{taken}"], ["--port {taken}", "cannot listen"]),
        (["{run}", "--set", "api_keys_file=nowhere.txt"], ["api_keys_file", "nowhere.txt"]),
        (["{run}", "--layout", "both"], ["--layout", "both"]),
        (["{run}", "--host", "0.0.0.0"], ["--host 0.0.0.0", "api_keys_file", "--no-keys"]),
        (["{run}", "--host", "::", "--config-out", "x.yaml"], ["--host ::", "--no-keys"]),
    ],
)
def test_what_cannot_be_served_is_said_in_a_line(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        names = {"run": folder, "taken": taken.getsockname()[1]}
        assert command(["serve", *(each.format(**names) for each in arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and all(word.format(**names) in err for word in words), err


def test_a_start_that_fails_says_why(folder: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(folder, tmp_path / "run"))
    file = expert_file(run, 1)
    file.write_bytes(file.read_bytes()[:-4] + struct.pack("<f", float("nan")))
    write_index(run)
    started = Server(run, tmp_path / "log", XDG_STATE_HOME=str(tmp_path))
    assert started.process.wait(START) == 2, (tmp_path / "log").read_text()
    (line,) = [line for line in (tmp_path / "log").read_text().splitlines() if line.startswith("raydmd: ")]
    assert "phase-2" in line and "not finite" in line and "\x1b" not in line


def test_a_proxy_that_is_not_ready_in_time_is_said_in_a_line(folder: Path, tmp_path: Path) -> None:
    """As on a machine that is too busy to start it."""
    patience = {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "0.001"}
    started = Server(folder, tmp_path / "log", XDG_STATE_HOME=str(tmp_path), **patience)
    assert started.process.wait(START) == 1, (tmp_path / "log").read_text()
    said = (tmp_path / "log").read_text()
    (line,) = [line for line in said.splitlines() if line.startswith("raydmd: ")]
    assert "Serve's proxy does not start here" in line and "Traceback" not in said


def test_a_picture_is_within_a_level_and_another_seed_is_not(folder: Path) -> None:
    """The measure that the tests above use tells pictures apart."""
    one, other = expected(folder, 7, 21, 1)[0], expected(folder, 7, 22, 1)[0]
    assert np.abs(one - other).max() > 1
