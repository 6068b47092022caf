"""The contract of a pretraining method, held by every entry of METHODS."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cluster.errors import UsageError
from training.encoder import Architecture, seed_weights
from training.methods import METHODS

ARCHITECTURE = Architecture("test_vit", 32, 32, 3, 8)
every_method = pytest.mark.parametrize("name", sorted(METHODS))


def built(name: str, seed: int = 0) -> Any:
    encoder = ARCHITECTURE.build()
    seed_weights(encoder, seed, "encoder.")
    module = METHODS[name](encoder, decoder_width=32, decoder_depth=1, mask_ratio=0.75, norm_pix=True)
    for child_name, child in module.named_children():
        if child_name != "encoder":
            seed_weights(child, seed, f"{name}.{child_name}.")
    return module


def shown(module: Any, count: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, 32, 32, generator=generator), torch.rand(count, module.patches, generator=generator)


@every_method
def test_a_method_is_a_documented_module_around_an_encoder(name: str) -> None:
    assert re.fullmatch(r"[a-z0-9_]+", name)
    assert issubclass(METHODS[name], nn.Module) and (inspect.getdoc(METHODS[name]) or "").strip()
    encoder = ARCHITECTURE.build()
    module = METHODS[name](encoder, decoder_width=32, decoder_depth=1, mask_ratio=0.75, norm_pix=True)
    assert module.encoder is encoder
    assert module.patches == 16


@every_method
def test_the_loss_is_one_finite_positive_number_for_each_image(name: str) -> None:
    module = built(name)
    loss = module(*shown(module))
    assert (loss.shape, loss.dtype) == ((4,), torch.float32)
    assert torch.isfinite(loss).all() and (loss > 0).all()


@every_method
def test_images_are_judged_alone_and_the_noise_is_all_the_randomness(name: str) -> None:
    module = built(name)
    images, noise = shown(module)
    torch.manual_seed(0)
    first = module(images, noise)
    torch.manual_seed(1)
    assert torch.equal(module(images, noise), first)
    assert torch.allclose(module(images[1:2], noise[1:2])[0], first[1], rtol=1e-4)
    assert not torch.allclose(module(images, noise.flip(1)), first)


@every_method
def test_images_and_noise_are_not_written_into(name: str) -> None:
    module = built(name)
    images, noise = shown(module)
    before = images.clone(), noise.clone()
    module(images, noise).sum().backward()
    module.pictures(images, noise)
    assert torch.equal(images, before[0]) and torch.equal(noise, before[1])


@every_method
def test_every_trainable_parameter_has_a_gradient(name: str) -> None:
    """DDP waits for all of them, so one without hangs a run of several workers."""
    module = built(name)
    module(*shown(module)).mean().backward()
    without = [n for n, p in module.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


@every_method
def test_equal_seeds_train_to_equal_weights(name: str) -> None:
    def trained() -> dict[str, Tensor]:
        module = built(name)
        optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-3)
        for _ in range(2):
            optimizer.zero_grad()
            module(*shown(module)).mean().backward()
            optimizer.step()
        return dict(module.state_dict())

    one, other = trained(), trained()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert not torch.equal(one["encoder.blocks.0.attn.qkv.weight"], built(name).encoder.blocks[0].attn.qkv.weight)


@every_method
def test_bfloat16_gives_finite_losses(name: str) -> None:
    module = built(name)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(module(*shown(module))).all()


@every_method
def test_the_encoder_leaves_as_a_timm_model_and_takes_nothing_of_the_method_along(name: str, tmp_path: Path) -> None:
    module = built(name)
    module(*shown(module)).mean().backward()
    save_file(module.encoder.state_dict(), tmp_path / "model.safetensors")
    plain = timm.create_model(ARCHITECTURE.name, num_classes=0, **ARCHITECTURE.kwargs)
    state = load_file(tmp_path / "model.safetensors")
    assert set(state) == set(plain.state_dict())
    plain.load_state_dict(state)
    images, _ = shown(module)
    with torch.no_grad():
        assert torch.equal(plain.eval()(images), module.encoder.eval()(images))


@every_method
def test_pictures_show_what_was_hidden_and_what_was_made_of_it(name: str) -> None:
    module = built(name)
    images, noise = shown(module)
    masked, made = module.pictures(images, noise)
    assert masked.shape == made.shape == images.shape
    assert torch.isfinite(made).all() and not torch.equal(masked, made)


@every_method
def test_a_conv_net_is_refused_in_one_line_that_names_the_method(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        METHODS[name](
            timm.create_model("test_efficientnet", num_classes=0),
            decoder_width=32,
            decoder_depth=1,
            mask_ratio=0.75,
            norm_pix=True,
        )
    assert f"--method {name}" in str(caught.value) and "\n" not in str(caught.value)
