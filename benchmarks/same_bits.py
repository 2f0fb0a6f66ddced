"""Do two git worktrees train the same weights, to the bit?

In each it distils the digits and ring recipes by every method, in processes of their own and in this environment, on
one teacher, and compares a hash of every expert's weights by name. A refactoring that changes none of them has moved
nothing.

    git worktree add /tmp/before COMMIT
    python benchmarks/same_bits.py /tmp/before . --json same_bits.json
"""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import arguments, console, finish, teacher_folder
from safetensors.numpy import load_file

METHODS = ("dmd", "dmd-fewstep", "dmd-sgts", "phased")
RECIPES = ("digits", "ring")


def experts(worktree: Path, recipe: str, method: str, teacher: Path, out: Path, iterations: int) -> dict[str, str]:
    """Distil with a worktree's own code; return a hash of each expert's tensors: names, types, shapes and bytes."""
    shutil.rmtree(out, ignore_errors=True)
    settings = [f"teacher.path={teacher}", f"method.name={method}", f"iterations={iterations}",
                "monitor.samples_every=0", "runtime.fake.max_workers=2"]  # fmt: skip
    if method == "dmd":
        settings += ["method.regression.weight=0.25", "method.regression.pairs=300"]
    command = [sys.executable, "-m", "raydmd", "distill", recipe, "--out", str(out)]
    for setting in settings:
        command += ["--set", setting]
    subprocess.run(
        command, check=True, cwd=out.parent, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(worktree)}
    )
    found = {}
    for file in sorted(out.glob("experts/*/*.safetensors")):
        digest = hashlib.sha256()
        for name, value in sorted(load_file(file).items()):
            digest.update(f"{name} {value.dtype} {value.shape} ".encode() + value.tobytes())
        found[file.parent.name] = digest.hexdigest()[:16]
    return found


def commit(worktree: Path) -> str:
    """Return what a worktree is at; ``-dirty`` where it has changes of its own."""
    words = ["git", "-C", str(worktree), "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()


def main() -> None:
    """Distil by every method in both, compare, print."""
    parser = arguments(__doc__)
    parser.add_argument("worktrees", type=Path, nargs=2, metavar="WORKTREE", help="the code of before, and of today")
    parser.add_argument("--iterations", type=int, default=20, help="of each run (default %(default)s)")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    worktrees = [path.resolve() for path in options.worktrees]
    figures: dict[str, Any] = {"commits": [commit(path) for path in worktrees], "iterations": options.iterations}
    differ = 0
    for recipe in RECIPES:
        teacher = teacher_folder(recipe, options.work)
        for method in METHODS:
            out = options.work.resolve() / "same-bits"
            before, after = (experts(path, recipe, method, teacher, out, options.iterations) for path in worktrees)
            if not before:
                sys.exit(f"{worktrees[0]}: {recipe} by {method} made no expert")
            differ += before != after
            figures[f"{recipe}_{method}"] = (
                " ".join(after.values()) if before == after else {"before": before, "after": after}
            )
            console.print(f"{recipe} {method}: {'same' if before == after else 'OTHER BITS'}", highlight=False)
    figures["runs_that_differ"] = differ
    finish("two worktrees' weights", figures, options.json)
    if differ:
        sys.exit(1)


if __name__ == "__main__":
    main()
