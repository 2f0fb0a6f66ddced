"""Z-Image: its reversed time and sign, prompts without their padding, their length."""

from pathlib import Path

import numpy as np
import pytest
import torch

from raydmd.errors import UserError
from raydmd.models.tiny import TINY_MODELS

torch.set_num_threads(1)

TINY = TINY_MODELS["z_image"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TINY.save(tmp_path_factory.mktemp("z_image"))


def test_the_network_runs_from_noise_to_data(folder: Path) -> None:
    """It is given 1 - t and predicts data - noise; t itself, or its own sign, is another prediction."""
    family = TINY.build(folder)
    teacher = family.load_teacher()
    x = torch.randn(2, *family.latent_shape, generator=torch.Generator().manual_seed(0))
    rows, t = TINY.rows(2), torch.tensor([0.2, 0.7])
    prompts = [torch.from_numpy(row[: 5 if i == 0 else 7]) for i, row in enumerate(rows["prompt_embeds"])]

    def by_hand(time: torch.Tensor) -> torch.Tensor:
        return torch.stack(teacher.network(list(x[:, :, None]), time, prompts, return_dict=False)[0])[:, :, 0]

    y = teacher(x, t, family.conditions(rows))
    assert torch.allclose(y, -by_hand(1 - t), atol=1e-5)
    assert not torch.allclose(y, by_hand(1 - t), atol=1e-2)
    assert not torch.allclose(y, -by_hand(t), atol=1e-3)


def test_padding_is_not_seen(folder: Path) -> None:
    """The network pads by itself, with a token of its own: ours must not reach it."""
    family = TINY.build(folder)
    teacher = family.load_teacher()
    x = torch.randn(2, *family.latent_shape, generator=torch.Generator().manual_seed(0))
    rows, t = TINY.rows(2), torch.tensor([0.2, 0.7])
    longer = {key: np.pad(value, [(0, 0), (0, 40)] + [(0, 0)] * (value.ndim - 2)) for key, value in rows.items()}
    conditions = family.conditions(longer)
    y = teacher(x, t, family.conditions(rows))
    assert torch.equal(teacher(x, t, conditions), y)
    conditions["prompt_embeds_mask"] = torch.ones_like(conditions["prompt_embeds_mask"])
    assert not torch.allclose(teacher(x, t, conditions), y, atol=1e-3)


def test_prompts_without_tokens_and_with_too_many_are_refused(folder: Path) -> None:
    family, rows = TINY.build(folder), TINY.rows(2)
    family.check_teacher()
    none = {**rows, "prompt_embeds_mask": rows["prompt_embeds_mask"] * np.array([[1], [0]])}
    with pytest.raises(UserError, match="prompts: column 'prompt_embeds_mask' has no token in row 1 of 2"):
        family.conditions(none)

    def of(tokens: int) -> dict[str, np.ndarray]:
        width = rows["prompt_embeds"].shape[2]
        embeds, mask = np.zeros((1, tokens, width), dtype=np.float32), np.ones((1, tokens), dtype=np.int64)
        return {"prompt_embeds": embeds, "prompt_embeds_mask": mask}

    family.check_conditions(family.conditions(of(224)))
    with pytest.raises(UserError, match="prompts: 225 tokens are too many: the teacher has 256 positions"):
        family.check_conditions(family.conditions(of(225)))
