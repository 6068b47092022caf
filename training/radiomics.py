"""Numbers that describe the main object of an image without a network: intensity, shape, margin and texture.

Source: the kinds of features that Huynh, Li & Giger (J Med Imaging 3(3), 2016) set beside those of a network; their
list and their segmentation are not public, so definitions, normalisations and the mask are our choice, named where they
stand. Spiculation: the radial gradient histogram of Huo et al., Med Phys 22(10), 1995. Texture: Haralick et al., IEEE
Trans SMC 3(6), 1973, by scikit-image.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage
from skimage.feature import graycomatrix, graycoprops
from skimage.filters import sobel_h, sobel_v, threshold_otsu
from skimage.measure import label, perimeter_crofton, regionprops

from training.images import to_channels

LEVELS = 32
"""Grey levels of the co-occurrence matrices, each eight values wide: brightness and contrast keep their meaning."""
DISTANCES = (1, 2, 4)
"""Offsets of the co-occurrence matrices, in stored pixels; each is a mean over four directions."""
ANGLES = (0.0, np.pi / 4, np.pi / 2, 3 * np.pi / 4)
DIRECTIONS = 36
"""Directions in which an object's extent is measured, and bins of its radial gradient histogram."""
FLAT = 4
"""Range of grey values up to which a line is of one colour."""
MARGIN = 0.1
"""Half the width of the margin, as a share of the object's diameter; at least `LEAST_MARGIN` pixels."""
LEAST_MARGIN = 2.0

_INTENSITY = ("mean", "spread", "skewness", "kurtosis", "percentile_10", "percentile_50", "percentile_90", "entropy")
_SHAPE = ("area", "diameter", "width", "compactness", "irregularity", "eccentricity")
_EDGE = ("contrast", "sharpness", "sharpness_spread", "spiculation_mean", "spiculation_width")
_TEXTURE = ("energy", "entropy", "contrast", "correlation", "homogeneity", "sum_variance", "difference_variance")
COLUMNS = (
    *(f"intensity_{name}" for name in _INTENSITY),
    *(f"shape_{name}" for name in _SHAPE),
    *(f"margin_{name}" for name in _EDGE),
    *(f"texture_{name}_{distance}" for name in _TEXTURE for distance in DISTANCES),
)
"""What each number is; all are free of units, and about -1 to 1."""


def radiomics(pixels: np.ndarray, masks: np.ndarray | None = None) -> np.ndarray:
    """Float32 [N, len(COLUMNS)], all finite, of stored pixels uint8 [N, H, W, 1|3]; colour counts as its luma.

    Quarter turns of an image change nothing but rounding. Lengths are shares of the stored size. Lines of one colour at
    an image's edges (a letterbox, other padding) belong neither to the object nor to its surroundings.

    Args:
        masks: bool [N, H, W], the object of each image; that of `object_of` where None.

    Raises:
        ValueError: a mask is empty.
    """
    grey = to_channels(pixels, 1)[..., 0]
    given = [None] * len(grey) if masks is None else list(masks)
    rows = [_numbers(image, mask) for image, mask in zip(grey, given, strict=True)]
    return np.asarray(rows, dtype=np.float32).reshape(len(grey), len(COLUMNS))


def object_of(grey: np.ndarray) -> np.ndarray:
    """Bool [H, W]: the largest connected part, its holes filled, of the side of Otsu's threshold that has less of the
    image's border; all of an image of one colour."""
    if grey.min() == grey.max():
        return np.ones(grey.shape, dtype=bool)
    bright = grey > threshold_otsu(grey)
    border = np.concatenate([bright[0], bright[-1], bright[1:-1, 0], bright[1:-1, -1]])
    parts = label(bright if border.mean() <= 0.5 else ~bright, connectivity=2)
    return np.asarray(ndimage.binary_fill_holes(parts == 1 + np.bincount(parts.ravel())[1:].argmax()))


def _numbers(grey: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    if mask is not None and not mask.any():
        raise ValueError("radiomics: a mask is empty")
    box = field_of(grey)
    if mask is None:
        mask = np.zeros(grey.shape, dtype=bool)
        mask[box] = object_of(grey[box])
    field = mask.copy()
    field[box] = True
    inside = ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    boundary = mask & (inside <= 1)
    margin = _margin(grey, mask, field, inside, boundary)
    return np.concatenate([_intensity(grey[mask]), _shape(mask, boundary), margin, texture(grey, mask)])


def field_of(grey: np.ndarray) -> tuple[slice, slice]:
    """The part of [H, W] without the lines of one colour at its edges; all of it where every line is such."""
    found = []
    for axis in (1, 0):
        varied = np.flatnonzero(np.ptp(grey, axis=axis) > FLAT)
        found.append(slice(varied[0], varied[-1] + 1) if len(varied) else slice(None))
    return found[0], found[1]


def _intensity(values: np.ndarray) -> np.ndarray:
    """[8]; skewness and excess kurtosis x as x / (1 + |x|), so that a single bright pixel is no outlier."""
    counts = np.bincount(values >> 3)
    shares = counts[counts > 0] / len(values)
    mean, spread = values.mean(), values.std()
    scores = (values - mean) / spread if spread else np.zeros(len(values))
    moments = np.asarray([np.mean(scores**3), np.mean(scores**4) - 3 if spread else 0.0])
    return np.concatenate(
        [
            [mean / 255, spread / 255],
            moments / (1 + np.abs(moments)),
            np.percentile(values, [10, 50, 90]) / 255,
            [-(shares * np.log(shares)).sum() / np.log(LEVELS)],
        ]
    )


def _shape(mask: np.ndarray, boundary: np.ndarray) -> np.ndarray:
    """[6]: area as a share, longest and shortest extent over the diagonal, 4 pi area / perimeter^2, the standard
    deviation of the boundary's distance from the centre over its mean, and that of the ellipse of equal moments."""
    (region,) = regionprops(mask.astype(np.uint8))
    turns = np.arange(DIRECTIONS) * np.pi / DIRECTIONS
    points = np.argwhere(boundary).astype(np.float64)
    along = points @ np.stack([np.sin(turns), np.cos(turns)])
    extents = (np.ptp(along, axis=0) + 1) / np.hypot(*mask.shape)
    radii = np.linalg.norm(points - region.centroid, axis=1)
    compactness = 4 * np.pi * region.area / perimeter_crofton(mask, directions=4) ** 2
    irregularity = radii.std() / radii.mean() if radii.any() else 0.0
    share = region.area / mask.size
    return np.asarray([share, extents.max(), extents.min(), compactness, irregularity, region.eccentricity])


def _margin(
    grey: np.ndarray, mask: np.ndarray, field: np.ndarray, inside: np.ndarray, boundary: np.ndarray
) -> np.ndarray:
    """[5]: contrast of in- and outside; mean and spread of the gradient on the boundary; spiculation of the margin."""
    values = grey / 255
    around = field & ~mask
    contrast = values[mask].mean() - values[around].mean() if around.any() else 0.0
    down, right = (sobel_h(values), sobel_v(values)) if min(grey.shape) > 1 else np.zeros((2, *grey.shape))
    edge = np.hypot(down, right)[boundary]
    half = max(LEAST_MARGIN, MARGIN * 2 * np.sqrt(mask.sum() / np.pi))
    outside = ndimage.distance_transform_edt(~mask) if not mask.all() else np.zeros(mask.shape)
    rows, columns = np.nonzero(field & (inside <= half) & (outside <= half))
    centre = np.argwhere(mask).mean(axis=0)
    # towards the bright side, so that a plain disc's gradient has the angle 0 whether it is light or dark
    away = np.stack([rows - centre[0], columns - centre[1]]) * (-1 if contrast >= 0 else 1)
    gradient = np.stack([down[rows, columns], right[rows, columns]])
    return np.asarray([contrast, edge.mean(), edge.std(), *radial_gradient(gradient, away)])


def radial_gradient(gradient: np.ndarray, radius: np.ndarray) -> tuple[float, float]:
    """(mean cosine, full width at half maximum as a share of the circle) of the angles between the gradients [2, P] and
    the radii [2, P] of P pixels, each weighted by the length of its gradient: 1 and narrow for a disc, less and wide
    for a star. (0, 1) where there is no gradient."""
    weight = np.linalg.norm(gradient, axis=0)
    total = weight.sum()
    if total < 1e-9:
        return 0.0, 1.0
    angles = np.arctan2(radius[0] * gradient[1] - radius[1] * gradient[0], (radius * gradient).sum(axis=0))
    place = angles / (2 * np.pi) * DIRECTIONS
    low = np.floor(place)
    first, share = low.astype(np.int64) % DIRECTIONS, place - low  # both bins share a pixel: no edge, no rounding
    histogram = np.bincount(first, weight * (1 - share), minlength=DIRECTIONS)
    histogram += np.bincount((first + 1) % DIRECTIONS, weight * share, minlength=DIRECTIONS)
    return float((weight * np.cos(angles)).sum() / total), _full_width(histogram) / DIRECTIONS


def _full_width(histogram: np.ndarray) -> float:
    """Bins from where a circular histogram rises above half its maximum to where it falls below, linear between bins;
    all of them where it never falls below."""
    rolled = np.roll(histogram, -int(histogram.argmax()))
    half, width = rolled[0] / 2, 0.0
    for side in (rolled, np.roll(rolled[::-1], 1)):
        below = np.flatnonzero(side < half)
        if not len(below):
            return float(len(histogram))
        end = below[0]
        width += end - 1 + (side[end - 1] - half) / (side[end - 1] - side[end])
    return float(width)


def texture(grey: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """[7 * 3], kind by kind, of uint8 [H, W]: properties of the symmetric co-occurrence matrices of pixel pairs that
    both lie in the mask, in units of the number of levels, averaged over directions."""
    quantised = (grey >> 3) + 1
    quantised[~mask] = 0
    pairs = graycomatrix(quantised, DISTANCES, ANGLES, levels=LEVELS + 1, symmetric=True)[1:, 1:]
    top = LEVELS - 1
    found = [
        graycoprops(pairs, "energy"),
        graycoprops(pairs, "entropy") / (2 * np.log(LEVELS)),
        graycoprops(pairs, "contrast") / top**2,
        graycoprops(pairs, "correlation"),
        graycoprops(pairs, "homogeneity"),
        *(variance / top**2 for variance in sum_and_difference_variance(pairs)),
    ]
    return np.concatenate([np.asarray(one).mean(axis=1) for one in found])


def sum_and_difference_variance(pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Variances [D, A] of the sum and of the absolute difference of a pair's levels, of co-occurrence matrices
    [L, L, D, A]. About the mean; Haralick's text subtracts the sum entropy, which is taken for a slip of the pen."""
    shares = pairs / np.maximum(pairs.sum(axis=(0, 1)), 1)
    i, j = np.ogrid[: len(pairs), : len(pairs)]
    found = []
    for value in (i + j, np.abs(i - j)):
        mean, square = (np.einsum("ij,ij...->...", value**power, shares) for power in (1, 2))
        found.append(np.maximum(square - mean**2, 0))
    return found[0], found[1]
