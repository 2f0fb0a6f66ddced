"""A small classifier of the embedded digits: its penultimate layer is the feature space of the Frechet distances."""

from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from raydmd.atomic import replacing
from raydmd.data.digits import CLASSES, load_digits
from raydmd.errors import StorageError
from raydmd.evaluation.chunks import single_thread
from raydmd.evaluation.metrics import accuracy
from raydmd.models.base import save_weights

FEATURES = 64
EPOCHS, BATCH, RATE = 30, 64, 1e-3
CACHE_FILE = "digits-classifier-1.safetensors"  # the number changes when the network or its training does


class DigitsClassifier(nn.Module):
    """Two 3x3 convolutions (16 and 32 channels), pooling, and a hidden layer of 64, on [N, 1, 8, 8] in [-1, 1].

    Args:
        seed: of the initial weights; the global random state is left alone.

    Attributes:
        scale: the unit of `features`: it makes their total variance over all the digits 64, one for each. Without it
            a Frechet distance's unit would be an accident of the training.
    """

    scale: Tensor

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
            self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
            self.hidden = nn.Linear(32 * 4 * 4, FEATURES)
            self.out = nn.Linear(FEATURES, CLASSES)

    def features(self, images: Tensor) -> Tensor:
        """Return the penultimate layer's activations, after its ReLU, over ``scale``, [N, 64]."""
        return self._hidden(images) / self.scale

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [N, 10]."""
        return self.out(self._hidden(images))

    @torch.no_grad()
    def judge(self, images: Tensor, batch: int = 500) -> tuple[Tensor, Tensor]:
        """Return features [N, 64] and logits [N, 10] of many images."""
        hidden = torch.cat([self._hidden(part) for part in images.float().split(batch)])
        return hidden / self.scale, self.out(hidden)

    def _hidden(self, images: Tensor) -> Tensor:
        x = F.relu(self.conv1(images))
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return F.relu(self.hidden(x.flatten(1)))


def train_classifier(seed: int = 0) -> DigitsClassifier:
    """Train on the training split, in seconds on one thread; the same seed gives the same weights.

    AdamW (lr 1e-3, cosine to 0, 30 epochs of batch 64), no augmentation. The threads that torch uses and
    its global random state are left as they were.
    """
    images, labels = load_digits("train")
    network, order = DigitsClassifier(seed), torch.Generator().manual_seed(seed)
    whole = len(images) // BATCH * BATCH
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * whole // BATCH)
    with single_thread(), torch.enable_grad():
        for _ in range(EPOCHS):
            for chosen in torch.randperm(len(images), generator=order)[:whole].split(BATCH):
                optimizer.zero_grad()
                F.cross_entropy(network(images[chosen]), labels[chosen]).backward()
                optimizer.step()
                schedule.step()
        network.scale.copy_((network.judge(load_digits()[0])[0].var(0).sum() / FEATURES).sqrt())
    return network.requires_grad_(False).eval()


def load_classifier(cache: Path | None = None) -> DigitsClassifier:
    """Return the classifier, from the folder ``cache`` when it holds one; else train it, and keep it there if given."""
    if cache is None:
        return train_classifier()
    file = cache / CACHE_FILE
    if file.is_file():
        network = DigitsClassifier()
        try:
            network.load_state_dict(load_file(file))
            return network.requires_grad_(False).eval()
        except (SafetensorError, RuntimeError, OSError):
            pass  # a damaged cache is no reason to fail: it is made again
    network = train_classifier()
    with suppress(StorageError), replacing(file) as part:  # a full disk is found by what must be written
        save_weights(network.state_dict(), part)
    return network


def held_out_accuracy(network: DigitsClassifier) -> float:
    """Return the accuracy on the test split, which training never sees."""
    images, labels = load_digits("test")
    return accuracy(network.judge(images)[1], labels)
