"""Adversarial losses: a discriminator's, and what its verdict asks of the generator."""

from typing import Literal

from torch import Tensor
from torch.nn.functional import relu, softplus

AdversarialLoss = Literal["hinge", "softplus"]
"""hinge: ADM and ADP (DMDX Sec. 3); softplus: DMD2's (Sec. 4.3), the non-saturating GAN loss."""


def discriminator_loss(real: Tensor, generated: Tensor, kind: AdversarialLoss = "hinge") -> Tensor:
    """The discriminator's loss of each pair of samples, [B], from its logits [B, heads]: a mean over the heads.

    hinge:     relu(1 - D(real)) + relu(1 + D(generated))
    softplus:  softplus(-D(real)) + softplus(D(generated))

    Raises ValueError for an unknown kind.
    """
    match kind:
        case "hinge":
            loss = relu(1.0 - real) + relu(1.0 + generated)
        case "softplus":
            loss = softplus(-real) + softplus(generated)
        case _:
            raise ValueError(f"unknown loss {kind!r}: one of hinge, softplus")
    return loss.flatten(1).mean(1)


def generator_loss(generated: Tensor, kind: AdversarialLoss = "hinge") -> Tensor:
    """The generator's loss of each sample, [B], from the discriminator's logits [B, heads] on it.

    hinge: -D; softplus: softplus(-D). Raises ValueError for an unknown kind.
    """
    match kind:
        case "hinge":
            loss = -generated
        case "softplus":
            loss = softplus(-generated)
        case _:
            raise ValueError(f"unknown loss {kind!r}: one of hinge, softplus")
    return loss.flatten(1).mean(1)
