"""What a server says of requests, errors and of a start that fails."""

import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from served import until

from raydmd.serving.log import cause_of, default_file, repeated, write_log


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    logger = logging.getLogger("raydmd.serving")
    before, level = list(logger.handlers), logger.level
    yield logger
    for handler in [handler for handler in logger.handlers if handler not in before]:
        logger.removeHandler(handler)
        handler.close()
    logger.setLevel(level)


def test_what_replicas_log_is_in_the_file_and_repeated(tmp_path: Path, logger: logging.Logger) -> None:
    file, shown = tmp_path / "serve.log", io.StringIO()
    file.write_text("of before\n")
    write_log(str(file))
    write_log(str(file))  # a process with a second replica writes no line twice
    with repeated(file, shown):
        logging.getLogger("raydmd.serving.http").info("%s", json.dumps({"event": "request", "request_id": "req_1"}))
        logging.getLogger("raydmd.serving.http").error("%s", json.dumps({"event": "error", "request_id": "req_2"}))
        until(lambda: "req_2" in shown.getvalue(), "it is repeated")
    assert shown.getvalue() == file.read_text().removeprefix("of before\n")
    access, error = shown.getvalue().splitlines()
    assert "INFO" in access and '"req_1"' in access and "ERROR" in error


def test_the_place_of_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert default_file(8000) == tmp_path / "raydmd/serve-8000.log"
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "raydmd/serve-8000.log"))  # no folder
    elsewhere = default_file(8000)
    assert elsewhere.parent.is_dir() and tmp_path not in elsewhere.parents


RAY = """Deploying application raydmd failed: The deployment failed to start 3 times in a row. Error:
\x1b[36mray::ServeReplica:raydmd:experts.initialize_and_get_metadata()\x1b[39m (pid=1, ip=127.0.0.1)
  File "replica.py", line 9, in initialize
RuntimeError: Traceback (most recent call last):
    engine = Engine(serving, parts)
\x1b[31mraydmd.errors.UserError: run/experts/phase-2/model.safetensors: 'w' has values that are not finite\x1b[0m

"""


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        (RAY, ("UserError", "run/experts/phase-2/model.safetensors: 'w' has values that are not finite")),
        ("a\nValueError: bad\n  at the end", ("ValueError", "bad")),
        ("\x1b[1mno room\x1b[0m\n", ("", "no room")),
        ("", ("", "no reason is given")),
    ],
)
def test_the_cause_of_a_failed_start(text: str, cause: tuple[str, str]) -> None:
    assert cause_of(text) == cause
