"""What does not go with a method is refused before anything starts: one line that names the key, exit code 2."""

from pathlib import Path
from typing import Any

import pytest

from raydmd.cli import run

LR = "Input should be greater than 0 (got 0)"
NO_BLOCK = "method.discriminator.blocks: the network has no block 'blocks.9'; did you mean 'blocks.0'?"


@pytest.mark.parametrize(
    ("method", "settings", "words"),
    [
        ("adm", ["method.discriminator.blocks=[blocks.9]"], NO_BLOCK),
        ("adp", ["method.discriminator.blocks=[blocks.0, blocks.9]"], NO_BLOCK),
        ("dmd2", ["method.discriminator.blocks=[blocks.9]"], NO_BLOCK),
        ("adm", ["optimizer.discriminator.lr=0"], f"optimizer.discriminator.lr: {LR}"),
        ("dmdx", ["optimizer.latent.lr=0"], f"optimizer.latent.lr: {LR}"),
        ("adm", ["optimizer.latent.lr=1e-3"], "'optimizer.latent' (one of: generator, fake, discriminator)"),
        ("adp", ["runtime.pixel.cpus=1"], "unknown key 'runtime.pixel'"),
        ("dmd2", ["method.phases=2"], "method.phases: dmd2 has 1 phase, not 2"),
        ("tdm", ["method.phases=2"], "method.phases: tdm has 1 phase, not 2"),
        ("adp", ["method.phases=2"], "method.phases: adp has 1 phase, not 2"),
        ("dmdx", ["method.phases=2"], "method.adp: training on ODE pairs goes with 1 phase, not 2"),
        ("adm", ["method.phases=2", "method.adm.warmup=5"], "method.adm.warmup: training on ODE pairs goes with 1"),
        ("adm", ["method.adm.warmup=200"], "method.adm.warmup: 200 of 200 iterations leave ADM none"),
        ("dmdx", ["method.adp.iterations=200"], "method.adp.iterations: 200 of 200 leave ADM none; for ADP alone, "),
        ("adm", ["method.adm.steps=4"], "method.score_margin: 0.02 is less than method.adm's steps of 0.015625 x 4"),
        ("sid", ["method.adm.dt=0.1"], "method.adm: an option of adm, dmdx, not of sid"),
        ("sid", ["method.regression.weight=0.25"], "regression on ODE pairs goes with dmd, not sid"),
        ("sid", ["method.sid.alfa=1"], "unknown key 'method.sid.alfa'; did you mean 'alpha'?"),
        ("dmd", ["method.dmd.t_max=0.01"], "method.score_margin: 0.02 leaves nothing of phase 1's interval"),
    ],
)  # fmt: skip
def test_what_does_not_go_with_a_method(
    teachers: dict[str, Path], tmp_path: Path, capsys: Any, method: str, settings: list[str], words: str
) -> None:
    given = [f"teacher.path={teachers['digits']}", "iterations=200", f"method.name={method}", *settings]
    out = tmp_path / "run"
    code = run(["distill", "digits", *(word for item in given for word in ("--set", item)), "--out", str(out)])
    error = capsys.readouterr().err
    assert code == 2 and words in error and error.count("\n") == 1 and "Traceback" not in error, error
    assert not out.exists()
