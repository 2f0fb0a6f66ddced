"""`raydmd generate`: files of pictures or videos, by a student that is called from Python (`StudentPipeline`)."""

from collections.abc import Callable, Sequence
from pathlib import Path

from raydmd.errors import UserError
from raydmd.evaluation.pictures import enlarge, in_plane, save_file, save_png, scatter, to_image
from raydmd.evaluation.prompts import own_prompts
from raydmd.evaluation.videos import FPS, video
from raydmd.extras import require_extra
from raydmd.pipeline import StudentPipeline


def generate(
    pipeline: StudentPipeline,
    prompts: str | Sequence[str],
    n: int,
    seed: int,
    out: Path,
    fps: int = FPS,
    made: Callable[[Path], None] = lambda path: None,
    image: Path | None = None,
) -> list[Path]:
    """Make pictures or videos with a student's experts: ``out/PROMPT-SEED-I.png`` or ``.mp4`` for I below ``n``.

    Each is made by itself, so sample I of a seed has the same bytes whatever ``n`` is. Points in the plane make one
    picture of ``n`` points. Every file is whole or not there.

    Args:
        pipeline: of a finished run or an export.
        prompts: one, or several, whose files are then numbered from 0001 on.
        n: samples of each prompt.
        seed: of their noise.
        out: the folder of the files.
        fps: frames a second of videos.
        made: told of each file.
        image: the first frame, of families from image to video.

    Returns:
        The files' paths.

    Raises:
        UserError: a prompt that the family does not know, an expert that is missing, no teacher, ``out`` is a file, or
            videos without the extra ``video``.
        RunError: a picture that is not finite.
    """
    student, family = pipeline.student, pipeline.family
    all_prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    moving, one_by_one, paths = family.frames > 1, not in_plane(family), []
    if moving:
        require_extra("video", f"{student.folder}: videos")
    for prompt in all_prompts if own_prompts(family) else all_prompts[:1]:  # a wrong one is told before any is made
        first = pipeline.conditions(prompt, image=image)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: there is a file of that name; a folder is needed")
    for number, prompt in enumerate(all_prompts):
        conditions = pipeline.conditions(prompt, image=image) if number else first
        name = (f"{number + 1:04d}-" if len(all_prompts) > 1 else "") + _file_name(prompt)
        for start, count in [(i, 1) for i in range(n)] if one_by_one else [(0, n)]:
            decoded = pipeline.decode(pipeline.latents(conditions, count, seed, start), seed, start)
            file = out / f"{name}-{seed}-{start}"
            about = {"prompt": prompt, "seed": str(seed), "sample": str(start), "model": student.name}
            out.mkdir(parents=True, exist_ok=True)
            if moving:
                images = [to_image(frame) for frame in decoded[0]]
                paths.append(save_file(video(images, fps), file.with_name(f"{file.name}.mp4")))
            else:
                picture = enlarge(to_image(decoded[0]), 256) if one_by_one else scatter(decoded, size=512)
                paths.append(save_png(picture, file.with_name(f"{file.name}.png"), about))
            made(paths[-1])
    return paths


def _file_name(prompt: str) -> str:
    """Return a prompt as a part of a file's name: letters, figures and dashes."""
    words: Sequence[str] = "".join(c if c.isalnum() else " " for c in prompt).split()
    return "-".join(words)[:60] or "sample"
