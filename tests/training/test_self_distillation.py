"""SD-MAE and DINO: their losses by a loop, who learns from whom, and what of SD-MAE is a masked autoencoder's."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

from cluster.errors import UsageError
from training.encoder import Architecture, seed_weights
from training.methods.dino import DINO, small_input
from training.methods.heads import Centre, ProjectionHead
from training.methods.mae import MAE
from training.methods.method import any_size, pooled
from training.methods.sssd import SSSD
from training.transform import Input
from training.views import Views

SIZE, PATCHES, K = 32, 16, 24
WANTED = Input(SIZE, SIZE, 3, (0.5,) * 3, (0.2,) * 3)
MASKED: dict[str, Any] = {"decoder_width": 32, "decoder_depth": 1, "mask_ratio": 0.75, "norm_pix": True}
HEADS: dict[str, Any] = {"hidden": 16, "prototypes": K, "temperatures": (0.05, 0.2)}


def vit(size: int = SIZE) -> Any:
    network = Architecture("test_vit", size, size, 3, 8).build()
    seed_weights(network, 0, "encoder.")
    return network


def sssd(**changes: Any) -> SSSD:
    module = SSSD(vit(), **(MASKED | HEADS | changes))
    module.seed(0)
    return module


def dino(local: int = 1, **changes: Any) -> DINO:
    small = Views(replace(WANTED, height=16, width=16), local, (0.05, 0.4)) if local else None
    encoder = vit()
    module = DINO(encoder, features=encoder.embed_dim, local=small, **(HEADS | changes))
    module.seed(0)
    return module


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def noise(count: int = 3) -> Tensor:
    return torch.rand(count, PATCHES, generator=torch.Generator().manual_seed(1))


def head_by_hand(head: Any, vector: Tensor) -> Tensor:
    """One vector through a head of the paper: three layers, unit length, prototypes of unit length."""
    x = vector
    for layer in head.layers:
        x = layer.weight @ x + layer.bias if isinstance(layer, nn.Linear) else F.gelu(x)
    x = x / math.sqrt(float((x**2).sum()))
    rows = [row @ x / math.sqrt(float((row**2).sum())) for row in head.prototypes.weight]
    return torch.stack(rows)


def softmax_by_hand(values: Tensor) -> list[float]:
    powers = [math.exp(float(v)) for v in values]
    return [power / sum(powers) for power in powers]


# SD-MAE


@pytest.mark.parametrize("centring", ["probabilities", "logits"])
@torch.no_grad()
def test_the_loss_of_self_distillation_is_that_of_the_formula(centring: Any) -> None:
    module = sssd(centring=centring)
    module.centre.mean.copy_(random(K, seed=9) / 30)
    student, teacher = random(2, 4, 64, seed=3), random(2, 4, 32, seed=4)
    found = module.distillation_loss(student, teacher)
    for image in range(2):
        scores = [head_by_hand(module.student_head, token) for token in student[image]]
        targets = [head_by_hand(module.teacher_head, token) for token in teacher[image]]
        score, other = torch.stack(scores).mean(dim=0), torch.stack(targets).mean(dim=0)
        answer = softmax_by_hand(score / 0.2)
        target = softmax_by_hand((other - module.centre.mean) / 0.05)
        expected = -sum(t * math.log(s) for t, s in zip(target, answer, strict=True))
        assert float(found[image]) == pytest.approx(expected, rel=1e-4)
        entropy = -sum(t * math.log(t) for t in target)
        assert expected >= entropy
        seen = target if centring == "probabilities" else other.tolist()
        assert module.observed is not None
        assert module.observed[image].tolist() == pytest.approx(seen, rel=1e-4, abs=1e-6)


@torch.no_grad()
def test_the_loss_of_tokens_is_one_minus_their_mean_cosine() -> None:
    module = sssd(distilled="tokens")
    student, teacher = random(2, 4, 64, seed=3), random(2, 4, 32, seed=4)
    for image, found in enumerate(module.distillation_loss(student, teacher)):
        layer: Any = module.student_head
        angles = []
        for own, other in zip(student[image], teacher[image], strict=True):
            mapped = layer.weight @ own + layer.bias
            angles.append(float(mapped @ other / (mapped.norm() * other.norm())))
        assert float(found) == pytest.approx(1 - sum(angles) / 4, rel=1e-4)


@torch.no_grad()
def test_the_whole_loss_is_the_weighted_sum_of_that_and_of_the_masked_autoencoder_s() -> None:
    module, images = sssd(share=0.3), random(3, 3, SIZE, SIZE)
    order = noise().argsort(dim=1)
    tokens = module.encode(module.patchify(images), order[:, :4])
    shown: list[Tensor] = []
    hook = module.decoder_norm.register_forward_pre_hook(lambda _, inputs: shown.append(inputs[0]))
    found = module(images, noise())
    hook.remove()
    (visible,) = (part for part in shown if part.shape[1] == 4)
    distillation = module.distillation_loss(tokens[:, 1:], module.decoder_norm(visible))
    assert torch.allclose(found, 0.3 * distillation + 0.7 * MAE.forward(module, images, noise()), rtol=1e-5)


def test_the_teacher_has_the_patches_that_the_student_has_in_the_same_order() -> None:
    """With a decoder that only adds what it is given, both are functions of the same patch."""
    module = sssd()
    module.decoder_blocks = nn.ModuleList()
    images, order = random(3, 3, SIZE, SIZE), noise().argsort(dim=1)
    tokens = module.encode(module.patchify(images), order[:, :4])
    decoded = module.decoded(tokens, order)
    for image in range(3):
        for at, number in enumerate(order[image, :4].tolist()):
            own = module.decoder_embed(tokens[image, 1 + at]) + module.get_buffer("decoder_positions")[0, number]
            assert torch.allclose(decoded[image, 1 + at], own, atol=1e-6)


def gradients(module: nn.Module) -> dict[str, float]:
    """Largest gradient of each child module's parameters."""
    found: dict[str, float] = {}
    for name, parameter in module.named_parameters():
        part = name.split(".")[0]
        size = 0.0 if parameter.grad is None else float(parameter.grad.abs().max())
        found[part] = max(found.get(part, 0.0), size)
    return found


@pytest.mark.parametrize("distilled", ["image", "tokens"])
@pytest.mark.parametrize("stop", [True, False])
def test_self_distillation_moves_the_encoder_and_only_if_asked_the_decoder(stop: bool, distilled: Any) -> None:
    module = sssd(stop_grad=stop, distilled=distilled)
    images, order = random(3, 3, SIZE, SIZE), noise().argsort(dim=1)
    tokens = module.encode(module.patchify(images), order[:, :4])
    teacher = module.decoder_norm(module.decoded(tokens, order)[:, 1:5])
    module.distillation_loss(tokens[:, 1:], teacher).sum().backward()
    found = gradients(module)
    assert found["encoder"] > 0 and found["student_head"] > 0
    for part in {"decoder_blocks", "decoder_norm", "teacher_head"} & set(found):
        assert (found[part] > 0) != stop, part


def test_without_a_share_it_is_a_masked_autoencoder_bit_for_bit() -> None:
    ours, plain = sssd(share=0.0), MAE(vit(), **MASKED)
    plain.seed(0)
    assert list(ours.state_dict()) == list(plain.state_dict()) and ours.noise == plain.noise
    images = random(3, 3, SIZE, SIZE)
    for module in (ours, plain):
        optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            module(images, noise()).mean().backward()
            optimizer.step()
    assert torch.equal(ours(images, noise()), plain(images, noise()))
    assert all(map(torch.equal, ours.state_dict().values(), plain.state_dict().values()))


def test_what_it_shares_with_a_masked_autoencoder_begins_with_the_same_weights() -> None:
    ours, plain = sssd().state_dict(), MAE(vit(), **MASKED)
    plain.seed(0)
    assert all(torch.equal(ours[name], tensor) for name, tensor in plain.state_dict().items())


# DINO


@torch.no_grad()
def test_the_loss_of_dino_is_the_mean_over_pairs_of_different_views() -> None:
    module = dino()
    module.centre.mean.copy_(random(K, seed=9) / 30)
    for parameter in module.teacher_head.parameters():
        parameter.add_(random(*parameter.shape, seed=5) / 20)
    large, small = random(2 * 3, 3, SIZE, SIZE), random(1 * 3, 3, 16, 16, seed=2)
    found = module(large, small, torch.empty(3, 0))
    encoder: Any = module.encoder
    for image in range(3):
        views = [large[image], large[3 + image], small[image]]
        losses = []
        for first in range(2):
            score = head_by_hand(module.teacher_head, encoder(views[first][None])[0])
            target = softmax_by_hand((score - module.centre.mean) / 0.05)
            for second in range(3):
                if first == second:
                    continue
                answer = softmax_by_hand(head_by_hand(module.head, pooled(encoder, views[second][None])[0]) / 0.2)
                losses.append(-sum(t * math.log(s) for t, s in zip(target, answer, strict=True)))
        assert len(losses) == 4
        assert float(found[image]) == pytest.approx(sum(losses) / 4, rel=1e-4)


def test_the_teacher_follows_the_student_slower_and_slower_and_its_centre_the_batches() -> None:
    module = dino(momentum=0.9)
    start = {name: p.clone() for name, p in module.teacher.named_parameters()}
    with torch.no_grad():
        for parameter in module.encoder.parameters():
            parameter.add_(1)
    kept = []
    for step in (0, 50, 100):
        module.begin(step, 100, 0)
        kept.append(module.momentum)
    assert kept == pytest.approx([0.9, 0.95, 1.0])
    module.begin(0, 100, 0)
    module.after_step(torch.full((K,), 2.0))
    assert module.centre.mean.tolist() == pytest.approx([0.2] * K)
    for name, parameter in module.teacher.named_parameters():
        assert torch.allclose(parameter, start[name] + 0.1, atol=1e-5)
    module.after_step(torch.full((K,), 2.0))
    assert module.centre.mean.tolist() == pytest.approx([0.38] * K)


@pytest.mark.parametrize("total", [1, 7, 156, 400, 30_000])
def test_a_run_of_any_length_leaves_a_teacher_with_next_to_nothing_of_its_first_weights(total: int) -> None:
    module, share = dino(momentum=0.996), 1.0
    for step in range(total):
        module.begin(step, total, 0)
        assert 0 <= module.momentum <= 1 and (step or total < 2500 or module.momentum == pytest.approx(0.996))
        share *= module.momentum
    assert share < 0.01


def test_prototypes_stand_still_in_the_first_epoch_only() -> None:
    module = dino(local=0)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    directions = [F.normalize(module.head.prototypes.weight.detach(), dim=1)]
    for epoch in range(2):
        module.begin(epoch, 2, epoch)
        module(random(6, 3, SIZE, SIZE), torch.empty(3, 0)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        directions.append(F.normalize(module.head.prototypes.weight.detach(), dim=1))
    assert torch.allclose(directions[0], directions[1], atol=1e-6)
    assert not torch.allclose(directions[1], directions[2], atol=1e-3)


def test_the_teacher_is_what_a_run_leaves_and_begins_as_the_student() -> None:
    module = dino()
    assert module.kept is module.teacher
    for slow, fast in ((module.teacher, module.encoder), (module.teacher_head, module.head)):
        assert all(map(torch.equal, slow.state_dict().values(), fast.state_dict().values()))


@pytest.mark.parametrize("name", ["test_vit", "vit_tiny_patch16_224"])  # the first resamples by itself
def test_a_vit_takes_another_size_as_one_built_for_it_with_resampled_positions(name: str) -> None:
    encoder: Any = Architecture(name, SIZE, SIZE, 3, 8).build()
    small = Architecture(name, 16, 16, 3, 8).build()
    any_size(encoder, replace(WANTED, height=16, width=16), "dino")
    state = encoder.state_dict()
    state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], [2, 2], [4, 4], num_prefix_tokens=1)
    small.load_state_dict(state)
    images = random(2, 3, 16, 16)
    assert torch.allclose(pooled(encoder, images), small(images), atol=1e-5)
    pooled(encoder, images).sum().backward()
    assert encoder.pos_embed.grad is not None and float(encoder.pos_embed.grad.abs().max()) > 0


def test_small_crops_are_three_sevenths_in_whole_patches() -> None:
    assert small_input(Architecture("test_vit", 224, 224, 3, 16).build(), replace(WANTED, height=224, width=224)) == (
        replace(WANTED, height=96, width=96)
    )
    conv = Architecture("test_efficientnet", 128, 64, 3).build()
    assert small_input(conv, replace(WANTED, height=128, width=64)) == replace(WANTED, height=55, width=32)


def test_a_network_of_one_size_is_refused_with_a_way_out() -> None:
    network = Architecture("swin_tiny_patch4_window7_224", 224, 224, 3).build()
    with pytest.raises(UsageError, match=r"--method dino: .* one size only.*--local-crops 0"):
        any_size(network, replace(WANTED, height=96, width=96), "dino")


# What both share


def test_a_centre_takes_away_what_all_images_share_and_a_lower_temperature_sharpens() -> None:
    scores = random(64, K) / 10 + torch.linspace(0, 3, K)
    centre = Centre(K, "logits", 0.1)
    assert centre(scores).argmax(dim=1).unique().numel() < 6
    for _ in range(100):
        centre.update(centre.observed(scores, centre(scores)).mean(dim=0))
    assert centre(scores).argmax(dim=1).unique().numel() > K / 2
    sharp = Centre(K, "logits", 0.01)
    assert float(sharp(scores).max(dim=1).values.mean()) > float(
        Centre(K, "logits", 0.1)(scores).max(dim=1).values.mean()
    )


def test_a_mean_of_scores_is_the_score_of_the_mean() -> None:
    head, tokens = ProjectionHead(8, 16, K), random(2, 5, 8)
    assert torch.allclose(SSSD.mean_score(head, tokens), head(tokens).mean(dim=1), atol=1e-6)
