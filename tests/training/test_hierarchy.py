"""The tree of classes: its questions, the chain rule, the joint loss, and what the structures learn from whom."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cluster.errors import UsageError
from training.artifact import HIERARCHY, Model, ModelCard, load_model, save_model
from training.configs import TransferConfig
from training.encoder import Architecture
from training.fit import Labels, finetune_fold
from training.hierarchical import at_level
from training.hierarchical_fit import Ground, hierarchical_fold, refit_hierarchy
from training.images import ImagePath
from training.splits import Fold, cross_validation
from training.tasks.finetune import Recipe, started_from, with_classifier
from training.tasks.hierarchy import (
    answered,
    chain_rule,
    flat_tree,
    joint_objective,
    node_temperature,
    paths,
    side_by_side,
    tree_of,
)
from training.tasks.inputs import one_input
from training.tasks.learners import Answer, Learner, Networks, Question, SmallNetworks, classifier_of
from training.tasks.objective import class_weights
from training.tasks.structures import fit_chain
from training.transform import Augmentation, Input
from training.weights import Wanted, initial_weights

CLASSES = ["healthy", "ill/early", "ill/late/mild", "ill/late/severe", "torn/only/left", "torn/only/right"]
STRUCTURES = ["flat", "independent", "transferred", "joint"]
SIZE = 32


# The tree


def test_questions_are_the_parents_of_several_children_at_any_depth() -> None:
    tree = tree_of(CLASSES)
    assert [node.path for node in tree.nodes] == ["", "ill", "ill/late", "torn/only"]
    assert [node.parent for node in tree.nodes] == [-1, 0, 1, 0]
    assert tree.nodes[0].children == ("healthy", "ill", "torn")
    assert tree.nodes[0].branch.tolist() == [0, 1, 1, 1, 2, 2]
    assert tree.nodes[1].branch.tolist() == [-1, 0, 1, 1, -1, -1]
    assert tree.nodes[3].children == ("torn/only/left", "torn/only/right")
    assert [node.level for node in tree.nodes] == [0, 1, 2, 2]
    assert tree.width == 3 + 2 + 2 + 2


def test_a_root_of_one_child_asks_nothing() -> None:
    tree = tree_of(["eye/healthy", "eye/ill"])
    assert [(node.path, node.parent, node.level) for node in tree.nodes] == [("eye", -1, 0)]


def test_classes_that_share_letters_share_no_parent() -> None:
    assert [node.path for node in tree_of(["a/x", "a/y", "ab/x", "ab/y"]).nodes] == ["", "a", "ab"]


parts = st.text("abc", min_size=1, max_size=2)
leaves = st.lists(st.lists(parts, min_size=1, max_size=4).map("/".join), min_size=2, max_size=12, unique=True)


@settings(max_examples=60, deadline=None)
@given(names=leaves, seed=st.integers(0, 99))
def test_the_chain_rule_sums_to_one_at_every_level(names: list[str], seed: int) -> None:
    classes = sorted(n for n in names if not any(other.startswith(n + "/") for other in names))
    if len(classes) < 2:
        return
    tree = tree_of(classes)
    rng = np.random.default_rng(seed)
    conditionals = [rng.dirichlet(np.ones(node.width), 5) for node in tree.nodes]
    found = chain_rule(tree, conditionals)
    depth = max(name.count("/") + 1 for name in classes)
    for level in range(1, depth + 1):
        _, _, summed = at_level(classes, np.zeros(5, dtype=np.int64), found, level)
        np.testing.assert_allclose(summed.sum(axis=1), 1, atol=1e-12)
    for node, said in zip(tree.nodes, conditionals, strict=True):  # what was said of a parent's children is kept
        below = found[:, node.branch >= 0]
        shares = np.stack([found[:, node.branch == child].sum(axis=1) for child in range(node.width)], axis=1)
        np.testing.assert_allclose(shares / below.sum(axis=1, keepdims=True), said, atol=1e-9)
    logarithms = np.log(np.concatenate(conditionals, axis=1)) @ paths(tree)
    np.testing.assert_allclose(np.exp(logarithms), found, atol=1e-12)


def test_a_class_is_as_likely_as_the_product_down_its_path() -> None:
    tree = tree_of(["healthy", "ill/early", "ill/late"])
    laid = np.asarray([[0.3, 0.7, 0.4, 0.6]])
    np.testing.assert_allclose(chain_rule(tree, side_by_side(tree, laid)), [[0.3, 0.28, 0.42]])


def test_a_node_is_calibrated_but_never_certain_of_a_handful() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 3, 4000)
    logits = np.log(0.15 + 0.55 * np.eye(3)[truth])
    flipped = np.where(rng.random(4000) < 0.3, rng.integers(0, 3, 4000), truth)  # right 4 times in 5
    temperature = node_temperature(logits * 5, flipped)
    assert answered(logits * 5, temperature).max(axis=1).mean() == pytest.approx(0.8, abs=0.02)
    sure = np.asarray([[4.0, 0.0], [0.0, 4.0], [4.0, 0.0]])
    assert answered(sure, node_temperature(sure, np.asarray([0, 1, 0]))).max() == pytest.approx(0.8, abs=1e-3)
    assert node_temperature(sure[:0], np.empty(0, dtype=np.int64)) == 1.0


def test_weights_down_a_path_give_every_leaf_the_same_say() -> None:
    """As those of a flat classifier do: else a tree whose branches are uneven starts from another belief."""
    tree, truth = tree_of(CLASSES), np.random.default_rng(0).choice(6, 300, p=[0.4, 0.3, 0.1, 0.1, 0.05, 0.05])
    assert [node.leaves for node in tree.nodes] == [[1, 3, 2], [1, 2], [1, 1], [1, 1]]
    beliefs = []
    for node in tree.nodes:
        own = node.branch[truth]
        own = own[own >= 0]
        say = np.bincount(own, minlength=node.width) * class_weights(own, node.width, node.leaves).numpy()
        beliefs.append((say / say.sum())[None])
    np.testing.assert_allclose(chain_rule(tree, beliefs), np.full((1, 6), 1 / 6), rtol=1e-6)


# The joint loss


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [(), (1.0, 2.0), (0.5, 1.0, 3.0)])
def test_the_joint_loss_equals_a_loop_by_hand(smoothing: float, weights: tuple[float, ...]) -> None:
    rng = np.random.default_rng(0)
    tree = tree_of(CLASSES)
    truth = rng.integers(0, len(CLASSES), 40)
    logits = torch.from_numpy(rng.normal(size=(7, tree.width))).float()
    batch = rng.integers(0, len(CLASSES), 7)
    found = float(joint_objective(tree, truth, weights, smoothing)(logits, batch))
    given_weights = [*weights, *[weights[-1] if weights else 1.0] * (3 - len(weights))]
    expected = 0.0
    for level in range(3):
        total, share = 0.0, 0.0
        for node, columns in zip(tree.nodes, tree.columns, strict=True):
            if node.level != level:
                continue
            below = [node.branch[t] for t in truth if node.branch[t] >= 0]
            counts = np.bincount(below, minlength=node.width)
            shares = [node.leaves[child] if n else 0 for child, n in enumerate(counts)]
            own = [len(below) * s / (sum(shares) * n) if n else 0.0 for s, n in zip(shares, counts, strict=True)]
            for row, label in enumerate(batch):
                answer = int(node.branch[label])
                if answer < 0:
                    continue
                scores = np.log(answered(logits[row : row + 1, columns].numpy(), 1.0)[0])
                even = smoothing / node.width
                total -= (1 - smoothing) * own[answer] * scores[answer]
                total -= even * sum(w * s for w, s in zip(own, scores, strict=True))
                share += own[answer]
        expected += given_weights[level] * total / share if share else 0.0
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_level_of_no_weight_teaches_its_columns_nothing() -> None:
    tree = tree_of(CLASSES)
    truth = np.arange(6).repeat(2)
    logits = torch.zeros(12, tree.width, requires_grad=True)
    joint_objective(tree, truth, (1.0, 0.0), 0.0)(logits, truth).backward()
    assert logits.grad is not None
    assert logits.grad[:, tree.columns[0]].abs().sum() > 0
    assert logits.grad[:, 3:].abs().sum() == 0


@pytest.mark.parametrize("structure", ["joint", "flat"])
def test_held_rows_that_cannot_be_judged_stop_nothing(structure: str) -> None:
    """They are of a class that nobody was trained on: their loss is not 0, and the last epoch counts."""
    features, truth, _ = toy()
    train, held = np.flatnonzero(truth < 2), np.flatnonzero(truth == 4)
    tree = flat_tree(CLASSES) if structure == "flat" else tree_of(CLASSES)
    objective = joint_objective(tree, truth[train], (), 0.1)
    assert torch.isnan(objective.plain()(torch.zeros(len(held), tree.width), truth[held]))
    chain = fit_chain(structure, small(features, epochs=7), CLASSES, truth, train, held, (0,))
    assert chain.epochs[0] == 7


def test_a_batch_that_no_weighted_level_reaches_teaches_nothing_and_breaks_nothing() -> None:
    tree, healthy = tree_of(CLASSES), np.zeros(3, dtype=np.int64)
    logits = torch.zeros(3, tree.width, requires_grad=True)
    objective = joint_objective(tree, np.arange(6), (0.0, 1.0), 0.1)
    objective(logits, healthy).backward()
    assert logits.grad is not None and not logits.grad.any()
    assert torch.isnan(objective.plain()(logits, healthy))


# What learns from whom


def toy(rows: int = 96, seed: int = 0) -> tuple[np.ndarray, np.ndarray, Labels]:
    """Features [N, 8] in which every class has a place of its own, and 16 groups."""
    rng = np.random.default_rng(seed)
    truth = np.arange(rows) % len(CLASSES)
    features = (np.eye(8)[truth] * 3 + rng.normal(0, 0.4, (rows, 8))).astype(np.float32)
    groups = [f"g{row // 6}" for row in range(rows)]
    return features, truth, Labels(truth, [CLASSES[t] for t in truth], groups, "group")


def stripes(rows: int = 72) -> tuple[np.ndarray, np.ndarray, Labels]:
    """Pictures of lying or standing, wide or narrow stripes: classes in two levels, of 18 groups."""
    names = ["lying/narrow", "lying/wide", "standing/narrow", "standing/wide"]
    rng = np.random.default_rng(0)
    truth = np.arange(rows) % 4
    waves = [80 * np.sin(np.arange(SIZE) * pace) for pace in (1.4, 0.45)]
    clean = [
        np.tile(waves[t % 2][:, None] if t < 2 else waves[t % 2][None], (SIZE, 1) if t >= 2 else (1, SIZE))
        for t in truth
    ]
    pixels = np.clip(np.stack(clean) + rng.normal(128, 10, (rows, SIZE, SIZE)), 0, 255).astype(np.uint8)[..., None]
    return pixels, truth, Labels(truth, [names[t] for t in truth], [f"g{row // 4}" for row in range(rows)], "group")


def recipe(model: str = "test_efficientnet", epochs: int = 3, lr: float = 3e-3) -> Recipe:
    wanted = Wanted("none", "auto", model, str(SIZE), 0, "cpu", 1, (0.5,), (0.2,), (("drop_path_rate", 0.0),))
    return Recipe(wanted, 4, epochs, 8, lr, 0.05, None, 0.1, Augmentation(0.8, False, False, 0.1), 0, "cpu", 1)


def small(features: np.ndarray, epochs: int = 30) -> SmallNetworks:
    return SmallNetworks(features, epochs, 16, 1e-2, 0.05, 0.1, 0)


def networks(pixels: np.ndarray, **changes: Any) -> Networks:
    made = recipe(**changes)
    return Networks(made, pixels, initial_weights(made.wanted).input)


def ground(kind: str, structure: str, stack: str = "none", **changes: Any) -> tuple[Ground, np.ndarray, Fold]:
    learner: Learner
    if kind == "features":
        features, _, labels = toy()
        learner, shown = small(features), features
    else:
        pixels, _, labels = stripes()
        learner, shown = networks(pixels, **changes), pixels
    classes = tuple(sorted(set(labels.names)))
    made = Ground(learner, labels, one_input(len(shown)), classes, structure, kind, (), stack, 0)
    fold = cross_validation(labels.names, labels.groups, folds=3, repeats=1, split="group", seed=0)[0]
    return made, shown, fold


@dataclass
class Recorder:
    """A learner that notes what it was asked."""

    learner: Learner
    smoothing: float = 0.1
    asked: list[Question] = field(default_factory=list)
    given: list[Answer] = field(default_factory=list)

    def fit(self, question: Question) -> Answer:
        self.asked.append(question)
        self.given.append(self.learner.fit(question))
        return self.given[-1]

    def logits(self, module: nn.Module, rows: np.ndarray) -> np.ndarray:
        return self.learner.logits(module, rows)

    def seen(self, module: nn.Module, rows: np.ndarray) -> np.ndarray:
        return self.learner.seen(module, rows)


def recorded(structure: str, classes: Sequence[str] = CLASSES) -> Recorder:
    features, truth, _ = toy()
    made = Recorder(small(features))
    fit_chain(structure, made, classes, truth, np.arange(72), np.arange(72, 96), (0,))
    return made


def test_a_transferred_child_starts_from_its_parents_final_weights_but_the_classifier() -> None:
    made = recorded("transferred")
    assert made.asked[0].start is None
    for child, parent in [(1, 0), (2, 1), (3, 0)]:
        final = made.given[parent].module.state_dict()
        first = made.learner.first(made.asked[child]).state_dict()  # type: ignore[attr-defined]
        for name, tensor in final.items():
            if not name.startswith("classifier."):
                torch.testing.assert_close(first[name], tensor, rtol=0, atol=0)
        assert first["classifier.weight"].shape[0] == made.asked[child].outputs
        assert first["classifier.weight"].abs().max() < 0.1


def test_independent_nodes_start_alike_and_see_their_own_rows_alone() -> None:
    made = recorded("independent")
    features, truth, _ = toy()
    tree = tree_of(CLASSES)
    for node, question in zip(tree.nodes, made.asked, strict=True):
        assert question.start is None
        assert set(truth[question.train]) == set(np.flatnonzero(node.branch >= 0))
        assert set(question.held) <= set(range(72, 96))
    firsts = [small(features).first(question).state_dict() for question in made.asked]
    for first in firsts[1:]:
        torch.testing.assert_close(first["trunk.weight"], firsts[0]["trunk.weight"], rtol=0, atol=0)


@pytest.mark.parametrize("model", ["test_efficientnet", "test_vit"])
def test_a_network_starts_from_another_in_all_layers_but_its_classifier(model: str) -> None:
    made = recipe(model)
    parent = with_classifier(initial_weights(made.wanted).network, replace(made, classes=2))
    with torch.no_grad():
        for parameter in parent.parameters():
            parameter.add_(1)
    child = with_classifier(initial_weights(made.wanted).network, replace(made, classes=3))
    own = {name: tensor.clone() for name, tensor in child.state_dict().items()}
    names = {id(tensor) for tensor in classifier_of(child).parameters()}
    started_from(child, parent.state_dict())
    for name, tensor in child.state_dict(keep_vars=True).items():
        source = own if id(tensor) in names else parent.state_dict()
        torch.testing.assert_close(tensor.detach(), source[name], rtol=0, atol=0)
    with pytest.raises(ValueError, match="of another network"):
        started_from(child, {"strange": torch.zeros(1)})


def test_a_flat_network_is_what_fine_tuning_makes() -> None:
    made, pixels, fold = ground("network", "flat", epochs=1)
    ours = hierarchical_fold(made, fold)
    theirs = finetune_fold(recipe(epochs=1), pixels, made.labels, fold)
    (temperature,) = ours.more["temperatures"].ravel()
    sharpened = theirs.probabilities ** (1 / temperature)
    np.testing.assert_allclose(ours.probabilities, sharpened / sharpened.sum(axis=1, keepdims=True), atol=1e-6)
    np.testing.assert_allclose(ours.distances, theirs.distances, atol=1e-6)
    assert ours.inner_rows.tolist() == theirs.inner_rows.tolist()


def test_a_node_without_two_answers_to_learn_from_says_what_was_true_of_its_rows() -> None:
    features, truth, _ = toy()
    train = np.flatnonzero((truth != 2) & (truth != 3) & (truth != 5))  # ill/late: none; torn: left alone
    chain = fit_chain("transferred", small(features), CLASSES, truth, train, train[:0], (0,))
    assert [head.module for head in chain.heads] == [0, -1, -1, -1]
    said = chain.answers([small(features).logits(module, np.arange(4)) for module in chain.modules], 4)
    _, ill, late, torn = side_by_side(tree_of(CLASSES), said)
    assert ill[0] == pytest.approx([17 / 18, 1 / 18])
    assert late[0] == pytest.approx([0.5, 0.5])
    assert torn[0] == pytest.approx([17 / 18, 1 / 18])


def test_a_child_of_a_node_without_a_module_starts_from_the_one_above() -> None:
    features, truth, _ = toy()
    train = np.flatnonzero(truth != 1)  # below `ill` there is `ill/late` alone, which has two children
    made = Recorder(small(features))
    chain = fit_chain("transferred", made, CLASSES, truth, train, train[:0], (0,))
    assert [head.module for head in chain.heads] == [0, -1, 1, 2]
    start = made.asked[1].start
    assert start is not None
    torch.testing.assert_close(start["trunk.weight"], made.given[0].module.state_dict()["trunk.weight"])


# The contract of every structure and learner

CONTRACT = [
    *[("features", structure, "none") for structure in STRUCTURES],
    *[("features", "transferred", stack) for stack in ("forest", "logistic")],
    *[("network", structure, "none") for structure in STRUCTURES],
]


@pytest.mark.parametrize(("kind", "structure", "stack"), CONTRACT)
def test_every_structure_learns_and_its_artifact_answers_as_it_did(
    kind: str, structure: str, stack: str, tmp_path: Path
) -> None:
    made, shown, fold = ground(kind, structure, stack, epochs=16)
    result = hierarchical_fold(made, fold)
    said, truth = result.probabilities, made.labels.truth
    assert np.isfinite(said).all() and np.isfinite(result.inner_probabilities).all()
    np.testing.assert_allclose(said.sum(axis=1), 1, atol=1e-6)
    right = (said.argmax(axis=1) == truth[fold.test]).mean()
    enough = 0.75 if kind == "features" else 0.45  # by chance 1 in 6, or in 4
    assert right > enough
    assert not {made.labels.groups[r] for r in result.inner_rows} & {made.labels.groups[r] for r in fold.test}
    epochs = np.rint(result.more["epochs"]).astype(int)
    content, weights, _ = refit_hierarchy(made, fold.train, epochs, result.more["temperatures"])
    model = _kept(made, content, weights, tmp_path / "model")
    assert model.hierarchy is not None
    again = refit_hierarchy(made, fold.train, epochs, result.more["temperatures"])
    assert again[0] == content  # the same twice, byte by byte
    chains, rows = model.hierarchy.chains, fold.test
    answers = [chain.answers([made.learner.logits(m, rows) for m in chain.modules], len(rows)) for chain in chains]
    expected = model.hierarchy.probabilities(answers)
    found = (
        model.probabilities(shown[rows]) if kind == "network" else model.classify(shown[rows])
    )  # what evaluate, predict and serve ask
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert (found.argmax(axis=1) == truth[rows]).mean() > enough
    assert model.needs_pixels == (kind == "network" and structure in {"independent", "transferred"})


def _kept(made: Ground, content: bytes, weights: dict[str, np.ndarray], folder: Path) -> Model:
    name, size = "test_efficientnet", SIZE
    architecture = Architecture(name, size, size, 1)
    network = architecture.build(0)
    wanted = Input(size, size, 1, (0.5,), (0.2,))
    if made.kind == "network":
        started_from(network, {n: torch.from_numpy(v.copy()) for n, v in weights.items()})
        assert isinstance(made.learner, Networks)
        wanted = made.learner.input
    card = ModelCard(architecture, ImagePath(size, size), wanted, head="hierarchy", classes=made.classes)
    save_model(folder, card, network, files=[(HIERARCHY, content)])
    return load_model(folder)


def test_an_artifact_that_older_code_would_misread_is_one_of_a_newer_format(tmp_path: Path) -> None:
    made, _, fold = ground("features", "flat")
    content, weights, _ = refit_hierarchy(made, fold.train, np.asarray([[2]]), np.ones((1, 1)))
    model = _kept(made, content, weights, tmp_path / "model")
    assert model.card.as_dict()["format"] == 2
    (tmp_path / "model" / HIERARCHY).write_bytes(content[:-1])
    with pytest.raises(UsageError, match="missing or changed"):
        load_model(tmp_path / "model")


@pytest.mark.parametrize(
    ("structure", "stack"),
    [*((structure, "none") for structure in STRUCTURES), ("flat", "logistic"), ("joint", "forest")],
)
def test_the_labels_of_a_folds_test_side_change_nothing_of_what_is_said_of_it(structure: str, stack: str) -> None:
    made, _, fold = ground("features", structure, stack)
    truth = made.labels.truth.copy()
    truth[fold.test] = (truth[fold.test] + 1) % len(CLASSES)
    other = replace(made, labels=replace(made.labels, truth=truth, names=[CLASSES[t] for t in truth]))
    ours, theirs = hierarchical_fold(made, fold), hierarchical_fold(other, fold)
    np.testing.assert_array_equal(ours.probabilities, theirs.probabilities)
    np.testing.assert_array_equal(ours.inner_probabilities, theirs.inner_probabilities)


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "linear", "structure": "joint"}, "--structure joint: needs --task hierarchical"),
        ({"stack": "forest"}, "--stack forest: needs --task hierarchical"),
        ({"learner": "features"}, "--learner features: needs --task hierarchical"),
        ({"task": "hierarchical", "level_weights": (1.0,)}, "--level-weights .*: needs --structure joint"),
        ({"task": "hierarchical", "structure": "joint", "level_weights": (0.0,)}, "--level-weights .*: none may be"),
        (
            {"task": "hierarchical", "inputs": ("oct", "fundus")},
            "--inputs .*: a case is what is judged: add --unit case",
        ),
        ({"task": "hierarchical", "input_column": "kind"}, "--input-column kind: needs --inputs"),
        ({"task": "hierarchical", "multi_label": True}, "--multi-label True: --task hierarchical judges one class"),
        (
            {"task": "hierarchical", "unit": "case", "pooling": "attention"},
            "--pooling attention: needs frozen features",
        ),
    ],
)
def test_a_flag_that_means_nothing_is_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        TransferConfig("d", out="o", **changes)
    assert len(str(caught.value).splitlines()) == 1


def test_a_flat_tree_has_every_class_below_its_root() -> None:
    (node,) = flat_tree(CLASSES).nodes
    assert node.children == tuple(CLASSES) and node.branch.tolist() == list(range(6))
