"""Distributed runs on a Ray of three nodes: the sequential reference's weights to the bit, and what a run leaves."""

import io
import json
import threading
import time
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from disturbed import Story, assert_bits_of_the_reference
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console
from safetensors.torch import load_file
from test_large_families import large_recipe, run_large

import raydmd.runtime  # before Ray  # noqa: F401
from raydmd import recipe_check
from raydmd.config.recipe import Recipe
from raydmd.data.prompts import PromptTable, write_prompts
from raydmd.data.row_order import PromptOrder
from raydmd.errors import RunError, UserError
from raydmd.methods.loading import load_recipe
from raydmd.methods.local import train
from raydmd.methods.registry import build_method, plan_phases
from raydmd.models.base import save_teacher
from raydmd.runs.folders import expert_file
from raydmd.runs.run import Run, recipe_family
from raydmd.runtime.checkpoint.manager import Archive
from raydmd.runtime.launch import distill
from raydmd.runtime.membership import placement
from raydmd.runtime.prompts import PromptStream
from raydmd.runtime.workers.helpers import start_helper
from raydmd.sampling.plan import plan_iterations
from raydmd.training.fake_score import Fake
from raydmd.training.generator import Generator
from raydmd.training.messages import PromptBatch
from raydmd.training.teacher import Scorer

CONSOLE = Console(quiet=True)


@pytest.fixture(scope="module")
def nodes():
    """Three nodes: the head, one labelled ``zone: b``, one with four of the resource ``scorer``; by name, their ids."""
    store = 100 * 2**20
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 2, "object_store_memory": store, "include_dashboard": False,
            "no_monitor": True, "include_log_monitor": False,
        },
    )  # fmt: skip
    try:
        cluster.add_node(num_cpus=1, object_store_memory=store, labels={"zone": "b"})
        cluster.add_node(num_cpus=1, object_store_memory=store, resources={"scorer": 4})
        ray.init(address=cluster.address, log_to_driver=False, configure_logging=False)
        names = {}
        for node in ray.nodes():
            name = "scorer" if "scorer" in node["Resources"] else node["Labels"].get("zone", "head")
            names[name] = node["NodeID"]
        yield names
    finally:
        ray.shutdown()
        cluster.shutdown()


def reference(recipe: Recipe, prompts: Any) -> list[dict[str, torch.Tensor]]:
    family = recipe_family(recipe)
    return train(recipe, family, family.load_teacher(), prompts(recipe.teacher.family)).experts


def assert_same_bits(folder: Path, experts: list[dict[str, torch.Tensor]]) -> None:
    for index, expected in enumerate(experts):
        found = load_file(expert_file(folder, index))
        assert found.keys() == expected.keys()
        assert max(float((found[name] - expected[name]).abs().max()) for name in found) == 0.0


def placed(actor_class: str) -> dict[str, int]:
    """Where the actors of a class were, of all that this Ray has seen: node id to how many."""
    found: dict[str, int] = {}
    for actor in ray._private.state.actors().values():
        if actor["ActorClassName"] == actor_class and actor["Address"]["NodeID"]:
            found[actor["Address"]["NodeID"]] = found.get(actor["Address"]["NodeID"], 0) + 1
    return found


def test_many_workers_end_where_the_reference_does(nodes: dict[str, str], quick, prompts, tmp_path: Path) -> None:
    """Two generators, two fakes and three scorers on three nodes, by label, by fallback and by resource."""
    recipe = quick(
        "digits", "batch.size=24", "checkpoint.every=1", "checkpoint.keep=1",
        "runtime.generator={max_workers: 2, cpus: 0.25, labels: {zone: b}}",
        "runtime.fake={max_workers: 2, cpus: 0.25, labels: {zone: nowhere}, fallbacks: [{zone: b}]}",
        "runtime.teacher={max_workers: 3, cpus: 0.25, resources: {scorer: 1}}",
    )  # fmt: skip
    run = tmp_path / "run"
    assert distill(recipe, run, console=CONSOLE) is True
    assert_same_bits(run, reference(recipe, prompts))
    wait_until(lambda: living() == [])  # a run leaves no actor behind
    assert placed("GeneratorWorker") == {nodes["b"]: 2} and placed("FakeWorker") == {nodes["b"]: 2}
    assert placed("TeacherWorker") == {nodes["scorer"]: 3}

    metrics = Run(run).metrics()
    assert [line["iteration"] for line in metrics] == [0, 1, 2, 3]
    assert [line["phase"] for line in metrics] == [1, 1, 2, 2]
    for n, line in enumerate(metrics):
        assert line["generator_version"] == n + 1 and line["fake_version"] == 2 * (n + 1)
        assert line["samples"] == 24 and line["seconds"] > 0 and line["staleness"] == 0
        assert line["loss_fake"] > 0 and line["generator_grad_norm"] > 0
        workers = {role: figures["workers"] for role, figures in line["roles"].items()}
        assert workers == {"teacher": 3, "fake": 2, "generator": 2}
        assert all(figures["busy_seconds"] > 0 for figures in line["roles"].values())
    events = Run(run).events()
    started, finished = events[0], events[-1]
    assert started["event"] == "started" and started["workers"] == {"teacher": 3, "fake": 2, "generator": 2}
    assert finished["event"] == "finished" and finished["iteration"] == 4
    assert [(e["phase"], e["iteration"], e["end"]) for e in events if e["event"] == "phase"] == [
        (1, 0, 0.5), (2, 2, 0.0),
    ]  # fmt: skip
    saved = [e["iteration"] for e in events if e["event"] == "checkpoint" and e["seconds"] > 0]
    assert saved in ([1, 2, 3, 4], [1, 2, 4])  # the third is left out while the second is being written
    found = Archive(str(run / "checkpoints")).newest()
    last = found.manifest
    assert last is not None and found.skipped == []
    assert (last.iteration, last.phase, last.experts, last.updates) == (4, 2, 2, {"generator": 4, "fake": 8})
    assert last.cursors == {"fake": 8 * 24, "generator": 4 * 24} and set(found.shards) == {
        "expert-0",
        "expert-1",
    }
    assert load_recipe(str(run / "recipe.yaml")) == recipe
    assert sorted(path.name for path in run.iterdir()) == [
        "checkpoints", "events.jsonl", "experts", "metrics.jsonl", "prompts", "recipe.yaml", "status.json",
    ]  # fmt: skip
    assert [path.name for path in (run / "checkpoints").iterdir() if path.suffix] == ["step-000004.json"]


def test_large_networks_with_embedded_prompts(nodes: dict[str, str], tmp_path: Path) -> None:
    """Qwen-Image's classes, LoRA experts, guidance 4, prompts' embeddings through Ray Data."""
    recipe = large_recipe("qwen_image", tmp_path, "batch.micro=4", "prompts.cache_mb=0")
    assert distill(recipe, tmp_path / "run", console=CONSOLE)
    assert_same_bits(tmp_path / "run", run_large(recipe).experts)


def prompt_stream(kind: type[PromptStream], recipe: Recipe, path: Path) -> Any:
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return start_helper(kind, recipe, str(path), scheduling_strategy=here)


def labels_of(conditions: Any) -> list[int]:
    return np.concatenate([micro["label"] for micro in conditions]).tolist()


@pytest.mark.parametrize("cache_mb", [0, 256])
def test_the_stream_hands_out_the_rows_of_the_order_streamed_or_kept(
    nodes: dict[str, str], quick, tmp_path: Path, cache_mb: int
) -> None:
    """Also from the middle, as on resume. Only what is too large to keep is encoded by actors of Ray Data.

    They need no more than tenths of a CPU: the roles' workers have the others.
    """

    class Held:
        """Takes CPUs."""

    held = [ray.remote(Held).options(num_cpus=cpus).remote() for cpus in (1.6, 1, 1)]  # of the nodes' 2, 1 and 1
    ray.get([actor.__ray_ready__.remote() for actor in held])
    labels = (np.arange(40) ** 2 % 10).astype(np.int64)
    path = write_prompts(tmp_path / "labels.parquet", {"other": np.zeros(40), "label": labels})
    recipe, before = quick("digits", f"prompts.cache_mb={cache_mb}"), encoders()
    order = PromptOrder(recipe, PromptTable(path).groups, build_method(recipe).draws)
    stream, each = prompt_stream(PromptStream, recipe, path), 3 * recipe.batch.size
    assert ray.get(stream.ready.remote()) == "40 prompts"
    for iteration in (7, 8):
        micros = ray.get(stream.take.remote(iteration))
        assert [len(micro["label"]) for micro in micros] == [4] * 12
        assert labels_of(micros) == labels[order.samples(iteration * each, each)].tolist()
    assert ray.get(stream.pairs.remote(30, 20))["label"].tolist() == labels[order.pairs(30, 20)].tolist()
    assert ray.get(stream.rows.remote(33, 9))["label"].tolist() == labels[np.arange(33, 42) % 40].tolist()
    assert (encoders() > before) == (cache_mb == 0)
    for actor in (stream, *held):
        ray.kill(actor)


def encoders() -> int:
    """How many actors Ray Data has started so far to encode prompts."""
    return sum("MapWorker" in actor["ActorClassName"] for actor in ray._private.state.actors().values())


def test_recoveries_and_previews_do_not_read_a_large_set_again(nodes: dict[str, str], quick, tmp_path: Path) -> None:
    class Counted(PromptStream):
        begun = 0

        def _execute(self, iteration: int) -> Iterator[dict[str, np.ndarray]]:
            self.begun += 1
            return super()._execute(iteration)

    labels = (np.arange(400) ** 2 % 10).astype(np.int64)
    path = write_prompts(tmp_path / "labels.parquet", {"label": labels})
    recipe = quick("digits", "prompts.cache_mb=0", "monitor.samples=9")
    stream, each = prompt_stream(Counted, recipe, path), 3 * recipe.batch.size
    order = PromptOrder(recipe, PromptTable(path).groups, build_method(recipe).draws)
    for iteration in (0, 1, 2, 3, 4, 2, 3, 4, 5):  # at 4 a trainer is lost, and they say that they stand at 2
        taken = labels_of(ray.get(stream.take.remote(iteration)))
        assert taken == labels[order.samples(iteration * each, each)].tolist()
        assert ray.get(stream.rows.remote(0, 9))["label"].tolist() == labels[:9].tolist()
    assert ray.get(stream.__ray_call__.remote(lambda self: self.begun)) == 1
    ray.kill(stream)


def stale_by_hand(recipe: Recipe) -> list[dict[str, torch.Tensor]]:
    """The fake's rollouts of an iteration are made one version early, but at the first of each segment."""
    family = recipe_family(recipe)
    teacher = family.load_teacher()
    generator, fake = (
        Generator(recipe, family, teacher, plan_phases(recipe, family.schedule.t_max)),
        Fake(recipe, family, teacher, plan_phases(recipe, family.schedule.t_max)),
    )
    scorer, micro, every = Scorer(recipe, family, teacher), recipe.batch.micro, recipe.checkpoint.every
    assert micro is not None
    starts, experts = range(0, recipe.batch.size, micro), []
    lengths = plan_iterations(recipe, plan_phases(recipe))
    for index, end in enumerate(accumulate(lengths)):
        begin, ahead = end - lengths[index], {}
        generator.start_phase(index, begin)
        fake.start_phase(index, begin)
        for n in range(begin, end):
            edge = min(end, (n // every + 1) * every)
            for m in range(n, min(n + 2, edge)):
                if m not in ahead:
                    updates = range(recipe.method.fake_updates)
                    ahead[m] = [[generator.rollout(m, u, PromptBatch(s, micro, {})) for s in starts] for u in updates]
            for batches in ahead.pop(n):
                fake.update(batches)
            proposals = [generator.propose(n, PromptBatch(s, micro, {})) for s in starts]
            generator.update([scorer.score(p) for p in proposals], [fake.score(p) for p in proposals])
        experts.append(generator.end_phase())
    return experts


def test_staleness_is_bounded_named_and_deterministic(nodes: dict[str, str], quick, prompts, tmp_path: Path) -> None:
    recipe = quick(
        "ring", "iterations=[5, 3]", "checkpoint.every=3", "runtime.max_staleness=1",
    )  # fmt: skip
    assert distill(recipe, tmp_path / "run", console=CONSOLE, until=5) is False  # at the first phase's edge
    assert [line["iteration"] for line in Run(tmp_path / "run").metrics()] == list(range(5))
    assert Run(tmp_path / "run").events()[-1]["event"] == "stopped"
    assert distill(recipe, tmp_path / "run", console=CONSOLE) is True
    assert [e["resumed"] for e in Run(tmp_path / "run").events() if "resumed" in e] == [5]
    staleness = [line["staleness"] for line in Run(tmp_path / "run").metrics()]
    assert staleness == [0, 1, 1, 0, 1, 0, 0, 1]  # segments begin at 0, 3 (a manifest), 5 (a phase), 6 (a manifest)
    assert_same_bits(tmp_path / "run", stale_by_hand(recipe))
    with pytest.raises(AssertionError):  # and it is not the exact schedule's result
        assert_same_bits(tmp_path / "run", reference(recipe, prompts))


def test_saves_do_not_queue_behind_a_store_that_is_slower_than_the_run(
    nodes: dict[str, str], quick, prompts, tmp_path: Path
) -> None:
    """The writer is held from near the start until the run has stopped: only that edge waits behind the held one."""
    recipe = quick("ring", "method.name=dmd", "iterations=60", "checkpoint.every=1", "checkpoint.keep=60")
    run, held = tmp_path / "run", []
    story = Story(recipe, run, lambda story: None)

    def hold() -> None:
        story.until(lambda: story.events("started"))
        (checkpoint_writer,) = story.processes("CheckpointWriter")
        checkpoint_writer.suspend()
        try:
            held.append(len(story.lines()))
            story.until(lambda: len(story.lines()) == 40)
        finally:
            checkpoint_writer.resume()

    thread = threading.Thread(target=hold, daemon=True)
    thread.start()
    assert distill(recipe, run, console=CONSOLE, until=40) is False
    thread.join()
    saved = [event["iteration"] for event in story.events("checkpoint")]
    assert held[0] < 30 and saved[-1] == 40
    assert sum(held[0] < iteration for iteration in saved) < 6  # a few may precede their lines
    assert_bits_of_the_reference(story, prompts)


def test_a_role_that_cannot_be_placed(nodes: dict[str, str], quick, tmp_path: Path) -> None:
    recipe = quick(
        "ring", "runtime.placement_timeout=3",
        "runtime.fake={max_workers: 2, cpus: 0.25, resources: {tpu: 2}, labels: {zone: elsewhere}}",
    )  # fmt: skip
    with pytest.raises(UserError) as caught:
        distill(recipe, tmp_path / "run", console=CONSOLE)
    message = str(caught.value)
    assert "2 fake worker(s) wait for 0.25 CPU, 2 tpu, label zone=elsewhere each" in message
    assert "3 s" in message and "CPU" in message.partition("free in the cluster")[2] and "\n" not in message
    wait_until(lambda: living() == [])  # they ask for nothing any more


def living() -> list[str]:
    """The classes of this package's actors that are there or waited for; Ray Data has some of its own."""
    ours = {"GeneratorWorker", "FakeWorker", "TeacherWorker", "PromptStream", "CheckpointWriter"}
    alive = [a["ActorClassName"] for a in ray._private.state.actors().values() if a["State"] != "DEAD"]
    return [name for name in alive if name in ours]


def wait_until(condition, seconds: float = 180.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "never came true"
        time.sleep(0.05)


def test_an_error_in_a_worker_ends_the_run_and_hangs_nobody(nodes: dict[str, str], quick, tmp_path: Path) -> None:
    """A teacher whose weights are not numbers: both fake replicas refuse the step, and the run ends by saying so."""
    recipe = quick("ring", "runtime.fake.max_workers=2")
    family = recipe_family(recipe)
    spoilt = family.load_teacher()
    with torch.no_grad():
        next(iter(spoilt.parameters()))[0, 0] = torch.nan
    save_teacher(spoilt, tmp_path / "teacher", "ring", family.options)
    teacher = recipe.teacher.model_copy(update={"path": str(tmp_path / "teacher")})
    with pytest.raises(RunError, match="a gradient is not finite") as caught:
        distill(recipe.model_copy(update={"teacher": teacher}), tmp_path / "run", console=CONSOLE)
    details = tmp_path / "run/error.txt"
    assert str(details) in str(caught.value) and "\n" not in str(caught.value)
    assert "FloatingPointError" in details.read_text() and "collective.py" in details.read_text()
    assert Run(tmp_path / "run").metrics() == []  # no step was committed


def test_a_teacher_that_gives_nan_ends_the_run_by_its_name(nodes: dict[str, str], quick, tmp_path: Path) -> None:
    """Without a prompt it gives NaN, so that all guided scores are none; every sample would be left out, in silence."""
    recipe = quick("digits", "iterations=20")
    family = recipe_family(recipe)
    spoilt: Any = family.load_teacher()
    with torch.no_grad():
        spoilt.label.weight[10] = torch.nan
    save_teacher(spoilt, tmp_path / "teacher", "digits", family.options)
    teacher = recipe.teacher.model_copy(update={"path": str(tmp_path / "teacher")})
    with pytest.raises(RunError, match="iteration 0: 16 of 16 samples .* made 16 by the teacher") as caught:
        distill(recipe.model_copy(update={"teacher": teacher}), tmp_path / "run", console=CONSOLE)
    assert "monitor.zeroed_end_share" in str(caught.value) and "\n" not in str(caught.value)
    (line,) = Run(tmp_path / "run").metrics()
    assert line["zeroed_samples"] == {"teacher": 16} and line["dm_gradient"] == 0.0
    (event,) = [event for event in Run(tmp_path / "run").events() if event["event"] == "zeroed"]
    assert event["roles"] == {"teacher": 16} and event["share"] == 1.0


def test_a_bad_prompt_row_is_named_by_an_actor_of_ray_data_while_the_run_trains(
    nodes: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the look before the run has not found it."""
    recipe = large_recipe("wan", tmp_path, "prompts.cache_mb=0")
    rows = {name: np.zeros((300, 5, 16), np.float32) for name in ("prompt_embeds", "negative_prompt_embeds")}
    rows["prompt_embeds"][250, 2, 3] = np.inf
    write_prompts(tmp_path / "prompts.parquet", rows)
    with pytest.raises(UserError, match="row 250 of '.*' has values that are not finite in column 'prompt_embeds'"):
        distill(recipe, tmp_path / "before", console=CONSOLE)
    assert not (tmp_path / "before").exists()
    monkeypatch.setattr(recipe_check, "LOOKED_THROUGH", 0)
    monkeypatch.setattr(PromptTable, "_refuse_not_finite", lambda *a: None)  # here, in the driver
    with pytest.raises(UserError, match="row 250 of '.*' has values that are not finite") as caught:
        distill(recipe, tmp_path / "run", console=CONSOLE)
    assert "\n" not in str(caught.value)


def test_a_bad_prompt_row_is_named_as_a_small_set_is_encoded(
    nodes: dict[str, str], quick, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the prompt stream, where the look before the run has not found it."""
    labels = np.arange(300) % 10
    labels[250] = 12
    path = write_prompts(tmp_path / "prompts.parquet", {"label": labels})
    recipe = quick("digits", f"prompts.path={path}")
    with pytest.raises(UserError, match=r"12 \(row 250\)"):
        distill(recipe, tmp_path / "before", console=CONSOLE)
    assert not (tmp_path / "before").exists()
    monkeypatch.setattr(recipe_check, "LOOKED_THROUGH", 0)
    with pytest.raises(UserError, match=r"12 \(row 250\)") as caught:
        distill(recipe, tmp_path / "run", console=CONSOLE)
    assert "\n" not in str(caught.value)


def test_it_begins_with_the_workers_that_there_is_room_for(
    nodes: dict[str, str], quick, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for two scorers of three; a single micro-batch; the keys that others rely on, and the sample grids."""
    monkeypatch.setattr(placement, "PATIENCE", 2.0)
    recipe = quick(
        "ring", "iterations=2", "method.name=dmd-sgts", "batch.micro=null", "monitor.samples_every=1",
        "monitor.samples=9", "monitor.tensorboard=true",
        "runtime.teacher={min_workers: 2, max_workers: 3, cpus: 0.25, resources: {scorer: 2}}",
    )  # fmt: skip
    said = io.StringIO()
    assert distill(recipe, tmp_path / "run", console=Console(file=said, width=1000))
    assert "going on without: 1 teacher worker(s) wait for 0.25 CPU, 2 scorer each" in said.getvalue()
    wait_until(lambda: living() == [])
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    promised = {
        "phase", "iteration", "generator_version", "fake_version", "loss_fake", "generator_grad_norm", "samples",
        "seconds", "roles",
    }  # fmt: skip
    assert [line["iteration"] for line in lines] == [0, 1] and all(promised <= line.keys() for line in lines)
    assert all({"busy_seconds", "workers"} <= figures.keys() for figures in lines[0]["roles"].values())
    assert lines[0]["roles"]["teacher"]["workers"] == 2
    events = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    assert all({"time", "event"} <= event.keys() for event in events)
    assert events[0]["workers"] == {"teacher": 2, "fake": 1, "generator": 1}
    names = [path.name for path in (tmp_path / "run/samples").iterdir()]
    assert {"student-000001.png", "student-000002.png"} <= set(names) and not [n for n in names if "part" in n]
    assert list((tmp_path / "run/tensorboard").glob("events.*"))
