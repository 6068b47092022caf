"""`tune`: labels and first weights to settings that were searched, and judged on groups that the search never saw."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.numpy import load_file, save_file

from cluster import storage
from cluster.errors import RayographError
from cluster.outdir import OutDir
from cluster.progress import Bar, counted, progress, say
from cluster.session import cores, session
from training import metrics
from training.artifact import features_of
from training.compare import differences
from training.dataset import Dataset, Selection, leaves
from training.device import count_workers, device_in, threads_for
from training.fit import Labels, refit_and_judge
from training.folds import run_folds
from training.ingest import resolve_data
from training.lineage import own_images, seen_by
from training.tasks.finetune import Recipe, recipe_for
from training.tasks.hierarchy import tree_of
from training.tasks.inputs import column_of, inputs_of, joined
from training.transfer import refuse_taught
from training.units import units_of
from training.weights import initial_weights, wanted_for
from tuning.configs import HIERARCHICAL, TuneConfig
from tuning.hierarchical import HierarchicalBench, final_fit, search_bench
from tuning.ledger import Ledger, Record, best_of
from tuning.report import (
    Judgement,
    draw_history,
    shown_value,
    verdict,
    write_best,
    write_trials,
    write_tune_report,
)
from tuning.search import Bench, run_search
from tuning.spaces import Space, defaults, space_for
from tuning.trial import bench_for, split_sides


def tune(config: TuneConfig) -> dict[str, Any]:
    """`best.yaml`, `trials.parquet` and a report stand at `config.out`; returns the summary.

    Trials that an earlier process finished are not run again; those that it was cut off in are, under their numbers.

    Raises:
        UsageError: a flag, the data or the first weights cannot be right.
        RayographError: every trial failed.
    """
    with config.open_out("tune") as out:
        if out.state == "done":
            return out.summary()
        dataset = resolve_data(config.data, out=config.out)
        labelled = dataset.select(config.where, labelled=True)
        selection = Selection(joined(labelled.table, config.inputs, config.input_column))
        for init in config.given["init"]:
            refuse_taught(init, dataset, selection)
        search = Search(config, dataset, selection, out)
        started = time.monotonic()
        with session(cpus=cores() + 2, log=out.log) as found:
            device = device_in(config.device, found)
            search.run(device, count_workers(config.workers, found, device))
        summary = search.summary() | {"seconds": time.monotonic() - started}
        out.finish(summary)
        say(f"{verdict(search.best, search.judged)}\nsettings in {out.name('best.yaml')}, report in report.html there")
        return summary


class Search:
    """One search: its rows, its trials, and how the best of them is judged."""

    def __init__(self, config: TuneConfig, dataset: Dataset, selection: Selection, out: OutDir) -> None:
        self.config, self.dataset, self.selection, self.out = config, dataset, selection, out
        self.default = config.trial({})
        names = selection.column("label")
        self.groups: list[str] = selection.column("group")
        if self.default.unit == "case":  # one of two patients would be on two sides
            units_of("case", names, selection.column("case"), self.groups)
        self.classes = leaves(names)
        self.truth = np.asarray([self.classes.index(name) for name in names])
        self.sides = split_sides(names, self.groups, holdout=config.holdout, seed=config.seed)

    def run(self, device: str, workers: int) -> None:
        self.gpu = device == "cuda"
        self.wanted = wanted_for(self.default, self.dataset, device)
        vit = initial_weights(self.wanted).architecture.patch is not None
        pretrained = vit and self.config.init != "none"
        self.space = self.space_of(pretrained_vit=pretrained)
        self._announce(workers)
        pixels = self.dataset.pixels(self.selection)
        self.records = self._search(pixels, workers)
        best = best_of(self.records)
        if best is None:
            reason = self.records[0].outcome.reason
            raise RayographError(
                f"all {len(self.records)} trials failed, the defaults with: {reason}\n"
                "once that is mended, search again with --overwrite"
            )
        self.best = best
        self.judged = self._judge(pixels)
        self._write()

    def space_of(self, *, pretrained_vit: bool) -> Space:
        """What is searched, of these classes."""
        levels = tree_of(self.classes).levels if self.config.study == HIERARCHICAL else 1
        given = self.config.given
        return space_for(self.config.study, pretrained_vit=pretrained_vit, several_levels=levels > 1, given=given)

    @property
    def input_column(self) -> str | None:
        """The column that tells the inputs, which one input alone may not be enough to find."""
        names, column = self.config.inputs, self.config.input_column
        return column_of(self.selection.table, names, column) if names else None

    def _search(self, pixels: np.ndarray, workers: int) -> list[Record]:
        config = self.config
        bench = self._bench(pixels, workers)
        ledger = Ledger.open(
            self.out.path, self.space, defaults(self.space), seed=config.seed, subject=f"dataset {self.dataset.version}"
        )
        try:
            self._write_sides()
            known = len(ledger.finished())
            if known:
                say(f"{known} trials were finished before and are not run again")
            with progress("tune", config.trials, "trials", done=known) as bar:
                run_search(
                    ledger,
                    bench,
                    self.out.path,
                    chatter=self.out.log,
                    trials=config.trials,
                    workers=workers,
                    gpu=self.gpu,
                    on_finished=_teller(bar),
                )
            return ledger.finished()
        finally:
            ledger.close()

    def _bench(self, pixels: np.ndarray, workers: int) -> Bench:
        if self.config.study != HIERARCHICAL:
            given: dict[str, Any] = {"classes": len(self.classes), "threads": threads_for(workers)}
            return bench_for(self.default, self.wanted, pixels, self.truth, self.sides, **given)
        return search_bench(self.hierarchical, self.sides)

    @cached_property
    def hierarchical(self) -> HierarchicalBench:
        """All rows, of which those of the search train and the held-out ones are judged."""
        config, features = self.config, {}
        pixels = self.dataset.pixels(self.selection)
        torch.set_num_threads(cores())
        for init in config.given["init"]:
            say(f"features of {len(pixels):,} images under {init}")
            wanted = wanted_for(replace(self.default, init=init), self.dataset, self.wanted.device)
            first = initial_weights(wanted)
            network = first.network.eval().to(wanted.device)
            with torch.inference_mode():
                features[init] = features_of(network, first.input, pixels, wanted.device)
        labels = Labels(self.truth, self.selection.column("label"), self.groups, "group")
        inputs = inputs_of(self.selection.table, config.inputs, config.input_column)
        sides = (np.sort(self.sides.search), np.sort(self.sides.held_out))
        return HierarchicalBench(config, features, labels, inputs, tuple(self.classes), *sides)

    def _judge(self, pixels: np.ndarray) -> Judgement:
        """Winner and defaults, fitted on all rows of the search, on the held-out ones."""
        contenders = {0: self.records[0], self.best.number: self.best}
        fits = self._fits([r for r in contenders.values() if r.value is not None], pixels)
        best, default = fits[self.best.number], fits.get(0)
        return Judgement(
            self._metrics(best),
            None if default is None else self._metrics(default),
            None if default is None else self._gain(best, default),
        )

    def _metrics(self, probabilities: np.ndarray) -> dict[str, Any]:
        truth, rows = self._held_out()
        return dict(metrics.summarise(truth, probabilities, **rows))

    def _gain(self, best: np.ndarray, default: np.ndarray) -> dict[str, Any]:
        truth, rows = self._held_out()
        (found,) = differences(truth, best, [default], **rows)
        return {"value": found["balanced_accuracy"]["difference"], "ci95": found["balanced_accuracy"]["ci95"]}

    def _held_out(self) -> tuple[np.ndarray, dict[str, Any]]:
        """Truth [M] of the held-out rows, or of those that stand for cases, and what their metrics need besides."""
        rows = self.sides.held_out if self.config.study != HIERARCHICAL else self.hierarchical.standing
        zeros = np.zeros(len(rows), dtype=np.int64)
        groups = [self.groups[r] for r in rows]
        return self.truth[rows], {"group": groups, "fold": zeros, "repeat": zeros, "seed": self.config.seed}

    def _fits(self, records: list[Record], pixels: np.ndarray) -> dict[int, np.ndarray]:
        """Probabilities of the held-out rows by number; fits that an earlier process finished are read."""
        folder = self.out.path / "final"
        folder.mkdir(exist_ok=True)
        files = {r.number: folder / f"trial-{r.number}.safetensors" for r in records}
        missing = [r for r in records if not files[r.number].exists()]
        if missing:
            say(f"judging on {len(self.sides.held_out):,} held-out images: fits on all groups of the search")
        for record in missing:  # one after the other, so that the result does not depend on the number of workers
            if self.config.study == HIERARCHICAL:
                (probabilities,) = run_folds(final_fit, (self.hierarchical, record.params), [()], workers=1, gpu=False)
            else:
                shared = (self._recipe(record), pixels, self.truth, self.sides.search, self.sides.held_out)
                each = [(record.outcome.best_epoch,)]
                (probabilities,) = run_folds(refit_and_judge, shared, each, workers=1, gpu=self.gpu)
            partial = folder / f".{files[record.number].name}"
            save_file({"probabilities": probabilities}, partial)
            storage.publish_file(partial, files[record.number])
        return {number: load_file(file)["probabilities"] for number, file in files.items()}

    def _recipe(self, record: Record) -> Recipe:
        return recipe_for(self.config.trial(record.params), self.wanted, len(self.classes), threads_for(1))

    def _announce(self, workers: int) -> None:
        said = self._protocol()
        say(
            f"{self.config.study}: up to {counted(self.config.trials, 'trial')} of "
            f"{counted(self.config.epochs, 'epoch')}, {workers} at a "
            f"time, over {', '.join(self.space)}"
        )
        say(
            f"{said['groups']:,} groups of {len(self.classes)} classes: {said['fit_groups']:,} fit, "
            f"{said['validation_groups']:,} choose, {said['held_out_groups']:,} are held out of the search"
        )

    def _protocol(self) -> dict[str, Any]:
        sides = {"fit": self.sides.fit, "validation": self.sides.validation, "held_out": self.sides.held_out}
        found: dict[str, Any] = {"split": "group", "groups": len(set(self.groups))}
        for name, rows in sides.items():
            found |= {f"{name}_groups": len({self.groups[r] for r in rows}), f"{name}_images": len(rows)}
        return found

    def _write_sides(self) -> None:
        """split.parquet: which side each labelled image is on."""
        side = np.full(len(self.selection), "fit", dtype=object)
        side[self.sides.validation], side[self.sides.held_out] = "validation", "held_out"
        columns = {name: self.selection.column(name) for name in ("image_id", "group", "label")}
        partial = self.out.path / ".split.parquet"
        pq.write_table(pa.table(columns | {"side": side.tolist()}), partial)
        storage.publish_file(partial, self.out.path / "split.parquet")

    def _write(self) -> None:
        write_trials(self.out.path / "trials.parquet", self.records, self.space)
        write_best(self.out.path / "best.yaml", self.config, self.best, self.dataset.version, self.input_column)
        draw_history(self.out.path / "figures", self.records)
        write_tune_report(
            self.out.path, self.config, self.space, self.records, self.best, self.judged, self._protocol(), self.seen
        )

    @property
    def seen(self) -> int:
        """Held-out images that any of the first weights saw."""
        shown = frozenset[str]().union(*(seen_by(init) for init in self.config.given["init"]))
        return len(own_images(self.selection.take(self.sides.held_out)) & shown)

    def summary(self) -> dict[str, Any]:
        states = [r.outcome.state for r in self.records]
        return {
            "protocol": self._protocol(),
            "trials": len({r.number for r in self.records}),
            "completed": states.count("complete"),
            "stopped_early": states.count("stopped"),
            "failed": states.count("failed"),
            "best_trial": self.best.number,
            "best_value": self.best.value,
            "default_value": self.records[0].value,
            "best_params": self.best.params,
            "held_out": self.judged.as_dict(),
        }


def _teller(bar: Bar) -> Callable[[Record], None]:
    """Says one line for each trial that ends."""

    def tell(record: Record) -> None:
        end = {
            "complete": "",
            "stopped": f", stopped after {len(record.outcome.values)} epochs",
            "failed": f"failed: {record.outcome.reason}",
        }
        value = "" if record.value is None else f"{record.value:.3f}"
        settings = ", ".join(f"{name} {shown_value(v)}" for name, v in record.params.items())
        say(f"trial {record.number}: {value}{end[record.outcome.state]} ({settings})")
        bar.advance(1)

    return tell
