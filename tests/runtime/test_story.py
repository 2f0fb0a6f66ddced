"""A story's plot does not outlive its run, and no signal of it reaches what comes after."""

import threading
import time
from pathlib import Path
from typing import Any

import disturbed
import pytest
from disturbed import Story


@pytest.mark.parametrize("error", [None, RuntimeError("the run broke")])
def test_a_run_that_ends_by_itself_ends_its_plot(
    error: Exception | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plot waits for what cannot come: it is told so, and nobody is interrupted afterwards."""

    def ends_early(*arguments: Any, **more: Any) -> bool:
        (tmp_path / "events.jsonl").write_text('{"event": "started"}\n')
        time.sleep(0.2)
        if error is not None:
            raise error
        return False

    monkeypatch.setattr(disturbed, "distill", ends_early)
    monkeypatch.setattr(disturbed, "AFTER_S", 0.3)
    recipe: Any = None
    before = set(threading.enumerate())
    with pytest.raises(AssertionError if error is None else RuntimeError):
        Story(recipe, tmp_path, lambda story: story.until(lambda: False)).run()
    for thread in set(threading.enumerate()) - before:
        thread.join(10)
        assert not thread.is_alive()
