"""What the benchmarks of metric learning compare: pairs of different images, peers from equal starts, groups apart."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.benchmarks.losses import DIMENSION, PEERS, started
from tests.benchmarks.metric import HELD, pair_contrastive, split_by_group


def test_no_image_is_a_pair_with_itself() -> None:
    generator = torch.Generator().manual_seed(0)
    known = nn.functional.normalize(torch.randn(12, 4, generator=generator))
    labels, rows = torch.arange(12) % 3, torch.tensor([5, 0, 7])
    members = torch.eye(3, dtype=torch.bool)[labels]
    pull, push = [], []
    for row in rows.tolist():
        for other in range(12):
            distance = float((known[row] - known[other]).norm())
            if labels[row] != labels[other]:
                push.append(max(0.0, 1 - distance) ** 2)
            elif other != row:
                pull.append(distance**2)
    expected = sum(pull) / len(pull) + sum(push) / len(push)
    assert float(pair_contrastive(known[rows], members[rows], known, members, rows)) == pytest.approx(expected)


@pytest.mark.parametrize("name", list(PEERS))
def test_a_peer_with_weights_of_its_own_starts_where_ours_do(name: str) -> None:
    start = nn.functional.normalize(torch.randn(3, DIMENSION, generator=torch.Generator().manual_seed(0)))
    peer = started(PEERS[name](3), start)
    for weights in peer.parameters():
        points = weights.detach() if weights.shape[1] == DIMENSION else weights.detach().T
        assert len(points) % 3 == 0
        likest = nn.functional.normalize(points) @ start.T
        assert likest.argmax(dim=1).tolist() == [at // (len(points) // 3) for at in range(len(points))]
        assert float(likest.amax(dim=1).min()) > 0.99
        assert len(torch.unique(points, dim=0)) == len(points)


def test_held_images_share_no_group_with_those_that_are_trained_on() -> None:
    rows = [(f"{at}", "a", f"g{at // 7}") for at in range(4_000)]
    chosen, held = split_by_group(rows, 1_000)
    assert len(chosen) == held + 1_000 and (HELD + 1_000) // 5 <= held < HELD
    assert not {group for *_, group in chosen[:held]} & {group for *_, group in chosen[held:]}
    assert len({path for path, *_ in chosen}) == len(chosen)
