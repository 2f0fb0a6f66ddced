"""The commands. Bad input gets one line and exit code 2; Ctrl-C leaves a run that can be continued (130)."""

import json
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import click
import yaml

from raydmd import __version__, interrupts
from raydmd.atomic import FULL, storage_error, write_text
from raydmd.bench.command import bench
from raydmd.config.overrides import apply_override
from raydmd.config.recipe import Recipe, dump_recipe, listed_recipes, shipped_recipes
from raydmd.console import console, errors
from raydmd.entry import main as main
from raydmd.errors import RunError, UserError
from raydmd.extras import require_extra
from raydmd.runtime.address import check_cluster

FOLDER = click.Path(path_type=Path)
recipe_argument = click.argument("recipe", metavar="RECIPE")
set_option = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of the recipe."
)


def _import(context: click.Context, option: click.Parameter, value: Sequence[str]) -> Sequence[str]:
    from raydmd.config.plugins import import_plugins

    import_plugins(value)
    return value


_PLUGIN: dict[str, Any] = {
    "multiple": True, "metavar": "MODULE|FILE.py", "callback": _import,
    "help": "Import code that registers a method or a family.",
}  # fmt: skip
plugin_option = click.option("--plugin", "plugins", **_PLUGIN)  # for a command that reads a recipe
run_plugin_option = click.option("--plugin", "plugins", expose_value=False, **_PLUGIN)  # for one that reads a run


base_option = click.option(
    "--base", metavar="PATH", help="Of an export: its base model's folder, or hf://owner/name; default as it says."
)


class Commands(click.Group):
    """A group that a Ctrl-C leaves without the empty line that click writes for it."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise click.Abort from None


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, message="%(version)s")
def app() -> None:
    """Distil diffusion models into few-step experts on a Ray cluster."""


app.add_command(bench)


@app.command(epilog="Example: raydmd quickstart --out runs/quickstart")
@click.option("--out", type=FOLDER, default=Path("runs/quickstart"), show_default=True, help="The run's folder.")
@set_option
def quickstart(out: Path, overrides: Sequence[str]) -> None:
    """Do it all on this machine: train a small teacher, distil it into 4 steps, evaluate, show a page.

    Takes minutes. Run again, it goes on where it was.
    """
    from raydmd.evaluation.report import report as write_report
    from raydmd.methods.loading import load_recipe
    from raydmd.runs.run import Run

    if not _distill(load_recipe("digits", list(overrides)), out, "auto") or interrupts.received():
        raise click.exceptions.Exit(interrupts.exit_code())
    _evaluate(out)
    page = write_report([Run(out)], out / "report.html")
    console.print(f"\nlook at the pictures: {page.resolve()}", highlight=False, soft_wrap=True)
    console.print(
        f"make more:            raydmd generate {out} --prompt 7 -n 16 --out pictures", highlight=False, soft_wrap=True
    )


@app.command(epilog="Example: raydmd pretrain digits --set pretrain.iterations=3000 --out runs/digits-teacher")
@recipe_argument
@set_option
@plugin_option
@click.option("--out", type=FOLDER, help="The teacher's folder; default runs/NAME-teacher.")
def pretrain(recipe: str, overrides: Sequence[str], plugins: Sequence[str], out: Path | None) -> None:
    """Train an embedded teacher with Ray Train.

    RECIPE is a YAML file, or a name that `raydmd recipes` lists.
    """
    from raydmd.methods.loading import load_recipe

    loaded = load_recipe(recipe, overrides, plugins)
    check_cluster()
    from raydmd.runtime.pretrain import pretrain as run_pretrain

    folder = run_pretrain(loaded, out or Path(f"runs/{loaded.name}-teacher"), console)
    use = shlex.quote(f"teacher.path={folder}")
    console.print(f"teacher: {folder} (use it with --set {use})", highlight=False, markup=False, soft_wrap=True)


@app.command(epilog="Example: raydmd pairs digits-adp --set teacher.path=runs/digits-teacher --out runs/digits-pairs")
@recipe_argument
@set_option
@plugin_option
@click.option("--out", type=FOLDER, help="The pairs' folder; default the recipe's pairs.path, else runs/NAME-pairs.")
@click.option("--count", type=click.IntRange(min=1), help="How many; default as many as the recipe's method needs.")
@click.option(
    "--shard-size", type=click.IntRange(min=1), help="Pairs of a file, a multiple of 256; default 256, or the folder's."
)
def pairs(
    recipe: str,
    overrides: Sequence[str],
    plugins: Sequence[str],
    out: Path | None,
    count: int | None,
    shard_size: int | None,
) -> None:
    """Have a teacher make the ODE pairs that runs train on, once for all of them, with Ray Data.

    RECIPE is a YAML file, or a name that `raydmd recipes` lists. What is there already is not made again.
    """
    from raydmd.methods.loading import load_recipe

    loaded = load_recipe(recipe, overrides, plugins)
    folder = out or Path(loaded.pairs.path or f"runs/{loaded.name}-pairs")
    check_cluster()
    from raydmd.runtime.pairs import collect_pairs

    made = collect_pairs(loaded, folder, count, shard_size, console)
    use = shlex.quote(f"pairs.path={folder}")
    words = f"pairs: {folder} ({made} shards made; use it with --set {use})"
    console.print(words if made else f"{folder} is complete: nothing to do", highlight=False, markup=False,
                  soft_wrap=True)  # fmt: skip


@app.command(epilog="Example: raydmd encode prompts.txt --recipe my-wan.yaml --out embeddings")
@click.argument("prompts", metavar="PROMPTS")
@click.option("--recipe", metavar="RECIPE", help="A YAML file or a shipped name, whose teacher and runtime are used.")
@click.option("--teacher", metavar="PATH", help="Instead: the teacher's folder, or hf://owner/name; with --family.")
@click.option("--family", metavar="NAME", help="The teacher's family.")
@set_option
@plugin_option
@click.option("--column", metavar="NAME", help="Of the texts; default text, prompt or caption.")
@click.option("--out", required=True, metavar="DIR", help="The table's folder, or a URI (s3://, gs://).")
def encode(
    prompts: str,
    recipe: str | None,
    teacher: str | None,
    family: str | None,
    overrides: Sequence[str],
    plugins: Sequence[str],
    column: str | None,
    out: str,
) -> None:
    """Encode texts by a teacher's text encoder into a table that runs take as prompts.path.

    PROMPTS is a .txt file (a prompt a line), a .csv, .jsonl or .parquet file with a column of texts, or a folder of
    pictures with captions. What is there already is not encoded again. A run does this by itself.
    """
    from raydmd.methods.loading import load_recipe, parse_recipe
    from raydmd.methods.registry import METHODS

    if (recipe is None) == (teacher is None) or (teacher is None) != (family is None):
        raise UserError("--recipe, --teacher: give --recipe RECIPE, or --teacher PATH and --family NAME")
    if recipe is not None:
        loaded = load_recipe(recipe, overrides, plugins)
    else:
        tree: dict[str, Any] = {"name": "encode", "teacher": {"path": teacher, "family": family}}
        tree["method"] = {"name": next(iter(METHODS))}  # whichever: nothing is trained
        for override in overrides:
            apply_override(tree, override)
        loaded = parse_recipe({**tree, "plugins": list(plugins)}, "encode", overrides)
    check_cluster()
    from raydmd.runtime.encode import encode_file

    encoded = encode_file(loaded, prompts, out, column, console)
    use = shlex.quote(f"prompts.path={encoded.place}")
    console.print(f"embeddings: {encoded.place} (use them with --set {use})", highlight=False, markup=False,
                  soft_wrap=True)  # fmt: skip


@app.command(epilog="Example: raydmd distill digits --set method.name=dmd-sgts --set seed=1 --out runs/sgts")
@recipe_argument
@set_option
@plugin_option
@click.option("--out", type=FOLDER, help="The run's folder; default runs/NAME.")
@click.option(
    "--resume",
    metavar="auto|never|PATH",
    default="auto",
    show_default=True,
    help="Continue what the folder holds, refuse a folder that holds a run, or continue the run in PATH.",
)
def distill(recipe: str, overrides: Sequence[str], plugins: Sequence[str], out: Path | None, resume: str) -> None:
    """Distil a teacher into few-step experts, on this machine or the Ray cluster of RAY_ADDRESS.

    RECIPE is a YAML file, or a name that `raydmd recipes` lists.
    """
    from raydmd.methods.loading import load_recipe

    loaded = load_recipe(recipe, overrides, plugins)
    folder = out or Path(f"runs/{loaded.name}")
    if resume not in ("auto", "never"):
        if not (Path(resume) / "recipe.yaml").is_file():
            raise UserError(f"--resume {resume}: neither auto, never nor the folder of a run")
        if out is not None and Path(resume).resolve() != out.resolve():
            raise UserError(f"--resume {resume}: --out {out} is another folder; give one of them")
        folder, resume = Path(resume), "auto"
    if not _distill(loaded, folder, resume):
        console.print(f"stopped; the same command goes on from {folder}", highlight=False, soft_wrap=True)
        raise click.exceptions.Exit(interrupts.exit_code())
    then = ", ".join(_next_commands(loaded, folder))
    console.print(f"run: {folder} (next: {then})", highlight=False, markup=False, soft_wrap=True)


@app.command(epilog="Example: raydmd status runs/digits --watch")
@click.argument("run", metavar="RUN", type=FOLDER)
@click.option("--watch", is_flag=True, help="Show it once a second until the run has ended, or Ctrl-C.")
@click.option("--json", "as_json", is_flag=True, help="Print RUN/status.json, for programs.")
def status(run: Path, watch: bool, as_json: bool) -> None:
    """Show what a run is doing: its state, each worker's call, what is waited for.

    RUN may be on storage that this machine shares with the run's; its driver writes RUN/status.json once a second.
    """
    from raydmd.runs.status import describe, read_status

    while True:
        found = read_status(run)
        lines = [found.model_dump_json()] if as_json else describe(run, found)
        if watch and console.is_terminal:
            console.clear()
        for line in lines:
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        if not watch or found.has_ended:
            return
        time.sleep(1.0)


@app.command(epilog="Example: raydmd evaluate runs/digits")
@click.argument("run", metavar="RUN", type=FOLDER)
@run_plugin_option
@click.option("--samples", type=click.IntRange(min=50), help="Pictures to compare; default the recipe's.")
def evaluate(run: Path, samples: int | None) -> None:
    """Measure a run's students against their teacher and the data; writes RUN/evaluation.json."""
    _evaluate(run, samples)


@app.command(epilog="Example: raydmd report runs/digits runs/sgts --out report.html")
@click.argument("runs", metavar="RUN...", type=FOLDER, nargs=-1, required=True)
@run_plugin_option
@click.option("--out", type=FOLDER, help="The page; default report.html in the first run's folder.")
def report(runs: Sequence[Path], out: Path | None) -> None:
    """Write one self-contained HTML page: pictures side by side, curves, the table."""
    from raydmd.evaluation.report import report as write_report
    from raydmd.progress import telling
    from raydmd.runs.run import Run

    with telling("reporting") as say:
        page = write_report([Run(folder) for folder in runs], out or runs[0] / "report.html", say)
    console.print(f"report: {page.resolve()}", highlight=False, soft_wrap=True)


@app.command(epilog="Example: raydmd generate runs/digits --prompt 7 -n 16 --seed 0 --out pictures")
@click.argument("folder", metavar="RUN|EXPORT", type=FOLDER)
@run_plugin_option
@base_option
@click.option("--prompt", metavar="TEXT", help="What to make; for digits, the digit.")
@click.option(
    "--prompts", metavar="FILE", type=FOLDER, help="Many: a text a line, or a .csv, .jsonl or .parquet with a column."
)
@click.option("--image", metavar="FILE", type=FOLDER, help="The first frame, of models from image to video.")
@click.option("-n", type=click.IntRange(min=1), default=1, show_default=True, help="How many of each prompt.")
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="The same seed gives the same pictures."
)
@click.option("--out", type=FOLDER, default=Path("pictures"), show_default=True, help="Folder of the PNGs or MP4s.")
@click.option("--fps", type=click.IntRange(min=1), default=16, show_default=True, help="Frames a second of videos.")
@click.option("--size", metavar="WIDTHxHEIGHT", help="One that the run has a bucket of; default that of its previews.")
@click.option("--frames", type=click.IntRange(min=1), help="Of videos, likewise.")
def generate(
    folder: Path,
    base: str | None,
    prompt: str | None,
    prompts: Path | None,
    image: Path | None,
    n: int,
    seed: int,
    out: Path,
    fps: int,
    size: str | None,
    frames: int | None,
) -> None:
    """Make pictures, or videos where the model makes those, with the experts of a run or of an export.

    An export makes of a seed and a prompt what its run makes.
    """
    from raydmd.evaluation.prompts import read_prompt_file
    from raydmd.export.exported import open_student
    from raydmd.generate import generate as make
    from raydmd.pipeline import StudentPipeline
    from raydmd.progress import counting

    if (prompt is None) == (prompts is None):
        raise UserError("--prompt, --prompts: give one of them")
    asked = read_prompt_file(prompts) if prompts is not None else [prompt or ""]
    loaded = open_student(folder, base)
    loaded.check_content()
    for remark in loaded.check():
        errors.print(f"raydmd: {remark}", highlight=False, markup=False, soft_wrap=True)
    pipeline = StudentPipeline(loaded, size=size, frames=frames)
    with counting("making", len(asked) * (n if loaded.family.latent_shape != (2,) else 1)) as made:

        def tell(path: Path) -> None:
            console.print(str(path), highlight=False, markup=False, soft_wrap=True)
            made()

        make(pipeline, asked, n, seed, out, fps, tell, image)


@app.command(epilog="Example: raydmd export runs/wan --format diffusers --out exports/wan-4-steps")
@click.argument("run", metavar="RUN", type=FOLDER)
@run_plugin_option
@click.option(
    "--format",
    type=click.Choice(["diffusers", "lora", "peft", "lightning"]),
    required=True,
    help="A pipeline's folder, or adapters as diffusers, PEFT or the Lightning releases have them.",
)
@click.option("--out", type=FOLDER, required=True, help="The export's folder, which is not there yet.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Of the weights; default float32 for adapters, and for diffusers the teacher's own if that keeps the effect.",
)
@click.option("--no-check", is_flag=True, help="Do not sample the export with plain diffusers and compare.")
@click.option("--push", "hub_name", metavar="OWNER/NAME", help="Upload it to the Hugging Face hub, too.")
def export(run: Path, format: str, out: Path, dtype: str | None, no_check: bool, hub_name: str | None) -> None:
    """Write a run's experts as diffusers, PEFT or ComfyUI load them, with a model card.

    Before the folder is there, plain diffusers samples it in a process of its own, and must make what the run makes.
    """
    from raydmd.export.export import export_run
    from raydmd.export.push import check_name, push
    from raydmd.progress import telling
    from raydmd.runs.run import Run

    if hub_name is not None:
        check_name(hub_name)
    with telling("exporting") as say:
        found = export_run(Run(run), format, out, dtype, not no_check, say)
    checked = f"latents within {found.latents:.1g} of the run's" if found is not None else "not checked"
    console.print(f"export: {out} ({checked}; its README.md says how it is used)", highlight=False, markup=False,
                  soft_wrap=True)  # fmt: skip
    if hub_name is not None:
        console.print(f"pushed: {push(out, hub_name)}", highlight=False, markup=False, soft_wrap=True)


@app.command(epilog="Example: raydmd serve runs/digits --port 8000 --layout pipelined --teacher")
@click.argument("folder", metavar="RUN|EXPORT", type=FOLDER)
@run_plugin_option
@base_option
@click.option("--host", default="127.0.0.1", show_default=True, help="Where to listen; 0.0.0.0: on every interface.")
@click.option("--port", type=click.IntRange(1, 65535), default=8000, show_default=True, help="Of the API and page.")
@click.option(
    "--layout",
    type=click.Choice(["colocated", "pipelined"]),
    help="All experts in one replica (the default), or each in replicas of its own.",
)
@click.option("--teacher", is_flag=True, help="Serve the many-step teacher, too, to compare with.")
@click.option("--fast", is_flag=True, help="The API in the experts' replicas, where it can be: a hop less.")
@click.option(
    "--proxy",
    type=click.Choice(["haproxy", "serve"]),
    help="In front: HAProxy (the default where Ray has it), or Ray Serve's own.",
)
@click.option("--name", metavar="NAME", help="The model's id in the API; default the folder's own name.")
@click.option("--no-keys", is_flag=True, help="Let everybody ask, also from elsewhere (--host) and without API keys.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="A setting, e.g. stages.expert.max=4.")
@click.option(
    "--api-key",
    "keys",
    multiple=True,
    metavar="KEY",
    help="Let in only who sends it; give several. It shows in `ps`: RAYDMD_API_KEY and api_keys_file do not.",
)
@click.option("--config-out", type=FOLDER, metavar="FILE", help="Write the file for `serve deploy`, and do not serve.")
def serve(
    folder: Path,
    base: str | None,
    host: str,
    port: int,
    layout: str | None,
    teacher: bool,
    fast: bool,
    proxy: Literal["haproxy", "serve"] | None,
    name: str | None,
    no_keys: bool,
    overrides: Sequence[str],
    keys: Sequence[str],
    config_out: Path | None,
) -> None:
    """Serve the experts of a run or of an export: an images API as OpenAI's, and a page to play with at /.

    On this machine, or on the Ray cluster of RAY_ADDRESS. Newer weights in RUN (or a link that is pointed at another
    run) are taken over without a pause; an export is served as it was when the server started.
    """
    require_extra("serve", "raydmd serve")
    from raydmd.serving.launch import absolute, config_of, demand_keys, serve_run
    from raydmd.serving.settings import load_serving

    named = [f"{key}={json.dumps(value)}" for key, value in (("name", name), ("base", base)) if value is not None]
    serving = absolute(load_serving(str(folder), layout, teacher, fast, [*overrides, *named], keys))
    if keys:
        words = "raydmd: --api-key shows in `ps` to everybody on this machine; RAYDMD_API_KEY and api_keys_file do not"
        errors.print(words, highlight=False, markup=False, soft_wrap=True)
    if config_out is not None:
        demand_keys(serving, host, no_keys)
        text = config_of(serving, host, port, errors)
        write_text(config_out, text)
        console.print(f"serve deploy {config_out}", highlight=False, soft_wrap=True)
        return
    check_cluster()
    serve_run(serving, host, port, proxy, console, no_keys)


@app.command(epilog="Example: raydmd recipes wan2.2-t2v-phased --explain method.score_interval")
@click.argument("name", metavar="[NAME]", required=False)
@click.option("--explain", "key", metavar="KEY", help="What a key means, what it takes, its default and value.")
@set_option
@plugin_option
def recipes(name: str | None, key: str | None, overrides: Sequence[str], plugins: Sequence[str]) -> None:
    """List the shipped recipes by family, or print one with every key and its value.

    NAME may be a file of yours, too.
    """
    if name is None:
        if key is not None or overrides:
            raise UserError("--explain, --set: of which recipe? `raydmd recipes NAME --explain KEY`")
        for line in listed_recipes():
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        return
    if key is not None:
        from raydmd.methods.explaining import explain_key

        for line in explain_key(name, key, tuple(overrides), tuple(plugins)).lines():
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        return
    from raydmd.methods.loading import load_recipe

    text = dump_recipe(load_recipe(name, overrides, plugins))
    console.print(text, highlight=False, markup=False, soft_wrap=True, end="")


@app.command(epilog="Example: raydmd validate cluster/aws.yaml cluster/kuberay/rayjob.yaml")
@click.argument("files", metavar="FILE...", type=FOLDER, nargs=-1, required=True)
@set_option
@run_plugin_option
def validate(files: Sequence[Path], overrides: Sequence[str]) -> None:
    """Check recipes, cluster-launcher files and KubeRay manifests, with no cluster and no cloud.

    FILE may be a shipped recipe's name; --set goes with recipes. A line for each file; the exit code is 2 if one of
    them is wrong.
    """
    from raydmd.validation import inspect_file

    wrong, shipped = 0, shipped_recipes()
    for file in files:
        place = file if file.exists() else shipped.get(str(file), file)
        try:
            words, checked = inspect_file(place, app.commands, overrides)
            found = "ok" if checked else "unknown"
            console.print(f"{found} {file} ({words})", highlight=False, markup=False, soft_wrap=True)
        except (UserError, OSError) as error:
            wrong += 1
            words = f"{file}: {error.strerror}" if isinstance(error, OSError) else str(error)
            errors.print(f"raydmd: {words}", highlight=False, markup=False, soft_wrap=True)
    if wrong:
        raise click.exceptions.Exit(2)


def _next_commands(recipe: Recipe, folder: Path) -> list[str]:
    """Return the commands that show a finished run, ready to be pasted; only those that this kind of run has."""
    from raydmd.evaluation.evaluate import has_figures

    place = shlex.quote(str(folder))
    return [f"raydmd evaluate {place}"] * has_figures(recipe) + [f"raydmd report {place}"]


def _distill(recipe: Recipe, folder: Path, resume: str) -> bool:
    """Train the embedded teacher into the run's folder if none is given, then distil."""
    check_cluster()
    from raydmd.runtime.launch import distill as run_distill

    return run_distill(recipe, folder, resume, console)


def _evaluate(folder: Path, samples: int | None = None) -> None:
    from raydmd.evaluation.evaluate import evaluate_run
    from raydmd.progress import telling
    from raydmd.runs.run import Run

    with telling("evaluating") as say:
        figures = evaluate_run(Run(folder), samples=samples, progress=say)
    console.print(yaml.safe_dump(_rounded(figures), sort_keys=False), highlight=False, markup=False, end="")


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    return round(value, 4) if isinstance(value, float) else value


def run(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code. Used by the jobs, too."""
    try:
        return int(app(arguments, prog_name="raydmd", standalone_mode=False) or 0)
    except click.exceptions.NoArgsIsHelpError as error:
        console.print(error.format_message(), highlight=False, markup=False, soft_wrap=True)
        return 2
    except (Exception, KeyboardInterrupt) as error:
        code, words = _end(error)
        errors.print(f"raydmd: {words}", highlight=False, markup=False, soft_wrap=True)
        return code


def _end(error: BaseException) -> tuple[int, str]:
    """Return the exit code and the line of a command that ended with an error; raise one that nobody foresaw."""
    if (failure := interrupts.failure()) is not None:
        return 1, str(failure)
    if interrupts.raised() or isinstance(error, KeyboardInterrupt | click.Abort):  # whatever it was turned into
        return interrupts.exit_code(), "interrupted"
    if isinstance(error, click.ClickException):
        return 2, " ".join(error.format_message().split())
    if isinstance(error, UserError):
        return 2, " ".join(str(error).split())
    if isinstance(error, RunError):
        return 1, str(error)
    if isinstance(error, OSError) and (error.filename is not None or error.errno in FULL):  # else a terminal's, too
        if (known := storage_error(error.filename or "a disk", error)) is not None:
            return 1, str(known)
        return 2, f"{error.filename}: {error.strerror}"
    raise error
