"""What only a GPU shows: half precision, roles that share one GPU, losses and signals there, serving from it.

Runs on one CUDA GPU (``--device cpu`` rehearses it without one):

    half       a tiny transformer and VAE of each diffusers family: bfloat16 against float32, LoRA merged and switched,
               a VAE that overflows in float16
    run        the digits recipe with every role on the GPU, twice undisturbed: seconds an iteration, the same bits?
    losses     the same with a SIGKILL of one of two scorers, and of the only generator: seconds, steps, the same bits?
    signal     SIGTERM in the middle: the exit code, seconds, and what is left on the GPU
    serving    the run served from the GPU with HAProxy before it, loaded by `raydmd bench serve`

    python benchmarks/gpu_check.py --json gpu_check.json
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from common import arguments, console, finish, teacher_folder
from safetensors.torch import load_file, save_file

from raydmd.jsonl import read_lines
from raydmd.runs.folders import expert_file

RAYDMD = [sys.executable, "-m", "raydmd"]
ITERATIONS = 60
PARTS = ("half", "run", "serving")  # the second one with losses and signals
SHARE = 0.2  # of the GPU, a worker


def half_precision(device: str, work: Path) -> dict[str, float]:
    """Compare half precision with float32 on tiny networks of diffusers' own classes."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "unit"))
    from test_families_diffusers import CLASSES, CONFIGS, NAMES, STATISTICS, VAES, family_of, inputs

    from raydmd.models.experts import Experts

    found = {}
    for name in NAMES:
        folder = work / f"tiny-{name}"
        torch.manual_seed(0)
        CLASSES[name](**CONFIGS[name]).save_pretrained(folder / "transformer")
        VAES[name](**STATISTICS).save_pretrained(folder / "vae")
        outputs = {}
        for dtype in ("float32", "bfloat16"):
            family = family_of(name, str(folder), dtype=dtype)
            teacher = family.load_teacher().to(device)
            x, t, conditions = inputs(family)
            on_device = {key: value.to(device) for key, value in conditions.items()}
            with torch.no_grad():
                outputs[dtype] = teacher(x.to(device), t.to(device), on_device).float()
                if dtype == "bfloat16":
                    experts = Experts(teacher, 1, "lora", 4, 8.0, family.lora_targets, 0)
                    experts.start(0)
                    for parameter in experts.trainable_parameters().values():
                        parameter.add_(0.02)
                    adapted = experts.expert(0)(x.to(device), t.to(device), on_device).float()
                    found[f"{name}_adapter_effect"] = _apart(adapted, outputs[dtype])
        found[f"{name}_bfloat16_apart"] = _apart(outputs["bfloat16"], outputs["float32"])
        latents = torch.randn(2, *family_of(name, str(folder)).latent_shape, generator=torch.Generator().manual_seed(1))
        right = family_of(name, str(folder)).decode(latents.to(device)).cpu()
        for dtype in ("bfloat16", "float16"):
            shown = family_of(name, str(folder), dtype=dtype).decode(latents.to(device)).cpu()
            found[f"{name}_vae_{dtype}_apart"] = float((shown - right).abs().max())
        large = _overflowing(folder)
        shown = family_of(name, str(large), dtype="float16").decode(latents.to(device)).cpu()
        right = family_of(name, str(large)).decode(latents.to(device)).cpu()
        found[f"{name}_vae_overflow_apart"] = float((shown - right).abs().max())
    return found


def _overflowing(folder: Path) -> Path:
    """Return a copy of a pipeline's folder whose VAE leaves float16's range on its way: large in, small out."""
    large = folder.with_name(f"{folder.name}-large")
    shutil.copytree(folder, large, dirs_exist_ok=True)
    file = large / "vae" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    for name in state:
        if name.startswith("decoder.conv_in."):
            state[name] = state[name] * 1e6
    save_file(state, file, {"format": "pt"})
    return large


def _apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the mean difference as a share of the mean size."""
    return float((one - other).abs().mean() / other.abs().mean())


class Run:
    """`raydmd distill digits` in a process of its own."""

    def __init__(self, folder: Path, teacher: Path, gpu: float, *more: str) -> None:
        self.folder = folder
        settings = [
            f"teacher.path={teacher}", f"iterations={ITERATIONS}", "batch.size=256", "batch.micro=64",
            "monitor.samples_every=0", "monitor.tensorboard=false", "runtime.teacher.max_workers=2",
            *(f"runtime.{role}.gpus={gpu}" for role in ("teacher", "fake", "generator") if gpu), *more,
        ]  # fmt: skip
        flags = [part for setting in settings for part in ("--set", setting)]
        self.log = open(f"{folder}.log", "wb")  # noqa: SIM115
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            [*RAYDMD, "distill", "digits", *flags, "--out", str(folder)], stdout=self.log, stderr=self.log
        )

    def lines(self, name: str) -> list[dict[str, Any]]:
        file = self.folder / name
        return read_lines(file) if file.is_file() else []

    def wait(self, iterations: int) -> None:
        """Wait until so many iterations are committed."""
        end = time.monotonic() + 150
        while len(self.lines("metrics.jsonl")) < iterations:
            if self.process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"{self.folder} did not come to iteration {iterations}: {self.folder}.log")
            time.sleep(0.02)

    def end(self) -> int:
        code = self.process.wait(timeout=240)
        self.log.close()
        return code

    def experts(self) -> list[dict[str, torch.Tensor]]:
        return [load_file(expert_file(self.folder, index)) for index in range(2)]


def workers(run: Run, title: str) -> list[int]:
    """Return the processes below a run's driver with such a title."""
    parents, titled = {}, []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdigit():
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                if title in (entry / "cmdline").read_text(errors="replace"):
                    titled.append(int(entry.name))

    def below(pid: int) -> bool:
        return pid == run.process.pid or (pid in parents and below(parents[pid]))

    return [pid for pid in titled if below(pid)]


def apart(one: Run, other: Run) -> float:
    """Return the largest difference of any weight of two runs' experts."""
    pairs = zip(one.experts(), other.experts(), strict=True)
    return max(float((mine[name] - theirs[name]).abs().max()) for mine, theirs in pairs for name in mine)


def on_gpu() -> int:
    """Return how many processes hold memory of the GPU besides this one, as nvidia-smi sees them."""
    asked = ["nvidia-smi", "--query-compute-apps=pid", "--format=csv,noheader"]
    try:
        pids = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.split()
    except FileNotFoundError:
        return 0
    return len([pid for pid in pids if pid != str(os.getpid())])


def training(work: Path, teacher: Path, gpu: float) -> dict[str, Any]:
    """Run, kill, stop."""
    figures: dict[str, Any] = {}
    first = Run(work / "run-first", teacher, gpu)
    figures["run_exit"] = first.end()
    seconds = sorted(line["seconds"] for line in first.lines("metrics.jsonl")[10:])
    figures["s_per_iteration"] = seconds[len(seconds) // 2]
    again = Run(work / "run-again", teacher, gpu)
    again.end()
    figures["apart_undisturbed"] = apart(first, again)
    killed = Run(work / "run-killed", teacher, gpu)
    for at, title in ((15, "ray::TeacherWorker"), (35, "ray::GeneratorWorker")):
        killed.wait(at)
        os.kill(workers(killed, title)[0], signal.SIGKILL)
    figures["killed_exit"] = killed.end()
    figures["apart_killed"] = apart(first, killed)
    figures["recovered"] = [
        {key: event[key] for key in ("roles", "seconds", "steps_lost", "how")}
        for event in killed.lines("events.jsonl") if event["event"] == "recovered"
    ]  # fmt: skip
    stopped = Run(work / "run-stopped", teacher, gpu)
    stopped.wait(10)
    since = time.monotonic()
    stopped.process.send_signal(signal.SIGTERM)
    figures["sigterm_exit"], figures["sigterm_seconds"] = stopped.end(), time.monotonic() - since
    time.sleep(1)
    figures["left_on_gpu"] = on_gpu()
    resumed = Run(work / "run-stopped", teacher, gpu)
    figures["resumed_exit"] = resumed.end()
    figures["apart_resumed"] = apart(first, resumed)
    return figures


def serving(work: Path, gpu: float) -> dict[str, Any]:
    """Serve the first run and load it."""
    if not expert_file(work / "run-first", 1).is_file():
        Run(work / "run-first", teacher_folder("digits", work), gpu).end()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    claims = ["--set", f"stages.expert.gpus={gpu}"] if gpu else []
    with open(work / "serve.log", "wb") as log:
        server = subprocess.Popen(
            [*RAYDMD, "serve", str(work / "run-first"), "--port", str(port), "--fast", *claims], stdout=log, stderr=log
        )
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 120
        while time.monotonic() < end and server.poll() is None:
            with suppress(OSError):
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            time.sleep(0.2)
        out = work / "bench.json"
        load = subprocess.run(
            [*RAYDMD, "bench", "serve", "--url", url, "--concurrency", "1,16", "--json", str(out)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        figures: dict[str, Any] = {"bench_exit": load.returncode}
        if out.is_file():
            figures["bench"] = json.loads(out.read_text(encoding="utf-8"))
        else:
            figures["bench_says"] = (load.stdout + load.stderr)[-1500:]
        return figures
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(timeout=60)


def main() -> None:
    """Do all, print, keep what is there when a part fails."""
    parser = arguments(__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a rehearsal")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts of it (default all)")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("gpu_check.py: there is no CUDA GPU here; --device cpu rehearses it")
    gpu = SHARE if options.device == "cuda" else 0.0
    options.work.mkdir(parents=True, exist_ok=True)
    work = options.work.resolve()
    figures: dict[str, Any] = {"gpu": torch.cuda.get_device_name() if gpu else "none (a rehearsal)"}
    parts = {
        "half": lambda: half_precision(options.device, work),
        "run": lambda: training(work, teacher_folder("digits", work), gpu),
        "serving": lambda: serving(work, gpu),
    }
    for name in options.only:
        try:
            figures |= parts[name]()
        except (Exception, SystemExit) as error:
            figures.setdefault("failed", []).append(f"{type(error).__name__}: {error}"[:500])
        finish("On a GPU", figures, options.json)
    console.print(figures, highlight=False)
    if "failed" in figures:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
