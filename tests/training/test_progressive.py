"""Progressive features: boxes around what stands out, crops that show them, and embeddings of every kind of network."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cluster.errors import UsageError
from training.tasks.progressive import SMALLEST, STEPS, Attention, Progressive, boxes_of, cropped

NETWORKS = [("test_efficientnet", 64), ("test_vit", 160), ("test_resnet", 64), ("test_convnext", 64)]
DEPTH = {"test_vit": [3, 4]}


def network_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    network: nn.Module = timm.create_model(name, num_classes=0)
    return network


def built(name: str, size: int, steps: int) -> Progressive:
    model = Progressive(network_of(name), torch.zeros(1, 3, size, size), 16, steps)
    model.seed(0)
    return model.eval()


def images(count: int, size: int) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


# Boxes


def test_a_box_lies_around_a_planted_blob() -> None:
    y, x = np.mgrid[:14, :14]
    for centre in ((4, 9), (9, 4), (7, 7)):
        blob = np.exp(-((y - centre[0]) ** 2 + (x - centre[1]) ** 2) / 8)[None]
        top, left, bottom, right = boxes_of(blob)[0] * 14
        assert top <= centre[0] - 1 < centre[0] + 2 <= bottom and left <= centre[1] - 1 < centre[1] + 2 <= right
        assert (bottom - top) * (right - left) < 0.6 * 14 * 14


def test_boxes_lie_within_the_image_and_are_never_small() -> None:
    responses = np.random.default_rng(0).normal(size=(200, 6, 9)).cumsum(axis=1).cumsum(axis=2)
    responses[0], responses[1] = 0, np.eye(6, 9)
    boxes = boxes_of(responses)
    assert boxes.min() >= 0 and boxes.max() <= 1
    assert (boxes[:, 2:] - boxes[:, :2]).min() >= SMALLEST - 1e-9
    assert boxes[0].tolist() == [0, 0, 1, 1]


def parts_of(mask: np.ndarray) -> list[list[tuple[int, int]]]:
    """The connected parts of a mask, corners counting, by flood."""
    left, parts = {(int(y), int(x)) for y, x in np.argwhere(mask)}, []
    while left:
        part, edge = [], [min(left)]
        left.remove(edge[0])
        while edge:
            y, x = edge.pop()
            part.append((y, x))
            near = {(y + a, x + b) for a in (-1, 0, 1) for b in (-1, 0, 1)} & left
            left -= near
            edge += near
        parts.append(part)
    return parts


def test_the_box_is_that_of_the_largest_connected_part_above_the_mean() -> None:
    responses = np.random.default_rng(1).normal(size=(50, 20, 20)).cumsum(axis=1).cumsum(axis=2)
    for response, box in zip(responses, boxes_of(responses), strict=True):
        rows, columns = np.asarray(max(parts_of(response > response.mean()), key=len)).T
        exact = np.asarray([rows.min(), columns.min(), rows.max() + 1, columns.max() + 1]) / 20
        wide = (exact[2:] - exact[:2]) >= SMALLEST
        np.testing.assert_allclose(box[:2][wide], exact[:2][wide])
        np.testing.assert_allclose(box[2:][wide], exact[2:][wide])


def test_a_crop_of_the_whole_is_the_image_and_of_a_part_is_that_part_enlarged() -> None:
    whole = images(2, 32)
    torch.testing.assert_close(cropped(whole, np.asarray([[0, 0, 1, 1]] * 2)), whole, atol=1e-4, rtol=0)
    smooth = F.interpolate(images(2, 4), (32, 32), mode="bicubic")
    found = cropped(smooth, np.asarray([[0.25, 0.5, 0.75, 1.0]] * 2))
    expected = F.interpolate(smooth[:, :, 8:24, 16:32], (32, 32), mode="bilinear", align_corners=False)
    torch.testing.assert_close(found[:, :, 1:-1, 1:-1], expected[:, :, 1:-1, 1:-1], atol=0.05, rtol=0)


class Bright(nn.Module):
    """A network whose maps are the picture itself, reduced."""

    num_features = 3

    def forward_features(self, shown: Tensor) -> Tensor:
        return F.avg_pool2d(shown, 4)

    def forward_head(self, maps: Tensor, pre_logits: bool) -> Tensor:
        return maps.mean(dim=(2, 3))


def test_a_bright_spot_of_a_picture_fills_its_crop() -> None:
    shown = torch.zeros(1, 3, 64, 64)
    shown[:, :, 8:32, 32:56] = 1
    model = Progressive(Bright(), torch.zeros(1, 3, 64, 64), 4, 2)
    box = model.boxes(model.network.forward_features(shown))  # type: ignore[operator]
    np.testing.assert_allclose(box[0], [8 / 64, 32 / 64, 32 / 64, 56 / 64])
    assert cropped(shown, box).mean() > 0.95


# Networks


@pytest.mark.parametrize("steps", range(1, STEPS + 1))
@pytest.mark.parametrize(("name", "size"), NETWORKS)
def test_every_step_of_every_kind_of_network_gives_embeddings_of_unit_length(name: str, size: int, steps: int) -> None:
    model, shown = built(name, size, steps), images(3, size)
    with torch.no_grad():
        found = model(shown)
        assert len(found) == steps
        for one in found:
            assert one.shape == (3, 16)
            torch.testing.assert_close(one.norm(dim=1), torch.ones(3))
        for one, alone in zip(found, model(shown[:1]), strict=True):
            torch.testing.assert_close(one[:1], alone, atol=1e-4, rtol=1e-4)  # an image's crop is its own


@pytest.mark.parametrize(("name", "size"), NETWORKS)
def test_gradients_reach_all_that_is_trained_and_steps_share_the_network(name: str, size: int) -> None:
    model = built(name, size, STEPS).train()
    sum(one[:, 0].sum() for one in model(images(3, size))).backward()
    still = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert not {n for n in still if not n.startswith("network.")}
    assert len(still) < 0.4 * len(list(model.parameters())), still  # blocks of a residual network begin at nothing
    assert sum(p.numel() for p in model.network.parameters()) == sum(p.numel() for p in network_of(name).parameters())


@pytest.mark.parametrize(("name", "size"), NETWORKS)
def test_the_first_step_takes_pooled_features_and_two_earlier_stages(name: str, size: int) -> None:
    model, shown = built(name, size, 1), images(2, size)
    network: Any = model.network
    with torch.no_grad():
        _, stages = network.forward_intermediates(shown)
        chosen = DEPTH.get(name, [len(stages) - 3, len(stages) - 2])
        pooled = network.forward_head(network.forward_features(shown), pre_logits=True)
        parts = [pooled, *(stages[at].mean(dim=(2, 3)) for at in chosen)]
        expected = F.normalize(torch.cat([F.normalize(part) for part in parts], dim=1))
        torch.testing.assert_close(model.descriptors(shown)[0], expected)


def test_a_head_is_read_back_and_one_of_other_steps_is_not() -> None:
    one, other = built("test_efficientnet", 64, 3), built("test_efficientnet", 64, 3)
    other.load_state_dict({n: t + 1 if t.is_floating_point() else t for n, t in other.state_dict().items()})
    other.network.load_state_dict(one.network.state_dict())
    other.load_head(one.head())
    assert all(torch.equal(t, other.state_dict()[n]) for n, t in one.state_dict().items())
    assert not any(n.startswith("network.") for n in one.head())
    with pytest.raises(RuntimeError):
        built("test_efficientnet", 64, 2).load_head(one.head())


def test_biases_put_the_mean_of_descriptors_at_the_middle() -> None:
    model = built("test_efficientnet", 64, 2)
    with torch.no_grad():
        descriptors = model.descriptors(images(8, 64))
        model.centre(descriptors)
        for layer, x in zip(model.embeddings, descriptors, strict=True):
            assert layer(x).mean(dim=0).abs().max() < 1e-5


def test_attention_weighs_by_channel_and_place_as_written_by_hand() -> None:
    torch.manual_seed(0)
    attention, maps = Attention(32), torch.randn(2, 32, 5, 7)
    with torch.no_grad():
        channel = torch.sigmoid(
            attention.channel(maps.flatten(2).mean(dim=2)) + attention.channel(maps.flatten(2).max(dim=2).values)
        )
        weighed = maps * channel.view(2, 32, 1, 1)
        looks = torch.stack([weighed.mean(dim=1), weighed.max(dim=1).values], dim=1)
        place = torch.sigmoid(F.conv2d(looks, attention.place.weight, attention.place.bias, padding=3))
        torch.testing.assert_close(attention(maps), weighed * place)


def test_a_crop_by_a_network_without_maps_is_refused() -> None:
    class Flat(Bright):
        def forward_features(self, shown: Tensor) -> Tensor:
            return shown.mean(dim=(2, 3))

        def forward_head(self, maps: Tensor, pre_logits: bool) -> Tensor:
            return maps

    with pytest.raises(UsageError, match="--steps: Flat has no feature maps to crop by; use --steps 1"):
        Progressive(Flat(), torch.zeros(1, 3, 8, 8), 4, 2)
    assert len(Progressive(Flat(), torch.zeros(1, 3, 8, 8), 4, 1)(torch.zeros(2, 3, 8, 8))) == 1
