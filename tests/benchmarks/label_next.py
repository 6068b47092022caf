"""`python -m tests.benchmarks.label_next`: what `suggest` gains over chance on the real sets, as Markdown for README.

Labelling is played back on sets whose labels are known: a few labelled groups, then rounds of images whose labels are
revealed because a strategy asked for them; each time a linear probe on frozen ImageNet features is fitted again and
judged on groups that are never asked about. Strategies of one repeat share the split and the first labels. Second part:
labels flipped on purpose, and how many of them the list of labels that look wrong finds.

Features come from the runs of `make results`. Every repeat is kept, so an interrupted benchmark goes on. Arguments:
names of sets, `gain` or `wrong` for one part only, names of `SCENARIOS` for those only, `--repeats N`.
"""

from __future__ import annotations

import hashlib
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import numpy as np
from safetensors.numpy import load_file
from scipy.stats import t as student
from sklearn.cluster import KMeans

from tests.benchmarks.results import CACHE, DATA, STUDIES, run, transfers
from training import calibration, choose, doubt
from training.choose import Budget
from training.dataset import Dataset
from training.metrics import balanced_accuracy, confusion
from training.splits import cross_validation, hold_out
from training.tasks.frozen import logistic

KEPT = CACHE / "label-next"
VERSION = 1
"""Raised whenever what is measured here changes: repeats kept from before are then measured again."""
REPEATS = 20
HELD = 1 / 3
"""Share of the groups that judge."""
REGULARISATION = 0.01
CHANCE = "random images"
FLIPS, FLIP_REPEATS = (0.05, 0.10), 20


@dataclass(frozen=True)
class Known:
    """The labelled images of a set: features [N, D], class and group numbers [N]."""

    features: np.ndarray
    truth: np.ndarray
    groups: np.ndarray
    classes: list[str]

    def texts(self) -> tuple[list[str], list[str]]:
        return [self.classes[y] for y in self.truth], [str(g) for g in self.groups]


def known(name: str) -> Known:
    """The set's features, computed by its linear probe where they are not there yet."""
    command = next(c for label, task, _, c in transfers(name) if (label, task) == ("ImageNet", "linear"))
    out = Path(command[command.index("--out") + 1])
    if not (out / "features.safetensors").exists():
        run(["ingest", str(DATA / STUDIES[name].index), "--out", str(CACHE / name), *STUDIES[name].ingest])
        run(command)
    flags = STUDIES[name].transfer
    where = tuple(value for flag, value in pairwise(flags) if flag == "--where")
    selection = Dataset.open(CACHE / name).select(where, labelled=True)
    features = load_file(out / "features.safetensors")["features"]
    classes, truth = np.unique(selection.column("label"), return_inverse=True)
    groups = np.unique(selection.column("group"), return_inverse=True)[1]
    assert len(features) == len(truth), "features of another selection"
    return Known(features, truth, groups, [str(c) for c in classes])


# What a label is worth


@dataclass(frozen=True)
class Round:
    """What a strategy may look at: the labels of `labelled` have been seen, those of `pool` have not."""

    data: Known
    labelled: np.ndarray
    pool: np.ndarray
    probabilities: np.ndarray | None
    count: int
    seed: int

    @property
    def budget(self) -> Budget:
        return Budget(self.count, 1, self.seed)

    @property
    def generator(self) -> np.random.Generator:
        return np.random.default_rng(self.seed)

    @property
    def doubt(self) -> np.ndarray:
        assert self.probabilities is not None
        return choose.uncertainty(self.probabilities)

    def one_of_each_group(self, rows: np.ndarray) -> np.ndarray:
        """`rows`, in order, less those of a group that was there before."""
        _, first = np.unique(self.data.groups[rows], return_index=True)
        return np.asarray(rows[np.sort(first)])


def unit(features: np.ndarray) -> np.ndarray:
    return np.asarray(features / np.linalg.norm(features, axis=1, keepdims=True))


def random_images(now: Round) -> np.ndarray:
    return now.generator.permutation(now.pool)[: now.count]


def random_groups(now: Round) -> np.ndarray:
    """One image of each of some groups, every group as likely as any other."""
    shuffled = now.generator.permutation(now.pool)
    groups = now.generator.permutation(np.unique(now.data.groups[now.pool]))[: now.count]
    return np.asarray([shuffled[now.data.groups[shuffled] == group][0] for group in groups])


def most_uncertain(now: Round) -> np.ndarray:
    """The smallest margins between the two likeliest classes, one image of each group."""
    return now.one_of_each_group(now.pool[np.argsort(-now.doubt[now.pool], kind="stable")])[: now.count]


def uncertain_and_different(now: Round) -> np.ndarray:
    """Of the 10 x count most uncertain, the nearest to each centre of a k-means weighted by it: Zhdanov, 2019."""
    order = now.one_of_each_group(now.pool[np.argsort(-now.doubt[now.pool], kind="stable")])
    shortlist = order[: 10 * now.count]
    if len(shortlist) <= now.count:
        return shortlist
    vectors, weights = unit(now.data.features[shortlist]), np.maximum(now.doubt[shortlist], 1e-6)
    fitted = KMeans(now.count, n_init=1, random_state=now.seed).fit(vectors, sample_weight=weights)
    far = np.linalg.norm(vectors - fitted.cluster_centers_[fitted.labels_], axis=1)
    nearest = np.lexsort((far, fitted.labels_))
    return np.asarray(shortlist[nearest[np.unique(fitted.labels_[nearest], return_index=True)[1]]])


def typical(now: Round) -> np.ndarray:
    return choose.typical(now.data.features, now.labelled, now.pool, now.data.groups, now.budget)[0]


def k_centre(now: Round) -> np.ndarray:
    """Greedy k-centre of Sener and Savarese, ICLR 2018, algorithm 1."""
    vectors, pool, groups = unit(now.data.features), now.pool, now.data.groups
    far = np.full(len(pool), 4.0)
    if len(now.labelled):
        far = (2 - 2 * vectors[pool] @ vectors[now.labelled].T).min(axis=1)
    chosen = list[int]()
    while len(chosen) < now.count and (far > -1).any():
        best = int(far.argmax()) if chosen or len(now.labelled) else int(now.generator.integers(len(pool)))
        chosen.append(int(pool[best]))
        far = np.minimum(far, 2 - 2 * vectors[pool] @ vectors[pool[best]])
        far[groups[pool] == groups[pool[best]]] = -2
    return np.asarray(chosen)


def badge(now: Round) -> np.ndarray:
    """k-means++ over gradient embeddings of Ash et al., ICLR 2020: (p - onehot(argmax p)) x features, never built."""
    assert now.probabilities is not None
    pool, groups = now.pool, now.data.groups
    error = now.probabilities[pool].copy()
    error[np.arange(len(pool)), error.argmax(axis=1)] -= 1
    vectors, length = unit(now.data.features[pool]), (error**2).sum(axis=1)
    far, generator, chosen = length.copy(), now.generator, list[int]()
    while len(chosen) < now.count and far.sum() > 0:
        best = int(generator.choice(len(pool), p=far / far.sum())) if chosen else int(far.argmax())
        chosen.append(int(pool[best]))
        distance = length + length[best] - 2 * (error @ error[best]) * (vectors @ vectors[best])
        far = np.minimum(far, np.maximum(distance, 0))
        far[groups[pool] == groups[pool[best]]] = 0
    return np.asarray(chosen)


STRATEGIES: dict[str, Callable[[Round], np.ndarray]] = {
    CHANCE: random_images,
    "random groups": random_groups,
    "most uncertain": most_uncertain,
    "uncertain and different": uncertain_and_different,
    "typical (suggest)": typical,
    "k-centre": k_centre,
    "BADGE": badge,
}
BLIND = (CHANCE, "random groups", "typical (suggest)", "k-centre")
"""Those that need no classes."""


@dataclass(frozen=True)
class Scenario:
    """How labelling begins and goes on: groups labelled at the start, images per round, rounds."""

    title: str
    start: int
    count: int
    rounds: int
    strategies: tuple[str, ...]


SCENARIOS = {
    "few": Scenario("20 labelled groups, then rounds of 20 images", 20, 20, 6, tuple(STRATEGIES)),
    "many": Scenario("100 labelled groups, then rounds of 20 images", 100, 20, 3, tuple(STRATEGIES)),
    "none": Scenario("no label at first, then rounds of 20 images", 0, 20, 3, BLIND),
}


def probabilities_after(data: Known, labelled: np.ndarray) -> np.ndarray:
    """[N, K] of all images by a linear probe on the labelled ones; a class not seen yet has none."""
    fitted = logistic(REGULARISATION).fit(data.features[labelled], data.truth[labelled])
    found = np.zeros((len(data.truth), len(data.classes)))
    found[:, fitted.classes_] = fitted.predict_proba(data.features)
    return found


def curve(data: Known, scenario: Scenario, strategy: str, repeat: int) -> list[float]:
    """Balanced accuracy on groups held out, before the first round (where there are labels) and after each."""
    rest, held = hold_out(*data.texts(), fraction=HELD, seed=repeat)
    labelled = _first(data, rest, scenario.start, repeat)
    found: list[float] = []
    p: np.ndarray | None = None
    for number in range(scenario.rounds + 1):
        if len(labelled):
            p = probabilities_after(data, labelled)
            counts = confusion(data.truth[held], p[held].argmax(axis=1), len(data.classes))
            found.append(float(balanced_accuracy(counts)))
        if number < scenario.rounds:
            seed = int(np.random.SeedSequence([repeat, number]).generate_state(1)[0])
            now = Round(data, labelled, np.setdiff1d(rest, labelled), p, scenario.count, seed)
            new = STRATEGIES[strategy](now)
            assert len(np.unique(new)) == len(new) and not np.isin(new, labelled).any()
            labelled = np.concatenate([labelled, new])
    return found


def _first(data: Known, rest: np.ndarray, start: int, repeat: int) -> np.ndarray:
    """All images of the first `start` of the shuffled groups, and of as many more as every class needs to be there."""
    if not start:
        return np.empty(0, dtype=np.int64)
    groups = np.random.default_rng(repeat).permutation(np.unique(data.groups[rest]))
    while True:
        labelled = rest[np.isin(data.groups[rest], groups[:start])]
        if len(np.unique(data.truth[labelled])) == len(np.unique(data.truth[rest])):
            return labelled
        start += 1


def with_interval(differences: np.ndarray, held: float = HELD) -> str:
    """Mean over repeats with a 95 % interval by the corrected resampled t of Nadeau and Bengio (2003): repeats share
    their images, so the plain one would be too narrow."""
    count = len(differences)
    spread = np.sqrt((1 / count + held / (1 - held)) * differences.var(ddof=1))
    half = student.ppf(0.975, count - 1) * spread
    return f"{differences.mean():+.3f} [{differences.mean() - half:+.3f}, {differences.mean() + half:+.3f}]"


def gain(name: str, scenario_name: str, repeats: int) -> Iterator[str]:
    """Markdown lines: curves of each strategy and the area between them and chance, paired over repeats."""
    scenario, data = SCENARIOS[scenario_name], known(name)
    curves = {
        s: np.asarray(
            [
                kept(f"{name}-{scenario_name}-{s}-{r}", choose, partial(curve, data, scenario, s, r))
                for r in range(repeats)
            ]
        )
        for s in scenario.strategies
    }
    first = 0 if scenario.start else 1
    asked = [scenario.count * (first + i) for i in range(curves[CHANCE].shape[1])]
    yield f"**{name}**: {scenario.title}; balanced accuracy on held-out groups, {repeats} splits"
    yield ""
    yield "| strategy | " + " | ".join(f"+{a}" for a in asked) + " | mean gain over random images | splits won |"
    yield "|---" * (len(asked) + 3) + "|"
    for strategy, values in curves.items():
        differences = (values - curves[CHANCE])[:, 1 - first :].mean(axis=1)
        gained = "" if strategy == CHANCE else with_interval(differences)
        won = "" if strategy == CHANCE else f"{(differences > 0).sum()} of {repeats}"
        yield f"| {strategy} | " + " | ".join(f"{v:.3f}" for v in values.mean(axis=0)) + f" | {gained} | {won} |"


# What a list of doubtful labels is worth


def flipped_labels(data: Known, share: float, kind: str, like: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(labels of which that share was flipped, to any other class or to the one most like it; which were)."""
    generator = np.random.default_rng(seed)
    count, classes = round(share * len(data.truth)), len(data.classes)
    flipped = np.isin(np.arange(len(data.truth)), generator.permutation(len(data.truth))[:count])
    anything = (data.truth + generator.integers(1, classes, size=len(data.truth))) % classes
    return np.where(flipped, anything if kind == "any class" else like[data.truth], data.truth), flipped


def out_of_fold(data: Known, labels: np.ndarray, seed: int) -> np.ndarray:
    """Probabilities [N, K] of 5 folds by group, with one temperature: what a RUN's predictions.parquet holds."""
    found = np.zeros((len(labels), len(data.classes)))
    names = [str(y) for y in labels]
    for fold in cross_validation(names, data.texts()[1], folds=5, repeats=1, split="group", seed=seed):
        fitted = logistic(REGULARISATION).fit(data.features[fold.train], labels[fold.train])
        found[np.ix_(fold.test, fitted.classes_)] = fitted.predict_proba(data.features[fold.test])
    return calibration.apply_temperature(found, calibration.fit_temperature(np.log(np.maximum(found, 1e-12)), labels))


JUDGES: dict[str, Callable[[Known, np.ndarray, int], np.ndarray]] = {
    "out of fold": out_of_fold,
    "neighbours": lambda data, labels, seed: doubt.neighbour_probabilities(
        data.features, labels, data.groups, len(data.classes)
    ),
}


def _found(data: Known, judge: str, share: float, kind: str, like: np.ndarray, seed: int) -> list[float]:
    """[precision of the first 50 and of the whole list, share of flips found in the first 50 and in it, its length]."""
    labels, flipped = flipped_labels(data, share, kind, like, seed)
    rows = doubt.doubts(JUDGES[judge](data, labels, seed), labels).rows
    total, short = flipped.sum(), flipped[rows[:50]]
    return [
        float(short.mean()),
        float(flipped[rows].mean()),
        float(short.sum() / total),
        float(flipped[rows].sum() / total),
        float(len(rows)),
    ]


def wrong(name: str) -> Iterator[str]:
    """Markdown lines: how many of the labels flipped on purpose `look_again` names."""
    data = known(name)
    mass = np.zeros((len(data.classes), len(data.classes)))
    np.add.at(mass, data.truth, out_of_fold(data, data.truth, 0))
    np.fill_diagonal(mass, 0)
    like = mass.argmax(axis=1)
    yield f"**{name}**: labels flipped on purpose ({len(data.truth)} images, {FLIP_REPEATS} draws)"
    yield ""
    yield (
        "| flipped | into | judged | right in the first 50 | by chance | flips found in the first 50 | by chance | "
        "list | right in it | flips found |"
    )
    yield "|---" * 10 + "|"
    for share in FLIPS:
        for kind in ("any class", "the most similar class"):
            for judge in JUDGES:
                values = [
                    kept(
                        f"{name}-{judge}-{share}-{kind}-{seed}",
                        doubt,
                        partial(_found, data, judge, share, kind, like, seed),
                    )
                    for seed in range(FLIP_REPEATS)
                ]
                first, whole, recall, all_found, length = np.mean(values, axis=0)
                yield (
                    f"| {share:.0%} | {kind} | {judge} | {first:.0%} | {share:.0%} | {recall:.0%} | "
                    f"{50 / len(data.truth):.0%} | {length:.0f} | {whole:.0%} | {all_found:.0%} |"
                )


def kept(key: str, module: ModuleType, compute: Callable[[], list[float]]) -> list[float]:
    """What `compute` gives, from disk where it was computed before by the same code of `module`."""
    code = hashlib.sha256(f"{VERSION}".encode() + Path(str(module.__file__)).read_bytes()).hexdigest()[:8]
    path = KEPT / code / f"{key.replace(' ', '_')}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(compute()))
    return list(json.loads(path.read_text()))


def main() -> int:
    warnings.filterwarnings("ignore", category=UserWarning, module="sklearn")
    arguments = sys.argv[1:]
    repeats = int(arguments[arguments.index("--repeats") + 1]) if "--repeats" in arguments else REPEATS
    for name in [a for a in arguments if a in STUDIES] or list(STUDIES):
        if "wrong" not in arguments:
            for scenario in [a for a in arguments if a in SCENARIOS] or SCENARIOS:
                print("\n".join(gain(name, scenario, repeats)), end="\n\n", flush=True)
        if "gain" not in arguments:
            print("\n".join(wrong(name)), end="\n\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
