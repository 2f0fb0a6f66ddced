"""`raydmd bench`: the options, and what they mean together. Imports nothing heavy until a command runs."""

import asyncio
import json
import os
from collections.abc import Coroutine, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from raydmd.console import console
from raydmd.errors import RunError, UserError
from raydmd.extras import require_extra
from raydmd.interrupts import graceful

if TYPE_CHECKING:
    from raydmd.bench.session import Plan, Session
    from raydmd.serving.contract import Maker

FOLDER = click.Path(path_type=Path)
PROMPTS = ("a lighthouse at dusk", "two cats on a windowsill", "a bowl of ripe plums", "snow on a mountain village")
REQUESTS = 100


@click.group(epilog="Example: raydmd bench serve --url http://127.0.0.1:8000 --concurrency 1,4,16")
def bench() -> None:
    """Measure how fast and how well things run here."""


@bench.command(
    epilog="\b\nExamples:\n  raydmd bench serve --url http://127.0.0.1:8000 --concurrency 1,4,16 --slo 1\n"
    "  raydmd bench serve --run runs/digits --rate 50,100,200 --slo 0.5 --plot load.png"
)
@click.option("--url", help="A server: ours, or another with OpenAI's POST /v1/images/generations.")
@click.option("--run", type=FOLDER, help="Instead of a server: a run's folder, served in this process.")
@click.option("--concurrency", metavar="C,...", help="Closed loop: requests at once; several are measured in turn.")
@click.option("--rate", metavar="R,...", help="Open loop: requests a second that come at random (Poisson).")
@click.option(
    "--trace", type=FOLDER, help="Open loop: arrivals from a file, a number of seconds or JSON object a line."
)
@click.option("--requests", type=click.IntRange(min=1), help=f"Of each load; default {REQUESTS}.")
@click.option("--duration", type=click.FloatRange(min=0, min_open=True), help="Seconds in which each load is sent.")
@click.option("--warmup", type=click.IntRange(min=0), help="Requests before each load that do not count.")
@click.option("--prompts", type=FOLDER, help="A file of prompts, one a line; default the model's own.")
@click.option("-n", "--n", type=click.IntRange(min=1), default=1, show_default=True, help="Pictures of a request.")
@click.option("--size", metavar="WxH[:WEIGHT],...", help="Sizes of pictures, mixed; default the model's own.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of arrivals, mix and pictures.")
@click.option("--slo", type=click.FloatRange(min=0, min_open=True), help="Seconds within which an answer is good.")
@click.option(
    "--timeout", type=click.FloatRange(min=0, min_open=True), default=300.0, show_default=True, help="Seconds."
)
@click.option("--price-per-hour", type=click.FloatRange(min=0), help="Of what is measured, for the cost of an image.")
@click.option("--model", help="With --url: the model to ask for; default the server's first.")
@click.option("--api-key-env", metavar="NAME", help="With --url: the environment variable that holds the API key.")
@click.option("--extra-body", metavar="JSON", help="With --url: fields to add to each request; null takes one out.")
@click.option("--layout", type=click.Choice(["colocated", "pipelined"]), help="With --run; default colocated.")
@click.option("--maker", type=click.Choice(["student", "teacher"]), help="With --run; default student.")
@click.option("--max-batch", type=click.IntRange(min=1), help="With --run: samples that a network takes at once.")
@click.option("--threads", type=click.IntRange(min=1), help="With --run: torch threads of a stage; default 1.")
@click.option("--client-ceiling", is_flag=True, help="Measure how many requests a second this client can do at all.")
@click.option("--json", "json_file", type=FOLDER, help="Write the figures here.")
@click.option("--save-detailed", is_flag=True, help="With --json: every request, too.")
@click.option("--plot", "picture", type=FOLDER, help="Draw latency and goodput against the load (PNG, PDF or SVG).")
def serve(**options: Any) -> None:
    """Load a server of pictures, and say how fast it answers.

    A closed loop keeps so many requests on their way. An open loop sends them at set times whatever became of those
    before; latency counts from the time at which a request was to be sent, so a stall is seen by all who would have
    come meanwhile. Ctrl-C prints what was measured so far. The exit code is 1 if requests failed otherwise than for
    want of room.
    """
    require_extra("serve", "raydmd bench serve")
    from raydmd.bench.results import failures

    _only(options, "url", ("model", "api_key_env", "extra_body"))
    _only(options, "run", ("layout", "maker", "max_batch", "threads"))
    if (options["url"] is None) == (options["run"] is None):
        raise UserError("--url, --run: give one of them")
    if options["save_detailed"] and options["json_file"] is None:
        raise UserError("--save-detailed: give --json FILE, too")
    picture: Path | None = options["picture"]
    if picture is not None and picture.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise UserError(f"--plot {picture}: it ends in .png, .pdf or .svg")
    _writable(options["json_file"], "--json")
    _writable(picture, "--plot")
    about: dict[str, Any] = {}
    sessions: list[Session] = []
    try:
        run_until_told(_measure(options, about, sessions))
    except KeyboardInterrupt:
        _show(options, about, sessions)
        raise
    _show(options, about, sessions)
    if sessions and (why := failures(sessions[0].records)):
        raise RunError(why)


def run_until_told(main: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine to its end; the first signal cancels it, where a KeyboardInterrupt would end any of its tasks.

    Raises:
        KeyboardInterrupt: a signal arrived.
    """
    with asyncio.Runner() as runner:
        loop = runner.get_loop()
        task = loop.create_task(main)

        async def ended() -> None:
            await asyncio.wait([task])

        with graceful(lambda: loop.call_soon_threadsafe(task.cancel)):
            runner.run(ended())
        if task.cancelled():
            raise KeyboardInterrupt
        task.result()


async def _measure(options: dict[str, Any], about: dict[str, Any], sessions: "list[Session]") -> None:
    from raydmd.bench.session import Session
    from raydmd.bench.targets import HttpTarget, LocalTarget
    from raydmd.serving.local import local_pipeline
    from raydmd.serving.settings import parse_serving

    plan = _plan(options)
    async with AsyncExitStack() as stack:
        target: HttpTarget | LocalTarget
        if options["url"] is not None:
            target = await stack.enter_async_context(
                HttpTarget(
                    options["url"],
                    options["model"],
                    options["timeout"],
                    _key(options["api_key_env"]),
                    _extra(options["extra_body"]),
                )
            )
            served = await target.look()
            own, about["model_id"], about["backend"] = served.prompts, served.model, target.base
        else:
            maker: Maker = options["maker"] or "student"
            tree = {"run": str(options["run"]), "teacher": maker == "teacher", "sizes": [
                size for size, _ in plan.mix.sizes]}  # fmt: skip
            tree |= {key: options[key] for key in ("layout", "max_batch") if options[key] is not None}
            pipeline = local_pipeline(parse_serving(tree, "bench serve"), options["threads"] or 1)
            target = LocalTarget(pipeline, maker, options["timeout"])
            card = pipeline.card()
            own, about["backend"] = card.prompts, "in-process"
            about["model_id"] = card.name if maker == "student" else f"{card.name}-teacher"
        plan = _with_prompts(plan, options["prompts"], own)
        if options["client_ceiling"]:
            from raydmd.bench.ceiling import client_ceiling

            about["client_requests_per_second"] = await client_ceiling(plan.mix, 16)
        session = Session(target, plan, own_process=options["run"] is not None)
        sessions.append(session)
        with console.status("") as status:
            await session.run(lambda load: status.update(f"{about['backend']}: {load.name}"))


def _plan(options: dict[str, Any]) -> "Plan":
    from raydmd.bench.arrivals import Mix, parse_sizes, read_trace
    from raydmd.bench.session import Plan
    from raydmd.bench.statistics import Load

    given = [name for name in ("concurrency", "rate", "trace") if options[name] is not None]
    if len(given) > 1:
        raise UserError(f"--{given[0]}, --{given[1]}: give one of them (an open loop holds no request back)")
    loads, arrivals, requests = [Load("closed", 1)], [], options["requests"]
    if options["trace"] is not None:
        arrivals = read_trace(options["trace"])
        loads = [Load("trace", (len(arrivals) - 1) / arrivals[-1].at if arrivals[-1].at else float(len(arrivals)))]
    elif options["rate"] is not None:
        loads = [Load("open", level) for level in _levels("--rate", options["rate"], whole=False)]
    elif options["concurrency"] is not None:
        loads = [Load("closed", level) for level in _levels("--concurrency", options["concurrency"], whole=True)]
    if requests is None and options["duration"] is None and not arrivals:
        requests = REQUESTS
    sizes = parse_sizes(options["size"]) if options["size"] is not None else []
    return Plan(
        loads, Mix((), options["n"], sizes, options["seed"]), requests, options["duration"], options["warmup"],
        arrivals, options["slo"], options["price_per_hour"],
    )  # fmt: skip


def _with_prompts(plan: "Plan", file: Path | None, own: Sequence[str] | None) -> "Plan":
    from dataclasses import replace

    from raydmd.bench.arrivals import read_prompts

    prompts = read_prompts(file) if file is not None else own or PROMPTS
    return replace(plan, mix=replace(plan.mix, prompts=tuple(prompts)))


def _levels(option: str, text: str, *, whole: bool) -> list[float]:
    """Return the numbers of ``A,B,...``, each above 0."""
    levels = []
    for part in text.split(","):
        try:
            level = float(int(part)) if whole else float(part)
        except ValueError:
            level = 0.0
        if not 0 < level < float("inf"):
            raise UserError(f"{option} {text}: {'whole numbers' if whole else 'numbers'} above 0, with commas between")
        levels.append(level)
    return levels


def _only(options: dict[str, Any], needed: str, names: Sequence[str]) -> None:
    for name in names:
        if options[name] is not None and options[needed] is None:
            raise UserError(f"--{name.replace('_', '-')}: goes with --{needed} only")


def _key(name: str | None) -> str | None:
    if name is None:
        return None
    key = os.environ.get(name, "").strip()
    if not key:
        raise UserError(f"--api-key-env: the environment has no variable {name}, or it is empty")
    return key


def _extra(text: str | None) -> dict[str, Any]:
    try:
        extra = json.loads(text) if text is not None else {}
    except json.JSONDecodeError as error:
        raise UserError(f"--extra-body: no JSON: {error}") from None
    if not isinstance(extra, dict):
        raise UserError("--extra-body: a JSON object is needed")
    return extra


def _writable(path: Path | None, option: str) -> None:
    """Refuse a file that could not be written, before the measurement and not after it."""
    if path is None:
        return
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if path.is_dir() or not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"{option}: '{path}' cannot be written")


def _show(options: dict[str, Any], about: dict[str, Any], sessions: "list[Session]") -> None:
    """Print and write what there is."""
    if not sessions or not sessions[0].done:
        return
    from raydmd.bench.results import as_json, detail, print_table, write_json

    session = sessions[0]
    print_table(console, f"{about['model_id'] or 'pictures'} at {about['backend']}", session.done)
    if "client_requests_per_second" in about:
        console.print(f"the client alone does {about['client_requests_per_second']:.0f} requests/s", highlight=False)
    if options["json_file"] is not None:
        runs = [as_json(figures) for figures in session.done]
        if options["save_detailed"]:
            for run, record in zip(runs, session.records, strict=True):
                run["requests"] = [detail(outcome) for outcome in record.outcomes]
        mix = session.plan.mix
        about |= {"n": mix.n, "seed": mix.seed, "sizes": {f"{w}x{h}": share for (w, h), share in mix.sizes}}
        write_json(options["json_file"], about, runs)
    if options["picture"] is not None:
        from raydmd.bench.plot import plot

        plot(session.done, options["picture"], f"{about['model_id'] or 'pictures'}, {about['backend']}")
