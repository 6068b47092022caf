"""Fine-tuning: weights and rates by their formulas, a toy that is learnt, and rows that are never looked at."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score

from tests.findings import findings
from tests.findings import labels_of as labels_of_sets
from training.encoder import layer_of
from training.fit import Labels, finetune_fold, refit_network
from training.splits import Fold
from training.tasks.finetune import (
    Outcome,
    Recipe,
    fine_tune,
    layer_groups,
    predict,
    with_classifier,
)
from training.tasks.objective import class_weights, label_weights, objective_for
from training.transform import Augmentation
from training.weights import Wanted, initial_weights

SIZE = 32


def wanted(model: str = "test_efficientnet", **options: Any) -> Wanted:
    values: dict[str, Any] = {
        "init": "none",
        "preset": "tiny",
        "model": model,
        "image_size": str(SIZE),
        "seed": 0,
        "device": "cpu",
        "channels": 1,
        "mean": (0.5,),
        "std": (0.25,),
    }
    return Wanted(**(values | options))


def recipe(**options: Any) -> Recipe:
    values: dict[str, Any] = {
        "wanted": wanted(),
        "classes": 2,
        "epochs": 4,
        "batch_size": 8,
        "lr": 1e-2,
        "weight_decay": 0.05,
        "layer_decay": None,
        "label_smoothing": 0.0,
        "augmentation": Augmentation(0.8),
        "seed": 0,
        "device": "cpu",
        "threads": 1,
    }
    return Recipe(**(values | options))


def stripes(count: int = 48) -> tuple[np.ndarray, np.ndarray]:
    """Noisy pictures with lying (0) or standing (1) stripes: uint8 [N, 32, 32, 1], and truth [N]."""
    rng = np.random.default_rng(0)
    wave = np.sin(np.arange(SIZE) * 1.1)
    images = [80 * (wave[:, None] if at % 2 == 0 else wave[None]) + np.zeros((SIZE, SIZE)) for at in range(count)]
    noisy = np.stack(images) + rng.normal(128, 12, (count, SIZE, SIZE))
    return np.clip(noisy, 0, 255).astype(np.uint8)[..., None], np.arange(count) % 2


def weights_of(outcome: Outcome) -> dict[str, torch.Tensor]:
    return dict(outcome.network.state_dict())


def equal(one: Outcome, other: Outcome) -> bool:
    first, second = weights_of(one), weights_of(other)
    return all(torch.equal(first[name], second[name]) for name in first)


NO_ROWS = np.empty(0, np.int64)


# Formulas


def test_class_weights_give_every_class_the_same_say() -> None:
    truth = np.asarray([0] * 6 + [1] * 3 + [3] * 1)
    assert class_weights(truth, 4).tolist() == pytest.approx([10 / 18, 10 / 9, 0, 10 / 3])
    weights = class_weights(truth, 4).numpy()
    assert weights[truth].mean() == pytest.approx(1)
    assert class_weights(np.asarray([0, 1, 0, 1]), 2).tolist() == [1, 1]


def test_class_weights_give_every_class_its_share_of_the_say() -> None:
    truth = np.asarray([0] * 6 + [1] * 3 + [3] * 1)
    weights = class_weights(truth, 4, [1, 2, 9, 3]).numpy()
    say = np.bincount(truth, minlength=4) * weights
    assert (say / say.sum()).tolist() == pytest.approx([1 / 6, 2 / 6, 0, 3 / 6])
    assert weights[truth].mean() == pytest.approx(1)


@pytest.mark.parametrize(("model", "patch"), [("test_vit", 16), ("test_efficientnet", None)])
@pytest.mark.parametrize("decay", [0.5, 0.75, 1.0])
def test_learning_rates_fall_by_the_decay_with_every_layer_below_the_head(
    model: str, patch: int | None, decay: float
) -> None:
    chosen = recipe(wanted=wanted(model), layer_decay=decay, weight_decay=0.3)
    initial = initial_weights(chosen.wanted)
    network: Any = with_classifier(initial.network, chosen)
    groups = layer_groups(network, chosen, initial)
    names = {id(p): n for n, p in network.named_parameters()}
    depth = {n: layer_of(network, n) for n in names.values()}
    top = max(depth.values())
    seen = []
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            seen.append(name)
            assert group["scale"] == pytest.approx(decay ** (top - depth[name])), name
            plain = parameter.ndim < 2 or name in ("pos_embed", "cls_token")
            assert group["weight_decay"] == (0.0 if plain else 0.3), name
    assert sorted(seen) == sorted(names.values())
    head = id(network.get_classifier().weight)
    assert next(g["scale"] for g in groups if any(id(p) == head for p in g["params"])) == 1
    assert initial.architecture.patch == patch


def test_layers_decay_by_default_only_in_vits_that_were_trained_before() -> None:
    def scales(model: str, init: str) -> set[float]:
        chosen = recipe(wanted=wanted(model))
        initial = initial_weights(chosen.wanted)
        network = with_classifier(initial.network, chosen)
        said = replace(chosen, wanted=replace(chosen.wanted, init=init))
        return {round(g["scale"], 6) for g in layer_groups(network, said, initial)}

    assert scales("test_vit", "none") == scales("test_efficientnet", "RUN") == {1.0}
    assert scales("test_vit", "RUN") == {round(0.75**k, 6) for k in range(8)}  # stem, six blocks and norm, head


def test_a_fresh_classifier_is_small_keyed_by_the_seed_and_changes_nothing_else() -> None:
    def built(seed: int) -> Any:
        return with_classifier(initial_weights(wanted()).network, recipe(classes=5, seed=seed))

    torch.manual_seed(1)
    one = built(0)
    torch.manual_seed(2)
    other = built(0)
    assert torch.equal(one.classifier.weight, other.classifier.weight)
    assert not torch.equal(one.classifier.weight, built(1).classifier.weight)
    assert one.classifier.weight.abs().max() <= 0.1 * (6 / (5 + one.num_features)) ** 0.5
    assert one.classifier.out_features == 5 and not one.classifier.bias.any()
    before = initial_weights(wanted()).network.state_dict()
    assert all(torch.equal(one.state_dict()[name], tensor) for name, tensor in before.items())


# Training


@pytest.fixture(scope="module")
def learnt() -> Outcome:
    pixels, truth = stripes()
    return fine_tune(recipe(), pixels, truth, np.arange(32), np.arange(32, 40), 0, 0)


def test_a_toy_is_learnt(learnt: Outcome) -> None:
    pixels, truth = stripes()
    logits = predict(learnt.network, learnt.initial.input, pixels[40:], "cpu")[1]
    assert logits.shape == (8, 2) and logits.dtype == np.float32
    assert (logits.argmax(axis=1) == truth[40:]).all()
    assert not learnt.network.training


def test_the_history_has_a_row_for_each_epoch_and_the_best_is_kept(learnt: Outcome) -> None:
    pixels, truth = stripes()
    assert [row["epoch"] for row in learnt.history] == [1, 2, 3, 4]
    held = [row["held_loss"] for row in learnt.history]
    assert learnt.best_epoch == 1 + int(np.argmin(held))
    logits = torch.from_numpy(predict(learnt.network, learnt.initial.input, pixels[32:40], "cpu")[1])
    by_hand = F.cross_entropy(logits, torch.from_numpy(truth[32:40]))  # balanced classes weigh the same
    assert float(by_hand) == pytest.approx(min(held), rel=1e-4)


def test_equal_keys_train_to_equal_weights_whatever_the_global_seed_and_others_do_not(learnt: Outcome) -> None:
    pixels, truth = stripes()
    rows = np.arange(32), np.arange(32, 40)
    torch.manual_seed(77)
    again = fine_tune(recipe(), pixels, truth, *rows, 0, 0)
    assert equal(again, learnt) and again.history == learnt.history
    assert not equal(
        fine_tune(recipe(epochs=1), pixels, truth, *rows, 0, 1), fine_tune(recipe(epochs=1), pixels, truth, *rows, 0, 0)
    )


def test_stochastic_depth_is_keyed_too() -> None:
    pixels, truth = stripes(16)
    chosen = recipe(wanted=wanted("test_vit", extra=(("drop_path_rate", 0.5),)), epochs=1)
    one, other = (fine_tune(chosen, pixels, truth, np.arange(16), NO_ROWS, "k") for _ in range(2))
    assert equal(one, other)
    plain = fine_tune(recipe(wanted=wanted("test_vit"), epochs=1), pixels, truth, np.arange(16), NO_ROWS, "k")
    assert not equal(one, plain)


def test_only_the_rows_named_are_trained_on() -> None:
    pixels, truth = stripes(24)
    train = np.arange(0, 24, 2)
    rest = np.setdiff1d(np.arange(24), train)
    truth = np.where(np.arange(24) % 4 < 2, 0, 1)
    other_pixels, other_truth = pixels.copy(), truth.copy()
    other_pixels[rest] = 255 - other_pixels[rest]
    other_truth[rest] = 1 - other_truth[rest]
    chosen = recipe(epochs=1)
    one = fine_tune(chosen, pixels, truth, train, NO_ROWS)
    other = fine_tune(chosen, other_pixels, other_truth, train, NO_ROWS)
    assert equal(one, other)
    changed = pixels.copy()
    changed[train[0]] = 255 - changed[train[0]]
    assert not equal(one, fine_tune(chosen, changed, truth, train, NO_ROWS))


def test_held_rows_choose_the_epoch_and_teach_nothing() -> None:
    pixels, truth = stripes(24)
    chosen = recipe(epochs=2)
    train, held = np.arange(16), np.arange(16, 24)
    with_held = fine_tune(chosen, pixels, truth, train, held)
    without = fine_tune(chosen, pixels, truth, train, NO_ROWS, stop_after=with_held.best_epoch)
    assert equal(with_held, without)
    assert [row["loss"] for row in without.history] == [row["loss"] for row in with_held.history][
        : len(without.history)
    ]


def test_stopping_early_is_the_beginning_of_the_whole_schedule() -> None:
    pixels, truth = stripes(16)
    rows = np.arange(16)
    short = fine_tune(recipe(epochs=3), pixels, truth, rows, NO_ROWS, stop_after=1)
    whole = fine_tune(recipe(epochs=3), pixels, truth, rows, NO_ROWS)
    assert short.history == whole.history[:1] and len(whole.history) == whole.best_epoch == 3
    assert not equal(short, fine_tune(recipe(epochs=1), pixels, truth, rows, NO_ROWS))


def test_the_pixels_may_be_read_only_and_stay_as_they_are() -> None:
    pixels, truth = stripes(16)
    before = pixels.copy()
    pixels.flags.writeable = truth.flags.writeable = False
    fine_tune(recipe(epochs=1), pixels, truth, np.arange(12), np.arange(12, 16))
    assert np.array_equal(pixels, before)


def test_fewer_rows_than_a_batch_and_an_absent_class_still_train() -> None:
    pixels, truth = stripes(6)
    outcome = fine_tune(recipe(classes=3, batch_size=32, epochs=1), pixels, truth, np.arange(6), NO_ROWS)
    assert all(torch.isfinite(t).all() for t in weights_of(outcome).values())


# Folds


def labels_of(truth: np.ndarray) -> Labels:
    return Labels(truth, ["ab"[t] for t in truth], [f"patient {at // 2}" for at in range(len(truth))], "group")


def test_the_test_rows_of_a_fold_change_nothing_but_their_own_prediction() -> None:
    pixels, _ = stripes(32)
    truth = np.arange(32) // 2 % 2
    fold = Fold(0, 1, np.arange(24), np.arange(24, 32))
    chosen = recipe(epochs=1)
    honest = finetune_fold(chosen, pixels, labels_of(truth), fold)
    changed, wrong = pixels.copy(), truth.copy()
    changed[28:] = 255 - changed[28:]
    wrong[24:] = 1 - wrong[24:]
    other = finetune_fold(chosen, changed, labels_of(wrong), fold)
    assert other.history == honest.history
    assert np.array_equal(other.probabilities[:4], honest.probabilities[:4])
    assert not np.array_equal(other.probabilities[4:], honest.probabilities[4:])
    assert np.allclose(honest.probabilities.sum(axis=1), 1) and np.array_equal(honest.test, fold.test)


def test_refitting_uses_every_row_and_gives_the_network_s_arrays() -> None:
    pixels, _ = stripes(16)
    truth = np.arange(16) // 2 % 2
    state, features = refit_network(recipe(epochs=2), pixels, labels_of(truth), np.arange(16), 1)
    expected = fine_tune(recipe(epochs=2), pixels, truth, np.arange(16), NO_ROWS, "refit", stop_after=1)
    assert all(np.array_equal(state[name], tensor.numpy()) for name, tensor in weights_of(expected).items())
    reference, _ = predict(expected.network, expected.initial.input, pixels, "cpu")
    assert np.allclose(features, reference, atol=1e-6)


# Several labels


def test_label_weights_are_those_without_over_those_with_and_bounded() -> None:
    truth = np.zeros((1000, 4), dtype=bool)
    truth[:250, 0], truth[:1, 1], truth[:999, 2] = True, True, True
    assert label_weights(truth).tolist() == pytest.approx([3, 20, 1 / 20, 20])


def test_the_loss_of_label_sets_is_the_mean_weighted_entropy_of_each_decision() -> None:
    rng = np.random.default_rng(0)
    truth, logits = rng.random((40, 3)) < 0.3, rng.normal(size=(40, 3)).astype(np.float32)
    found = float(objective_for(truth, 3, 0.1)(torch.from_numpy(logits), truth))
    weight = label_weights(truth).numpy()
    p, soft = 1 / (1 + np.exp(-logits.astype(np.float64))), truth * 0.9 + 0.05
    by_hand = -(weight * soft * np.log(p) + (1 - soft) * np.log(1 - p)).mean()
    assert found == pytest.approx(by_hand, rel=1e-5)
    plain = -(weight * truth * np.log(p) + ~truth * np.log(1 - p)).mean()
    assert float(objective_for(truth, 3, 0.1).plain()(torch.from_numpy(logits), truth)) == pytest.approx(
        plain, rel=1e-5
    )


def test_the_loss_of_one_class_is_torch_s_own_to_the_bit() -> None:
    truth, logits = np.arange(20) % 3, torch.from_numpy(np.random.default_rng(0).normal(size=(20, 3)))
    expected = F.cross_entropy(
        logits.float(), torch.from_numpy(truth), weight=class_weights(truth, 3), label_smoothing=0.1
    )
    assert torch.equal(objective_for(truth, 3, 0.1)(logits, truth), expected)


@pytest.mark.slow
def test_two_findings_in_one_picture_are_both_learnt() -> None:
    pixels, sets = findings(480)
    names, rows = labels_of_sets(sets), np.arange(480)
    groups = [f"patient {at // 4}" for at in range(480)]
    chosen = recipe(wanted=wanted(image_size="32"), classes=3, epochs=14, batch_size=32, lr=4e-3)
    fold = Fold(0, 0, rows[:320], rows[320:])
    result = finetune_fold(chosen, pixels, Labels(sets, names, groups, "group"), fold)
    found, truth = result.probabilities, sets[320:]
    assert found.shape == (160, 3) and not np.allclose(found.sum(axis=1), 1)
    for at in (1, 2):
        assert roc_auc_score(truth[:, at], found[:, at]) > 0.85
    both = truth[:, 1] & truth[:, 2]
    assert ((found[both][:, 1:] >= 0.5).all(axis=1)).mean() > 0.5  # one class per picture could not say it
