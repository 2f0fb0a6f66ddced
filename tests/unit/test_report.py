"""The page: complete, self-contained, and made whatever state a run is in; and its charts."""

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from PIL import Image
from run_folders import make_run
from safetensors.torch import load_file, save_file

from raydmd.data.prompts import PromptTable, write_prompts
from raydmd.errors import UserError
from raydmd.evaluation import exhibits
from raydmd.evaluation.comparison import Difference, by_teacher, differences
from raydmd.evaluation.curves import HEIGHT, LEFT, TOP, WIDTH, Band, Line, chart
from raydmd.evaluation.report import _best, report
from raydmd.generate import generate
from raydmd.methods.loading import load_recipe, parse_recipe
from raydmd.models.fingerprint import fingerprint_teacher
from raydmd.pipeline import StudentPipeline
from raydmd.runs.run import Run


class Page(HTMLParser):
    """What a browser would see of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.images: list[dict[str, str | None]] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.open: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append(tag)
        if tag == "img":
            self.images.append(values)
        self.links += [value for key in ("href", "src", "srcset", "data", "action") if (value := values.get(key))]
        if tag not in ("img", "meta", "link", "br") and not self.get_starttag_text().endswith("/>"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.get_starttag_text().endswith("/>") or tag == (self.open or [""])[-1]:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text += data


@pytest.fixture(scope="session")
def runs(quick, prompts, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """A phased run and a one-step run on digits, and one on the ring."""
    root = tmp_path_factory.mktemp("runs")
    small = ["evaluation.samples=40", "teacher.steps=4"]
    return {
        "phased": make_run(quick("digits", *small), root / "phased", prompts("digits")),
        "onestep": make_run(quick("digits", "method.name=dmd", *small), root / "onestep", prompts("digits")),
        "ring": make_run(quick("ring", *small), root / "ring", prompts("ring")),
    }


def test_the_page_shows_everything_and_needs_nothing(runs: dict[str, Run], tmp_path: Path) -> None:
    page = Page(report(list(runs.values()), tmp_path / "deep" / "report.html"))
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["report.html"]

    assert not page.open and "script" not in page.tags
    assert all(link.startswith(("data:", "#")) for link in page.links)
    assert not re.search(r"@import|url\(|https?://", page.source)
    assert all(f'id="{link[1:]}"' in page.source for link in page.links if link.startswith("#"))
    for image in page.images:
        assert image["alt"] and len(image["alt"]) > 5
        data = base64.b64decode(str(image["src"]).removeprefix("data:image/png;base64,"), validate=True)
        with Image.open(io.BytesIO(data)) as picture:
            assert picture.size == (int(image["width"] or 0), int(image["height"] or 0))

    for words in (
        "phased",
        "onestep",
        "ring",
        "Heun, 4 steps",
        "Euler, 1 step",
        "FD to teacher",
        "mode TV",
        "recovered",
    ):
        assert words in page.text, words
    for words in ("expert 1", "expert 2", "t = 0.75", "s = 0.5", "1 checkpoint", "guidance_scale", "seconds 0.52"):
        assert words in page.text, words
    panels = [image["alt"] or "" for image in page.images if "rows of 10" in (image["alt"] or "")]
    assert len(panels) == 6  # data, teacher many, teacher 1 and 4, two students
    for run in runs.values():  # what was missing is there now
        figures = json.loads((run.folder / "evaluation.json").read_text())
        row = figures["student"]["fd_teacher" if run.name != "ring" else "sw_teacher"]
        assert f"{row:.3f}" in page.text or f"{row:.2f}" in page.text


def test_one_run_has_charts_with_its_phases(runs: dict[str, Run], tmp_path: Path) -> None:
    page = Page(report([runs["phased"]], tmp_path / "r.html"))
    assert page.tags.count("svg") == 7  # six curves and the roles' busy share
    assert page.text.count("phase 2") >= 6 and "dashed" in page.text
    assert "best" not in re.findall(r'<td class="(\w+)"', page.source)  # nothing to compare it with


def test_a_run_in_training_has_a_page(runs: dict[str, Run], tmp_path: Path) -> None:
    shutil.copytree(runs["phased"].folder, tmp_path / "run")
    run = Run(tmp_path / "run")
    run.expert_file(1).unlink()
    lines = run.metrics()
    lines[1]["loss_fake"] = float("nan")
    lines[2]["roles"]["fake"]["workers"] = 2
    for number, line in enumerate(lines):  # of a method with more roles
        line |= {"loss_discriminator": 0.5 + number, "loss_own": 0.25}
        line["roles"]["discriminator"] = {"busy_seconds": 0.2, "workers": 1}
    text = "".join(json.dumps(line) + "\n" for line in lines[:3]) + '{"cut'
    (run.folder / "metrics.jsonl").write_text(text)
    samples = run.folder / "samples"
    samples.mkdir()
    for number in range(1, 8):
        Image.new("L", (10, 10), number).save(samples / f"student-{number:06}.png")
    page = Page(report([run], tmp_path / "a.html"))
    assert "3 of 4" in page.text and "still at t = 0.5" in page.text and "Workers of each role" in page.text
    for words in ("Discriminator's loss", "Loss: own"):
        assert words in page.text, words
    assert page.source.count("discriminator") > 1  # its busy share, in the legend
    assert [words for words in re.findall(r"iteration (\d+)</b>", page.source)] == ["1", "3", "5", "7"]

    run.expert_file(0).unlink()
    (run.folder / "metrics.jsonl").unlink()
    (run.folder / "events.jsonl").unlink()
    page = Page(report([run], tmp_path / "b.html"))
    assert "no trained expert" in page.text and "0 of 4" in page.text and "No events" in page.text


def test_pretrained_families_have_pictures_and_no_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        QwenImageTransformer2DModel(
            patch_size=2, in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=1,
            joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
        ).save_pretrained(tmp_path / "teacher")  # fmt: skip
    columns = {"prompt_embeds": rng.random((3, 4, 16), np.float32), "prompt_embeds_mask": np.ones((3, 4), bool)}
    columns |= {f"negative_{name}": values for name, values in columns.items()}
    table = write_prompts(tmp_path / "prompts.parquet", {**columns, "text": ["a cat", "a dog", "a fox"]})
    options = {"latent_shape": [4, 1, 8, 8]}
    tree = {
        "name": "tiny", "iterations": 2, "batch": {"size": 2}, "prompts": {"path": str(table)},
        "teacher": {"family": "qwen_image", "path": str(tmp_path / "teacher"), "options": options, "steps": 3},
        "method": {"name": "phased", "steps": 2, "fake_updates": 1, "experts": {"kind": "lora", "rank": 2}},
        "runtime": {"device": "cpu"},
    }  # fmt: skip
    run = make_run(parse_recipe(tree, "test"), tmp_path / "run", PromptTable(table))
    page = Page(report([run], tmp_path / "r.html"))
    assert "figures for digits and ring, not for 'qwen_image'" in page.text and "There are no figures" in page.text
    assert len([image for image in page.images if "8 pictures in rows of 4" in str(image["alt"])]) == 3
    asked, first = re.findall(r'<div class="prompts">(.*?)</div>', page.source, re.DOTALL)
    assert re.findall(r"<li>(.*?)</li>", first) == ["a cat", "a dog", "a fox"] * 2  # of the samples step by step
    assert re.findall(r"<li>(.*?)</li>", asked) == ["a cat", "a dog", "a fox"] * 2 + ["a cat", "a dog"]
    assert all(
        "row by row: a cat; a dog; a fox; a cat" in str(i["alt"]) for i in page.images if "rows of 4" in str(i["alt"])
    )
    assert "s = 0.5" in page.text and not (run.folder / "evaluation.json").exists()
    (path,) = generate(StudentPipeline(run), "a dog", 1, 0, tmp_path / "out")
    assert path.name == "a-dog-0-0.png"

    write_prompts(table, columns)  # without texts
    assert "<li>row 0</li><li>row 1</li><li>row 2</li><li>row 0</li>" in report([run], tmp_path / "r.html").read_text()
    monkeypatch.setattr(exhibits, "LARGE", 1000)
    assert "too large to be sampled" in Page(report([run], tmp_path / "large.html")).text
    shutil.rmtree(tmp_path / "teacher")
    assert "No pictures: teacher.path: no folder" in Page(report([run], tmp_path / "gone.html")).text


def test_runs_on_one_teacher_stand_side_by_side_wherever_it_lies(runs: dict[str, Run], tmp_path: Path) -> None:
    """As two runs that each trained the same teacher into their own folder; another teacher is another section."""
    folders = [tmp_path / "a", tmp_path / "b", tmp_path / "c"]
    for folder, source in zip(folders, ("phased", "onestep", "onestep"), strict=True):
        shutil.copytree(runs[source].folder, folder)
        shutil.copytree(str(runs[source].recipe.teacher.path), folder / "teacher")
        recipe = (folder / "recipe.yaml").read_text()
        (folder / "recipe.yaml").write_text(
            recipe.replace(str(runs[source].recipe.teacher.path), str(folder / "teacher"))
        )
    weights = load_file(folders[2] / "teacher/model.safetensors")
    save_file({name: value + 0.01 for name, value in weights.items()}, folders[2] / "teacher/model.safetensors")
    assert by_teacher([Run(folder) for folder in folders]) == [[0, 1], [2]]
    assert by_teacher([Run(folders[1]), runs["ring"], Run(folders[0])]) == [[0, 2], [1]]

    page = Page(report([Run(folder) for folder in folders[:2]], tmp_path / "r.html"))
    assert page.text.count("Teacher: digits") == 1
    shutil.rmtree(folders[0] / "teacher")  # the other one's does as well
    kept = [event | {"teacher": fingerprint_teacher(Run(folders[1]).family)} for event in Run(folders[0]).events()]
    (folders[0] / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in kept))
    page = Page(report([Run(folder) for folder in folders[:2]], tmp_path / "r.html"))
    assert page.text.count("Teacher: digits") == 1 and "No pictures" not in page.text


def test_the_readmes_example_is_of_one_teacher() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"raydmd report (runs/\S+) (runs/\S+) ", readme)
    given = [re.findall(rf"raydmd distill (.*) --out {folder}\b", readme)[0] for folder in shown]
    assert {tuple(re.findall(r"--set (teacher\S+)", words)) for words in given} == {("teacher.path=runs/teacher",)}
    assert "raydmd pretrain digits --out runs/teacher" in readme


def test_what_differs_between_recipes_is_shown(runs: dict[str, Run], tmp_path: Path) -> None:
    phased, onestep = runs["phased"], runs["onestep"]
    assert differences([phased, onestep]) == [Difference("method.name", ["phased", "dmd"])]
    assert differences([phased, phased]) == []
    own = Run(onestep.folder)
    own.recipe = load_recipe(str(onestep.folder / "recipe.yaml"), ["method.dmd.t_max=0.5"])
    assert Difference("method.dmd.t_max", ["–", "0.5"]) in differences([phased, own])
    found = {difference.key: difference.values for difference in differences([phased, onestep, runs["ring"]])}
    assert found["method.name"] == ["phased", "dmd", "phased"] and "teacher.path" in found and "seed" not in found
    assert found["teacher.family"] == ["digits", "digits", "ring"] and found["teacher.guidance_scale"][2] == "1"

    def rows(*shown: Run) -> list[str]:
        page = report(list(shown), tmp_path / "r.html").read_text()
        (table,) = re.findall(r'<table class="differences">(.*?)</table>', page, re.DOTALL) or [""]
        return [re.sub(r"<[^>]+>", " ", row).split() for row in re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)[1:]]

    assert rows(phased, onestep) == [["method.name", "phased", "dmd"]]
    assert rows(phased) == [] and "What differs" not in (tmp_path / "r.html").read_text()
    shutil.copytree(phased.folder, tmp_path / "again")
    assert rows(phased, Run(tmp_path / "again")) == [] and "they are the same" in (tmp_path / "r.html").read_text()


def test_names_are_escaped_and_told_apart(runs: dict[str, Run], tmp_path: Path) -> None:
    folders = [tmp_path / "a" / "<b>&run", tmp_path / "b" / "<b>&run"]
    for folder in folders:
        shutil.copytree(runs["ring"].folder, folder)
    page = Page(report([Run(folder) for folder in folders], tmp_path / "r.html"))
    assert "<b>&run" in page.text and "<b>&run" not in page.source
    assert "a/<b>&run" in page.text and "b/<b>&run" in page.text


def test_report_refuses(runs: dict[str, Run], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least one run"):
        report([], tmp_path / "r.html")
    with pytest.raises(UserError, match="a folder; name the page's file"):
        report([runs["ring"]], tmp_path)


def test_best_goes_by_what_a_figure_is_for() -> None:
    students = [{"fd_teacher": 0.3, "pcos": 0.5, "accuracy": 0.9}, {"fd_teacher": 0.4, "pcos": 0.8, "accuracy": 1.0}]
    teacher = {"pcos": 0.75}
    assert _best("fd_teacher", students, teacher) == 0.3
    assert _best("accuracy", students, teacher) == 1.0
    assert _best("pcos", students, teacher) == 0.8  # nearest to the teacher, not the least
    assert _best("fd_data", students, teacher) is None
    assert _best("fd_teacher", students[:1] * 2, teacher) is None  # a tie has no best


# ---------------------------------------------------------------- charts


def points(svg: str, kind: str) -> list[tuple[float, float]]:
    (found,) = re.findall(rf'<polyline points="([^"]*)" stroke="[^"]*" class="{kind}"/>', svg)
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in found.split())]


def test_a_chart_puts_values_where_its_ticks_are() -> None:
    svg = chart("loss", [Line("a", "red", [0, 50, 100], [0.0, 1.0, 2.0])])
    ((x0, y0), (x1, y1), (x2, y2)) = points(svg, "raw")
    assert (x0, x2) == (LEFT, WIDTH - 16) and x1 == pytest.approx((x0 + x2) / 2)
    assert y1 == pytest.approx((y0 + y2) / 2) and y2 < y0  # up is more
    ticks = {text: float(y) - 4 for y, text in re.findall(r'y="([\d.]+)" text-anchor="end">([^<]*)<', svg)}
    assert ticks["0"] == pytest.approx(y0, abs=0.1) and ticks["2"] == pytest.approx(y2, abs=0.1)
    assert 'aria-label="loss: a ends at 2"' in svg


def test_a_chart_of_powers_is_logarithmic() -> None:
    svg = chart("norm", [Line("a", "red", [0, 1, 2], [0.01, 1.0, 100.0])])
    (_, y0), (_, y1), (_, y2) = points(svg, "raw")
    assert y1 == pytest.approx((y0 + y2) / 2, abs=0.2)


def test_a_chart_leaves_out_what_is_no_number_and_cuts_off_towers() -> None:
    values = [1.0 + 0.01 * i for i in range(100)]
    values[3], values[50] = float("nan"), 1000.0
    drawn = points(chart("seconds", [Line("a", "red", range(100), values)]), "raw")
    assert len(drawn) == 99 and min(y for _, y in drawn) == TOP
    assert max(y for _, y in drawn) - sorted(y for _, y in drawn)[1] > (HEIGHT - TOP) / 3  # the others fill the chart
    assert chart("empty", [Line("a", "red", [], [])]) == ""
    assert chart("empty", [Line("a", "red", [1], [float("inf")])]) == ""
    assert "<svg" in chart("constant", [Line("a", "red", [5], [3.0])])


def test_the_running_median_stops_at_a_break() -> None:
    x, y = range(100), [3.0] * 50 + [1.0] * 50
    with_break = [v for _, v in points(chart("a", [Line("a", "red", x, y, breaks=[49.5])]), "mean")]
    assert len(set(with_break)) == 2
    ramp = [float(v) for v in range(50)] + [0.0] * 50
    kept = points(chart("a", [Line("a", "red", x, ramp, breaks=[49.5])]), "mean")
    lost = points(chart("a", [Line("a", "red", x, ramp)]), "mean")
    assert kept[49][1] < lost[49][1]  # without the break the next phase pulls the end of this one


def test_long_runs_are_gathered() -> None:
    svg = chart("a", [Line("a", "red", range(20_000), [float(i % 7) for i in range(20_000)])])
    assert len(svg) < 30_000 and "<polygon" in svg


def test_bands_and_guides() -> None:
    line = Line("a", "red", [0, 100], [0.0, 1.0])
    svg = chart("a", [line], [Band(0, 50, "phase <1>", "blue", guide=0.5), Band(200, 300, "out", "blue")])
    assert "phase &lt;1&gt;" in svg and 'class="guide"' in svg and ">out<" not in svg
    assert 'class="guide"' not in chart("a", [line], [Band(0, 50, "p", "blue")])
