"""Who is let in: API keys from wherever they come, and pages of other origins."""

from hashlib import sha256
from pathlib import Path

import httpx
import pytest
import yaml
from run_folders import make_run
from served import api, until

from raydmd.cli import run as command
from raydmd.errors import UserError
from raydmd.serving.settings import KEY_VARIABLE, load_serving, parse_serving, read_keys

MODELS = "/v1/models"
PAGE, OTHER = "https://page.example", "https://other.example"


@pytest.fixture(scope="module")
def run(quick, prompts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(quick("digits"), tmp_path_factory.mktemp("runs") / "run", prompts("digits")).folder


def status(url: str, key: str = "") -> int:
    return httpx.get(f"{url}{MODELS}", headers={"authorization": f"Bearer {key}"} if key else {}).status_code


def test_the_file_of_keys_is_read_again(run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "keys"
    file.write_text("# of the team\nfirst\n\n second \n")
    with api(run, api_keys_file=str(file)) as (url, _):
        assert [status(url, key) for key in ("first", "second", "third", "")] == [200, 200, 401, 401]
        file.write_text("second\nthird\n")
        until(lambda: status(url, "third") == 200, "a new key is known")
        assert [status(url, key) for key in ("first", "second")] == [401, 200]
        for change in (lambda: file.write_text("# nobody\n"), lambda: file.write_bytes(b"\xff\xfe"), file.unlink):
            seen = len(caplog.records)
            change()  # it never opens to everybody
            until(lambda n=seen: (status(url), len(caplog.records) > n)[1], "the change was seen")
            assert [status(url, key) for key in ("third", "first", "")] == [200, 401, 401]
        file.write_text("fourth")
        until(lambda: status(url, "fourth") == 200, "the file is there again")
        assert status(url, "third") == 401
    assert "third" not in caplog.text


def test_keys_of_the_environment_and_of_the_command_line(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = load_serving(str(run), None, False, False, [])
    assert read_keys(plain) == frozenset() == read_keys(parse_serving({"run": str(run)}, "test"))
    monkeypatch.setenv(KEY_VARIABLE, " ")
    assert read_keys(load_serving(str(run), None, False, False, [])) == frozenset()
    monkeypatch.setenv(KEY_VARIABLE, "quiet")
    with api(run) as (url, _):
        assert [status(url, key) for key in ("quiet", "loud", "")] == [200, 401, 401]
    serving = load_serving(str(run), None, False, False, [], ["loud", "louder"])
    monkeypatch.delenv(KEY_VARIABLE)  # replicas on other nodes do not have it
    assert len(read_keys(serving)) == 3
    with api(run, api_key_sha256=serving.api_key_sha256) as (url, _):
        assert [status(url, key) for key in ("quiet", "loud", "louder", "l", "")] == [200, 200, 200, 401, 401]
    with pytest.raises(UserError, match="--api-key: it is empty"):
        load_serving(str(run), None, False, False, [], [""])
    with pytest.raises(UserError, match="api_key_sha256"):
        parse_serving({"run": str(run), "api_key_sha256": ["loud"]}, "test")


def test_a_key_is_written_nowhere(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "serve.yaml"
    assert command(["serve", str(run), "--api-key", "hush", "--api-key", "hush-hush", "--config-out", str(config)]) == 0
    said = capsys.readouterr()
    assert "`ps`" in said.err and KEY_VARIABLE in said.err and "hush" not in said.err + said.out
    assert "hush" not in config.read_text()
    args = yaml.safe_load(config.read_text())["applications"][0]["args"]
    assert sorted(args["api_key_sha256"]) == sorted(sha256(key).hexdigest() for key in (b"hush", b"hush-hush"))


def preflight(http: httpx.Client, origin: str, path: str = "/v1/images/generations") -> httpx.Response:
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,x-stainless-os"}
    return http.options(path, headers={"origin": origin, **asked})


def test_pages_of_other_origins_are_let_in_by_setting(run: Path) -> None:
    allowed = "access-control-allow-origin"
    with api(run, "key", cors_origins=[PAGE]) as (url, _), httpx.Client(base_url=url, timeout=60) as http:
        asked = preflight(http, PAGE)  # a browser sends no key with it
        assert asked.status_code == 200 and asked.headers[allowed] == PAGE
        assert "x-stainless-os" in asked.headers["access-control-allow-headers"]
        refused = preflight(http, OTHER)
        assert refused.status_code == 400 and allowed not in refused.headers
        mine = {"origin": PAGE, "authorization": "Bearer key"}
        answer = http.get(MODELS, headers=mine)
        assert answer.status_code == 200 and answer.headers[allowed] == PAGE
        assert "x-request-id" in answer.headers["access-control-expose-headers"].lower()
        assert allowed not in http.get(MODELS, headers={**mine, "origin": OTHER}).headers
        denied = http.get(MODELS, headers={"origin": PAGE})  # which the page may read, too
        assert denied.status_code == 401 and denied.headers[allowed] == PAGE
        form = {"files": {"prompt": (None, "0")}}
        for origin, code in ((PAGE, 400), (OTHER, 403)):  # 400: this model makes no videos
            headers = {**mine, "origin": origin, "sec-fetch-site": "cross-site"}
            assert http.post("/v1/videos", headers=headers, **form).status_code == code  # type: ignore[arg-type]
    with api(run) as (url, _), httpx.Client(base_url=url, timeout=60) as http:
        assert preflight(http, PAGE).status_code == 405 and allowed not in preflight(http, PAGE).headers
        assert allowed not in http.get(MODELS, headers={"origin": PAGE}).headers
    with api(run, cors_origins=["*"]) as (url, _), httpx.Client(base_url=url, timeout=60) as http:
        assert preflight(http, OTHER).headers[allowed] == "*"
    for wrong in ("page.example", "https://page.example/path", ""):
        with pytest.raises(UserError, match="cors_origins"):
            parse_serving({"run": str(run), "cors_origins": [wrong]}, "test")
