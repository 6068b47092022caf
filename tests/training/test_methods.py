"""The contract of a pretraining method, held by every entry of METHODS."""

from __future__ import annotations

import inspect
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cluster.errors import UsageError
from training import checkpoint
from training.checkpoint import Position
from training.configs import PretrainConfig
from training.encoder import PRESETS, Architecture, seed_weights
from training.methods import METHODS, NEED_VIT, Material, Method, check_method
from training.probe import effective_rank
from training.schedule import parameter_groups
from training.speed import flops_per_image
from training.transform import Augmentation, Input
from training.views import draw_views, render
from training.weights import Initial

VIT, CONV = Architecture("test_vit", 32, 32, 3, 8), Architecture("test_efficientnet", 64, 64, 3)
SMALL = {"prototypes": 32, "head_width": 16, "decoder_width": 32, "decoder_depth": 1, "local_crops": 2}
STEPS = 60

CASES: dict[str, tuple[str, Architecture, dict[str, Any]]] = {name: (name, VIT, {}) for name in METHODS} | {
    "dino on a conv net": ("dino", CONV, {}),
    "rotation on a conv net": ("rotation", CONV, {}),
    "distill into a conv net": ("distill", CONV, {}),
    "distill by smooth L1": ("distill", VIT, {"matching": "smooth_l1"}),
    "dino without small crops": ("dino", VIT, {"local_crops": 0}),
    "sssd of tokens": ("sssd", VIT, {"distilled": "tokens"}),
    "sssd without stopped gradients": ("sssd", VIT, {"teacher_stop_grad": False}),
    "sssd with centred scores": ("sssd", VIT, {"centring": "logits"}),
}
every_method = pytest.mark.parametrize("name", sorted(METHODS))
every_case = pytest.mark.parametrize("case", sorted(CASES))


def shown_to(architecture: Architecture) -> Input:
    channels = architecture.channels
    return Input(architecture.height, architecture.width, channels, (0.4,) * channels, (0.2,) * channels)


def encoder_of(architecture: Architecture, seed: int = 0) -> nn.Module:
    encoder = architecture.build()
    seed_weights(encoder, seed, "encoder.")
    return encoder


def teacher() -> Initial:
    """A conv net for grey images of 48 px."""
    architecture = Architecture("test_efficientnet", 48, 48, 1)
    return Initial(encoder_of(architecture, 7), architecture, shown_to(architecture), {"sha256": "ab" * 32})


def config_of(name: str, **changes: Any) -> PretrainConfig:
    read = {key: value for key, value in SMALL.items() if key in METHODS[name].OPTIONS}
    return PretrainConfig("data", out="run", method=name, **(read | changes))


def built(name: str, architecture: Architecture = VIT, seed: int = 0, **changes: Any) -> Method:
    material = Material(
        encoder_of(architecture, seed),
        shown_to(architecture),
        config_of(name, **changes),
        PRESETS["tiny"],
        teacher() if METHODS[name].NEEDS_TEACHER else None,
    )
    module = METHODS[name].build(material)
    module.seed(seed)
    return module.train()


def case_of(case: str, seed: int = 0) -> Method:
    name, architecture, changes = CASES[case]
    return built(name, architecture, seed, **changes)


def has_batch_norm(module: nn.Module) -> bool:
    return any(isinstance(part, nn.BatchNorm2d) for part in module.modules())


def views_of(case: str, module: Method, count: int = 4, *, epoch: int = 0, same: bool = False) -> list[Tensor]:
    """The arguments of `forward` for `count` images: views, then noise; `same`: of one image over and over."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (1 if same else count, 8, 8, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    pixels = np.broadcast_to(coarse, (count, 64, 64, 3))
    groups = module.views(shown_to(CASES[case][1]))
    draws, noise = draw_views(groups, Augmentation(0.6), module.noise, 0, epoch, positions=np.arange(count))
    return [*render(pixels, groups, draws), torch.from_numpy(noise)]


def rows(arguments: list[Tensor], which: slice, count: int = 4) -> list[Tensor]:
    """The part of the arguments that belongs to these images; views are stored one after the other."""
    return [part.unflatten(0, (-1, count))[:, which].flatten(0, 1) for part in arguments]


def optimizer_of(module: Method, lr: float = 1e-3) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameter_groups(module, 0.05), lr=lr)


def step(
    module: Method,
    optimizer: torch.optim.Optimizer,
    parts: list[list[Tensor]],
    number: int,
    epoch: int,
    total_steps: int = STEPS,
) -> float:
    """What `loop.Rank.step` does, with each of `parts` on a rank of its own: losses and gradients are of them all."""
    module.begin(number, total_steps, epoch)
    total = sum(len(part[-1]) for part in parts)
    loss, observed = 0.0, []
    for part in parts:
        losses = module(*part)
        (losses.sum() / total).backward()
        loss += float(losses.detach().sum()) / total
        observed += [module.observed] if module.observed is not None else []
    nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    module.after_step(torch.cat(observed).double().mean(dim=0) if observed else None)
    return loss


def train(
    case: str,
    module: Method,
    steps: int,
    optimizer: Any = None,
    first: int = 0,
    count: int = 4,
    total: int = STEPS,
) -> list[float]:
    optimizer = optimizer or optimizer_of(module)
    arguments = views_of(case, module, count)
    return [step(module, optimizer, [arguments], number, number, total) for number in range(first, first + steps)]


@every_method
def test_a_method_is_a_documented_module_around_an_encoder(name: str) -> None:
    assert re.fullmatch(r"[a-z0-9_]+", name) and name == METHODS[name].NAME
    assert (inspect.getdoc(METHODS[name]) or "").strip()
    encoder = encoder_of(VIT)
    material = Material(encoder, shown_to(VIT), config_of(name), PRESETS["tiny"], teacher())
    assert METHODS[name].build(material).encoder is encoder


@every_method
def test_a_method_can_be_told_of_to_somebody_who_does_not_program(name: str) -> None:
    words = METHODS[name].words(config_of(name))
    assert words.task and words.loss.startswith("The loss") and not words.loss.endswith(".")


@every_method
def test_options_of_other_methods_are_refused_and_its_own_taken(name: str) -> None:
    other: dict[str, Any] = {"mask_ratio": 0.5, "teacher": "timm:resnet18", "local_crops": 3, "prototypes": 8}
    for option, value in other.items():
        config = replace(PretrainConfig("data", out="run", method=name), **{option: value})
        if option in METHODS[name].OPTIONS:
            check_method(config)
        else:
            with pytest.raises(
                UsageError, match=f"--{option.replace('_', '-')} .*: --method {name} has no such option"
            ):
                check_method(config)


def test_a_method_that_is_none_is_answered_with_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"--method rotate: no such method.*rotation"):
        check_method(PretrainConfig("data", out="run", method="rotate"))


@every_case
def test_the_loss_is_one_finite_positive_number_for_each_image(case: str) -> None:
    module = case_of(case)
    loss = module(*views_of(case, module))
    assert (loss.shape, loss.dtype) == ((4,), torch.float32)
    assert torch.isfinite(loss).all() and (loss > 0).all()


@every_case
def test_images_are_judged_alone_and_views_and_noise_are_all_the_randomness(case: str) -> None:
    module = case_of(case)
    if has_batch_norm(module.encoder):
        module.eval()  # in training, batch norm judges images together
    arguments = views_of(case, module)
    torch.manual_seed(0)
    first = module(*arguments)
    torch.manual_seed(1)
    assert torch.equal(module(*arguments), first)
    assert torch.allclose(module(*rows(arguments, slice(1, 2)))[0], first[1], rtol=1e-4)
    if module.noise:
        other = torch.rand(arguments[-1].shape, generator=torch.Generator().manual_seed(5))
        assert not torch.allclose(module(*arguments[:-1], other), first)


@every_case
def test_images_and_noise_are_not_written_into(case: str) -> None:
    module = case_of(case)
    arguments = views_of(case, module)
    before = [part.clone() for part in arguments]
    module(*arguments).sum().backward()
    module.pictures(arguments[0], arguments[-1])
    assert all(map(torch.equal, arguments, before))


@every_case
@pytest.mark.parametrize("epoch", [0, 1])
def test_every_trainable_parameter_has_a_gradient_and_what_has_none_is_named(case: str, epoch: int) -> None:
    """DDP waits for all of them, so one without stops a run of several workers."""
    module = case_of(case)
    module.begin(epoch, 2, epoch)
    module(*views_of(case, module)).mean().backward()
    parameters = dict(module.named_parameters())
    assert [n for n, p in parameters.items() if p.requires_grad and p.grad is None] == []
    assert [n for n, p in parameters.items() if not p.requires_grad and p.grad is not None] == []
    still = {n for n, p in parameters.items() if not p.requires_grad}
    of_teachers = {n for n in parameters if n.split(".")[0] in module.frozen}
    assert still - of_teachers <= {"encoder.pos_embed"} and of_teachers <= still


@pytest.mark.parametrize("case", [name for name, case in CASES.items() if case[0] != "dino"])
def test_the_loss_falls_on_eight_images(case: str) -> None:
    losses = train(case, case_of(case), STEPS, count=8)
    assert np.mean(losses[-5:]) < 0.97 * np.mean(losses[:5]), losses


@pytest.mark.parametrize("case", [name for name, case in CASES.items() if case[0] == "dino"])
def test_dino_learns_to_tell_eight_images_apart(case: str) -> None:
    """At first all answers are alike, which student and teacher agree on; the centre takes that away, and the loss goes
    up to that of uniform answers. From there it falls, and features spread, only if images are told apart."""
    name, architecture, changes = CASES[case]
    module = built(name, architecture, teacher_momentum=0.9, **changes)
    steps = 180
    losses = train(case, module, steps, optimizer_of(module, 5e-4), count=8, total=steps)
    assert max(losses) > 0.7 * np.log(SMALL["prototypes"])
    assert np.mean(losses[-5:]) < 0.5 * max(losses), losses[::10]
    with torch.no_grad():
        features = module.kept.eval()(views_of(case, module, 8)[0][:8]).numpy()
    assert effective_rank(features - features.mean(axis=0)) > 4


@every_case
def test_equal_seeds_train_to_equal_weights(case: str) -> None:
    def trained() -> dict[str, Tensor]:
        module = case_of(case)
        train(case, module, 2)
        return dict(module.state_dict())

    one, other, before = trained(), trained(), case_of(case).state_dict()
    assert all(torch.equal(one[key], other[key]) for key in one)
    kernels = [key for key in one if key.startswith("encoder.") and one[key].ndim > 1 and key != "encoder.pos_embed"]
    assert kernels and not any(torch.equal(one[key], before[key]) for key in kernels)


@every_case
def test_what_the_method_adds_has_weights_by_seed_and_name_alone(case: str) -> None:
    torch.manual_seed(3)
    one = case_of(case).state_dict()
    torch.manual_seed(4)
    again, other = case_of(case).state_dict(), case_of(case, seed=1).state_dict()
    assert all(torch.equal(one[key], again[key]) for key in one)
    own = [key for key in one if not key.startswith(("encoder.", "teacher.")) and one[key].ndim > 1]
    assert not any(torch.equal(one[key], other[key]) for key in own)


@every_case
def test_bfloat16_gives_finite_losses_and_gradients(case: str) -> None:
    module = case_of(case)
    with torch.autocast("cpu", torch.bfloat16):
        losses = module(*views_of(case, module))
    assert losses.dtype == torch.float32 and torch.isfinite(losses).all()
    losses.mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in module.parameters() if p.grad is not None)


@every_case
def test_a_checkpoint_holds_all_that_decides_the_rest_of_the_curve(case: str, tmp_path: Path) -> None:
    module = case_of(case)
    optimizer = optimizer_of(module)
    train(case, module, 3, optimizer)
    state = checkpoint.State(Position(step=3), checkpoint.collect(module, optimizer))
    name = checkpoint.save(tmp_path, state, keep=1)
    whole = train(case, module, 3, optimizer, first=3)
    fresh = case_of(case)
    other = optimizer_of(fresh)
    checkpoint.restore(fresh, other, checkpoint.load(tmp_path, name).tensors)
    assert train(case, fresh, 3, other, first=3) == whole
    assert all(map(torch.equal, fresh.state_dict().values(), module.state_dict().values()))


def _ranks(arguments: list[Tensor]) -> list[list[Tensor]]:
    return [rows(arguments, slice(0, 1)), rows(arguments, slice(1, 4))]


@every_case
def test_two_ranks_with_unequal_shares_do_what_one_does(case: str) -> None:
    """Batch norm excepted, which sees the images of one rank together: there only what is observed is compared."""
    alone, together = case_of(case), case_of(case)
    if has_batch_norm(alone.encoder):
        alone.eval()
        together.eval()
    ones, others = optimizer_of(alone), optimizer_of(together)
    arguments = views_of(case, alone)
    for number in range(4):
        one = step(alone, ones, [arguments], number, number // 2)
        other = step(together, others, _ranks(arguments), number, number // 2)
        assert one == pytest.approx(other, rel=1e-4)
    one_centre, other_centre = (dict(module.named_buffers()).get("centre.mean") for module in (alone, together))
    if one_centre is not None and other_centre is not None:
        assert torch.allclose(one_centre, other_centre, rtol=1e-3, atol=1e-6)
        assert float(one_centre.abs().max()) > 0


@every_case
def test_the_encoder_leaves_as_a_timm_model_and_takes_nothing_of_the_method_along(case: str, tmp_path: Path) -> None:
    module = case_of(case)
    train(case, module, 1)
    architecture = CASES[case][1]
    save_file(dict(module.kept.state_dict()), tmp_path / "model.safetensors")
    plain = timm.create_model(architecture.name, num_classes=0, **architecture.kwargs)
    state = load_file(tmp_path / "model.safetensors")
    assert set(state) == set(plain.state_dict())
    plain.load_state_dict(state)
    images = torch.randn(2, 3, architecture.height, architecture.width)
    with torch.no_grad():
        assert torch.equal(plain.eval()(images), module.kept.eval()(images))


@every_case
def test_its_arithmetic_can_be_counted_without_numbers(case: str) -> None:
    module = case_of(case)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    assert flops_per_image(module, module.views(shown_to(CASES[case][1]))) > 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


@every_case
def test_a_rank_without_a_row_leaves_running_statistics_alone(case: str) -> None:
    module = case_of(case)
    before = {name: tensor.clone() for name, tensor in module.named_buffers()}
    module.train(False)  # as the loop does
    (module(*views_of(case, module)).sum() * 0).backward()
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.named_buffers())
    assert all(float(p.grad.abs().sum()) == 0 for p in module.parameters() if p.grad is not None)


@every_method
def test_pictures_show_what_was_hidden_and_what_was_made_of_it_or_there_are_none(name: str) -> None:
    module = built(name)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    noise = torch.rand(4, module.noise, generator=torch.Generator().manual_seed(0))
    pictures = module.pictures(images, noise)
    assert (pictures is not None) == (name in {"mae", "sssd"})
    if pictures:
        masked, made = pictures
        assert masked.shape == made.shape == images.shape
        assert torch.isfinite(made).all() and not torch.equal(masked, made)


@pytest.mark.parametrize("name", sorted(NEED_VIT))
def test_a_conv_net_is_refused_in_one_line_that_names_the_method(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        built(name, CONV)
    assert f"--method {name}" in str(caught.value) and "\n" not in str(caught.value)


def test_two_images_of_one_pixel_maps_and_one_alone_pass_through_batch_norm() -> None:
    tiny = Architecture("test_efficientnet", 32, 32, 3)
    module = built("rotation", tiny)
    images = torch.randn(1, 3, 32, 32)
    assert torch.isfinite(module(images, torch.zeros(1, 1))).all()
