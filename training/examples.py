"""Pictures to ask a served model about, and how its answers are drawn; for the demo."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from PIL import Image
from sklearn.datasets import load_sample_image

from training.dataset import Dataset, Selection
from training.figures import contact_sheet

PHOTO = "a photograph of a flower"


def questions(dataset: str, out: Path, count: int = 3) -> list[tuple[str, Path]]:
    """(name, PNG file) of some images of a DATASET, unlabelled ones where it has any, and of one unlike them all."""
    out.mkdir(parents=True, exist_ok=True)
    opened = Dataset.open(dataset)
    selection = opened.select()
    unlabelled = selection.table.filter(pc.equal(selection.table["label"], ""))
    chosen = Selection(unlabelled) if unlabelled.num_rows >= count else selection
    kind = "an image without a label" if unlabelled.num_rows >= count else "an image that was trained on"
    rows = np.linspace(0, len(chosen) - 1, count + 2).astype(int)[1:-1]
    found = []
    for number, pixels in enumerate(opened.pixels(chosen.take(rows)), start=1):
        file = out / f"question-{number}.png"
        Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(file)
        found.append((f"{kind} ({number})", file))
    photo = out / "photograph.png"
    Image.fromarray(load_sample_image("flower.jpg")).save(photo)
    return [*found, (PHOTO, photo)]


def draw_answer(question: Path, hits: list[dict[str, Any]], path: Path) -> None:
    """A PNG at `path`: the picture asked about, then its nearest cases with label and similarity."""
    with Image.open(question) as opened:
        opened.thumbnail((160, 160))
        asked = np.asarray(opened.convert("RGB"))
    pictures, captions = [asked], ["asked"]
    for hit in hits:
        content = base64.b64decode(hit["thumbnail"].partition(",")[2])
        with Image.open(io.BytesIO(content)) as thumbnail:
            pictures.append(np.asarray(thumbnail.convert("RGB")))
        captions.append(f"{hit['label'] or 'no label'} {hit['score']:.2f}")
    contact_sheet(pictures, captions, path)
