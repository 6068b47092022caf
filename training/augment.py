"""Which random changes of an image are safe for which kind of image: `--modality`.

A change is allowed where it leaves every finding what it was. Sources: Xiao et al., WACV 2023 (crops of half the area
and more for chest X-rays), Tellez et al., Med Image Anal 58:101544, 2019 (stains differ between laboratories, and
varying them helps); the strengths are our choice. Training with labels crops less than training without: a label may
be of a small finding at the edge, and without labels nothing can become wrong.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from training.configs import PretrainConfig, TransferConfig
from training.transform import Augmentation


@dataclass(frozen=True)
class Modality:
    """Changes that are safe for one kind of image."""

    name: str
    """For people."""
    augmentation: Augmentation
    """With labels."""
    reason: str
    """Why none of it turns one finding into another, and what the preset gives up."""
    unlabelled_crop: float = 0.5
    """`min_crop` of training without labels."""


MODALITIES = {
    "none": Modality(
        "no augmentation",
        Augmentation(1.0, flip=False, aspect=1.0),
        "The whole image, as it is.",
        unlabelled_crop=1.0,
    ),
    "xray": Modality(
        "X-ray",
        Augmentation(0.8, flip=False, jitter=0.1, aspect=1.1, tilt=5, gamma=0.2, noise=0.02),
        "Never mirrored: the heart would change sides, which is a finding (situs inversus), and so would every finding "
        "that has a side; published recipes do mirror, for twice the data. Exposure and processing vary by device, so "
        "brightness, contrast and gamma do; patients stand a little askew, but never on their heads.",
    ),
    "ct": Modality(
        "computed tomography, axial slices",
        Augmentation(0.8, flip=False, jitter=0.05, aspect=1.0, tilt=5, gamma=0.05, blur=0.3, noise=0.02),
        "Never mirrored: liver and spleen would change sides. Grey values are densities, which tell ground glass from "
        "consolidation, and a pixel is a length: they hardly change, and nothing is stretched. Dose and reconstruction "
        "kernel do vary: noise and sharpness.",
    ),
    "oct": Modality(
        "optical coherence tomography of the retina",
        Augmentation(0.8, jitter=0.1, aspect=1.1, tilt=5, gamma=0.1, noise=0.03),
        "Mirrored left to right, as in the fellow eye, never upside down: the order of the layers is what is read. The "
        "tilt is that of a scan through a decentred pupil; stretching is slight, since thickness is a finding; the "
        "noise stands for speckle. Not blurred: small hyper-reflective foci would go.",
    ),
    "fundus": Modality(
        "photographs of the fundus",
        Augmentation(0.85, jitter=0.1, aspect=1.05, tilt=10, gamma=0.1, saturation=0.1),
        "Mirrored left to right, as in the fellow eye, never upside down: no eye has the upper arcade below. Hue "
        "stays, but for the degree or so that gamma moves it: it tells haemorrhages from exudates and these from "
        "cotton-wool spots. Not blurred, and hardly cropped: microaneurysms are a few pixels wide, and may lie at the "
        "edge.",
    ),
    "derm": Modality(
        "dermoscopy",
        Augmentation(0.8, turns=True, jitter=0.1, aspect=1.05, tilt=15, gamma=0.1, saturation=0.1),
        "Turned and mirrored: the instrument has no upright. Hue stays, but for the degree or so that gamma moves it: "
        "blue-grey, red and white areas are criteria of their own. Hardly stretched or cropped: asymmetry and the "
        "whole border are read. Not blurred: pigment network and dots are fine.",
    ),
    "cytology": Modality(
        "smears and cells",
        Augmentation(0.8, turns=True, jitter=0.1, aspect=1.0, stain=0.06, saturation=0.1, blur=0.3),
        "All quarter turns and mirrored: a slide has no upright. Stains differ between laboratories: each channel's "
        "density varies, clear glass stays white, but too little to turn a pink cytoplasm into a blue one, which is a "
        "finding. Focus varies too. Not stretched, and zoomed by at most an eighth: size and roundness of the nucleus, "
        "and its share of the cell, are what is read. No free tilt, which would invent corners.",
    ),
    "ultrasound": Modality(
        "ultrasound",
        Augmentation(0.8, jitter=0.1, aspect=1.0, tilt=5, gamma=0.2, blur=0.2, noise=0.04),
        "Never upside down: shadow and enhancement lie behind what makes them. Not stretched: taller than wide is a "
        "sign of malignancy. Mirrored left to right, since the probe may be held either way: not for views of the "
        "heart or others that have sides. Gain and speckle vary: gamma and noise.",
    ),
}


def augmentation_of(config: PretrainConfig | TransferConfig) -> Augmentation:
    """What `--modality` means for a run, or without one its own flags."""
    labelled = isinstance(config, TransferConfig)
    if config.modality == "auto":
        turns, jitter = (config.turns, config.jitter) if isinstance(config, TransferConfig) else (False, 0.0)
        return Augmentation(config.min_crop, config.flip, turns, jitter)
    preset = MODALITIES[config.modality]
    return preset.augmentation if labelled else replace(preset.augmentation, min_crop=preset.unlabelled_crop)


def described(augmentation: Augmentation) -> str:
    """Such as "crops of at least 60% of the area, mirroring, brightness and contrast by 10%"."""
    a = augmentation
    said = [f"crops of at least {a.min_crop:.0%} of the area"] if a.min_crop < 1 else ["the whole image"]
    said += ["mirroring"] if a.flip else []
    said += ["quarter turns"] if a.turns else []
    said += [f"tilts of up to {a.tilt:g} degrees"] if a.tilt else []
    shares = {
        "brightness and contrast": a.jitter,
        "gamma": a.gamma,
        "stain": a.stain,
        "saturation": a.saturation,
        "focus": a.blur,
        "noise": a.noise,
    }
    return ", ".join([*said, *(f"{name} by {share:.0%}" for name, share in shares.items() if share)])
