"""The embedded networks, their families, and teachers on disk."""

import json

import numpy as np
import pytest
import torch

from raydmd.data import ring
from raydmd.data.digits import load_digits
from raydmd.errors import UserError
from raydmd.models.base import save_teacher
from raydmd.models.embedded.digits import NULL_LABEL, Block, DigitsDiT, DigitsFamily
from raydmd.models.embedded.ring import PointsMLP, RingFamily
from raydmd.models.registry import FAMILIES, build_family

torch.set_num_threads(1)


def shaken(network, seed=0, scale=0.05):
    """Move every weight, so that nothing is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return network


def digits_batch(count=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 1, 8, 8, generator=generator)
    t = torch.rand(count, generator=generator, dtype=torch.float64)
    return x, t, {"label": torch.arange(count) % 10}


def one_line(error):
    return "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize(("build", "parameters"), [(DigitsDiT, 243_792), (PointsMLP, 35_714)])
def test_size_and_initial_weights(build, parameters):
    network = build(seed=3)
    assert sum(p.numel() for p in network.parameters()) == parameters
    before = torch.get_rng_state()
    again, other = build(seed=3), build(seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    state = network.state_dict()
    assert all(torch.equal(state[name], value) for name, value in again.state_dict().items())
    assert not all(torch.equal(state[name], value) for name, value in other.state_dict().items())


def test_digits_dit_starts_at_zero_and_moves_with_everything():
    x, t, conditions = digits_batch()
    network = DigitsDiT()
    assert torch.equal(network(x, t, conditions), torch.zeros_like(x))  # adaLN-zero
    shaken(network)
    y = network(x, t, conditions)
    assert y.shape == x.shape and y.dtype == torch.float32
    for changed in (
        network(x + 0.1, t, conditions),
        network(x, (t + 0.01).clamp(max=1), conditions),
        network(x, t, {"label": (conditions["label"] + 1) % 10}),
        network(x, t, {"label": torch.full((6,), NULL_LABEL)}),
    ):
        assert ((changed - y).flatten(1).abs().amax(1) > 1e-4).all()
    assert torch.allclose(network(x, t.float(), conditions), y, atol=1e-4)


def test_samples_of_a_batch_do_not_see_each_other():
    x, t, conditions = digits_batch()
    network = shaken(DigitsDiT())
    y = network(x, t, conditions)
    alone = network(x[2:3], t[2:3], {"label": conditions["label"][2:3]})
    assert torch.allclose(alone, y[2:3], atol=1e-5)
    assert not torch.allclose(alone, y[3:4], atol=1e-3)


def test_a_patch_in_is_the_same_patch_out():
    """With every gate at zero a pixel depends on its own 4x4 patch alone; with attention on, on all."""
    network = DigitsDiT()
    with torch.no_grad():
        network.patch_out.weight.normal_(generator=torch.Generator().manual_seed(0))
    x, t, conditions = digits_batch(1)

    def reach():
        jacobian = torch.autograd.functional.jacobian(lambda z: network(z, t, conditions)[0, 0, 1, 6], x)
        return jacobian[0, 0].abs() > 1e-8

    patch = torch.zeros(8, 8, dtype=torch.bool)
    patch[:4, 4:] = True
    assert torch.equal(reach(), patch)
    with torch.no_grad():
        for block in network.blocks:
            block.modulation.bias.fill_(0.5)
    assert reach().all()


def test_a_block_is_what_the_paper_writes():
    """One block against a loop over samples and heads; heads read off in another order give something else."""
    torch.manual_seed(0)
    block = shaken(Block(width=8, heads=2, ratio=4), scale=0.5)
    generator = torch.Generator().manual_seed(0)
    x, c = torch.randn(3, 4, 8, generator=generator), torch.randn(3, 1, 8, generator=generator)

    def norm(z):
        return (z - z.mean(-1, keepdim=True)) / (z.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()

    def by_hand(heads):
        out = []
        for z, modulation in zip(x, block.modulation(c)[:, 0], strict=True):
            shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.view(6, 8)
            q, k, v = block.qkv(norm(z) * (1 + scale_a) + shift_a).split(8, dim=-1)
            attended = torch.zeros_like(z)
            for part in heads:
                weights = torch.softmax(q[:, part] @ k[:, part].T / 4**0.5, dim=-1)
                attended[:, part] = weights @ v[:, part]
            z = z + gate_a * block.proj(attended)
            hidden = block.fc1(norm(z) * (1 + scale_m) + shift_m)
            out.append(z + gate_m * block.fc2(torch.nn.functional.gelu(hidden, approximate="tanh")))
        return torch.stack(out)

    y = block(x, c)
    assert torch.allclose(y, by_hand([slice(0, 4), slice(4, 8)]), atol=1e-5)
    assert not torch.allclose(y, by_hand([slice(0, 8, 2), slice(1, 8, 2)]), atol=1e-3)


@pytest.mark.parametrize("options", [{"width": 30, "heads": 4}, {"patch": 3}, {"depth": 0}])
def test_digits_dit_refuses_shapes_that_do_not_divide(options):
    with pytest.raises(UserError, match="teacher.options") as error:
        DigitsFamily(None, options).new_network()
    assert one_line(error)


def test_digits_dit_with_smaller_patches():
    network = shaken(DigitsFamily(None, {"patch": 2, "depth": 1}).new_network())
    x, t, conditions = digits_batch()
    assert network(x, t, conditions).shape == x.shape


def test_digits_dit_learns_the_flow():
    """A few steps of plain flow matching bring the loss to a third; the same without the labels does worse."""
    images, labels = load_digits("train")

    def train(labels, steps=250):
        network = DigitsDiT(seed=0)
        optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
        generator, losses = torch.Generator().manual_seed(0), []
        for _ in range(steps):
            index = torch.randint(len(images), (64,), generator=generator)
            noise = torch.randn(64, 1, 8, 8, generator=generator)
            t = torch.rand(64, generator=generator, dtype=torch.float64)
            at = t.float().view(-1, 1, 1, 1)
            x0 = images[index]
            loss = (network((1 - at) * x0 + at * noise, t, {"label": labels[index]}) - (noise - x0)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return sum(losses[:5]) / 5, sum(losses[-50:]) / 50

    first, last = train(labels)
    blind_first, blind_last = train(torch.full_like(labels, NULL_LABEL))
    assert first > 1.3 and blind_first > 1.3
    assert last < 0.62 < blind_last
    assert last < blind_last - 0.04


def test_points_mlp_in_one_and_two_dimensions():
    for dimensions in (1, 2):
        network = PointsMLP(dimensions, width=32, depth=2)
        x, t = torch.randn(5, dimensions), torch.rand(5, dtype=torch.float64)
        y = network(x, t, {})
        assert y.shape == (5, dimensions)
        assert not torch.allclose(network(x, t * 0.9, {}), y, atol=1e-4)
        assert not torch.allclose(network(x + 0.1, t, {}), y, atol=1e-4)


def test_digits_family_conditions_and_pictures():
    family = DigitsFamily()
    conditions = family.conditions({"label": np.array([3, 0, 9], dtype=np.int32)})
    assert conditions["label"].dtype == torch.int64 and conditions["label"].tolist() == [3, 0, 9]
    null = family.unconditional(conditions)
    assert null.keys() == conditions.keys() and null["label"].tolist() == [10, 10, 10]
    assert family.conditions({"label": np.array([], dtype=np.int64)})["label"].shape == (0,)
    assert family.schedule.t_max == 1.0 and family.prediction == "flow" and family.latent_shape == (1, 8, 8)
    images = load_digits()[0][:4]
    pictures = family.decode(images)
    assert pictures.shape == (4, 1, 8, 8)
    assert torch.allclose(pictures, (images + 1) / 2) and 0 <= pictures.min() and pictures.max() == 1
    assert family.decode(torch.tensor([[[[-3.0, 3.0]]]])).flatten().tolist() == [0, 1]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"labels": np.array([1])}, "no column 'label'; did you mean 'labels'"),
        ({"label": np.array([1, 12])}, "outside 0..9, e.g. 12"),
        ({"label": np.array([0.5])}, "whole numbers"),
        ({"label": np.array([[1], [2]])}, "whole numbers"),
    ],
)
def test_digits_family_refuses_other_labels(rows, message):
    with pytest.raises(UserError, match=message) as error:
        DigitsFamily().conditions(rows)
    assert one_line(error)


def test_ring_family_has_no_conditions():
    family = RingFamily()
    assert family.condition_columns == [] and family.conditions({"index": np.arange(3)}) == {}
    assert family.unconditional({}) == {} and family.latent_shape == (2,)
    points = ring.sample(5)
    assert family.decode(points) is points


@pytest.mark.parametrize("name", ["digits", "ring"])
def test_teacher_comes_back_from_its_folder(name, tmp_path):
    family = build_family(name, None, {"depth": 2})
    network = shaken(family.new_network(seed=5))
    save_teacher(network, tmp_path / "a" / "teacher", name, family.options)
    assert sorted(p.name for p in (tmp_path / "a" / "teacher").iterdir()) == ["config.json", "model.safetensors"]
    again = build_family(name, str(tmp_path / "a" / "teacher"), {})
    assert again.options == family.options != build_family(name).options
    teacher = again.load_teacher()
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    state = network.state_dict()
    assert teacher.state_dict().keys() == state.keys()
    assert all(torch.equal(state[key], value) for key, value in teacher.state_dict().items())
    x = torch.randn(3, *family.latent_shape)
    t, conditions = torch.rand(3, dtype=torch.float64), {"label": torch.arange(3)}
    assert torch.equal(teacher(x, t, conditions), network(x, t, conditions))


def test_what_is_wrong_with_a_teachers_folder_is_said_in_a_line(tmp_path):
    family = DigitsFamily(None, {"depth": 1})
    good = tmp_path / "teacher-digits"
    save_teacher(family.new_network(), good, "digits", family.options)

    def refused(message, path, name="digits", options=None):
        with pytest.raises(UserError, match=message) as error:
            build_family(name, path, options).load_teacher()
        assert one_line(error) and str(error.value).startswith("teacher.")

    refused("raydmd pretrain", None)
    refused("no folder .*did you mean 'teacher-digits'", str(tmp_path / "teacher-digit"))
    refused("no folder '/nowhere/at/all'$", "/nowhere/at/all")
    refused("family 'digits', not 'ring'", str(good), name="ring")
    refused("depth: 2 given, but .* has 1", str(good), options={"depth": 2})
    (tmp_path / "empty").mkdir()
    refused("has no config.json", str(tmp_path / "empty"))

    other = tmp_path / "other"
    save_teacher(family.new_network(), other, "digits", {**family.options, "depth": 2})
    refused("does not fit the network of config.json", str(other))
    (other / "config.json").write_text("[1]")
    refused("not a teacher's config", str(other))
    (other / "config.json").write_text(json.dumps({"family": "digits", "options": family.options}))
    (other / "model.safetensors").write_bytes((good / "model.safetensors").read_bytes()[:1000])
    refused("not readable", str(other))
    (other / "model.safetensors").unlink()
    refused("has no model.safetensors", str(other))
    assert build_family("digits", str(good), {"depth": 1}).load_teacher() is not None


def test_families_by_name():
    assert {name: family.name for name, family in FAMILIES.items()} == {name: name for name in FAMILIES}
    assert {"digits", "ring", "qwen_image", "wan", "sd3", "flux", "z_image", "flux2_klein"} <= set(FAMILIES)
    for name, options, message in [
        ("digts", {}, "teacher.family: no family 'digts'; did you mean 'digits'"),
        ("digits", {"dept": 2}, "teacher.options.dept: .*did you mean 'depth'"),
        ("digits", {"depth": "2"}, "teacher.options.depth: a whole number is needed, not '2'"),
        ("digits", {"depth": True}, "teacher.options.depth: a whole number"),
        ("ring", {"width": -1}, "teacher.options.width: a whole number"),
        ("wan", {"latent_shape": [16, 60, 104]}, r"\[C, frames, H, W\]"),
        ("wan", {"latent_shape": "16x60"}, "a list of sizes"),
        ("wan", {"dtype": "bfloat"}, "did you mean 'bfloat16'"),
        ("qwen_image", {"latent_shape": [16, 1, 7, 8]}, "H and W even"),
        ("qwen_image", {"gradient_checkpointing": 1}, "true or false"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            build_family(name, None, options)
        assert one_line(error)
