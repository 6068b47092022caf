"""Retrieval in learnt embeddings on the real sets, and what centres save against pairs: parts of `make results`.

`python -m tests.benchmarks.results retrieval` runs `transfer --task metric` for every loss and prints Recall@k beside
that of the first weights, with the claims of paper 5. `… distances` trains a linear embedding on fixed features, which
is enough to count distances and time them; it needs minutes, not hours. Both are resumable: finished runs are kept.
"""

from __future__ import annotations

import csv
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.benchmarks.losses import other_losses
from tests.benchmarks.paired import interval, told, verdict
from training.artifact import features_of
from training.bootstrap import Metric
from training.compare import Difference
from training.hits import hits_differ, read_hits
from training.images import ImagePath, decode, to_channels
from training.losses.centre import centre_contrastive, squared_distances, unit
from training.losses.centres import Centres, start_at
from training.retrieval import NAMES, RANKS, per_query
from training.tasks.metric import balanced_batches
from training.weights import Wanted, initial_weights

REPEATS = os.environ.get("RAYOGRAPH_METRIC_REPEATS", "3")
EPOCHS = os.environ.get("RAYOGRAPH_METRIC_EPOCHS", "8")
LOSSES = ("centre_contrastive", "centre_ranking", "proxy_anchor", "triplet")
OURS, STEPS = "centre_contrastive", "centre_contrastive, 3 steps"
AT_8 = NAMES[RANKS.index(8)]


# Retrieval


@dataclass(frozen=True)
class Arm:
    """One way to embed: its RUN, and the step of it that is judged (None: its last)."""

    name: str
    folder: Path
    command: tuple[str, ...]
    step: int | None = None


def arms(name: str, cache: Path, study: Any) -> list[Arm]:
    """Frozen features, every loss, and each step of the progressive features; all from the same folds."""
    data = ("transfer", "--data", str(cache / name), "--repeats", REPEATS)
    found = []
    for label, init, size in (("ImageNet", "imagenet", study.imagenet), ("SSL", str(cache / f"{name}-mae"), study.vit)):
        out = cache / f"{name}-neighbours-{label.lower()}"
        flags = ("--out", str(out), "--init", init, "--task", "knn", *study.transfer, *size)
        found.append(Arm(f"{label} features, as they are", out, (*data, *flags)))
    for loss in LOSSES:
        out = cache / f"{name}-metric-{loss}"
        found.append(Arm(loss, out, (*data, *_metric(out, loss, study))))
    out = cache / f"{name}-metric-{OURS}-3-steps"
    command = (*data, *_metric(out, OURS, study), "--steps", "3")
    return [*found, *(Arm(f"{STEPS}: step {step}", out, command, step) for step in (1, 2, 3))]


def _metric(out: Path, loss: str, study: Any) -> tuple[str, ...]:
    flags = ("--init", "imagenet", "--task", "metric", "--loss", loss, "--epochs", EPOCHS)
    return ("--out", str(out), *flags, *study.transfer, *study.imagenet)


def retrieval(cache: Path, studies: dict[str, Any], run: Callable[[list[str]], float]) -> str:
    """Recall@k and mAP@R of every arm on every set, and the claims, as Markdown."""
    lines = []
    for name, study in studies.items():
        chosen = arms(name, cache, study)
        for folder, command in {arm.folder: arm.command for arm in chosen}.items():
            print(f"{folder.name}: {run(list(command)):.0f} s", flush=True)
        lines += [f"**{study.title}**", "", *_table(chosen), "", *_claims(chosen), ""]
        where = study.transfer[1:] if "--where" in study.transfer else ()
        lines += [*other_losses(cache / name, chosen[0].folder, where, int(REPEATS)), ""]
    return "\n".join(lines)


def _table(chosen: list[Arm]) -> list[str]:
    heads = [*(f"Recall@{k}" for k in RANKS), "mAP@R", "Recall@8 less that of ImageNet features"]
    lines = ["| embedding | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for arm in chosen:
        found = _metrics(arm)
        cells = [interval(found[n]["value"] or 0.0, found[n]["ci95"]) for n in NAMES]
        difference = _difference(arm, chosen[0])
        lines.append(f"| {arm.name} | " + " | ".join(cells) + f" | {told(difference) if difference else ''} |")
    chance = json.loads((chosen[0].folder / "summary.json").read_text())["metrics"]
    return [*lines, "| *by chance* | " + " | ".join(f"{chance[n]['chance']:.3f}" for n in NAMES) + " | |"]


def _metrics(arm: Arm) -> dict[str, Metric]:
    metrics = json.loads((arm.folder / "summary.json").read_text())["metrics"]
    prefix = f"step_{arm.step}/" if arm.step in {1, 2} else ""
    return {name: metrics[f"{prefix}{name}"] for name in NAMES}


def _difference(arm: Arm, other: Arm) -> Difference | None:
    """Recall@8 of one less that of another, paired by image, resampled by group."""
    ours, theirs = read_hits(str(arm.folder), step=arm.step), read_hits(str(other.folder), step=other.step)
    if arm is other or ours is None or theirs is None:
        return None
    found = hits_differ(ours, theirs)
    return None if found is None else found[AT_8]


def _claims(chosen: list[Arm]) -> list[str]:
    by_name = {arm.name: arm for arm in chosen}
    rivals = [by_name[name] for name in LOSSES if not name.startswith("centre_")]
    best = max(rivals, key=lambda arm: _metrics(arm)[AT_8]["value"] or 0)
    steps = [by_name[f"{STEPS}: step {step}"] for step in (1, 2, 3)]
    asked = [
        ("+2.26 points of Recall@8 over the best method compared with", by_name[OURS], best),
        ("step 2 (crop) adds to step 1", steps[1], steps[0]),
        ("step 3 (attention) adds to step 2", steps[2], steps[1]),
    ]
    lines = ["| paper 5 | our data, Recall@8 | |", "|---|---|---|"]
    for claim, ours, theirs in asked:
        found = _difference(ours, theirs)
        assert found is not None
        lines.append(f"| {claim} | {ours.name} less {theirs.name}: {told(found)} | {verdict(found)} |")
    return lines


# Distances


SIZES = (1_000, 3_000, 10_000, 100_000)
DIMENSION, BATCH, HELD = 64, 64, 500
LIMIT_S = float(os.environ.get("RAYOGRAPH_DISTANCES_S", "120"))
"""Longest training of one arm."""
SHARE = 0.9
"""Of what the best arm gains in Recall@8 over the untrained embedding: the fixed Recall@8 that is timed."""


@dataclass(frozen=True)
class Points:
    """Features [N, D] to train on and held ones to ask and find among, with class numbers."""

    features: np.ndarray
    truth: np.ndarray
    held: np.ndarray
    held_truth: np.ndarray
    held_groups: list[str]

    @property
    def classes(self) -> int:
        return int(self.truth.max()) + 1


@dataclass(frozen=True)
class Moment:
    """Where a training stood: its own seconds (judging is not counted), distances computed, epochs, Recall@8."""

    seconds: float
    distances: int
    epochs: float
    recall: float


def distances(index_folder: Path) -> str:
    """Distances an epoch and time to a fixed Recall@8, centres against pairs, as Markdown."""
    torch.set_num_threads(1)
    head = ["N", "embedding trained against", "distances an epoch", "s an epoch", "Recall@8", "s to the fixed Recall@8"]
    lines = ["| " + " | ".join([*head, "times as long", "(N - 1) / 2C"]) + " |", "|---" * 8 + "|"]
    for size in SIZES:
        points = real_points(index_folder, size) if size <= 3_000 else synthetic_points(size)
        trained = {name: list(train(points, name)) for name in ("centres", "pairs of a batch", "all pairs")}
        start = trained["centres"][0].recall
        goal = start + SHARE * (max(m.recall for moments in trained.values() for m in moments) - start)
        reached = {name: next((m for m in moments if m.recall >= goal), None) for name, moments in trained.items()}
        base, count = reached["centres"], len(points.truth)
        for name, moments in trained.items():
            last, hit = moments[-1], reached[name]
            cells = [
                f"{count:,}",
                name,
                f"{last.distances / last.epochs:,.0f}",
                f"{last.seconds / last.epochs:.3f}",
                f"{max(m.recall for m in moments):.3f}",
                f"{hit.seconds:.2f} (of {goal:.3f})" if hit else f"not in {last.seconds:.0f} s (of {goal:.3f})",
                f"{hit.seconds / base.seconds:.1f}" if hit and base and base.seconds else "",
                f"{(count - 1) / (2 * points.classes):,.0f}" if name == "all pairs" else "",
            ]
            lines.append("| " + " | ".join(cells) + " |")
            print(lines[-1], flush=True)
    return "\n".join([*lines, "", PAIRS])


PAIRS = (
    "All pairs: each image of a batch against all N, so that a pair is computed from both of its sides: N (N - 1) "
    "distances an epoch, where a list of pairs would need half as many, N (N - 1) / 2; (N - 1) / 2C is of that half."
)


def train(points: Points, name: str) -> Iterator[Moment]:
    """Moments of the training of a linear embedding, until it stands still or time is up.

    All arms take the same batches and steps of the same size. `all pairs` compares each batch with all N embeddings as
    they were at the start of the epoch, so that each pair is there twice an epoch: offline pairs at their cheapest.
    """
    x, members = torch.from_numpy(points.features), torch.eye(points.classes, dtype=torch.bool)[points.truth]
    layer = nn.Linear(x.shape[1], DIMENSION)
    with torch.no_grad():
        layer.weight.normal_(0, x.shape[1] ** -0.5, generator=torch.Generator().manual_seed(0))
        layer.bias.copy_(-layer.weight @ x.mean(dim=0))
    began = time.perf_counter()
    centres = Centres(start_at(unit(layer(x)).detach(), members), "rule") if name == "centres" else None
    seconds = time.perf_counter() - began  # a pass over all images that only centres need
    optimizer, generator = torch.optim.Adam(layer.parameters(), lr=1e-3), np.random.default_rng(0)
    count, shown, best, since = 0, 0, 0.0, 0
    yield Moment(seconds, 0, 1e-9, recall_of(layer, points))
    while seconds < LIMIT_S and since < 12:
        batches = balanced_batches(members.numpy(), BATCH, generator)
        often, known = max(1, min(50, len(batches) // 4)), None
        for number, batch in enumerate(batches):
            began = time.perf_counter()
            if name == "all pairs" and known is None:
                with torch.no_grad():
                    known = unit(layer(x))
            rows = torch.from_numpy(batch)
            found = unit(layer(x[rows]))
            if centres is not None:
                loss = centre_contrastive(found, members[rows], centres(), 1.0)
                count += len(batch) * points.classes
            else:
                others, sets, own = found, members[rows], torch.arange(len(rows))
                pairs = len(batch) * (len(batch) - 1) // 2
                if known is not None:
                    others, sets, own, pairs = known, members, rows, len(batch) * (len(known) - 1)
                loss = pair_contrastive(found, members[rows], others, sets, own)
                count += pairs
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if centres is not None:
                centres.after_batch(found, members[rows])
            seconds, shown = seconds + time.perf_counter() - began, shown + len(batch)
            if (number + 1) % often == 0 or number + 1 == len(batches):
                recall = recall_of(layer, points)
                best, since = (recall, 0) if recall > best + 1e-3 else (best, since + 1)
                yield Moment(seconds, count, shown / len(x), recall)
            if seconds >= LIMIT_S:
                break


def pair_contrastive(
    embeddings: Tensor, members: Tensor, others: Tensor, sets: Tensor, own: Tensor, margin: float = 1.0
) -> Tensor:
    """The contrastive loss of Hadsell, Chopra & LeCun (CVPR 2006) over all pairs [B, M], both kinds weighing alike;
    `own` [B] is where each image is among the others, for with itself it is no pair."""
    squares = squared_distances(embeddings, others)
    shared = members.float() @ sets.float().T > 0
    like, unlike = shared.float(), (~shared).float()
    like[torch.arange(len(own)), own] = 0
    short = (margin - squares.clamp(min=1e-12).sqrt()).clamp(min=0).square()
    pull, push = (squares * like).sum() / like.sum().clamp(min=1), (short * unlike).sum() / unlike.sum().clamp(min=1)
    return pull + push


def recall_of(layer: nn.Module, points: Points) -> float:
    """Recall@8 of held rows among held rows of other groups."""
    with torch.no_grad():
        found = unit(layer(torch.from_numpy(points.held))).numpy()
    result = per_query(found, points.held_truth, points.held_groups, deals=0)
    return float(result.scores[result.judged, RANKS.index(8)].mean())


def synthetic_points(size: int, classes: int = 14, width: int = 128, seed: int = 0) -> Points:
    """Classes in a few of many directions, the others loud noise that says nothing."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(classes, 16))

    def drawn(count: int) -> tuple[np.ndarray, np.ndarray]:
        truth = np.arange(count) % classes
        own = centres[truth] + 1.5 * rng.normal(size=(count, 16))
        return np.column_stack([own, 4 * rng.normal(size=(count, width - 16))]).astype(np.float32), truth

    return Points(*drawn(size), *drawn(HELD), [str(at) for at in range(HELD)])


def real_points(folder: Path, size: int) -> Points:
    """ImageNet features of Pap smear cells of Herlev and CRIC, classes of each set its own, whole slides held."""
    rows = []
    for index, source in (("index.csv", "herlev"), ("index_cric.csv", "cric")):
        with (folder / index).open(newline="", encoding="utf-8") as file:
            read = [r for r in csv.DictReader(file) if source in r["path"]]
            rows += [(r["path"], f"{source} {r['label']}", f"{source} {r['group'] or r['path']}") for r in read]
    chosen, held = split_by_group(rows, size)
    wanted = Wanted("imagenet", "auto", None, "128", 0, "cpu", 3, (0.5,) * 3, (0.25,) * 3)
    initial = initial_weights(wanted)
    path = ImagePath(128, 128)
    pixels = np.stack([to_channels(decode((folder / name).read_bytes(), path), 3) for name, _, _ in chosen])
    features = features_of(initial.network.eval(), initial.input, pixels)
    features = (features - features.mean(axis=0)) / (features.std(axis=0) + 1e-6)
    truth = np.unique([label for _, label, _ in chosen], return_inverse=True)[1]
    groups = [group for *_, group in chosen[:held]]
    return Points(features[held:], truth[held:], features[:held], truth[:held], groups)


def split_by_group(rows: list[tuple[str, str, str]], size: int) -> tuple[list[tuple[str, str, str]], int]:
    """(rows of (path, label, group), how many of them come first and are held): whole groups, of about `HELD` images or
    a fifth of all, then `size` images of others."""
    names = sorted({group for *_, group in rows})
    place = dict(zip(names, np.random.default_rng(0).permutation(len(names)).tolist(), strict=True))
    ordered = sorted(rows, key=lambda row: place[row[2]])
    held = min(HELD, min(len(rows), size + HELD) // 5)
    while held < len(ordered) and ordered[held][2] == ordered[held - 1][2]:
        held += 1
    return ordered[: held + size], held
