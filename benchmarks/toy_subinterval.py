"""The paper's toy (Phased DMD appendix D, Fig. 2): does training on t in [0.5, 1] alone learn the true flow there?

x_0 takes the values -1, 0, 1, 2. Three equal MLPs learn the flow:

    full     on [0, 1] from clean x_0                                    (Eq. 4)
    correct  on [0.5, 1] from x_s, s = 0.5, with the subinterval target  (Eq. 12, the loss of Eq. 13)
    naive    on [0.5, 1] from x_s, with x_s taken for x_0                (Eq. 4, wrongly)

Then each carries the same noises along its probability-flow ODE, and the deviation is the mean |x - x_full| over
[0.5, 1]. A right build keeps deviation_correct at or below 0.02 and at or below a quarter of deviation_naive. The error
of each, the mean |x - x_exact| over [0.5, 1], is against the ODE of the flow in closed form.

    python benchmarks/toy_subinterval.py --seeds 3 --json toy.json --picture toy.png
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from common import machine
from torch import Tensor, nn

from raydmd.diffusion.random import Key, normal, uniform
from raydmd.diffusion.schedule import RectifiedFlow
from raydmd.diffusion.solvers import integrate
from raydmd.diffusion.times import sample_times
from raydmd.objectives.score_matching import score_matching_loss

S = 0.5
VALUES = torch.tensor([-1.0, 0.0, 1.0, 2.0])
BATCH, LEARNING_RATE, TRAJECTORIES, STEPS = 256, 3e-3, 200, 50
SCHEDULE = RectifiedFlow()
Kind = Literal["full", "correct", "naive"]
KINDS: tuple[Kind, ...] = ("full", "correct", "naive")
MAX_DEVIATION, MAX_RATIO = 0.02, 0.25


class Flow(nn.Module):
    """An MLP of four layers, 512 wide, that sees x and t and nothing else."""

    def __init__(self, width: int = 512) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2, width), nn.ReLU(),
            nn.Linear(width, width), nn.ReLU(),
            nn.Linear(width, width), nn.ReLU(),
            nn.Linear(width, 1),
        )  # fmt: skip

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layers(torch.cat([x, t.to(x.dtype)[:, None]], dim=1))


def exact_flow(x: Tensor, t: Tensor) -> Tensor:
    """E[eps - x_0 | x_t] in closed form, x [B, 1], t [B]."""
    alpha, sigma = 1.0 - t[:, None], t[:, None]
    x0 = (torch.softmax(-0.5 * ((x - alpha * VALUES) / sigma).square(), dim=1) * VALUES).sum(1, keepdim=True)
    return (x - alpha * x0) / sigma - x0


def train(kind: Kind, seed: int, iterations: int) -> Flow:
    """Train one network. All three of a seed start from the same weights."""
    torch.manual_seed(seed)
    network = Flow()
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    s = 0.0 if kind == "full" else S
    for update in range(iterations):

        def draw(stream: str, update: int = update) -> Tensor:
            return normal(Key(seed, 1, stream, update), 0, BATCH, (1,))

        x0 = VALUES[(4 * uniform(Key(seed, 1, "data", update), 0, BATCH, (1,))).long()]
        x_s = SCHEDULE.diffuse(x0, draw("x_s"), s)  # the true x_s; x_0 itself at s = 0
        t, noise = sample_times(uniform(Key(seed, 1, "time", update), 0, BATCH), s, 1.0), draw("noise")
        output = network(SCHEDULE.diffuse(x_s, noise, t, s), t)
        target: Literal["subinterval", "naive"] = "naive" if kind == "naive" else "subinterval"
        loss = score_matching_loss(SCHEDULE, output, x_s, noise, t, s, "flow", target=target).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    return network


@torch.no_grad()
def trajectories(flow: Callable[[Tensor, Tensor], Tensor], noise: Tensor, end: float) -> tuple[list[float], Tensor]:
    """The times from 1 to `end` and the states [times, TRAJECTORIES, 1], in steps of 1 / (2 STEPS)."""
    times = [1.0 - i / (2 * STEPS) for i in range(round(2 * STEPS * (1.0 - end)) + 1)]
    states = integrate(SCHEDULE, lambda x, t: flow(x, torch.full((len(x),), t, dtype=x.dtype)), noise, times, "flow")
    return times, states


def run(seed: int, iterations: int) -> dict[str, Any]:
    """Train the three networks of a seed; their deviations, errors and trajectories, and the seconds that each took."""
    noise = normal(Key(seed, 1, "trajectory", 0), 0, TRAJECTORIES, (1,))
    exact = trajectories(exact_flow, noise.double(), S)[1]
    result: dict[str, Any] = {"seed": seed}
    start = time.perf_counter()
    for kind in KINDS:
        network = train(kind, seed, iterations)
        result[kind] = trajectories(network, noise, 0.0 if kind == "full" else S)
        result[f"error_{kind}"] = float((result[kind][1][: len(exact)] - exact).abs().mean())
    result["seconds"] = (time.perf_counter() - start) / len(KINDS)
    for kind in KINDS[1:]:
        states = result[kind][1]
        gap = (states - result["full"][1][: len(states)]).abs()
        result[f"deviation_{kind}"] = float(gap.mean())
        result[f"deviation_{kind}_at_s"] = float(gap[-1].mean())
    return result


def draw_picture(result: dict[str, Any], path: Path) -> None:
    """The three panels of the paper's Fig. 2 for one seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    titles = {"full": "(a) full interval", "correct": "(b) subinterval target", "naive": "(c) naive target"}
    figure, axes = pyplot.subplots(1, 3, figsize=(15, 4.5), sharey=True, layout="constrained")
    full_times, full = result["full"]
    for axis, kind in zip(axes, KINDS, strict=True):
        times, states = result[kind]
        axis.plot(full_times, full[..., 0], color="0.6", linewidth=0.6)
        colour, title = "tab:blue", titles[kind]
        if kind != "full":
            colour = "tab:green" if kind == "correct" else "tab:red"
            title += f", mean |dx| {result[f'deviation_{kind}']:.4f}"
        axis.plot(times, states[..., 0], color=colour, linewidth=0.5, alpha=0.8)
        axis.axvline(S, color="black", linewidth=0.8, linestyle=":")
        axis.set(title=title, xlabel="t", xlim=(1.0, 0.0))
    axes[0].set_ylabel("x_t")
    figure.suptitle(f"{TRAJECTORIES} trajectories of the same noises; grey: those of (a)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> int:
    """Run, print, write; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds (default 3)")
    parser.add_argument("--iterations", type=int, default=1000, help="training iterations (default 1000)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="draw the first seed's trajectories here")
    args = parser.parse_args()
    if args.seeds < 1 or args.iterations < 1:
        parser.error("--seeds and --iterations must be at least 1")

    torch.set_num_threads(1)
    columns = {
        "correct": "deviation_correct", "naive": "deviation_naive",
        "full err": "error_full", "correct err": "error_correct", "naive err": "error_naive",
    }  # fmt: skip
    print(f"{'seed':>6}" + "".join(f"{title:>13}" for title in columns) + f"{'s/network':>11}")

    def row(name: object, values: dict[str, Any], suffix: str = "") -> None:
        cells = "".join(f"{values[key + suffix]:>13.4f}" for key in columns.values())
        print(f"{name!s:>6}{cells}{values['seconds' + suffix]:>11.1f}", flush=True)

    results = []
    for seed in range(args.seeds):
        results.append(run(seed, args.iterations))
        row(seed, results[-1])

    report: dict[str, Any] = {}
    for key in (*columns.values(), "deviation_correct_at_s", "deviation_naive_at_s", "seconds"):
        values = [result[key] for result in results]
        report[key] = statistics.mean(values)
        report[f"{key}_spread"] = statistics.stdev(values) if len(values) > 1 else 0.0
        report[f"{key}_per_seed"] = values
    row("mean", report)
    row("spread", report, "_spread")
    report |= {
        "iterations": args.iterations,
        "batch": BATCH,
        "seeds": args.seeds,
        "machine": {**machine(), "threads": torch.get_num_threads()},
    }
    correct, naive = report["deviation_correct"], report["deviation_naive"]
    report["passed"] = correct <= MAX_DEVIATION and correct <= MAX_RATIO * naive
    print(
        f"correct {correct:.4f} <= {MAX_DEVIATION} and <= {MAX_RATIO} x naive {naive:.4f}"
        f" (it is {correct / naive:.3f} x): {'passed' if report['passed'] else 'MISSED'}"
    )
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    if args.picture:
        draw_picture(results[0], args.picture)
    return 0 if report["passed"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
