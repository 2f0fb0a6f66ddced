"""`raydmd serve`: the API and the page."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import click

from raydmd.atomic import write_text
from raydmd.cli.options import FOLDER, base_option, run_plugin_option
from raydmd.console import console, errors
from raydmd.extras import require_extra
from raydmd.runtime.address import check_cluster


@click.command(epilog="Example: raydmd serve runs/digits --port 8000 --layout pipelined --teacher")
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
