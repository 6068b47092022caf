"""What random changes make of images, to be looked at: the contact sheet of a report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from training import keyed, report
from training.augment import MODALITIES, augmentation_of, described
from training.configs import PretrainConfig, TransferConfig
from training.transform import Augmentation, Input, sample_draws, training_view

FILE = "views.png"
IMAGES, COLUMNS = 4, 6
"""Images of a report's sheet, and random views of each."""


def contact_sheet(
    pixels: np.ndarray, wanted: Input, augmentations: Sequence[Augmentation], columns: int = COLUMNS, seed: int = 0
) -> np.ndarray:
    """uint8 [R * h, (1 + columns) * w, C] of `pixels` [N, H, W, 1|3]: for each augmentation N rows, each of an
    unchanged image and random views of it."""
    calm = MODALITIES["none"].augmentation
    rows = []
    for number, augmentation in enumerate(augmentations):
        for at in range(len(pixels)):
            still, _ = sample_draws(calm, 0, "sheet", positions=np.zeros(1, dtype=np.int64))
            draws, _ = sample_draws(augmentation, 0, "sheet", seed, number, at, positions=np.arange(columns))
            views = [
                training_view(pixels[[at]], wanted, still),
                training_view(np.repeat(pixels[[at]], columns, axis=0), wanted, draws),
            ]
            rows.append(np.concatenate([image for view in views for image in wanted.restore(view)], axis=1))
    return np.concatenate(rows, axis=0)


def sheet_section(
    folder: Path, pixels: np.ndarray, wanted: Input, config: PretrainConfig | TransferConfig
) -> report.Section:
    """The random views that a run trained on, of a few of its images [N, H, W, 1|3]; draws views.png in `folder`."""
    folder.mkdir(exist_ok=True)
    augmentation = augmentation_of(config)
    chosen = np.sort(keyed.generator("views", config.seed).permutation(len(pixels))[:IMAGES])
    sheet = contact_sheet(pixels[chosen], wanted, [augmentation], seed=config.seed)
    Image.fromarray(sheet.squeeze(-1) if sheet.shape[2] == 1 else sheet).save(folder / FILE)
    changed = (
        "No image was shown twice alike. Each time it was changed at random, so that the network would not learn by "
        f"heart what has no meaning: {described(augmentation)}."
    )
    preset = "" if config.modality == "auto" else f" {MODALITIES[config.modality].reason}"
    return report.Section(
        "What it was shown",
        [
            report.Text(f"{'' if config.modality == 'none' else changed}{preset}".strip()),
            report.Figure(
                folder / FILE,
                f"Rows of {COLUMNS + 1} pictures: an image as it is, then random views of it",
                "First column: images as they are. The others: what the network was shown of them. If a change could "
                "make one finding look like another, choose another --modality.",
                contains_data=True,
            ),
        ],
    )
