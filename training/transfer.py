"""`transfer`: labels and first weights to a judged, refitted, calibrated model."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from cluster import storage
from cluster.errors import UsageError
from cluster.outdir import OutDir
from cluster.progress import say
from cluster.session import cores, session
from training import domain, report
from training.artifact import ModelCard, model_folder, save_model
from training.attention import Looker, looker_of
from training.budgets import budget_section
from training.configs import TRAINED, TransferConfig
from training.dataset import Dataset, Selection
from training.device import count_workers, device_in
from training.findings import Found, first_neighbours, learnt_neighbours, neighbours_of, overlap_with, statistics_of
from training.fit import FoldResult, attention_fold, refit_attention
from training.fitting import Fitting, Trained
from training.hits import write_hits
from training.images import to_channels
from training.ingest import resolve_data
from training.judgement import Judged, judge, of_units
from training.learnt import asked_of
from training.lineage import labelled_by, named_by, own_groups, own_images, seen_by
from training.mistakes import mistakes_section
from training.model_card import README, model_card
from training.overlap import groups_of
from training.predictions import write_predictions, write_units
from training.protocol import judged_rows, laid_out, protocol_of
from training.results import figures_of
from training.sheets import sheet_section
from training.splits import budget
from training.subgroups import columns_of
from training.tasks import pooling
from training.tasks.inputs import column_of
from training.transfer_report import Facts, trained_of, write_transfer_report
from training.units import fold_of_units


def transfer(config: TransferConfig) -> dict[str, Any]:
    """The RUN at `config.out` holds a cross-validated and refitted classifier; returns its summary.

    Raises:
        UsageError: a flag, the data or the first weights cannot be right.
    """
    if config.stages is not None:
        from training.chain import transfer_through

        return transfer_through(config)
    named = config.init in {"imagenet", "none"} or config.init.endswith(".safetensors")
    if not named and storage.exists(config.init):
        model_folder(config.init)  # not a RUN: said before anything is read
    with config.open_out("transfer") as out:
        if out.state == "done":
            return out.summary()
        return carry_out(config, out)


class Chain(Protocol):
    """What was done before a transfer that ends a chain of stages; see `training.chain`."""

    def lineage(self) -> list[dict[str, Any]]:
        """The stages, for model.json."""

    def told(self, folder: Path, metrics: dict[str, Any]) -> tuple[list[report.Section], dict[str, Any]]:
        """Sections of the report, and keys of the summary, once the RUN in `folder` has its predictions."""


def carry_out(config: TransferConfig, out: OutDir, chain: Chain | None = None) -> dict[str, Any]:
    """`out` holds the finished RUN of `config`, which may itself name another `out`; returns its summary."""
    dataset = resolve_data(config.data, out=config.out, images=config.images)
    selection = judged_rows(config, dataset)
    refuse_taught(config.init, dataset, selection)
    study = _Study(config, dataset, selection, out, chain)
    started = time.monotonic()
    with session(cpus=cores() + 2, log=out.log) as found:
        device = device_in(config.device, found)
        study.run(device, count_workers(config.workers, found, device))
    summary = study.summary() | {"seconds": time.monotonic() - started}
    out.finish(summary)
    balanced = summary["metrics"]["balanced_accuracy"]
    say(f"done: balanced accuracy {_interval(balanced)}, report in {out.name('report.html')}")
    return summary


def refuse_taught(init: str, dataset: Dataset, selection: Selection) -> None:
    """Raises UsageError where the first weights learnt from labels of groups that are judged here."""
    groups = groups_of(labelled_by(init), dataset.manifest, selection.table)
    if groups:
        raise UsageError(
            f"first weights {init} learnt from labels of {len(groups):,} of the groups that are judged here, such as "
            f"{storage.printable(min(groups))!r}: they would leak into what judges; start from other weights, or leave "
            "those groups out by --where"
        )


def _interval(metric: Any) -> str:
    from training.report import with_interval

    return with_interval(metric["value"], metric["ci95"])


class _Study:
    """One transfer: its rows, its folds, and what becomes of them."""

    def __init__(
        self, config: TransferConfig, dataset: Dataset, selection: Selection, out: OutDir, chain: Chain | None
    ) -> None:
        self.config, self.dataset, self.selection, self.out, self.chain = config, dataset, selection, out, chain
        columns_of(config.by, selection.table.column_names)  # a name that is none is said before anything is fitted
        layout = laid_out(config, selection)
        self.classes, self.labels, self.units, self.whole = layout.classes, layout.labels, layout.units, layout.folds
        self.share = max(config.label_fraction)
        cut = self._budget
        self.folds = [replace(f, train=cut(f.train, s), share=s) for s in config.label_fraction for f in self.whole]
        self.kept = cut(np.arange(len(self.labels.truth)), self.share)
        self.pooler: pooling.Pooler | None = None
        self.more: dict[str, Any] = {}
        """Further keys of the summary."""

    def run(self, device: str, workers: int) -> None:
        self.fitting = fitting = Fitting(
            self.config,
            self.dataset,
            self.selection,
            self.classes,
            self.labels,
            self.folds,
            self.share,
            self.kept,
            self.out,
            device,
            workers,
        )
        self.initial, self.pixels = fitting.initial, fitting.pixels
        trained = fitting.run()
        self.results = sorted((r for r in trained.results if r.share == self.share), key=lambda r: (r.repeat, r.fold))
        images = self._judge(trained.results)
        self.by_image = images[self.share]
        self.budgets = self._judge_units(images)
        self.judged = self.budgets[self.share]
        self.best_epoch = trained.best_epoch
        self.domain = self._domain(trained.features)
        looker = looker_of(trained.network, self.initial.input, trained.estimator, len(self.classes))
        facts = self._facts(trained, looker.method if trained.described.layers else "")
        self.searched = facts.searched
        self._write_model(trained, facts)
        self._write_predictions()
        figures_of(self.judged, self.out.path / "figures", self.results)
        mistakes, more = self._mistakes(looker, facts.method), self._more_sections()
        facts = replace(facts, by=self.more.get("subgroups", {}))
        write_transfer_report(self.out.path, facts, mistakes, more)

    def _more_sections(self) -> list[report.Section]:
        """What the report says beside the results themselves; its numbers are in `more`."""
        config, judged = self.config, self.judged
        found = [self.chain.told(self.out.path, judged.metrics)] if self.chain is not None else []
        budgets = {f"{share:g}": self._budget_summary(share) for share in self.budgets}
        curve = budget_section(self.out.path / "figures", budgets)
        found.append(([curve] if curve is not None else [], {"budgets": budgets}))
        chosen: dict[str, Any] = {"by": config.by, "prevalence": config.prevalence, "seed": config.seed}
        found.append(statistics_of(judged, self.selection, **chosen))
        found.append(overlap_with(seen_by(config.init), self.dataset, self.selection, judged, seed=config.seed))
        if config.task in TRAINED:
            shown = sheet_section(self.out.path / "figures", self.pixels, self.initial.input, config)
            found.append(([shown], {}))
        found += self._neighbours()
        values = [more.pop("metrics", {}) | more.get("retrieval", {}) for _, more in found]
        self.more = {key: value for _, more in found for key, value in more.items() if key != "retrieval"}
        self.more["metrics"] = {name: metric for part in values for name, metric in part.items()}
        return [section for sections, _ in found for section in sections]

    def _neighbours(self) -> list[Found]:
        """Of the embedding that the run trained, and of the first weights; random ones know no neighbours."""
        found, labels, seed = [], self.labels, self.config.seed
        learnt = asked_of(self.results)
        if learnt is not None:
            found.append(learnt_neighbours(learnt, labels.groups, seed=seed))
        first = None
        if self.config.init != "none":
            features, prefix = self.fitting.features(), "" if learnt is None else "first_weights/"
            first = first_neighbours(features, labels.truth, labels.groups, seed=seed)
            known = (features, labels.truth, labels.names, labels.groups)
            found.append(neighbours_of(first, *known, seed=seed, prefix=prefix))
        asked = learnt or first
        if asked is not None:
            write_hits(self.out.path, self.selection, asked)
        return found

    def _budget(self, rows: np.ndarray, share: float) -> np.ndarray:
        names, groups = self.labels.names, self.labels.groups
        own = groups if self.config.split != "image" else [""] * len(groups)
        return budget(names, own, rows, share=share, seed=self.config.seed)

    def _judge(self, results: list[FoldResult]) -> dict[float, Judged]:
        """The judgement of each share of the labels."""
        found, ordered = {}, bool(self.config.order)
        for share in sorted(self.config.label_fraction):
            own = sorted((r for r in results if r.share == share), key=lambda r: (r.repeat, r.fold))
            found[share] = judge(own, self.labels, self.classes, self.config.seed, ordered=ordered)
        return found

    def _judge_units(self, images: dict[float, Judged]) -> dict[float, Judged]:
        """The same of the units: pooled from that of the images, or of an attention over their features."""
        config, groups = self.config, self.labels.groups
        if config.unit == "image":
            return images
        if config.pooling == "mean":
            ordered = bool(config.order)
            return {s: of_units(one, self.units, groups, config.seed, ordered=ordered) for s, one in images.items()}
        folds = [fold_of_units(self.units, fold) for fold in self.folds]
        shared = (self.fitting.features(), self.labels, self.units, len(self.classes), config.seed)
        subject = {"unit_of_image": self.units.of_row.tolist(), "images": self.fitting.image_ids}
        kept: dict[str, Any] = {"what": "attention", "kept_in": "attention", "more": subject}
        results = self.fitting.each_fold(attention_fold, *shared, folds=folds, **kept)
        self.pooler = refit_attention(*shared, self.kept, self.fitting.median_epoch(results))
        return self._judge(results)

    def _domain(self, features: np.ndarray) -> domain.Domain:
        """What the training set looks like, from the features that the final network gives it."""
        channels = self.initial.input.channels
        looks = np.concatenate(
            [domain.look_of(to_channels(self.pixels[[at]], channels)) for at in range(len(self.pixels))]
        )
        train = {(f.repeat, f.fold): f.train for f in self.folds if f.share == self.share}
        far = [domain.look_distances_to(looks[train[r.repeat, r.fold]], looks[r.test]) for r in self.results]
        kept = looks[self.kept]
        kept = kept[domain.sampled_rows(len(kept), domain.LARGEST)] if len(features) < len(kept) else kept
        return domain.learn(features, kept, np.concatenate([r.distances for r in self.results]), np.concatenate(far))

    def _card(self, trained: Trained) -> ModelCard:
        return ModelCard(
            architecture=self.initial.architecture,
            image_path=self.dataset.image_path,
            input=self.initial.input,
            head=trained.head,
            features=trained.described,
            classes=tuple(self.classes),
            ordered=bool(self.config.order),
            activation="sigmoid" if self.labels.several else "softmax",
            temperature=self.by_image.temperature,
            metrics={name: m["value"] for name, m in self.judged.metrics.items()},
            lineage={
                "verb": "transfer",
                "task": self.config.task,
                "dataset": self.dataset.version,
                "images": len(self.selection),
                "initial": self.initial.provenance,
                "config": self.config.identity(),
                **self._inputs(),
                **({"stages": self.chain.lineage()} if self.chain is not None else {}),
            },
        )

    def _inputs(self) -> dict[str, Any]:
        names = self.config.inputs
        if not names:
            return {}
        column = column_of(self.selection.table, names, self.config.input_column)
        return {"inputs": {"names": list(names), "column": column}}

    def _facts(self, trained: Trained, method: str) -> Facts:
        return Facts(
            name=storage.name_of(self.config.out),
            config=self.config,
            dataset=self.dataset,
            selection=self.selection,
            judged=self.judged,
            card=self._card(trained),
            best_epoch=self.best_epoch,
            shared=len(own_images(self.selection) & seen_by(self.config.init)),
            method=method,
            units=self.units,
        )

    def _mistakes(self, looker: Looker, method: str) -> report.Section:
        judged = self.by_image
        return mistakes_section(
            self.out.path / "figures",
            classes=self.classes,
            truth=judged.truth,
            probabilities=judged.probabilities,
            groups=[self.labels.groups[r] for r in judged.rows],
            rows=judged.rows,
            pixels=self.pixels.__getitem__,
            maps=looker.maps if method else None,
            method=method,
            judged="images" if self.config.unit != "image" else "",
        )

    def _write_model(self, trained: Trained, facts: Facts) -> None:
        own, init = own_images(self.selection), self.config.init
        labelled = labelled_by(init) | (own if trained.taught else frozenset())
        files = [(domain.REFERENCE, self.domain.dumps()), (README, model_card(facts.card, trained_of(facts)).encode())]
        files += trained.files
        files += [(pooling.FILE, self.pooler.dumps(self.judged.temperature))] if self.pooler is not None else []
        known = {"seen": own | seen_by(init), "groups": own_groups(self.selection) | named_by(init)}
        save_model(self.out.path / "model", facts.card, trained.network, **known, labelled=labelled, files=files)

    def _write_predictions(self) -> None:
        write_predictions(self.out.path, self.selection, self.by_image)
        if self.config.unit != "image":
            write_units(self.out.path, self.selection, self.judged, self.units)

    def _budget_summary(self, share: float) -> dict[str, Any]:
        """What a share of the training groups was, per fit on average, and what came of it."""
        train = [f.train for f in self.folds if f.share == share]
        groups = [len({self.labels.groups[row] for row in rows}) for rows in train]
        return {
            "train_images": float(np.mean([len(rows) for rows in train])),
            "train_groups": float(np.mean(groups)),
            "metrics": self.budgets[share].metrics,
        }

    def summary(self) -> dict[str, Any]:
        return {
            "protocol": {
                "split": self.config.split,
                "folds": len({f.fold for f in self.whole}),
                "repeats": self.config.repeats,
                "groups": len(set(self.labels.groups)),
                **protocol_of(self.units, self.config.pooling),
            },
            "images": len(self.selection),
            "classes": self.classes,
            "multi_label": self.labels.several,
            "best_epoch": self.best_epoch,
            "temperature": self.by_image.temperature,
            "searched": self.searched,
            **self.more,
            "metrics": self.judged.metrics | self.more["metrics"],
        }
