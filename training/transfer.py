"""`transfer`: labels and first weights to a judged, refitted, calibrated model."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.numpy import load_file, save_file
from torch import nn

from cluster import storage
from cluster.errors import UsageError
from cluster.outdir import OutDir
from cluster.progress import progress, say
from cluster.session import cores, session
from training import domain
from training.artifact import HEAD, ModelCard, forward, model_folder, save_model
from training.configs import TransferConfig
from training.dataset import Dataset, Selection, label_of, leaves, several_labels, truth_of
from training.device import count_workers, device_in, threads_for
from training.fit import (
    FoldResult,
    Labels,
    attention_fold,
    finetune_fold,
    fit_frozen,
    frozen_fold,
    refit_attention,
    refit_network,
)
from training.folds import run_folds
from training.images import to_channels
from training.ingest import resolve_data
from training.judgement import Judged, figures_of, of_units, summarise, write_transfer_report
from training.lineage import own_images, seen_by
from training.probabilities import calibrated, temperature_for
from training.splits import Fold, cross_validation
from training.tasks import pooling
from training.tasks.finetune import Recipe, recipe_for
from training.transform import evaluation_view
from training.units import Units, fold_of_units, units_of
from training.weights import Wanted, initial_weights, located


def transfer(config: TransferConfig) -> dict[str, Any]:
    """The RUN at `config.out` holds a cross-validated and refitted classifier; returns its summary.

    Raises:
        UsageError: a flag, the data or the first weights cannot be right.
    """
    named = config.init in {"imagenet", "none"} or config.init.endswith(".safetensors")
    if not named and storage.exists(config.init):
        model_folder(config.init)  # not a RUN: said before anything is read
    with config.open_out("transfer") as out:
        if out.state == "done":
            return out.summary()
        dataset = resolve_data(config.data, out=config.out)
        selection = dataset.select(config.where, labelled=True)
        study = _Study(config, dataset, selection, out)
        started = time.monotonic()
        with session(cpus=cores() + 2, log=out.log) as found:
            device = device_in(config.device, found)
            study.run(device, count_workers(config.workers, found, device))
        summary = study.summary() | {"seconds": time.monotonic() - started}
        out.finish(summary)
        balanced = summary["metrics"]["balanced_accuracy"]
        say(f"done: balanced accuracy {_interval(balanced)}, report in {out.name('report.html')}")
        return summary


def _interval(metric: Any) -> str:
    from training.report import with_interval

    return with_interval(metric["value"], metric["ci95"])


def wanted_for(config: TransferConfig, dataset: Dataset, device: str) -> Wanted:
    """The first weights that a transfer of this dataset starts from."""
    return Wanted(
        init=located(config.init),
        preset=config.preset,
        model=config.model,
        image_size=config.image_size,
        seed=config.seed,
        device=device,
        channels=dataset.channels,
        mean=tuple(dataset.info["mean"]),
        std=tuple(dataset.info["std"]),
        extra=(("drop_path_rate", config.drop_path),) if config.task == "finetune" else (),
    )


class _Study:
    """One transfer: its rows, its folds, and what becomes of them."""

    def __init__(self, config: TransferConfig, dataset: Dataset, selection: Selection, out: OutDir) -> None:
        self.config, self.dataset, self.selection, self.out = config, dataset, selection, out
        names = selection.column("label")
        several = config.multi_label or several_labels(names)
        if several and config.order:
            raise UsageError(
                "--order: images have several labels, whose classes are judged by themselves; leave it out"
            )
        self.classes = leaves(names, config.order, several=several)
        truth = truth_of(names, self.classes, several=several)
        self.labels = Labels(truth, names, selection.column("group"), config.split)
        self.units = units_of(config.unit, names, selection.column("case"), self.labels.groups)
        self.folds = cross_validation(
            names,
            self.labels.groups,
            folds=config.folds,
            repeats=config.repeats,
            split=config.split,
            seed=config.seed,
        )

    def run(self, device: str, workers: int) -> None:
        self._prepare(device)
        self._announce(workers)
        if self.config.task == "finetune":
            results, network, features, best = self._finetune(workers)
            estimator = None
        else:
            results, network, features, estimator = self._frozen(workers)
            best = 0
        self.results = sorted(results, key=lambda r: (r.repeat, r.fold))
        self.by_image = self._judge(self.results)
        self.pooler: pooling.Pooler | None = None
        self.judged = self._judge_units(features, workers)
        self.best_epoch = best
        self.domain = self._domain(features)
        self._write_model(network, estimator)
        self._write_predictions()
        figures_of(self.judged, self.out.path / "figures", self.results)
        write_transfer_report(
            self.out.path, self.config, self.dataset, self.selection, self.judged, self._card(), best, self.units
        )

    def _prepare(self, device: str) -> None:
        """First weights and pixels, for the device that the session offers."""
        config, dataset = self.config, self.dataset
        self.device = device
        self.wanted = wanted_for(config, dataset, device)
        self.initial = initial_weights(self.wanted)
        self.pixels = dataset.pixels(self.selection)

    def _announce(self, workers: int) -> None:
        network = self.initial.architecture
        say(
            f"{self.config.task}: {len(self.selection):,} labelled images, {len(set(self.labels.groups)):,} groups, "
            f"{len(self.classes)} classes; {self.config.repeats} x {self.config.folds} folds by {self.config.split}, "
            f"{workers} at a time"
        )
        digest = self.initial.provenance.get("sha256", "")
        say(
            f"initial weights: {self.config.init}{f' (sha256 {digest})' if digest else ''}; "
            f"{network.name} at {network.height}x{network.width}, {network.channels} channels, on {self.device}"
        )

    def _recipe(self, workers: int) -> Recipe:
        return recipe_for(self.config, self.wanted, len(self.classes), threads_for(workers))

    def _finetune(self, workers: int) -> tuple[list[FoldResult], nn.Module, np.ndarray, int]:
        shared = (self._recipe(workers), self.pixels, self.labels)
        results = self._each_fold(finetune_fold, shared, workers)
        best = int(np.median([r.best_epoch for r in results]))
        say(f"refitting on all {len(self.selection):,} images for {best} epochs, the median of the folds")
        alone = (self._recipe(1), self.pixels, self.labels)
        ((state, features),) = run_folds(refit_network, alone, [(best,)], workers=1, gpu=self.device == "cuda")
        network = self.initial.architecture.build(len(self.classes))
        network.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in state.items()})
        return results, network, features, best

    def _frozen(self, workers: int) -> tuple[list[FoldResult], nn.Module, np.ndarray, Any]:
        features = self._features()
        task, count, seed = self.config.task, len(self.classes), self.config.seed
        results = self._each_fold(frozen_fold, (task, features, self.labels, count, seed), workers)
        everything = np.arange(len(self.labels.truth))
        estimator = fit_frozen(task, features, self.labels, everything, count, seed)
        return results, self.initial.network, features, estimator

    def _features(self) -> np.ndarray:
        """Features of all labelled rows under the initial network, kept for an interrupted run."""
        cache = self.out.path / "features.safetensors"
        if not cache.exists():
            torch.set_num_threads(cores())
            network, parts = self.initial.network.eval().to(self.device), []
            with torch.inference_mode(), progress("features", len(self.pixels), "images") as bar:
                for at in range(0, len(self.pixels), 64):
                    images = evaluation_view(self.pixels[at : at + 64], self.initial.input, self.device)
                    parts.append(forward(network, images)[0].float().cpu().numpy())
                    bar.advance(len(images))
            network.cpu()
            partial = cache.with_name(f".{cache.name}")
            save_file({"features": np.concatenate(parts)}, partial)
            storage.publish_file(partial, cache)
        return np.asarray(load_file(cache)["features"])

    def _judge_units(self, features: np.ndarray, workers: int) -> Judged:
        """The judgement of the units: pooled from that of the images, or of an attention over their features."""
        config = self.config
        if config.unit == "image":
            return self.by_image
        if config.pooling == "mean":
            return of_units(self.by_image, self.units, self.labels.groups, config.seed, ordered=bool(config.order))
        folds = [fold_of_units(self.units, fold) for fold in self.folds]
        shared = (features, self.labels, self.units, len(self.classes), config.seed)
        results = self._each_fold(attention_fold, shared, workers, folds, "attention")
        best = int(np.median([r.best_epoch for r in results]))
        self.pooler = refit_attention(*shared, best)
        return self._judge(sorted(results, key=lambda r: (r.repeat, r.fold)))

    def _each_fold(
        self, fit: Any, shared: tuple[Any, ...], workers: int, folds: list[Fold] | None = None, name: str = "folds"
    ) -> list[FoldResult]:
        """Results of all folds; those finished before an interruption are read, not computed again."""
        folder = self.out.path / name
        folder.mkdir(exist_ok=True)
        folds = self.folds if folds is None else folds
        done = [r for f in folds if (r := _load_fold(folder, f)) is not None]
        known = {(r.repeat, r.fold) for r in done}
        missing = [(f,) for f in folds if (f.repeat, f.fold) not in known]
        with progress(self.config.task if name == "folds" else name, len(folds), "folds", done=len(done)) as bar:
            for result in run_folds(fit, shared, missing, workers=workers, gpu=self.device == "cuda"):
                _save_fold(folder, result)
                self.out.push()
                done.append(result)
                bar.advance(1)
        return done

    def _judge(self, results: list[FoldResult]) -> Judged:
        """Out-of-fold predictions, each fold calibrated by the temperature of its repeat's other folds."""
        rows = np.concatenate([r.test for r in results])
        fold = np.concatenate([np.full(len(r.test), r.fold) for r in results])
        repeat = np.concatenate([np.full(len(r.test), r.repeat) for r in results])
        raw = np.concatenate([r.probabilities for r in results])
        truth = self.labels.truth[rows]
        probabilities = np.empty_like(raw)
        for one in results:
            same, mine = repeat == one.repeat, fold == one.fold
            # of the same repeat: another one's folds hold the very rows that are calibrated here
            mine, others = same & mine, same & ~mine
            temperature = temperature_for(raw[others], truth[others])
            probabilities[mine] = calibrated(raw[mine], temperature, several=self.labels.several)
        groups = [self.labels.groups[r] for r in rows]
        ordered = bool(self.config.order)
        summary = summarise(
            truth, probabilities, group=groups, fold=fold, repeat=repeat, seed=self.config.seed, ordered=ordered
        )
        temperature = temperature_for(raw, truth)
        return Judged(self.classes, rows, truth, probabilities, fold, repeat, dict(summary), temperature)

    def _domain(self, features: np.ndarray) -> domain.Domain:
        """What the training set looks like, from the features that the final network gives it."""
        channels = self.initial.input.channels
        looks = np.concatenate(
            [domain.look_of(to_channels(self.pixels[[at]], channels)) for at in range(len(self.pixels))]
        )
        train = {(f.repeat, f.fold): f.train for f in self.folds}
        far = [domain.look_distances_to(looks[train[r.repeat, r.fold]], looks[r.test]) for r in self.results]
        kept = looks[domain.sampled_rows(len(looks), domain.LARGEST)] if len(features) < len(looks) else looks
        return domain.learn(features, kept, np.concatenate([r.distances for r in self.results]), np.concatenate(far))

    def _card(self) -> ModelCard:
        return ModelCard(
            architecture=self.initial.architecture,
            image_path=self.dataset.image_path,
            input=self.initial.input,
            head="network" if self.config.task == "finetune" else "estimator",
            classes=tuple(self.classes),
            ordered=bool(self.config.order),
            activation="sigmoid" if self.labels.several else "softmax",
            temperature=self.by_image.temperature,
            metrics={name: m["value"] for name, m in self.judged.metrics.items()},
            lineage={
                "verb": "transfer",
                "task": self.config.task,
                "dataset": self.dataset.version,
                "initial": self.initial.provenance,
                "config": self.config.identity(),
            },
        )

    def _write_model(self, network: nn.Module, estimator: Any) -> None:
        seen = own_images(self.selection) | seen_by(self.config.init)
        files = [(domain.REFERENCE, self.domain.dumps())]
        files += [(HEAD, estimator.dumps())] if estimator is not None else []
        files += [(pooling.FILE, self.pooler.dumps(self.judged.temperature))] if self.pooler is not None else []
        save_model(self.out.path / "model", self._card(), network, seen=seen, files=files)

    def _write_predictions(self) -> None:
        write_predictions(self.out.path / "predictions.parquet", self.selection, self.by_image)
        if self.config.unit != "image":
            write_units(self.out.path / "units.parquet", self.selection, self.judged, self.units)

    def summary(self) -> dict[str, Any]:
        return {
            "protocol": {
                "split": self.config.split,
                "folds": self.config.folds,
                "repeats": self.config.repeats,
                "groups": len(set(self.labels.groups)),
                **protocol_of(self.units, self.config.pooling),
            },
            "images": len(self.selection),
            "classes": self.classes,
            "multi_label": self.labels.several,
            "best_epoch": self.best_epoch,
            "temperature": self.by_image.temperature,
            "metrics": self.judged.metrics,
        }


def write_predictions(path: Path, selection: Selection, judged: Judged) -> None:
    """predictions.parquet: image_id, group, case, repeat, fold, truth, one probability per leaf."""
    columns: dict[str, Any] = {name: selection.column(name) for name in ("image_id", "group", "case")}
    _write_judged(path, columns, judged)


def write_units(path: Path, selection: Selection, judged: Judged, units: Units) -> None:
    """units.parquet: unit (its case or group; the image's id where one stands alone), group, images, and the rest of
    predictions.parquet."""
    identities, groups = selection.column("image_id"), selection.column("group")
    columns = {
        "unit": [units.names[u] or identities[r] for u, r in zip(units.of_row, range(len(selection)), strict=True)],
        "group": groups,
        "images": np.bincount(units.of_row)[units.of_row],
    }
    _write_judged(path, columns, judged)


def protocol_of(units: Units, pooling: str) -> dict[str, Any]:
    """What `protocol` of summary.json says of the units."""
    if units.kind == "image":
        return {"unit": "image"}
    left_out = int(units.conflicting.sum())
    return {"unit": units.kind, "pooling": pooling, "units": len(units) - left_out, "units_left_out": left_out}


def _write_judged(path: Path, columns: dict[str, Any], judged: Judged) -> None:
    table = pa.table(
        {
            **{name: [values[r] for r in judged.rows] for name, values in columns.items()},
            "repeat": judged.repeat,
            "fold": judged.fold,
            "truth": [label_of(t, judged.classes) for t in judged.truth],
            **{name: judged.probabilities[:, at] for at, name in enumerate(judged.classes)},
        }
    )
    partial = path.with_name(f".{path.name}")
    pq.write_table(table, partial)
    storage.publish_file(partial, path)


def _save_fold(folder: Path, result: FoldResult) -> None:
    target = folder / f"repeat-{result.repeat}-fold-{result.fold}.safetensors"
    partial = folder / f".{target.name}"
    history = np.asarray([[row["epoch"], row["loss"], row.get("held_loss", np.nan)] for row in result.history])
    tensors = {
        "test": result.test.astype(np.int64),
        "probabilities": result.probabilities,
        "best_epoch": np.asarray([result.best_epoch]),
        "history": history.reshape(-1, 3).astype(np.float64),
        "distances": result.distances,
    }
    save_file(tensors, partial)
    storage.publish_file(partial, target)


def _load_fold(folder: Path, fold: Fold) -> FoldResult | None:
    path = folder / f"repeat-{fold.repeat}-fold-{fold.fold}.safetensors"
    values = load_file(path) if path.exists() else {}
    if "distances" not in values:  # absent, or of a version that measured none
        return None
    if not np.array_equal(values["test"], fold.test):
        raise UsageError(f"{path}: was computed for another split; use --overwrite or another --out")
    history = [{"epoch": e, "loss": x, "held_loss": h} for e, x, h in values["history"].tolist()]
    best = int(values["best_epoch"][0])
    return FoldResult(
        fold.repeat, fold.fold, values["test"], values["probabilities"], best, history, values["distances"]
    )
