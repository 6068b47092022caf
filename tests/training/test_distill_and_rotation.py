"""Distillation: its losses by a loop, and a teacher that is seen and not kept. Rotation: turns, and who is refused."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from cluster.errors import UsageError
from training.configs import PretrainConfig
from training.encoder import PRESETS, Architecture, seed_weights
from training.methods.distill import Distill
from training.methods.method import Material, feature_width
from training.methods.rotation import Rotation
from training.transform import Input

WANTED = Input(32, 32, 3, (0.5,) * 3, (0.2,) * 3)
TEACHERS = Input(48, 64, 1, (0.1,), (0.9,))


def network(name: str, wanted: Input, seed: int) -> nn.Module:
    patch = 8 if "vit" in name else None
    built = Architecture(name, wanted.height, wanted.width, wanted.channels, patch).build()
    seed_weights(built, seed)
    return built


def distill(
    matching: Literal["cosine", "smooth_l1"] = "cosine", sha256: str = "ab" * 32, seen: Input | None = None
) -> Distill:
    teacher = network("test_efficientnet", TEACHERS, 1)
    module = Distill(
        network("test_vit", WANTED, 0),
        teacher,
        features=64,
        teacher_input=seen or TEACHERS,
        teacher_sha256=sha256,
        matching=matching,
    ).train()
    module.seed(0)
    return module


def shown(count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(count, 3, 32, 32, generator=generator),
        torch.randn(count, 1, 48, 64, generator=generator),
        torch.empty(count, 0),
    ]


@pytest.mark.parametrize("matching", ["cosine", "smooth_l1"])
@torch.no_grad()
def test_the_loss_of_distillation_is_that_of_its_source(matching: Any) -> None:
    module, (images, others, noise) = distill(matching), shown()
    plain = network("test_efficientnet", TEACHERS, 1).eval()
    found = module(images, others, noise)
    for image in range(3):
        features: Any = module.encoder
        own = (module.projection.weight @ features(images[image][None])[0] + module.projection.bias).tolist()
        target = plain(others[image][None])[0].tolist()
        if matching == "cosine":
            inner = sum(a * b for a, b in zip(own, target, strict=True))
            lengths = math.sqrt(sum(a * a for a in own)) * math.sqrt(sum(b * b for b in target))
            expected = 1 - inner / lengths
        else:
            mean = sum(target) / len(target)
            deviation = math.sqrt(sum((b - mean) ** 2 for b in target) / len(target) + 1e-5)
            gaps = [abs(a - (b - mean) / deviation) for a, b in zip(own, target, strict=True)]
            expected = sum(g * g / 4 if g < 2 else g - 1 for g in gaps) / len(gaps)
        assert float(found[image]) == pytest.approx(expected, rel=1e-3)


def test_the_teacher_is_in_no_checkpoint_and_stays_as_it_is() -> None:
    module = distill()
    before = copy.deepcopy(module.teacher.network.state_dict())
    assert [name for name in module.state_dict() if "teacher" in name] == ["teacher.sha256", "teacher.size"]
    assert {name.split(".")[0] for name, _ in module.named_parameters()} == {"encoder", "projection", "teacher"}
    assert not module.teacher.network.training  # although the method was put into training mode
    module(*shown()).sum().backward()
    module.load_state_dict({n: t if n.startswith("teacher.") else t + 1 for n, t in module.state_dict().items()})
    assert all(torch.equal(before[name], tensor) for name, tensor in module.teacher.network.state_dict().items())
    assert all(parameter.grad is None for parameter in module.teacher.parameters())


def test_a_checkpoint_that_lacks_something_is_still_noticed() -> None:
    module = distill()
    state = module.state_dict()
    state.pop("projection.weight")
    with pytest.raises(RuntimeError, match=r"Missing key.*projection\.weight"):
        module.load_state_dict(state)


def test_a_run_does_not_go_on_with_another_teacher() -> None:
    with pytest.raises(
        UsageError, match=r"--teacher: its weights \(sha256 cdcdcdcdcdcd\) are not those .*\(abababababab\)"
    ):
        distill(sha256="cd" * 32).load_state_dict(distill().state_dict())


def test_a_run_does_not_go_on_with_a_teacher_that_sees_images_of_another_size() -> None:
    """Its size is auto, so it follows from the device."""
    other = distill(seen=replace(TEACHERS, height=96))
    with pytest.raises(UsageError, match=r"--teacher: would be shown images of 96x64, the run began with 48x64"):
        other.load_state_dict(distill().state_dict())
    before = {name: tensor for name, tensor in distill().state_dict().items() if name != "teacher.size"}
    other.load_state_dict(before)  # of before the size was kept


def test_the_teacher_sees_the_same_view_by_its_own_input() -> None:
    first, second = distill().views(WANTED)
    assert (first.input, second.input, second.again) == (WANTED, TEACHERS, True)


def test_no_network_without_weights_is_a_teacher() -> None:
    with pytest.raises(UsageError, match="--teacher none: a network without trained weights has nothing to teach"):
        PretrainConfig("data", out="run", method="distill", teacher="none")


def test_images_are_turned_by_quarters_of_the_noise() -> None:
    noise = torch.tensor([[0.0], [0.24], [0.25], [0.5], [0.99], [1.0]])
    assert Rotation.turns(noise).tolist() == [0, 0, 1, 2, 3, 3]
    image = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    turned = Rotation.turned(image.expand(4, 1, 2, 2), torch.tensor([0, 1, 2, 3]))[:, 0].tolist()
    assert turned == [[[1, 2], [3, 4]], [[2, 4], [1, 3]], [[4, 3], [2, 1]], [[3, 1], [4, 2]]]


@torch.no_grad()
def test_the_loss_of_rotation_is_the_cross_entropy_of_the_turn() -> None:
    encoder: Any = network("test_vit", WANTED, 0)
    module = Rotation(encoder, features=64)
    module.seed(0)
    images, noise = shown()[0], torch.tensor([[0.1], [0.6], [0.9]])
    for image, turn, found in zip(images, (0, 2, 3), module(images, noise), strict=True):
        scores = module.head(encoder(torch.rot90(image, turn, (1, 2))[None]))[0].tolist()
        expected = math.log(sum(math.exp(s) for s in scores)) - scores[turn]
        assert float(found) == pytest.approx(expected, rel=1e-4)


def test_rotation_wants_square_images_and_an_upright_augmentation() -> None:
    wide = Input(32, 64, 3, (0.5,) * 3, (0.2,) * 3)
    config = PretrainConfig("data", out="run", method="rotation")
    with pytest.raises(UsageError, match=r"--method rotation: .*32x64.*--image-size, such as 32$"):
        Rotation.build(Material(network("test_vit", wide, 0), wide, config, PRESETS["tiny"]))
    (views,) = Rotation(network("test_vit", WANTED, 0), features=64).views(WANTED)
    assert views.upright


@pytest.mark.parametrize("name", ["test_vit", "test_efficientnet", "mobilenetv3_small_050"])
@torch.no_grad()
def test_the_width_of_features_is_what_comes_out(name: str) -> None:
    encoder: Any = network(name, WANTED, 0).eval()
    assert feature_width(encoder, WANTED) == encoder(shown()[0]).shape[1]
    assert (encoder.num_features == feature_width(encoder, WANTED)) == ("mobilenet" not in name)
