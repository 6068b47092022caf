"""What a search leaves to read: `trials.parquet`, `best.yaml`, the history figure and `report.html`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster import storage
from cluster.settings import dump_yaml
from training import figures, report
from training.results import WORDS
from tuning.configs import FIXED, HIERARCHICAL, OF_HIERARCHY, TuneConfig
from tuning.ledger import Record, by_rank
from tuning.spaces import Choice, Setting, Space
from tuning.trial import IN_FULL, VALIDATION

OBJECTIVE = "balanced accuracy on the validation groups"


@dataclass(frozen=True, eq=False)
class Judgement:
    """Winner and defaults on the held-out groups; `None` for defaults that failed."""

    best: dict[str, Any]
    default: dict[str, Any] | None
    difference: dict[str, Any] | None
    """Balanced accuracy of the winner less that of the defaults, on the same images, with `ci95`."""

    def as_dict(self) -> dict[str, Any]:
        return {"best": self.best, "default": self.default, "difference": self.difference}


def write_trials(path: Path, records: list[Record], space: Space) -> None:
    """trials.parquet: one row per trial, by number; its parameters are columns."""
    outcomes = [r.outcome for r in records]
    columns: dict[str, Any] = {
        "number": pa.array([r.number for r in records], pa.int64()),
        "state": [o.state for o in outcomes],
        "value": pa.array([r.value for r in records], pa.float64()),
        "held_loss": pa.array([o.held_loss for o in outcomes], pa.float64()),
        "best_epoch": pa.array([o.best_epoch for o in outcomes], pa.int64()),
        "epochs": pa.array([len(o.values) for o in outcomes], pa.int64()),
        "seconds": pa.array([o.seconds for o in outcomes], pa.float64()),
        **{name: pa.array([r.params.get(name) for r in records], _type(s)) for name, s in space.items()},
        "reason": [o.reason for o in outcomes],
    }
    partial = path.with_name(f".{path.name}")
    pq.write_table(pa.table(columns), partial)
    storage.publish_file(partial, path)


def write_best(path: Path, config: TuneConfig, best: Record, dataset: str, input_column: str | None = None) -> None:
    """best.yaml: a config of `transfer` without --data and --out, which go with the command that uses it; it says on
    which version of a DATASET it was searched.

    `input_column` is where the search found the inputs: the winner may have one alone, which several columns may name.
    """
    chosen = config.trial(best.params).as_dict()
    chosen |= {"input_column": input_column} if chosen["inputs"] else {}
    own = [*OF_HIERARCHY] if config.study == HIERARCHICAL else []
    kept = dict.fromkeys([*(name for name in FIXED if name != "device"), *own, *best.params])
    settings = {name: chosen[name] for name in kept} | {"searched_on": dataset}
    storage.write_text(path, dump_yaml("transfer", settings))


def _type(setting: Setting) -> pa.DataType:
    return pa.string() if isinstance(setting, Choice) else pa.float64()


def shown_value(value: float | str | None) -> str:
    """A setting of a trial; one that meant nothing beside the others has none."""
    return "–" if value is None else value if isinstance(value, str) else f"{value:.3g}"


def draw_history(folder: Path, records: list[Record]) -> None:
    """trials.png stands in `folder`."""
    folder.mkdir(exist_ok=True)

    def points(state: str) -> tuple[list[int], list[float]]:
        chosen = [(r.number, r.value) for r in records if r.outcome.state == state and r.value is not None]
        return [number for number, _ in chosen], [value for _, value in chosen]

    failed = [r.number for r in records if r.outcome.state == "failed"]
    series = {"complete": points("complete"), "stopped early": points("stopped")}
    figures.search_history(series, folder / "trials.png", OBJECTIVE, failed)


def verdict(best: Record, judged: Judgement) -> str:
    """What the search gained on groups that it never saw, claiming no more than the interval allows."""
    value = judged.best["balanced_accuracy"]
    own = report.with_interval(value["value"], value["ci95"])
    if best.number == 0:
        return f"No trial did better than the defaults: they reach balanced accuracy {own} on the held-out groups."
    if judged.default is None or judged.difference is None:
        return f"Trial {best.number} won: balanced accuracy {own} on the held-out groups. The defaults failed."
    theirs = judged.default["balanced_accuracy"]
    change, (low, high) = judged.difference["value"], judged.difference["ci95"]
    said = (
        f"On groups that the search never saw, trial {best.number}, its winner, reaches balanced accuracy {own}, the "
        f"defaults {report.with_interval(theirs['value'], theirs['ci95'])}: "
    )
    if low is None or high is None:
        return said + "too few groups are held out to say more."
    interval = f"{change:+.3f} [{low:+.2f}, {high:+.2f}]"
    if low > 0:
        return said + f"a gain of {interval}."
    if high < 0:
        return said + f"a loss of {interval}. Keep the defaults."
    word = "gain" if change > 0 else "loss" if change < 0 else "difference"
    return said + f"a {word} of {interval}, whose interval holds 0, so that it may be chance."


def write_tune_report(
    out: Path,
    config: TuneConfig,
    space: Space,
    records: list[Record],
    best: Record,
    judged: Judgement,
    protocol: dict[str, Any],
    seen: int,
) -> None:
    """report.html of a search, for a reader who does not program."""
    sections = [
        _result_section(best, judged, protocol, seen),
        _protocol_section(config, space, protocol),
        _trials_section(out, records, space),
        _use_section(out, config, best),
    ]
    report.write_report(out / "report.html", title=f"Tune: {out.name}", sections=sections)


def _result_section(best: Record, judged: Judgement, protocol: dict[str, Any], seen: int) -> report.Section:
    default = judged.default
    rows = [
        [name, _shown(m), _shown(default[name]) if default else "failed", WORDS.get(name, "")]
        for name, m in judged.best.items()
    ]
    winner = "the defaults" if best.number == 0 else f"trial {best.number}"
    blocks: list[Any] = [
        report.Text(verdict(best, judged)),
        report.Table(
            ["metric", f"winner ({winner})", "defaults (trial 0)", "meaning"],
            rows,
            f"On {protocol['held_out_groups']:,} groups that the search never saw, value [95 % interval]; "
            "probabilities are not calibrated here",
        ),
    ]
    if seen:
        blocks.append(
            report.Warning(
                f"{seen:,} of the held-out images were seen, without their labels, in the training of first weights. "
                "On images that no weights have seen, figures may be lower."
            )
        )
    return report.Section("Result", blocks)


def _shown(metric: dict[str, Any]) -> str:
    return report.with_interval(metric["value"], metric["ci95"])


def _protocol_section(config: TuneConfig, space: Space, protocol: dict[str, Any]) -> report.Section:
    text = (
        f"{protocol['held_out_groups']:,} of {protocol['groups']:,} groups (patients, slides), "
        f"{protocol['held_out_images']:,} images, were held out before the search began, stratified by class. Trials "
        f"were neither fitted nor chosen on them. Of the remaining groups, {protocol['validation_groups']:,} (about "
        f"{VALIDATION:.0%}) judged the trials, and the others fitted them. The value of a trial is its {OBJECTIVE} at "
        "the epoch of lowest loss; equal values are decided by that loss. Being the best of many on the same groups, "
        "the winner's value there is too good, so winner and defaults were fitted again on all groups of the search, "
        "for the epochs that served them best in their trials, and judged on the held-out groups. Nothing was chosen "
        "by those figures. Intervals come from a bootstrap over groups."
    )
    search = (
        f"Trial 0 is the defaults of {config.study}. The others were suggested by Optuna's tree-structured Parzen "
        f"estimator. After the first {IN_FULL}, which set the bar, trials were stopped early by asynchronous "
        f"successive halving; a full trial is {config.epochs} epochs, from first weights {config.init}."
    )
    rows = [[name, *setting.in_words(), _when(setting)] for name, setting in space.items()]
    table = report.Table(["setting", "range", "scale", "where"], rows, "Searched")
    return report.Section("Protocol", [report.Text(text), report.Text(search), table])


def _when(setting: Setting) -> str:
    return "" if setting.when is None else f"{setting.when[0]} is {setting.when[1]}"


def _trials_section(out: Path, records: list[Record], space: Space) -> report.Section:
    words = {"complete": "complete", "stopped": "stopped early", "failed": "failed"}
    rows = [
        [
            str(r.number),
            words[r.outcome.state],
            "–" if r.value is None else f"{r.value:.3f}",
            f"{len(r.outcome.values)}",
            *(shown_value(r.params.get(name)) for name in space),
            r.outcome.reason,
        ]
        for r in by_rank(records)
    ]
    caption = (
        "Filled points were trained in full and may win; open ones were stopped, and stand where they then were, so "
        "their values are of fewer epochs."
    )
    return report.Section(
        "Trials",
        [
            report.Figure(out / "figures" / "trials.png", "Value of each trial and the best so far", caption),
            report.Table(["trial", "state", "value", "epochs", *space, "reason"], rows, "All trials, the best first"),
        ],
    )


def _use_section(out: Path, config: TuneConfig, best: Record) -> report.Section:
    command = f"rayograph transfer --config {out / 'best.yaml'} --data {config.data} --out RUN"
    text = (
        f"best.yaml holds the settings of trial {best.number}. The command below cross-validates them on all labelled "
        "images; its figures are a little too good, for the settings were chosen on part of these, as its report says."
    )
    return report.Section("Use it", [report.Text(text), report.Code(command)])
