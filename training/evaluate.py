"""`evaluate`: models judged on labelled data that they have not seen, or compared by what they said out of fold."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cluster.errors import UsageError
from cluster.outdir import OutDir
from cluster.progress import say
from training import report
from training.artifact import card_sha256, located_model, read_card, refuse_changed, run_name
from training.compare import compare
from training.configs import EvaluateConfig
from training.evaluation_facts import Facts, asked_section, closing_sections
from training.evaluation_report import (
    HEADLINE,
    Rival,
    comparison_section,
    draw_differences,
    verdict,
    write_evaluation_report,
)
from training.evidence import Evidence, out_of_fold, unseen
from training.findings import statistics_of
from training.hits import hits_compared
from training.judgement import Judged, summarise
from training.mistakes import mistakes_section
from training.report import with_interval
from training.results import figures_of


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """A report at `config.out` judges the model, alone or against others; returns its summary.

    With `config.data`, all models judge its labelled images; without, the out-of-fold predictions of RUNs of
    `transfer` are compared, which must have judged the same images in the same folds.

    Raises:
        UsageError: a model has no classes, labels are not among them, images are of a model's lineage, or the RUNs
            were not judged alike.
    """
    runs = _named(config)
    models = {run: card_sha256(run) for run in runs.values()}
    with config.open_out("evaluate") as out:
        if out.state == "done":
            refuse_changed(config.out, out.summary(), models)
            return out.summary()
        started = time.monotonic()
        found = out_of_fold(config, runs, out) if config.data is None else unseen(config, config.data, runs, out)
        rivals = _rivals(config, found)
        name = next(iter(runs))
        asked: dict[str, Any] = {"by": config.by, "prevalence": config.prevalence, "seed": config.seed}
        after, more = statistics_of(found.judged, found.selection, **asked, chosen=OUT_OF_FOLD)
        rankings, kept = hits_compared(runs, seed=config.seed) if config.data is None else ([], {})
        facts = _facts(config, name, found, rivals, more)
        _write_report(config, out, facts, found, rivals, [*rankings, *after, *found.overlap[0]])
        summary = {
            "protocol": found.protocol,
            "images": found.images,
            "seen": found.known.images,
            "seen_groups": found.known.groups,
            "namesakes": found.known.namesakes,
            "models": models,
            "seconds": time.monotonic() - started,
            **more,
            **found.overlap[1],
            "metrics": found.judged.metrics | more.get("metrics", {}),
        }
        if rivals:
            summary["against"] = {
                other: {"run": runs[other], "own": rival.metrics, **rival.comparison, **kept.get(other, {})}
                for other, rival in rivals.items()
            }
        out.finish(summary)
        _say_result(out, name, found.judged, rivals)
        return summary


def _named(config: EvaluateConfig) -> dict[str, str]:
    """The RUNs by name, `--model` first: their own names, or, where two share one, as they were given."""
    runs = [config.model, *config.against]
    places = [located_model(run) for run in runs]
    twice = next((run for at, run in enumerate(runs) if places[at] in places[:at]), None)
    if twice is not None:
        raise UsageError(f"--against {twice}: is named twice; a model is compared with others")
    names = [run_name(run) for run in runs]
    return dict(zip(names if len(set(names)) == len(names) else runs, runs, strict=True))


OWN = "What was said, and where the colours show that it looks, is of one model that was not trained on the picture."
SEEN = (
    "What was said, and where the colours show that it looks, is of one model, which may have seen the picture before."
)
OUT_OF_FOLD = "on what the run had said, out of fold, of the images that it was trained on"


def _rivals(config: EvaluateConfig, found: Evidence) -> dict[str, Rival]:
    if not found.others:
        return {}
    ours = found.judged
    rows: dict[str, Any] = {"group": found.group, "fold": ours.fold, "repeat": ours.repeat, "seed": config.seed}
    compared = compare(ours.truth, ours.probabilities, found.others, **rows)
    return {
        name: Rival(summarise(ours.truth, theirs, ordered=found.ordered, **rows), compared[name])
        for name, theirs in found.others.items()
    }


def _facts(
    config: EvaluateConfig, name: str, found: Evidence, rivals: Mapping[str, Rival], more: Mapping[str, Any]
) -> Facts:
    return Facts(
        name=name,
        config=config,
        card=read_card(config.model)[0],
        judged=found.judged,
        selection=found.selection,
        split=found.protocol["split"],
        protocol=found.words,
        seen=found.known,
        dataset=found.dataset,
        others=tuple(rivals),
        verdicts=_verdicts(name, rivals),
        by=more.get("subgroups", {}),
        method=found.looker.method if found.looker else "",
    )


def _mistakes(config: EvaluateConfig, out: OutDir, found: Evidence) -> list[report.Section]:
    """The worst of them, where there are pictures to show."""
    dataset, judged, looker = found.dataset, found.by_image, found.looker
    if dataset is None or judged is None:
        return []
    groups = found.selection.column("group")
    section = mistakes_section(
        out.path / "figures",
        classes=judged.classes,
        truth=judged.truth,
        probabilities=judged.probabilities,
        groups=[groups[row] for row in judged.rows],
        rows=judged.rows,
        pixels=lambda rows: dataset.pixels(found.selection.take(rows)),
        maps=looker.maps if looker else None,
        method=looker.method if looker else "",
        judged="images" if config.unit != "image" else "",
        whose=SEEN if found.known.any else OWN,
    )
    return [section]


def _verdicts(name: str, rivals: Mapping[str, Rival]) -> list[str]:
    """Who is ahead on the main metric, a sentence for each rival."""
    differences = {other: rival.comparison["metrics"][HEADLINE] for other, rival in rivals.items()}
    return [verdict(name, other, one, len(rivals)) for other, one in differences.items()]


def _write_report(
    config: EvaluateConfig,
    out: OutDir,
    facts: Facts,
    found: Evidence,
    rivals: Mapping[str, Rival],
    after: Sequence[report.Section],
) -> None:
    figures_of(found.judged, out.path / "figures")
    comparison = None
    if rivals:
        figure = out.path / "figures" / "differences.png"
        draw_differences(figure, rivals)
        comparison = comparison_section(
            facts.name,
            found.judged.metrics,
            rivals,
            images=len(np.unique(found.judged.rows)),
            unit=config.unit,
            groups=len(set(found.group)),
            repeats=found.protocol["repeats"],
            figure=figure,
        )
    write_evaluation_report(
        out.path,
        found.judged,
        before=[asked_section(facts), *found.before],
        comparison=comparison,
        after=[*after, *_mistakes(config, out, found), *closing_sections(facts)],
        caption=found.caption,
        images=config.images,
    )


def _say_result(out: OutDir, name: str, judged: Judged, rivals: Mapping[str, Rival]) -> None:
    for sentence in _verdicts(name, rivals):
        say(sentence)
    own = judged.metrics[HEADLINE]
    shown = with_interval(own["value"], own["ci95"])
    say(f"done: balanced accuracy {shown}, report in {out.name('report.html')}")
