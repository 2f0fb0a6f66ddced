"""`raydmd generate`: pictures or videos of a run or an export."""

from pathlib import Path

import click

from raydmd.cli.options import FOLDER, base_option, run_plugin_option
from raydmd.console import console, errors
from raydmd.errors import UserError


@click.command(epilog="Example: raydmd generate runs/digits --prompt 7 -n 16 --seed 0 --out pictures")
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
