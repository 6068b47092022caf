"""Masked autoencoder: the loss of the paper by a loop, the encoder of timm, and no look at what is hidden."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from cluster.errors import UsageError
from training.encoder import Architecture, seed_weights
from training.methods.mae import MAE

SIZE, PATCH, PATCHES = 32, 8, 16


def tiny(channels: int = 3, height: int = SIZE, width: int = SIZE) -> nn.Module:
    network = Architecture("test_vit", height, width, channels, PATCH).build()
    seed_weights(network, 0, "encoder.")
    return network


def mae(encoder: nn.Module | None = None, *, ratio: float = 0.75, norm_pix: bool = True, depth: int = 1) -> MAE:
    module = MAE(
        encoder if encoder is not None else tiny(),
        decoder_width=32,
        decoder_depth=depth,
        mask_ratio=ratio,
        norm_pix=norm_pix,
    )
    for name, child in module.named_children():
        if name != "encoder":
            seed_weights(child, 0, f"{name}.")
    with torch.no_grad():
        module.mask_token.normal_(0, 0.02, generator=torch.Generator().manual_seed(0))
    return module


def images(count: int = 2, channels: int = 3, height: int = SIZE, width: int = SIZE, seed: int = 0) -> Tensor:
    return torch.randn(count, channels, height, width, generator=torch.Generator().manual_seed(seed))


def noise(count: int = 2, patches: int = PATCHES, seed: int = 1) -> Tensor:
    return torch.rand(count, patches, generator=torch.Generator().manual_seed(seed))


def patch_of(image: Tensor, number: int, columns: int) -> Tensor:
    """[C, p, p]: the patch with this number, counted by rows."""
    row, column = divmod(number, columns)
    return image[:, row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH]


def loss_by_hand(module: MAE, image: Tensor, scores: list[float], columns: int, norm_pix: bool) -> float:
    """He et al. 2022, section 3, for one image and one patch at a time; positions by their formula."""
    encoder: Any = module.encoder
    order = sorted(range(len(scores)), key=lambda at: scores[at])
    count = int(len(scores) * (1 - 0.75))
    visible, hidden = order[:count], order[count:]
    width = encoder.embed_dim

    def position(number: int, dim: int) -> Tensor:
        """Appendix A.1 up to the order of the channels: sines of row and column, then their cosines."""
        angles = [place / 10000 ** (k / (dim / 4)) for place in divmod(number, columns) for k in range(dim // 4)]
        return torch.tensor([*map(math.sin, angles), *map(math.cos, angles)], dtype=torch.float32)

    tokens = [encoder.cls_token[0, 0]]  # its position is zero
    for number in visible:
        patch = patch_of(image, number, columns)
        linear = (encoder.patch_embed.proj.weight * patch).sum(dim=(1, 2, 3)) + encoder.patch_embed.proj.bias
        tokens.append(linear + position(number, width))
    x = torch.stack(tokens)[None]
    for block in encoder.blocks:
        x = block(x)
    latent = module.decoder_embed(encoder.norm(x))[0]
    full = [latent[0]] + [torch.zeros(0)] * len(scores)
    for at, number in enumerate(visible):
        full[1 + number] = latent[1 + at] + position(number, latent.shape[1])
    for number in hidden:
        full[1 + number] = module.mask_token[0, 0] + position(number, latent.shape[1])
    x = torch.stack(full)[None]  # in the order of the image, as the paper unshuffles it
    for block in module.decoder_blocks:
        x = block(x)
    predicted = module.decoder_head(module.decoder_norm(x))[0, 1:]
    errors = []
    for number in hidden:
        target = patch_of(image, number, columns).double()
        if norm_pix:
            deviation = target - target.mean()
            variance = (deviation**2).sum() / (target.numel() - 1)
            target = deviation / (variance + 1e-6).sqrt()
        errors.append(float(((predicted[number].double() - target.flatten()) ** 2).mean()))
    return float(np.mean(errors))


@pytest.mark.parametrize("norm_pix", [True, False])
@pytest.mark.parametrize(("channels", "height", "width"), [(3, 32, 32), (1, 16, 40)])
@torch.no_grad()
def test_the_loss_is_that_of_the_paper(norm_pix: bool, channels: int, height: int, width: int) -> None:
    columns, patches = width // PATCH, height * width // PATCH**2
    module = mae(tiny(channels, height, width), norm_pix=norm_pix)
    shown, scores = images(2, channels, height, width), noise(2, patches)
    expected = [
        loss_by_hand(module, image, row.tolist(), columns, norm_pix) for image, row in zip(shown, scores, strict=True)
    ]
    found = module(shown, scores)
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["test_vit", "vit_tiny_patch16_224"])
@torch.no_grad()
def test_with_nothing_hidden_the_encoder_is_timm_s_own_forward_pass(name: str) -> None:
    encoder: Any = Architecture(name, SIZE, SIZE, 3, PATCH).build().eval()
    module = mae(encoder).eval()
    everything = torch.arange(PATCHES).expand(2, -1)
    found = module.encode(module.patchify(images()), everything)
    assert torch.allclose(found, encoder.forward_features(images()), atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{"class_token": False}, {"no_embed_class": True}, {"pre_norm": True}, {"embed_norm_layer": nn.LayerNorm}],
)
@torch.no_grad()
def test_variants_of_the_plain_vit_are_encoded_as_timm_encodes_them(options: dict[str, Any]) -> None:
    encoder: Any = timm.create_model(
        "test_vit", img_size=SIZE, patch_size=PATCH, num_classes=0, global_pool="avg", **options
    ).eval()
    module = mae(encoder)
    everything = torch.arange(PATCHES).expand(2, -1)
    found = module.encode(module.patchify(images()), everything)
    assert torch.allclose(found, encoder.forward_features(images()), atol=1e-5)


@torch.no_grad()
def test_the_order_in_which_patches_are_named_is_the_order_of_the_tokens() -> None:
    module = mae().eval()
    pixels = module.patchify(images())
    straight = module.encode(pixels, torch.tensor([[3, 9, 14]] * 2))
    turned = module.encode(pixels, torch.tensor([[14, 3, 9]] * 2))
    assert torch.allclose(turned, straight[:, [0, 3, 1, 2]], atol=1e-5)


@torch.no_grad()
def test_a_visible_patch_is_embedded_as_timm_embeds_it() -> None:
    encoder: Any = tiny()
    module = mae(encoder)
    by_timm = encoder.patch_embed(images()).flatten(1, 2)
    proj = encoder.patch_embed.proj
    ours = module.patchify(images()) @ proj.weight.flatten(1).T + proj.bias
    assert torch.allclose(ours, by_timm, atol=1e-5)


@pytest.mark.parametrize(("channels", "height", "width"), [(3, 32, 32), (1, 16, 40)])
def test_unpatchify_undoes_patchify(channels: int, height: int, width: int) -> None:
    module = mae(tiny(channels, height, width))
    shown = images(2, channels, height, width)
    patches = module.patchify(shown)
    columns = width // PATCH
    for number in range(patches.shape[1]):
        assert torch.equal(patches[1, number], patch_of(shown[1], number, columns).flatten())
    assert torch.equal(module.unpatchify(patches), shown)


@torch.no_grad()
def test_what_is_hidden_does_not_reach_the_tokens() -> None:
    module = mae()
    scores = noise()
    order = scores.argsort(dim=1)
    visible, hidden = order[:, : module.visible], order[:, module.visible :]
    pixels = module.patchify(images())
    changed = pixels.clone()
    for at in range(2):
        changed[at, hidden[at]] = 1e6
    assert torch.equal(module.encode(pixels, visible), module.encode(changed, visible))
    changed[0, visible[0, 0]] += 1
    assert not torch.equal(module.encode(pixels, visible)[0], module.encode(changed, visible)[0])


@torch.no_grad()
def test_the_loss_of_an_image_does_not_depend_on_its_batch() -> None:
    module = mae()
    together = module(images(3), noise(3))
    for at in range(3):
        assert module(images(3)[[at]], noise(3)[[at]]).item() == pytest.approx(together[at].item(), rel=1e-5)


@torch.no_grad()
def test_a_normalised_target_ignores_the_brightness_and_contrast_of_hidden_patches() -> None:
    scores = noise()
    hidden = scores.argsort(dim=1)[:, 4:]
    for norm_pix, same in ((True, True), (False, False)):
        module = mae(norm_pix=norm_pix)
        pixels = module.patchify(images())
        for at in range(2):
            pixels[at, hidden[at]] = pixels[at, hidden[at]] * 3 + 5
        brighter = module.unpatchify(pixels)
        assert torch.allclose(module(images(), scores), module(brighter, scores), rtol=1e-3) is same


def test_every_trainable_parameter_gets_a_gradient_and_positions_stay_fixed() -> None:
    module = mae(depth=2)
    module(images(), noise()).mean().backward()
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None, name
    assert [n for n, p in module.named_parameters() if not p.requires_grad] == ["encoder.pos_embed"]


def test_the_loss_falls_on_a_few_images_and_training_is_deterministic() -> None:
    level = torch.linspace(-1.5, 1.5, 8)[:, None, None, None]  # what is visible tells what is hidden
    shown = level + torch.linspace(-1, 1, SIZE)[:, None].expand(8, 1, SIZE, SIZE)

    def losses() -> list[float]:
        module = mae(tiny(channels=1), norm_pix=False)
        optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=2e-3)
        found = []
        for step in range(30):
            loss = module(shown, noise(8, seed=step)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(float(loss.detach()))
        return found

    first = losses()
    assert np.mean(first[-5:]) < 0.3 * float(shown.var())  # the best constant reaches the variance
    assert losses() == first


def test_bfloat16_stays_finite_and_near() -> None:
    module = mae(depth=2)
    exact = module(images(), noise())
    with torch.autocast("cpu", torch.bfloat16):
        rough = module(images(), noise())
    assert rough.dtype == torch.float32
    assert torch.allclose(rough, exact, rtol=0.05)
    rough.mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in module.parameters() if p.grad is not None)


@torch.no_grad()
def test_pictures_keep_what_is_visible_and_grey_out_what_is_hidden() -> None:
    for norm_pix in (True, False):
        module = mae(norm_pix=norm_pix)
        shown, scores = images(), noise()
        masked, made = (module.patchify(p) for p in module.pictures(shown, scores))
        order, pixels = scores.argsort(dim=1), module.patchify(shown)
        for at in range(2):
            visible, hidden = order[at, : module.visible], order[at, module.visible :]
            assert torch.equal(masked[at, visible], pixels[at, visible])
            assert torch.equal(made[at, visible], pixels[at, visible])
            assert not masked[at, hidden].any()
            assert (made[at, hidden] - pixels[at, hidden]).abs().max() > 0.1


@torch.no_grad()
def test_the_pictures_of_a_perfect_prediction_are_the_image() -> None:
    """Zero weights predict the mean of each patch: with `norm_pix` that is a patch of its own mean."""
    module = mae()
    module.decoder_head.weight.zero_()
    module.decoder_head.bias.zero_()
    flat = images(1, 3, SIZE // PATCH, SIZE // PATCH).repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)
    flat = flat[:, :1].expand(-1, 3, -1, -1)
    _, made = module.pictures(flat, noise(1))
    assert torch.allclose(made, flat, atol=1e-5)


def test_exactly_the_share_asked_for_is_hidden() -> None:
    assert [mae(ratio=ratio).visible for ratio in (0.75, 0.5, 0.25, 0.9)] == [4, 8, 12, 1]


@pytest.mark.parametrize("ratio", [0.95, 0.999, 0.01])
def test_a_mask_that_leaves_nothing_is_refused(ratio: float) -> None:
    if ratio < 0.5:  # int() rounds down, so 15 of 16 stay visible: one is hidden
        assert mae(ratio=ratio).visible == PATCHES - 1
        return
    with pytest.raises(UsageError, match=f"--mask-ratio {ratio}"):
        mae(ratio=ratio)


@pytest.mark.parametrize(
    "name",
    ["test_efficientnet", "test_convnext", "deit_tiny_distilled_patch16_224", "vit_tiny_r_s16_p8_224", "test_vit3"],
)
def test_networks_that_are_no_plain_vit_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="plain ViT"):
        mae(timm.create_model(name, num_classes=0))
