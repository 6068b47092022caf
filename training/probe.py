"""What an encoder has learnt so far, read from its frozen features while it trains: do images of one class lie
together, how many directions are in use, has it collapsed? No Ray, no file; whoever trains decides when to ask."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from cluster.errors import UsageError
from training import keyed
from training.artifact import features_of
from training.dataset import Dataset, Selection, own_group
from training.metrics import balanced_accuracy, confusion
from training.splits import Fold, cross_validation
from training.tasks.frozen import logistic
from training.transform import Input

LIMIT = 384
"""Labelled images looked at, at most."""
POOL_LIMIT = 192
"""Images of the pretraining pool whose features give the effective rank, at most."""
FOLDS = 3
NEIGHBOURS = 10
TEMPERATURE = 0.07
"""Of the neighbours' votes, as in Wu et al. (CVPR 2018) and Caron et al. (ICCV 2021)."""
REGULARISATION = 0.01
"""C of the linear probe: fixed, since a search at every checkpoint would cost more than the rest of the probe."""

SMALLEST_SPREAD = 1e-4
SMALLEST_RANK, SMALLEST_RANK_SHARE = 2.0, 0.01
FEWEST_TO_JUDGE = 32
"""See `collapsed`."""

SCORES = ("knn_balanced_accuracy", "linear_balanced_accuracy", "chance")
SCALARS = (*SCORES, "effective_rank", "feature_spread")
"""What is worth a curve, of the keys that `probe` gives."""


@dataclass(frozen=True, eq=False)
class ProbeData:
    """The images that every probe of a run is made on, chosen once.

    Without usable labels `labelled`, `truth`, `groups` and `folds` are empty, and only the pool is looked at.
    """

    labelled: np.ndarray
    """Stored pixels uint8 [N, H, W, C]."""
    truth: np.ndarray
    """Class numbers [N]."""
    groups: np.ndarray
    """Group numbers [N]."""
    classes: tuple[str, ...]
    folds: tuple[Fold, ...]
    """Each of the N images is tested once; no group is on both sides."""
    pool: np.ndarray
    """Stored pixels uint8 [M, H, W, C] of images that pretraining sees."""
    transductive: bool
    """Whether the labelled images lie in the pretraining pool; otherwise not even their groups do."""

    @property
    def sentence(self) -> str:
        """What was measured on, and what that means, for a reader who does not program."""
        if not len(self.truth):
            return (
                f"Too few labelled groups for a score (two classes with {FOLDS} groups each are needed), so only the "
                f"features of {len(self.pool):,} images of the pretraining pool were looked at."
            )
        what = (
            f"Scores are of {len(self.truth):,} labelled images of {len(np.unique(self.groups)):,} groups and "
            f"{len(self.classes)} classes, always the same ones; no group (patient, slide) judges itself. With so few "
            f"groups, differences below about {len(np.unique(self.groups)) ** -0.5:.2f} may be chance."
        )
        if self.transductive:
            return what + (
                " The encoder was pretrained on these images too, without their labels, so the scores say whether it "
                "learns, not how well it would do on new patients."
            )
        return what + " Neither they nor other images of their groups are in the pretraining pool."


# What is looked at


def probe_data(dataset: Dataset, pool: Selection, seed: int) -> ProbeData:
    """What the probes of a run on `pool`, rows of `dataset`, are made on: a pure function of the arguments.

    Labelled images come from the pool; where it has too few, from groups of the dataset that are not in it. Those with
    several labels are passed over.
    """
    rows = keyed.generator("probe pool", seed).permutation(len(pool))[:POOL_LIMIT]
    pixels = dataset.pixels(pool.take(np.sort(rows)))
    for candidates, transductive in ((pool, True), (_outside(dataset, pool), False)):
        chosen = _choose(candidates, seed)
        if len(chosen):
            return _with_labels(dataset, candidates.take(chosen), pixels, transductive, seed)
    none = np.empty(0, dtype=np.int64)
    return ProbeData(pixels[:0], none, none, (), (), pixels, transductive=False)


def _outside(dataset: Dataset, pool: Selection) -> Selection:
    """The ok rows whose group has no image in the pool."""
    everything, inside = dataset.select(), set(_groups(pool))
    return everything.take([at for at, group in enumerate(_groups(everything)) if group not in inside])


def _groups(selection: Selection) -> list[str]:
    pairs = zip(selection.column("group"), selection.column("image_id"), strict=True)
    return [own_group(group, image) for group, image in pairs]


def _choose(selection: Selection, seed: int) -> np.ndarray:
    """Rows of at most `LIMIT` images with one label each, in order; none where they allow no grouped folds."""
    names, groups = _texts(selection.column("label")), _texts(_groups(selection))
    rows = np.flatnonzero([bool(name) and "|" not in name for name in names.tolist()])
    rows = rows[choose_rows(names[rows], groups[rows], seed)]
    try:
        _folds(names[rows], groups[rows], seed)
    except UsageError:  # classes that share all their groups
        return np.asarray(rows[:0])
    return np.asarray(rows)


def _texts(values: Sequence[str]) -> np.ndarray:
    return np.asarray(values, dtype=object).astype(str)


def choose_rows(names: np.ndarray, groups: np.ndarray, seed: int) -> np.ndarray:
    """Rows, in order, of at most `LIMIT` images: classes as equal in number as they can be, groups whole.

    A group larger than a class's share of a fold is thinned, else one slide could be all there is. Classes with fewer
    than `FOLDS` groups are left out; nothing remains where only one class would.
    """
    allowed = _of_enough_groups(names, groups)
    names, groups = names[allowed], groups[allowed]
    if not len(names):
        return allowed
    classes, c = np.unique(names, return_inverse=True)
    units, g = np.unique(groups, return_inverse=True)
    generator = keyed.generator("probe labelled", seed)
    shuffled, visits = generator.permutation(len(names)), generator.permutation(len(units))
    share = max(1, LIMIT // (FOLDS * len(classes)))
    members = [part[:share] for part in _split(shuffled, g[shuffled], len(units))]
    waiting = [[int(unit) for unit in visits if (c[members[unit]] == k).any()] for k in range(len(classes))]
    counts, taken = np.zeros(len(classes), dtype=np.int64), set[int]()
    while any(waiting) and counts.sum() < LIMIT:
        smallest = min((k for k in range(len(classes)) if waiting[k]), key=lambda k: int(counts[k]))
        unit = waiting[smallest].pop()
        if unit not in taken and counts.sum() + len(members[unit]) <= LIMIT:
            taken.add(unit)
            counts += np.bincount(c[members[unit]], minlength=len(classes))
    chosen = np.sort(np.concatenate([members[unit] for unit in sorted(taken)]))
    return np.asarray(allowed[chosen[_of_enough_groups(names[chosen], groups[chosen])]])


def _of_enough_groups(names: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """The rows of classes with at least `FOLDS` groups; none where that leaves fewer than two classes."""
    counts = Counter(name for name, _ in set(zip(names.tolist(), groups.tolist(), strict=True)))
    enough = {name for name, count in counts.items() if count >= FOLDS}
    return np.flatnonzero([name in enough for name in names.tolist()] if len(enough) > 1 else [])


def _split(values: np.ndarray, part: np.ndarray, parts: int) -> list[np.ndarray]:
    """`values` [N] by the number of their part [N], in their order."""
    order = np.argsort(part, kind="stable")
    return np.split(values[order], np.cumsum(np.bincount(part, minlength=parts))[:-1])


def _folds(names: np.ndarray, groups: np.ndarray, seed: int) -> tuple[Fold, ...]:
    if not len(names):
        return ()
    return tuple(cross_validation(names.tolist(), groups.tolist(), folds=FOLDS, repeats=1, split="group", seed=seed))


def _with_labels(dataset: Dataset, labelled: Selection, pool: np.ndarray, transductive: bool, seed: int) -> ProbeData:
    names, groups = _texts(labelled.column("label")), _texts(_groups(labelled))
    classes, truth = np.unique(names, return_inverse=True)
    return ProbeData(
        labelled=dataset.pixels(labelled),
        truth=truth,
        groups=np.unique(groups, return_inverse=True)[1],
        classes=tuple(str(name) for name in classes),
        folds=_folds(names, groups, seed),
        pool=pool,
        transductive=transductive,
    )


# Looking


def probe(network: nn.Module, wanted: Input, data: ProbeData) -> dict[str, Any]:
    """Scores of a timm network's pooled features; the network, its mode and all random states are as before.

    Deterministic on one machine and number of threads. Runs on the network's own device, in torch's number of threads:
    8 s of one thread for `vit_tiny` at 96 px, measured on cores that were busy with other things as well.

    Returns:
        `knn_balanced_accuracy`, `linear_balanced_accuracy` and `chance` (one over the number of classes), where there
        are labels; `effective_rank`, `feature_spread` and `feature_dimension` of the pool; and `collapsed`.
    """
    device = next(network.parameters()).device
    with _evaluating(network):
        pool = features_of(network, wanted, data.pool, device)
        labelled = features_of(network, wanted, data.labelled, device) if len(data.truth) else pool[:0]
    return judge(pool, labelled, data)


def judge(pool: np.ndarray, labelled: np.ndarray, data: ProbeData) -> dict[str, Any]:
    """What `probe` returns, of features [M, D] of the pool and [N, D] of the labelled images."""
    finite = bool(np.isfinite(pool).all() and np.isfinite(labelled).all())
    found: dict[str, Any] = {}
    if len(data.truth) and finite:
        count = len(data.classes)
        predicted = knn(labelled, data.truth, data.groups, count), linear(labelled, data.truth, data.folds)
        for name, answer in zip(SCORES, predicted, strict=False):
            found[name] = float(balanced_accuracy(confusion(data.truth, answer, count)))
        found["chance"] = 1 / count
    centred = pool.astype(np.float64) - pool.mean(axis=0, dtype=np.float64)
    spread = float(np.linalg.norm(centred) / max(float(np.linalg.norm(pool)), 1e-12)) if finite else 0.0
    rank = effective_rank(centred) if spread > 1e-6 else 0.0  # below, the differences are rounding
    found |= {"effective_rank": rank, "feature_spread": spread, "feature_dimension": int(pool.shape[1])}
    return found | {"collapsed": not finite or collapsed(rank, spread, pool.shape[1], len(pool))}


@contextlib.contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; every part's own mode after."""
    before = [(part, part.training) for part in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for part, mode in before:
            part.training = mode


def knn(features: np.ndarray, truth: np.ndarray, groups: np.ndarray, classes: int) -> np.ndarray:
    """Class [N] of each row of features [N, D] by its 10 nearest rows of *other groups*, by cosine.

    Votes weigh exp(similarity / 0.07), as in Wu et al., CVPR 2018 (there k = 200, of a whole training set). The
    estimator of `training.tasks.frozen` cannot leave out other rows for each row that it is asked about.
    """
    unit = features.astype(np.float64)
    unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
    similarity = unit @ unit.T
    similarity[groups[:, None] == groups[None, :]] = -np.inf
    count = min(NEIGHBOURS, len(features))
    nearest = np.argsort(-similarity, axis=1, kind="stable")[:, :count]
    weights = np.exp((np.take_along_axis(similarity, nearest, axis=1) - 1) / TEMPERATURE)  # 0 for the own group
    votes = np.zeros((len(features), classes))
    np.add.at(votes, (np.arange(len(features))[:, None], truth[nearest]), weights)
    return np.asarray(votes.argmax(axis=1))


def linear(features: np.ndarray, truth: np.ndarray, folds: Sequence[Fold]) -> np.ndarray:
    """Class [N] of each row by a logistic regression on standardised features of the folds that it is not in."""
    predicted = np.empty(len(truth), dtype=np.int64)
    for fold in folds:
        model = logistic(REGULARISATION).fit(features[fold.train], truth[fold.train])
        predicted[fold.test] = model.predict(features[fold.test])
    return predicted


def effective_rank(features: np.ndarray) -> float:
    """How many directions the rows [N, D] spread over: exp of the entropy of the normalised singular values.

    RankMe of Garrido et al., ICML 2023, equation 2, after Roy and Vetterli, 2007; 1 for rank one, D for rows that fill
    all directions alike, 0 for rows of zeros. At most min(N, D). Without the paper's 1e-7 added to every share, which
    only guards its logarithm.
    """
    values = np.linalg.svd(np.asarray(features, dtype=np.float64), compute_uv=False)
    if not values.sum() > 0:
        return 0.0
    shares = values / values.sum()
    shares = shares[shares > 0]
    return float(np.exp(-(shares * np.log(shares)).sum()))


def collapsed(rank: float, spread: float, dimension: int, images: int) -> bool:
    """Whether an encoder gives all images nearly the same features.

    Either the features differ by less than 1e-4 of their own length (one point for all images; healthy autoencoders dip
    to 1e-2 in their first steps, a constant gives 1e-7 by rounding), or what differs lies along fewer than two
    directions, or 1 % of the dimension where that is more (a line for all images; untrained and trained ones had 20 to
    66 here).
    `effective_rank` is of features less their mean, unlike in the paper: pooled features of a transformer share a large
    constant part, which would count as the one direction there is, in healthy encoders too. Fewer than 32 images are
    not judged.
    """
    if images < FEWEST_TO_JUDGE:
        return False
    return spread < SMALLEST_SPREAD or rank < max(SMALLEST_RANK, SMALLEST_RANK_SHARE * dimension)


# Telling


def alarm(found: dict[str, Any]) -> str | None:
    """One line for the log and the terminal where the encoder has collapsed, else None. Takes a probe's row, too."""
    if not found["collapsed"]:
        return None
    at = f" at step {found['probed_step']:,}" if "probed_step" in found else ""
    return (
        f"the encoder has collapsed{at}: its features of different images are nearly the same (effective rank "
        f"{found['effective_rank']:.1f} of {found['feature_dimension']}, spread {found['feature_spread']:.1e}); "
        "stop, and start again with a lower --lr or another --method"
    )


def row_of(step: int, found: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The row of `metrics.jsonl` for a probe of the encoder as it was after `step`; without `step`, which is a step's
    own."""
    return {"probed_step": step, **found, **more}


def probes_in(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The probes among the rows of `metrics.jsonl`, by step; of one that was made again after a restart, the last."""
    found = {row["probed_step"]: row for row in rows if "probed_step" in row}
    return [found[step] for step in sorted(found)]
