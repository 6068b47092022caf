"""`transfer --stages`: the stages of a chain trained once each, and the target judged from every point of it.

A stage, and the target judged from an earlier point, is kept beside `--out` under the hash of its content, so that
another target, or a chain with one more stage, finds it; each is a RUN of its own verb, which goes on where it stopped.

Source: double transfer, Alzubaidi et al., Cancers 13:1590, 2021, whose pretext is not public. Not here: a pretext that
names the collection which an image is from, a tenth of the rate for layers that were handed on (`--layer-decay` grades
them), and a vote over the patches of an image.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from cluster import storage
from cluster.errors import UsageError
from cluster.progress import say
from cluster.session import in_cluster
from training import gains, stages
from training.artifact import read_card
from training.configs import PretrainConfig, TransferConfig
from training.dataset import Dataset, Selection
from training.device import choose_device
from training.encoder import Architecture
from training.gains import Gain, Point
from training.ingest import resolve_data
from training.lineage import labelled_by
from training.overlap import Overlap, groups_of, overlap
from training.predictions import FILE, UNITS
from training.pretrain import pretrain
from training.protocol import Layout, judged_rows, laid_out
from training.report import Section
from training.stages import SCRATCH, START, Stage
from training.transfer import carry_out, transfer

Preset = Literal["auto", "tiny", "small", "base", "large"]
FOLDER, PLAN = "stages", "chain.json"
KEPT = (storage.MANIFEST, "report.html")
"""What the RUN keeps of the target judged from an earlier point, beside its predictions."""


@dataclass(frozen=True)
class Planned:
    """A stage with its images, and what its result is known by."""

    stage: Stage
    dataset: Dataset
    selection: Selection
    overlap: Overlap
    key: str
    place: str
    """Where its RUN is kept."""

    def facts(self) -> dict[str, Any]:
        return {
            "name": self.stage.name,
            "verb": self.stage.verb,
            "key": self.key,
            "dataset": self.dataset.version,
            "images": len(self.selection),
            "config": self.stage.config.identity(),
        }


def transfer_through(config: TransferConfig) -> dict[str, Any]:
    """As `transfer`, from the last stage of the chain `config.stages`, with every stage's gain; returns the summary.

    Raises:
        UsageError: the chain, its data or the target cannot be right, or a stage trained with labels has seen images
            or groups of the target. Said before anything is trained.
    """
    chain = _Chain.planned(config)
    chain.refuse_other()
    with config.open_out("transfer") as out:
        if out.state == "done":
            return out.summary()
        (out.path / FOLDER).mkdir(exist_ok=True)
        storage.write_json(out.path / FOLDER / PLAN, chain.lineage())
        out.push()
        chain.train()
        ending = chain.judge(out.path / FOLDER)
        out.push()
        return carry_out(ending, out, chain)


@dataclass(frozen=True)
class _Earlier:
    """A point of the chain before its last, and the flags that start the target from it."""

    name: str
    init: str
    key: str
    preset: Preset = "auto"
    model: str | None = None
    link: Planned | None = None


@dataclass
class _Chain:
    """One chain and its target."""

    config: TransferConfig
    target: Dataset
    judged: Selection
    layout: Layout
    links: list[Planned]
    points: list[Point] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)
    """Where the predictions of each point stand."""

    @classmethod
    def planned(cls, config: TransferConfig) -> _Chain:
        """All is checked that can be, and SOURCEs are ingested; nothing is trained."""
        read = stages.read_chain(str(config.stages))
        device = None if in_cluster() else choose_device(config.device)
        stages.architectures(read, [3] * len(read), device)  # a misfit is told before images are read
        before = stages.origin_key(read[0].config.init)
        data = [resolve_data(stage.config.data, out=config.out, images=config.images) for stage in read]
        networks = stages.architectures(read, [each.channels for each in data], device)
        target = resolve_data(config.data, out=config.out, images=config.images)
        judged = judged_rows(config, target)
        layout = laid_out(config, judged)
        links: list[Planned] = []
        for stage, dataset, network in zip(read, data, networks, strict=True):
            selection = _rows(stage, dataset)
            shared = overlap(dataset, selection, target, judged)
            _refuse_leak(stage, shared, config.data)
            before = stages.key_of(stage.verb, stage.config, dataset.version, before, network)
            place = _place(config, stage.verb, before)
            links.append(Planned(stage, dataset, selection, shared, before, place))
        _refuse_seen(read, target, judged)
        return cls(config, target, judged, layout, links)

    def refuse_other(self) -> None:
        """Raises UsageError where `--out` holds a RUN of other stages under the same flags."""
        place = storage.join(self.config.out, FOLDER)
        if self.config.overwrite or PLAN not in storage.list_names(place):
            return
        there = [(link["name"], link["key"]) for link in storage.read_json(storage.join(place, PLAN))]
        ours = [(link.stage.name, link.key) for link in self.links]
        if there != ours:
            changed = next((name for name, key in ours if (name, key) not in there), ours[-1][0])
            raise UsageError(
                f"--out {self.config.out}: its stages differ from those of {self.config.stages}, first at {changed!r}; "
                "use --overwrite or another --out"
            )

    def train(self) -> None:
        """Every stage stands in its place; those that did already are left as they are."""
        init = self.origin
        for number, link in enumerate(self.links, start=1):
            what = f"stage {link.stage.name} ({number} of {len(self.links)}): {link.stage.verb}"
            if _finished(link.place):
                say(f"{what}, kept from before in {link.place}")
            else:
                say(f"{what} on {len(link.selection):,} images, in {link.place}")
                self._train(link, init)
            init = link.place

    def _train(self, link: Planned, init: str) -> None:
        config = link.stage.config
        if isinstance(config, PretrainConfig):
            pretrain(replace(config, data=link.dataset.uri, init=init, out=link.place))
        else:
            transfer(replace(config, data=link.dataset.uri, init=init, out=link.place))

    def judge(self, folder: Path) -> TransferConfig:
        """The target was judged from every point but the last; returns the config of the last."""
        network = read_card(self.links[-1].place)[0].architecture
        size = self.config.image_size if self.config.image_size != "auto" else f"{network.height}x{network.width}"
        base = replace(self.config, stages=None, image_size=size, data=self.target.uri)
        for point in self._earlier(network):
            config = replace(base, init=point.init, preset=point.preset, model=point.model)
            key = stages.key_of("transfer", config, self.target.version, point.key)
            place = _place(self.config, "transfer", key)
            if not _finished(place):
                say(f"the target from {point.name}, in {place}")
                transfer(replace(config, out=place, overwrite=False))
            own = folder / point.name
            own.mkdir(exist_ok=True)
            for part in (*KEPT, FILE, *([UNITS] if self.config.unit != "image" else [])):
                storage.fetch(storage.join(place, part), own / part)
            self._add(point.name, point.link, own, storage.read_json(own / storage.MANIFEST)["metrics"])
        return replace(base, init=self.links[-1].place)

    def _earlier(self, network: Architecture) -> list[_Earlier]:
        """The points before the last one, which leaves `network`."""
        found = []
        scratch = stages.scratch_flags(network)
        if scratch is None:
            say(f"note: no flags give {network.name} random weights, so the chain is not compared with {SCRATCH}")
        else:
            found.append(_Earlier(SCRATCH, SCRATCH, SCRATCH, scratch["preset"], scratch["model"]))
        first, origin = self.links[0].stage.config, self.origin
        if origin != SCRATCH:
            name = origin if origin == "imagenet" else START
            found.append(_Earlier(name, origin, stages.origin_key(origin), first.preset, first.model))
        return found + [_Earlier(link.stage.name, link.place, link.key, link=link) for link in self.links[:-1]]

    def _add(self, name: str, link: Planned | None, folder: Path, values: dict[str, Any]) -> None:
        """The point whose predictions stand in `folder` is known, and its gain over the one before."""
        gain = self._gain(self.folders[-1], folder) if self.points else None
        verb, key, images = (link.stage.verb, link.key, len(link.selection)) if link else (None, None, 0)
        self.points.append(Point(name, verb, key, images, values, gain, link.overlap if link else None))
        self.folders.append(folder)

    def _gain(self, before: Path, after: Path) -> Gain:
        """The one place where two runs of the target are compared."""
        file = FILE if self.config.unit == "image" else UNITS
        laid = self.layout
        several, seed = laid.labels.several, self.config.seed
        return gains.gain_between(before / file, after / file, laid.classes, several=several, seed=seed)

    @property
    def origin(self) -> str:
        return self.links[0].stage.config.init

    def lineage(self) -> list[dict[str, Any]]:
        return [link.facts() for link in self.links]

    def told(self, folder: Path, metrics: dict[str, Any]) -> tuple[list[Section], dict[str, Any]]:
        link = self.links[-1]
        self._add(link.stage.name, link, folder, metrics)
        whole = self._gain(self.folders[0], folder) if len(self.points) > 1 else {}
        section = gains.section(self.points, whole, folder / "figures", len(self.judged))
        return [section], {"stages": [point.as_dict() for point in self.points], "chain_gain": whole}


def _rows(stage: Stage, dataset: Dataset) -> Selection:
    """The rows that a stage trains on; of a labelled one, whose folds can be laid."""
    try:
        if not isinstance(stage.config, TransferConfig):
            return dataset.select(stage.config.where)
        selection = judged_rows(stage.config, dataset)
        laid_out(stage.config, selection)
    except UsageError as error:
        raise UsageError(f"{stage.where}: {error}") from error
    return selection


def _refuse_leak(stage: Stage, shared: Overlap, target: str) -> None:
    if not stage.labelled:
        return
    if shared.images or shared.groups:
        raise UsageError(
            f"{stage.where}: trains on labels of {shared.images:,} images of {target}, and of {shared.groups:,} of its "
            f"groups, such as {storage.printable(shared.example)!r}: their labels would leak into the test folds; "
            "leave them out by `where`, or use them without labels (verb: pretrain)"
        )
    if shared.namesakes:
        say(
            f"warning: {shared.namesakes:,} groups of stage {stage.name} are called as groups of {target} are; if they "
            "are the same patients, their labels leak"
        )


def _refuse_seen(chain: list[Stage], target: Dataset, judged: Selection) -> None:
    """Raises UsageError where weights that the chain is given, those of its start or of a teacher, were trained with
    labels of the target's groups."""
    given = [(chain[0], "init", chain[0].config.init)]
    given += [(stage, "teacher", run) for stage in chain if (run := stages.teacher_of(stage.config)) is not None]
    for stage, flag, run in given:
        groups = groups_of(labelled_by(run), target.manifest, judged.table)
        if groups:
            raise UsageError(
                f"{stage.where}: --{flag} {run} was trained with labels of {len(groups):,} groups of the target, such "
                f"as {storage.printable(min(groups))!r}: they would leak into its test folds; use other weights"
            )


def _place(config: TransferConfig, verb: str, key: str) -> str:
    return storage.sibling(config.out, f".{verb}-{key}.stage")


def _finished(place: str) -> bool:
    return storage.MANIFEST in storage.list_names(place)
