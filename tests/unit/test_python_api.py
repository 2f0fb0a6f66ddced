"""The public Python API, without Ray: recipes, a student that is called, and what an event loop and a stop do."""

import asyncio
import doctest
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from run_folders import draw_run
from test_every_family import recipe_of

import raydmd
from raydmd import api, interrupts, pipeline
from raydmd.api import outside_event_loop
from raydmd.generate import generate
from raydmd.models.tiny import TINY_MODELS
from raydmd.pipeline import StudentPipeline
from raydmd.runs.run import Run

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of pixels, whose prompts are classes' rows."""
    root = tmp_path_factory.mktemp("api")
    TINY_MODELS["qwen_image"].save(root / "teacher")
    return draw_run(recipe_of(TINY_MODELS["qwen_image"], root / "teacher"), root / "run")


def test_what_is_public_is_there_and_imported_when_it_is_used() -> None:
    assert all(getattr(raydmd, name) is not None for name in raydmd.__all__)
    assert set(raydmd.__all__) <= set(dir(raydmd)) and (Path(raydmd.__file__).parent / "py.typed").is_file()
    code = "import sys, raydmd; sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
    with pytest.raises(AttributeError, match="no attribute 'distil'"):
        raydmd.distil  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize("module", [api, pipeline])
def test_examples(module: object) -> None:
    found = doctest.testmod(module)  # type: ignore[arg-type]
    assert found.failed == 0 and (module is pipeline or found.attempted >= 2)


def test_values_of_a_recipe_come_by_key(tmp_path: Path) -> None:
    changes = {"optimizer.fake.lr": 1e-5, "name": "true", "iterations": [3, 4], "checkpoint.path": tmp_path}
    by_key = raydmd.load_recipe("ring", changes)
    assert (by_key.optimizer.of("fake").lr, by_key.name, by_key.iterations) == (1e-5, "true", [3, 4])
    assert by_key.checkpoint.path == str(tmp_path)
    assert raydmd.load_recipe("ring", ["iterations=5"]) == raydmd.load_recipe("ring", {"iterations": 5})
    for changes, words in (
        ({"iterations": object()}, "iterations: a recipe's values are plain, not of type object"),
        ({"iteratons": 5}, "unknown key 'iteratons'; did you mean 'iterations'"),
        ({"iterations": 0}, "--set iterations=0: iterations"),
    ):
        with pytest.raises(raydmd.UserError, match=words):
            raydmd.load_recipe("ring", changes)
    with pytest.raises(raydmd.UserError, match="no recipe 'rong'.*did you mean 'ring'"):
        raydmd.load_recipe("rong")


def test_a_student_makes_what_the_command_makes(run: Run, tmp_path: Path) -> None:
    student = StudentPipeline.from_run(run.folder)
    files = generate(student, "0", 2, 3, tmp_path / "out")
    pictures = student("0", num_images=2, seed=3)
    tensors = student("0", num_images=2, seed=3, output_type="pt")
    assert len(files) == 2 and tensors.shape == (2, 3, *reversed(pictures[0].size))
    again = raydmd.StudentPipeline.from_run(run.folder)(["0", "1"], num_images=2, seed=3)
    assert [each.tobytes() for each in again[:2]] == [each.tobytes() for each in pictures]
    assert again[2].tobytes() != pictures[0].tobytes()
    latents = student("0", num_images=3, seed=3, batch_size=3, output_type="latent")
    alone = student("0", num_images=3, seed=3, output_type="latent")
    assert latents.shape[1:] == run.family.latent_shape and torch.allclose(latents, alone, atol=1e-5)


def test_each_step_is_told_and_a_generator_draws_the_seed(run: Run) -> None:
    student, told = StudentPipeline(run), list[tuple[int, float, torch.Tensor]]()
    made = student("0", output_type="latent", on_step=lambda *step: told.append(step))
    assert [number for number, _, _ in told] == [*range(1, len(student.times))]
    assert [t for _, t, _ in told] == student.times[1:] and torch.equal(told[-1][2], made)
    drawn = [student("0", generator=torch.Generator().manual_seed(seed), output_type="latent") for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_a_wrong_call_has_the_commands_words(run: Run, tmp_path: Path) -> None:
    student = StudentPipeline(run)
    for given, words in (
        ({"num_images": 0}, "num_images 0: at least 1"), ({"batch_size": -1}, "batch_size -1: at least 1"),
        ({"output_type": "np"}, "output_type 'np': one of pil, pt, latent"),
    ):  # fmt: skip
        with pytest.raises(raydmd.UserError, match=words):
            student("0", **given)
    with pytest.raises(raydmd.UserError, match="no run in"):
        StudentPipeline.from_run(tmp_path)
    with pytest.raises(raydmd.UserError, match="no export in"):
        StudentPipeline.from_export(tmp_path)
    with pytest.raises(raydmd.UserError, match="prompt 99"):
        student("99")


def test_a_call_within_an_event_loop_has_a_thread_of_its_own() -> None:
    async def cell() -> tuple[threading.Thread, int]:
        return outside_event_loop(lambda: (threading.current_thread(), asyncio.run(asyncio.sleep(0, 7))))

    thread, value = asyncio.run(cell())
    assert thread is not threading.main_thread() and value == 7
    assert outside_event_loop(threading.current_thread) is threading.current_thread()


def test_a_stop_reaches_a_run_in_another_thread() -> None:
    stopped, inside = threading.Event(), threading.Event()

    def work() -> None:
        with interrupts.graceful(stopped.set):
            inside.set()
            stopped.wait(60)

    thread = threading.Thread(target=work)
    assert not interrupts.stop_other_thread()
    thread.start()
    assert inside.wait(60) and interrupts.stop_other_thread()
    thread.join(60)
    assert stopped.is_set() and not thread.is_alive() and not interrupts.stop_other_thread()
