"""One frozen config per verb: the single definition of its flags, YAML keys, Python API and `config.yaml`."""

from __future__ import annotations

import re
from dataclasses import KW_ONLY, dataclass, fields
from typing import Annotated, ClassVar, Literal

from cyclopts import Parameter

from cluster.errors import UsageError
from cluster.settings import Config

Task = Literal["finetune", "linear", "knn", "svm", "hierarchical", "metric"]
FROZEN = ("linear", "knn", "svm")
"""Tasks that judge features of the first weights, which stay as they are."""
TRAINED = ("finetune", "metric")
"""Tasks that train the network itself, whole and as one."""
MetricLoss = Literal["centre_contrastive", "centre_ranking", "proxy_anchor", "triplet"]
CentreUpdate = Literal["rule", "means", "learnt"]
Split = Literal["group", "image", "site", "holdout"]
Unit = Literal["image", "case", "group"]
Pooling = Literal["mean", "attention"]
Device = Literal["auto", "cpu", "cuda", "mps"]
Modality = Literal["auto", "none", "xray", "ct", "oct", "fundus", "derm", "cytology", "ultrasound"]
AUGMENTATION_FIELDS = ("min_crop", "flip", "turns", "jitter")
"""What `--modality` decides where it is given."""
Words = Annotated[tuple[str, ...], Parameter(consume_multiple=True)]
Numbers = Annotated[tuple[float, ...], Parameter(consume_multiple=True)]
"""Flags that take several values after one name."""


@Parameter(name="*")
@dataclass(frozen=True)
class IngestConfig(Config):
    source: Annotated[str, Parameter(name="source")]
    "Folder, index.csv, Parquet manifest, MedMNIST .npz, medmnist:NAME, phantom:N; local or a pyarrow.fs URI."
    _: KW_ONLY
    out: str
    "Where the DATASET goes."
    image_size: str = "auto"
    "Stored size, N or HxW; auto is 128 without an accelerator and 256 with one."
    fit: Literal["letterbox", "squash", "crop"] = "letterbox"
    "How an image of another shape is fitted into the stored size."
    channels: Literal["auto", "1", "3"] = "auto"
    "Channels of the stored images; auto is 3 unless every image is grey."
    window: str = "auto"
    "Grey values LOW:HIGH made black and white; auto: the 0.5 to 99.5 percentile of images of more than 8 bits."
    max_quarantined: float = 0.05
    "Largest share of unreadable images that is still accepted."
    max_merged_group: float = 0.05
    "Largest share of the data that copies may weld into one group before ingest stops."
    max_pixels: int = 100_000_000
    "Images with more pixels than this are quarantined unread."
    seed: int = 0
    "Seed of generated phantoms."
    images: bool = True
    "Pictures of the data, and names of files and groups, in report.html."
    overwrite: bool = False
    "Replace what is at --out."

    def __post_init__(self) -> None:
        self._require("max_quarantined", 0 <= self.max_quarantined <= 1, "must lie between 0 and 1")
        self._require("max_merged_group", 0 < self.max_merged_group <= 1, "must lie between 0 and 1")
        self._require("max_pixels", self.max_pixels > 0, "must be positive")


@Parameter(name="*")
@dataclass(frozen=True)
class PretrainConfig(Config):
    RAISABLE: ClassVar[frozenset[str]] = frozenset({"epochs"})

    data: str
    "A DATASET, or any SOURCE that ingest takes."
    _: KW_ONLY
    out: str
    "Where the RUN goes; an unfinished one of the same config is resumed."
    method: str = "mae"
    "mae, sssd (mae and self-distillation), distill (--teacher), dino or rotation; the first two need a ViT."
    preset: Literal["auto", "tiny", "small", "base", "large"] = "auto"
    "Model size; auto is tiny without an accelerator and base with one."
    model: str | None = None
    "A timm name instead of the preset's."
    init: str = "none"
    "Starting weights: none, imagenet (a conv net), a RUN, timm:NAME, hf-hub:NAME or a safetensors file in timm keys."
    where: tuple[str, ...] = ()
    "Keep only rows whose COLUMN=VALUE."
    epochs: int = 100
    "Passes over the data."
    batch_size: int = 64
    "Global batch size, whatever the number of workers."
    workers: str = "auto"
    "Training processes, N or MIN:MAX; auto is one per GPU of the cluster, else one per core, at most 2."
    seed: int = 0
    "Decides data order, augmentation, masks and initial weights."
    image_size: str = "auto"
    "N or HxW, divisible by the patch; auto is the preset's."
    mask_ratio: float = 0.75
    "mae, sssd: share of patches hidden from the encoder."
    norm_pix: bool = True
    "mae, sssd: reconstruct patches normalised by their own mean and variance."
    decoder_width: int | None = None
    "mae, sssd: decoder embedding width; default by preset."
    decoder_depth: int | None = None
    "mae, sssd: decoder blocks; default by preset."
    distillation: float = 0.2
    "sssd: share of the loss that is self-distillation; 0 is mae."
    distilled: Literal["image", "tokens"] = "image"
    "sssd: what the encoder matches of the decoder: one answer per image, or each visible patch by cosine."
    teacher_stop_grad: bool = True
    "sssd: the decoder, which teaches, learns from reconstruction alone."
    centring: Literal["probabilities", "logits"] = "probabilities"
    "sssd: what the teacher's centre is the running mean of: its answers (as in SD-MAE), or scores (as in dino)."
    prototypes: int = 4096
    "sssd, dino: entries of the answers that are matched."
    head_width: int | None = None
    "sssd, dino: hidden width of the heads; default 2048, or 512 with the tiny preset."
    teacher_temperature: float = 0.04
    "sssd, dino: of the teacher's answers; lower is sharper."
    student_temperature: float = 0.1
    "sssd, dino: of the student's answers."
    teacher_momentum: float = 0.996
    "dino: share of itself that the teacher keeps at the first step, at most 1 - 10 / steps of the run; rises to 1."
    local_crops: int = 6
    "dino: small crops of each image, beside two large ones."
    teacher: str = "imagenet"
    "distill: whose features are learnt: anything that --init takes, except none."
    matching: Literal["cosine", "smooth_l1"] = "cosine"
    "distill: how features are compared."
    lr: float = 2e-3
    "Peak learning rate at a global batch of 256; scaled linearly with --batch-size."
    weight_decay: float = 0.05
    "AdamW weight decay."
    warmup: float = 0.05
    "Share of the steps in which the learning rate rises."
    clip: float = 1.0
    "Largest gradient norm."
    min_crop: float = 0.4
    "Smallest share of the image area that a random crop keeps."
    flip: bool = True
    "Mirror half of the images left to right."
    modality: Modality = "auto"
    "Kind of images: random changes that are safe for it, instead of --min-crop and --flip."
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    "auto is bf16 where the hardware gains from it."
    checkpoint_s: float = 60.0
    "Seconds between checkpoints."
    keep: int = 2
    "Checkpoints kept."
    watchdog_s: float = 120.0
    "Seconds without a step after which a worker that hangs is replaced."
    probe: bool = True
    "Now and then judge the encoder on labelled images while it trains, beside the training."
    read_on: str | None = None
    "A custom resource of the cluster's nodes that can read --data; default any node with a CPU."
    train_on: str | None = None
    "A custom resource of the cluster's nodes that may train."
    receipt: str | None = None
    "A folder of the training hosts in which each worker notes which images its losses were computed on."
    device: Device = "auto"
    "Where training runs."
    overwrite: bool = False
    "Throw away what is at --out."

    def __post_init__(self) -> None:
        self._require("epochs", self.epochs > 0, "must be at least 1")
        self._require("batch_size", self.batch_size > 0, "must be at least 1")
        self._require("mask_ratio", 0 < self.mask_ratio < 1, "must lie between 0 and 1")
        self._require("distillation", 0 <= self.distillation < 1, "must lie between 0 and 1, 1 left out")
        self._require("prototypes", self.prototypes >= 2, "must be at least 2")
        self._require("head_width", self.head_width is None or self.head_width >= 1, "must be at least 1")
        self._require("teacher_temperature", self.teacher_temperature > 0, "must be positive")
        self._require("student_temperature", self.student_temperature > 0, "must be positive")
        self._require("teacher_momentum", 0 <= self.teacher_momentum <= 1, "must lie between 0 and 1")
        self._require("local_crops", self.local_crops >= 0, "must be at least 0")
        self._require("teacher", self.teacher != "none", "a network without trained weights has nothing to teach")
        self._require("min_crop", 0 < self.min_crop <= 1, "must lie between 0 and 1")
        self._require("warmup", 0 <= self.warmup < 1, "must lie between 0 and 1")
        self._require("keep", self.keep >= 1, "must be at least 1")
        self._require("lr", self.lr > 0, "must be positive")
        self._require("watchdog_s", self.watchdog_s > 0, "must be positive")
        _refuse_beside_modality(self)


@Parameter(name="*")
@dataclass(frozen=True)
class TransferConfig(Config):
    data: str
    "A DATASET, or any SOURCE that ingest takes."
    _: KW_ONLY
    out: str
    "Where the RUN goes."
    init: str = "imagenet"
    "Starting weights: imagenet, a RUN, timm:NAME, hf-hub:NAME, a safetensors file in timm keys, or none."
    stages: str | None = None
    "A YAML file with a chain of pretrain and transfer stages to start from, in place of --init."
    searched_on: str | None = None
    "Version of the DATASET that the settings were searched on; best.yaml of tune says so, and the report then warns."
    task: Task = "finetune"
    "finetune and metric train the network, metric for retrieval; linear, knn and svm judge frozen features."
    features: Literal["deep", "radiomic", "both", "fused"] = "deep"
    "What a frozen classifier judges: deep, radiomic, both side by side, or fused, the mean of a classifier of each."
    layers: Words = ("last",)
    "Of which layers deep features are: last, all, or numbers from the input on, such as 1 3 -1."
    preset: Literal["auto", "tiny", "small", "base", "large"] = "auto"
    "Model size where --init names no model."
    model: str | None = None
    "A timm name where --init names no model."
    where: tuple[str, ...] = ()
    "Keep only rows whose COLUMN=VALUE."
    folds: int = 5
    "Cross-validation folds."
    repeats: int = 1
    "Repetitions of the cross-validation with other splits."
    split: Split = "group"
    "group: k folds, a patient on one side; holdout: one such side; site: leave one site out; image: k folds that leak."
    site_column: str | None = None
    "The column that names the site (hospital, scanner) of --split site."
    test_fraction: float = 0.2
    "Share of the groups that --split holdout judges on."
    label_fraction: Numbers = (1.0,)
    "Shares of the training groups to fit with: a curve; the largest is the run's own."
    by: Words = ()
    "Columns of the manifest, such as sex,site: the report also judges each of their values alone."
    prevalence: Numbers = ()
    "Shares of a class for which predictive values are stated, such as 0.01 0.1."
    order: Words = ()
    "All classes from lowest to highest, where they have an order."
    multi_label: bool = False
    "Judge each class by itself, as an image may have several; so it is anyway where a label has a |."
    unit: Unit = "image"
    "What is judged: each image, or all images of a case or a group together."
    pooling: Pooling = "mean"
    "How the images of a unit are pooled: mean of their probabilities, or attention over frozen features."
    structure: Literal["flat", "independent", "transferred", "joint"] = "transferred"
    "Of --task hierarchical: one classifier, one per parent, each child started from its parent's, or one with all."
    learner: Literal["network", "features"] = "network"
    "Of --task hierarchical: fine-tune networks, or train small ones on frozen features, in seconds."
    level_weights: Numbers = ()
    "Of --structure joint: the weight of each level's loss from the top, the last for all below; default 1."
    stack: Literal["none", "forest", "logistic"] = "none"
    "Of --task hierarchical: a meta-learner on confidences made out of fold."
    inputs: Words = ()
    "Of --task hierarchical: kinds of images that a case may have, such as oct fundus; needs --unit case."
    input_column: str | None = None
    "The column that tells the kinds of --inputs; default the one that has all their names."
    epochs: int = 20
    "Passes of fine-tuning."
    batch_size: int = 32
    "Global batch size."
    lr: float = 1e-3
    "Peak learning rate of fine-tuning."
    layer_decay: float | None = None
    "Share of the learning rate that each lower layer keeps; default 0.75 for pretrained ViTs, else 1."
    weight_decay: float = 0.05
    "AdamW weight decay."
    drop_path: float = 0.1
    "Stochastic depth of fine-tuning."
    label_smoothing: float = 0.1
    "Label smoothing of fine-tuning."
    loss: MetricLoss = "centre_contrastive"
    "What --task metric trains to: against class centres, proxies, or the hardest pairs of a batch."
    embedding: int = 128
    "Numbers in an embedding of --task metric."
    margin: float | None = None
    "Margin of --task metric; default the loss's own."
    centres: CentreUpdate | None = None
    "How class centres of --task metric move: by Center Loss's rule (default), to class means, or learnt."
    steps: int = 1
    "Views of an image that --task metric puts together: 1 the whole, 2 also a crop, 3 also that under attention."
    min_crop: float = 0.6
    "Smallest share of the image area that a random crop keeps."
    flip: bool = True
    "Mirror half of the images left to right."
    turns: bool = False
    "Turn images by quarter turns: only where a picture has no upright."
    jitter: float = 0.1
    "Largest random change of contrast and brightness, as a share."
    modality: Modality = "auto"
    "Kind of images: random changes that are safe for it, instead of --min-crop, --flip, --turns and --jitter."
    tta: Literal["none", "flip", "turns"] = "none"
    "Test-time augmentation: judge each image also mirrored, or in all its 8 quarter turns, and average."
    image_size: str = "auto"
    "N or HxW; auto is the size of the initial weights' model."
    workers: str = "auto"
    "Folds fitted at the same time."
    seed: int = 0
    "Decides splits, order, augmentation and initial weights."
    device: Device = "auto"
    "Where training runs."
    images: bool = True
    "Pictures of the data in report.html."
    overwrite: bool = False
    "Throw away what is at --out."

    def __post_init__(self) -> None:
        self._require("folds", self.folds >= 2, "needs at least 2")
        self._require("repeats", self.repeats >= 1, "needs at least 1")
        self._require("test_fraction", 0 < self.test_fraction < 1, "must lie between 0 and 1")
        shares = self.label_fraction
        self._require("label_fraction", bool(shares) and all(0 < s <= 1 for s in shares), "each must lie in 0 to 1")
        self._require("label_fraction", len(set(shares)) == len(shares), "names a share twice")
        if (self.split == "site") != (self.site_column is not None):
            raise UsageError("--split site and --site-column COLUMN belong together")
        self._require("repeats", self.split != "site" or self.repeats == 1, "a site is left out once: give 1")
        self._require("epochs", self.epochs > 0, "must be at least 1")
        self._require("batch_size", self.batch_size > 1, "must be at least 2")
        if self.stages is not None:
            self._require("init", self.init == "imagenet", "not with --stages: give it to the first stage, as `init`")
            for field in ("model", "preset"):
                given = getattr(self, field) not in {None, "auto"}
                self._require(field, not given, "not with --stages, whose first stage decides the network")
        self._require("prevalence", all(0 < share < 1 for share in self.prevalence), "must lie between 0 and 1")
        self._require("layer_decay", self.layer_decay is None or 0 < self.layer_decay <= 1, "must lie between 0 and 1")
        self._require("min_crop", 0 < self.min_crop <= 1, "must lie between 0 and 1")
        self._require("order", len(set(self.order)) == len(self.order), "names a class twice")
        self._require("order", not (self.order and self.multi_label), "classes that are judged by themselves have none")
        parts = "a split by image would put the images of one unit on both sides"
        self._require("unit", self.unit == "image" or self.split != "image", parts)
        self._require("pooling", self.pooling == "mean" or self.unit != "image", "needs --unit case or group")
        frozen = "needs frozen features: --task linear, knn or svm"
        self._require("pooling", self.pooling == "mean" or self.task in FROZEN, frozen)
        self._require("features", self.features == "deep" or self.task in FROZEN, frozen)
        self._require("layers", self.layers == ("last",) or self.task in FROZEN, frozen)
        self._require("layers", self.layers == ("last",) or self.features != "radiomic", "radiomics have no layers")
        named = bool(self.layers) and all(re.fullmatch(r"last|all|-?[1-9]\d*", name) for name in self.layers)
        self._require("layers", named, "give last, all, or numbers such as 1 3 -1")
        self._check_metric()
        self._check_hierarchy()
        self._check_views()
        _refuse_beside_modality(self)

    def _check_views(self) -> None:
        if self.tta == "none":
            return
        self._require("tta", self.task != "metric", "an embedding of --task metric is of one view: leave it out")
        self._require("tta", self.features in {"deep", "fused", "both"}, "radiomics need no views")

    def _only_of(self, task: Task, *names: str) -> None:
        """Fields that other tasks do not read are as they were declared."""
        for field in fields(self):
            given = field.name in names and getattr(self, field.name) != field.default
            self._require(field.name, self.task == task or not given, f"needs --task {task}")

    def _check_metric(self) -> None:
        self._only_of("metric", "loss", "embedding", "margin", "centres", "steps")
        self._require("embedding", 2 <= self.embedding <= 4096, "must lie between 2 and 4096")
        self._require("margin", self.margin is None or self.margin > 0, "must be positive")
        self._require("steps", 1 <= self.steps <= 3, "must be 1, 2 or 3")
        pairs = self.task != "metric" or self.batch_size >= 4
        self._require("batch_size", pairs, "--task metric compares images of two classes, two of each: at least 4")
        own = self.centres is None or self.loss.startswith("centre_")
        self._require("centres", own, f"{self.loss} has none to move: --loss centre_contrastive or centre_ranking")

    def _check_hierarchy(self) -> None:
        self._only_of("hierarchical", "structure", "learner", "level_weights", "stack", "inputs", "input_column")
        hierarchical = self.task == "hierarchical"
        self._require("multi_label", not (hierarchical and self.multi_label), "--task hierarchical judges one class")
        self._require("level_weights", not self.level_weights or self.structure == "joint", "needs --structure joint")
        some = all(weight >= 0 for weight in self.level_weights) and (not self.level_weights or any(self.level_weights))
        self._require("level_weights", some, "none may be below 0, nor all 0")
        self._require("inputs", not self.inputs or self.unit == "case", "a case is what is judged: add --unit case")
        self._require("inputs", len(set(self.inputs)) == len(self.inputs), "names an input twice")
        self._require("input_column", self.input_column is None or bool(self.inputs), "needs --inputs")


@Parameter(name="*")
@dataclass(frozen=True)
class EvaluateConfig(Config):
    _: KW_ONLY
    model: str
    "A RUN of transfer, or its model folder."
    data: str | None = None
    "A labelled DATASET, or any SOURCE that ingest takes, that the models have not seen."
    out: str
    "Where the report goes."
    against: Words = ()
    "RUNs that the model is compared with; without --data by the out-of-fold predictions of the same folds."
    where: tuple[str, ...] = ()
    "Keep only rows whose COLUMN=VALUE."
    by: Words = ()
    "Columns of the manifest, such as sex,site: the report also judges each of their values alone."
    prevalence: Numbers = ()
    "Shares of a class for which predictive values are stated, such as 0.01 0.1."
    unit: Unit = "image"
    "What is judged: each image, or all images of a case or a group together."
    pooling: Pooling = "mean"
    "How the images of a unit are pooled: mean of their probabilities, or the attention that the model was left with."
    allow_seen: bool = False
    "Also judge images of the model's own lineage; the figures are then optimistic."
    batch_size: int = 64
    "Images per forward pass."
    seed: int = 0
    "Seed of the bootstrap."
    device: Device = "auto"
    "Where the model runs."
    images: bool = True
    "Pictures of the data in report.html."
    overwrite: bool = False
    "Throw away what is at --out."

    def __post_init__(self) -> None:
        if self.data is None and not self.against:
            raise UsageError(
                f"evaluate --model {self.model}: give unseen images by --data, or RUNs to compare with by --against"
            )
        if self.data is None and self.where:
            raise UsageError(f"--where {' '.join(self.where)}: chooses rows of --data, which is not given")
        self._require("prevalence", all(0 < share < 1 for share in self.prevalence), "must lie between 0 and 1")
        self._require("pooling", self.pooling == "mean" or self.unit != "image", "needs --unit case or group")
        unseen = "judges images of --data, which is not given: what was said out of fold is pooled by the mean"
        self._require("pooling", self.pooling == "mean" or self.data is not None, unseen)


@Parameter(name="*")
@dataclass(frozen=True)
class InferenceConfig(Config):
    """Config of `predict` and `embed`."""

    source: Annotated[str, Parameter(name="source")]
    "Whatever ingest takes, or a DATASET."
    _: KW_ONLY
    model: str
    "A RUN, or its model folder."
    out: str
    "The Parquet file to write."
    where: tuple[str, ...] = ()
    "Keep only rows whose COLUMN=VALUE."
    batch_size: int = 64
    "Images per forward pass."
    workers: str = "auto"
    "Model replicas working at the same time."
    device: Device = "auto"
    "Where the model runs."
    overwrite: bool = False
    "Replace the file at --out."


@Parameter(name="*")
@dataclass(frozen=True)
class SuggestConfig(Config):
    _: KW_ONLY
    model: str
    "A RUN of transfer or of pretrain, or its model folder."
    data: str
    "A DATASET, or any SOURCE that ingest takes: images without a label, with one, or both."
    out: str
    "Where the lists and contact sheets go."
    n: int = 50
    "Images on each list, at most."
    per_group: int = 1
    "Images of one group (patient, slide) suggested at a time, at most."
    unlike: bool = False
    "Also suggest images that are unlike all that the model was trained on, such as empty fields or another stain."
    where: tuple[str, ...] = ()
    "Keep only rows whose COLUMN=VALUE."
    seed: int = 0
    "Seed of what is drawn by chance."
    device: Device = "auto"
    "Where the model runs."
    images: bool = True
    "Pictures of the data in report.html."
    overwrite: bool = False
    "Throw away what is at --out."

    def __post_init__(self) -> None:
        self._require("n", self.n >= 1, "must be at least 1")
        self._require("per_group", self.per_group >= 1, "must be at least 1")


@Parameter(name="*")
@dataclass(frozen=True)
class ExportConfig(Config):
    _: KW_ONLY
    model: str
    "A RUN, or its model folder."
    to: Literal["onnx", "timm"]
    "onnx: a graph from pixel values to probabilities; timm: a folder that timm.create_model loads."
    out: str
    "Where the exported model goes."
    encoder_only: bool = False
    "Leave the classifier out: features alone."
    overwrite: bool = False
    "Replace what is at --out."


def _refuse_beside_modality(config: PretrainConfig | TransferConfig) -> None:
    """Raises UsageError where a flag says one thing and `--modality` may say another."""
    if config.modality == "auto":
        return
    for field in fields(config):
        given = getattr(config, field.name)
        if field.name in AUGMENTATION_FIELDS and given != field.default:
            flag = field.name.replace("_", "-")
            raise UsageError(f"--{flag} {given}: --modality {config.modality} decides it; leave one of the two out")


def parse_size(text: str, *, flag: str = "--image-size") -> tuple[int, int]:
    """`"96"` -> (96, 96) and `"64x144"` -> (64, 144), as (height, width) in pixels.

    Raises:
        UsageError: not N or HxW, or a side outside 8..4096.
    """
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(p.isdecimal() for p in parts):
        raise UsageError(f"{flag} {text}: give N or HxW in pixels, such as 96 or 64x144")
    height, width = int(parts[0]), int(parts[-1])
    if not (8 <= height <= 4096 and 8 <= width <= 4096):
        raise UsageError(f"{flag} {text}: each side must lie between 8 and 4096 pixels")
    return height, width
