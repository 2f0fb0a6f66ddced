"""What the files in cluster/ promise, read from them: used by tests of the files and of a Ray that is started so."""

import json
import re
from pathlib import Path

import yaml

CLUSTER = Path(__file__).parents[2] / "cluster"
HEALTH = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 3,
}


def system_config(name: str) -> dict[str, int]:
    """Return the --system-config of a cluster-launcher file's head."""
    tree = yaml.safe_load((CLUSTER / f"{name}.yaml").read_text())
    (text,) = re.findall(r"--system-config='(\{.*?\})'", tree["head_start_ray_commands"][-1])
    config: dict[str, int] = json.loads(text)
    return config
