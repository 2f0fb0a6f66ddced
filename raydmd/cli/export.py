"""`raydmd export`: a run's experts for other libraries."""

from pathlib import Path

import click

from raydmd.cli.options import FOLDER, run_plugin_option
from raydmd.console import console


@click.command(epilog="Example: raydmd export runs/wan --format diffusers --out exports/wan-4-steps")
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
