"""What a result must not be taken for, in words: each sentence follows from something that the run knows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

FEW_GROUPS = 30
"""Fewer than these, and a bootstrap over groups gives intervals that are too narrow."""
SMALL_CLASS = 20
"""Groups of a class; with fewer, its own figures are guesses."""
POOR_ECE = 0.05
"""Calibration error above which stated probabilities are not to be taken at their word."""
SKEW = 10
"""Largest class over smallest, above which rare classes deserve a word."""
SITE_COLUMNS = ("site", "centre", "center", "hospital", "institution", "scanner", "device", "source")
Searched = Literal["", "here", "elsewhere"]
SEARCHED: dict[Searched, str] = {
    "": "",
    "here": "The settings were chosen by a search (rayograph tune) on this data: labels of images that are judged here "
    "had a say in them, so the figures are a little too good. Those that the search itself states, of groups that it "
    "never saw, are not.",
    "elsewhere": "The settings were chosen by a search (rayograph tune) on another version of a data set. If that held "
    "patients who are judged here, the figures are a little too good.",
}
"""What a search before the run means for its figures."""


UNSEEN = "unseen"
"""The split of an evaluation on images that no model was trained on."""
RELATED = (
    "These are other patients of the data set that the model was trained on, with its places, devices and labels: a "
    "test that was held out, not one from outside."
)
SIBLINGS = (
    "The model that is kept was fitted on all images, so nothing is left to judge it by: the figures are of its "
    "siblings, each fitted on a part."
)
ONE_MODEL = (
    "One finished model is judged: intervals say what other patients would change, and nothing of what another "
    "training of it would."
)


@dataclass(frozen=True)
class Known:
    """What the limits follow from."""

    split: str
    images: Mapping[str, int]
    """Judged images per class."""
    class_groups: Mapping[str, int]
    """Groups per class."""
    groups: int
    metrics: Mapping[str, Any]
    """As in summary.json."""
    guessing: Mapping[str, float]
    ungrouped: int = 0
    """Labelled images of the data set whose group nobody gave."""
    sites: tuple[str, int] | None = None
    """The column that seems to say where images come from, and how many values it has; see `sites_in`."""
    shared: int = 0
    """Judged images that the first weights were pretrained on."""
    searched: Searched = ""
    """Where the settings were searched: on the data judged `here`, or `elsewhere`."""
    seen: str = ""
    """What of the judged images a finished model was trained on, as the subject of a sentence."""
    namesakes: int = 0
    """Judged groups that are called as groups of its training are."""
    related: bool = False
    """Whether a finished model is judged on other patients of its own data set."""
    conflicting: int = 0
    """Sets of copies with different labels."""
    quarantined: float = 0.0
    """Share of the source's images that could not be read."""


def sites_in(columns: Mapping[str, list[Any]]) -> tuple[str, int] | None:
    """The first of `SITE_COLUMNS` among columns (in any case), and how many values it has; None without one."""
    by_name = {name.lower(): values for name, values in columns.items()}
    for name in SITE_COLUMNS:
        values = {str(v) for v in by_name.get(name, []) if v not in (None, "")}
        if values:
            return name, len(values)
    return None


def limits_of(known: Known) -> list[str]:
    """Sentences, the gravest first; there is always one, for no run knows of another hospital's images."""
    return [sentence for part in (_leaks, _sample, _sites, _figures, _data) for sentence in part(known)]


def _leaks(known: Known) -> list[str]:
    found = []
    if known.split == "image":
        found.append(
            "Split by image: pictures of one patient may stand in training and test. The figures are too good, and say "
            "nothing about new patients."
        )
    if known.ungrouped:
        found.append(
            f"{_images(known.ungrouped)} came without a group. Each counts as a patient of its own; if it is not, "
            "patients stand on both sides of a split and the figures are too good."
        )
    if known.shared:
        found.append(
            f"The first weights were pretrained, without labels, on {known.shared:,} of the images that were judged: a "
            "transductive setting. No label leaked, but pictures of new patients will be new to the network in a way "
            "that these were not."
        )
    if known.seen:
        found.append(f"Seen in training or pretraining: {known.seen}. The figures are too good for new patients.")
    if known.namesakes:
        found.append(
            f"{known.namesakes:,} judged groups are called as groups of the training are. If they are the same "
            "patients, the figures are too good."
        )
    if known.searched:
        found.append(SEARCHED[known.searched])
    return found


def _sample(known: Known) -> list[str]:
    found = [RELATED] if known.related else []
    if known.groups < FEW_GROUPS:
        found.append(
            f"Only {known.groups} groups: intervals from so few are themselves uncertain, and rather too narrow."
        )
    small = [f"{name} ({count})" for name, count in known.class_groups.items() if count < SMALL_CLASS]
    if small:
        found.append(
            f"Few groups in {', '.join(small)}: what is said of a class with fewer than {SMALL_CLASS} groups may be "
            "chance."
        )
    counts = [count for count in known.images.values() if count]
    if counts and max(counts) >= SKEW * min(counts):
        found.append(
            f"The largest class has {max(counts) / min(counts):.0f} times the images of the smallest. Accuracy speaks "
            "mostly of the large one; where the model is used, classes may be as frequent as nowhere here."
        )
    return found


def _sites(known: Known) -> list[str]:
    if known.split == "site":
        return ["Each site was judged by a model of the others; there is still no evidence for sites unlike these."]
    if known.sites is None or known.sites[1] < 2:
        return [
            "Nothing says that these images come from more than one site or scanner. Expect lower figures elsewhere, "
            "and judge on images from there before believing anything."
        ]
    name, count = known.sites
    return [
        f"Images come from {count} places (column {name}), which the folds mix: the figures are for these places, not "
        "for a new one. Where a place has mostly one class, the model may have learnt the place."
    ]


def _figures(known: Known) -> list[str]:
    found = []
    (low, high), level = _interval(known, "balanced_accuracy"), known.guessing.get("balanced_accuracy")
    if low is not None and high is not None and level is not None and low <= level:
        found.append(
            f"The interval of the balanced accuracy, {low:.2f} to {high:.2f}, holds what guessing reaches, "
            f"{level:.2f}: there is no evidence that the model tells the classes apart."
        )
    low, _ = _interval(known, "ece")
    if low is not None and low > POOR_ECE:
        value = known.metrics["ece"]["value"]
        found.append(
            f"Uncalibrated: stated probabilities are off by {value:.2f} on average (interval from {low:.2f}). "
            "Read them as an order, not as chances."
        )
    found.append(ONE_MODEL if known.split == UNSEEN else SIBLINGS)
    return found


def _data(known: Known) -> list[str]:
    found = []
    if known.conflicting:
        found.append(
            f"{known.conflicting:,} sets of identical pictures carry different labels and were left out. Labels that "
            "disagree where it shows may disagree elsewhere too: no figure can be better than its labels."
        )
    if known.quarantined > 0.01:
        found.append(f"{known.quarantined:.1%} of the source's images could not be read and were judged by nobody.")
    return found


def _interval(known: Known, name: str) -> tuple[float | None, float | None]:
    low, high = known.metrics.get(name, {}).get("ci95", (None, None))
    return low, high


def _images(count: int) -> str:
    return f"{count:,} labelled image{'s' if count > 1 else ''}"
