"""A chain's file: what is read, what is refused before anything runs, and what a stage is known by."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import UsageError
from training.artifact import ModelCard, save_model
from training.configs import PretrainConfig, TransferConfig
from training.encoder import Architecture
from training.images import ImagePath
from training.stages import architectures, key_of, origin_key, read_chain, scratch_flags
from training.transform import Input

POOL = "  - {name: pool, verb: pretrain, data: images"
CRIC = "  - {name: cric, verb: transfer, data: images"


def written(folder: Path, *stages: str, head: str = "stages:") -> str:
    file = folder / "chain.yaml"
    file.write_text("\n".join([head, *stages]) + "\n")
    return str(file)


def saved(run: Path, architecture: Architecture) -> str:
    card = ModelCard(architecture, ImagePath(32, 32), Input(32, 32, 3, (0.5,) * 3, (0.5,) * 3))
    save_model(run / "model", card, architecture.build())
    return str(run)


def test_a_chain_is_read_with_the_types_and_defaults_of_its_verbs(tmp_path: Path) -> None:
    text = """
  - name: pool
    verb: pretrain
    data: sets/all
    epochs: 7
    batch-size: 16
    workers: 1:2
  - name: cric
    verb: transfer
    data: /abs/cric
    where: [source=cric, eye=left]
    flip: false
  - {name: third, verb: pretrain, data: "phantom:64"}
"""
    pool, cric, third = read_chain(written(tmp_path, text))
    assert pool.config == PretrainConfig(
        str(tmp_path / "sets/all"), out="-", epochs=7, batch_size=16, workers="1:2", init="none"
    )
    assert cric.config == TransferConfig("/abs/cric", out="-", where=("source=cric", "eye=left"), flip=False)
    assert third.config.data == "phantom:64"
    assert [stage.labelled for stage in (pool, cric, third)] == [False, True, False]


def test_paths_count_from_the_file_and_names_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deep").mkdir()
    written(tmp_path / "deep", CRIC + ", init: runs/first}")
    monkeypatch.chdir(tmp_path)
    (stage,) = read_chain("deep/chain.yaml")
    assert stage.config.data == str(tmp_path / "deep/images")
    assert stage.config.init == str(tmp_path / "deep/runs/first")
    for name in ("imagenet", "none", "timm:test_vit", "s3://bucket/run", "/abs/run"):
        (stage,) = read_chain(written(tmp_path, CRIC + f", init: '{name}'" + "}"))
        assert stage.config.init == name


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], "stages must be a list of one stage or more"),
        (["  - pool"], "stage 1: must be a mapping with name, verb and data"),
        (["  - {verb: pretrain, data: x}"], "stage 1: name '': needs letters"),
        (["  - {name: a/b, verb: pretrain, data: x}"], "stage 1: name 'a/b': needs letters"),
        (["  - {name: none, verb: pretrain, data: x}"], "stage 1: name 'none': needs letters"),
        (["  - {name: a, verb: pretrian, data: x}"], "stage 'a': verb 'pretrian'.* Did you mean 'pretrain'"),
        (["  - {name: a, verb: evaluate, data: x}"], "stage 'a': verb 'evaluate': must be pretrain or transfer"),
        (["  - {name: a, verb: pretrain}"], "stage 'a': has no data"),
        ([POOL + "}", POOL + "}"], "stage 'pool': two stages have this name"),
        ([POOL + ", epohcs: 3}"], "stage 'pool': unknown key 'epohcs' for pretrain. Did you mean 'epochs'"),
        ([CRIC + ", mask_ratio: 0.5}"], "stage 'cric': unknown key 'mask_ratio' for transfer"),
        ([POOL + ", epochs: many}"], "stage 'pool': .*many"),
        ([POOL + ", epochs: 0}"], "stage 'pool': --epochs 0: must be at least 1"),
        ([POOL + ", out: here}"], "stage 'pool': out is not a stage's to set"),
        ([CRIC + ", stages: other.yaml}"], "stage 'cric': stages is not a stage's to set"),
        ([POOL + "}", CRIC + ", init: imagenet}"], "stage 'cric': init is the stage before it, 'pool'"),
        ([POOL + "}", CRIC + ", preset: small}"], "stage 'cric': preset is decided by the first stage, 'pool'"),
        ([CRIC + ", task: svm}"], "stage 'cric': task svm leaves the network as it was"),
        ([POOL + ", method: maee}"], "stage 'pool': --method maee: no such method. Did you mean 'mae'"),
    ],
)
def test_a_chain_that_cannot_be_right_is_refused_in_one_line(tmp_path: Path, stages: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        read_chain(written(tmp_path, *stages))
    assert "\n" not in str(caught.value)
    assert "chain.yaml" in str(caught.value)


def test_a_file_that_is_no_chain_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        read_chain(str(tmp_path / "gone.yaml"))
    with pytest.raises(UsageError, match="not valid YAML"):
        read_chain(written(tmp_path, "[", head="stages: {"))
    with pytest.raises(UsageError, match="unknown key 'epochs'; a chain has one key"):
        read_chain(written(tmp_path, POOL + "}", head="epochs: 3\nstages:"))


@pytest.mark.parametrize("given", [{"init": "none"}, {"init": "some/run"}, {"model": "test_vit"}, {"preset": "small"}])
def test_the_target_names_no_first_weights_beside_its_chain(given: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="not with --stages"):
        TransferConfig("data", out="out", stages="chain.yaml", **given)


# The networks of a chain


def test_a_convolutional_network_before_a_masked_autoencoder_is_refused(tmp_path: Path) -> None:
    read = read_chain(written(tmp_path, CRIC + "}", POOL + "}"))
    with pytest.raises(UsageError, match="stage 'pool': --method mae needs a ViT, but stage 'cric' gives efficient"):
        architectures(read, [3, 3], "cpu")
    run = saved(tmp_path / "conv", Architecture("test_efficientnet", 32, 32, 3))
    for init in ("imagenet", "timm:test_efficientnet", run):
        read = read_chain(written(tmp_path, POOL + f", init: '{init}'" + "}"))
        with pytest.raises(UsageError, match=r"needs a ViT, but --init .* gives .*efficientnet"):
            architectures(read, [3], "cpu")


@pytest.mark.parametrize(
    ("first", "expected"),
    [
        ("model: parallel_resnet_tiny, image_size: 64", Architecture("parallel_resnet_tiny", 64, 64, 3)),
        ("init: imagenet", Architecture("efficientnet_lite0", 128, 128, 3)),
    ],
)
def test_a_chain_of_a_convolutional_network_begins_with_images_without_labels(
    first: str, expected: Architecture, tmp_path: Path
) -> None:
    read = read_chain(written(tmp_path, POOL + f", method: rotation, {first}" + "}", CRIC + "}"))
    assert architectures(read, [3, 3], "cpu") == [expected, expected]
    masked = replace(read[0], config=replace(read[0].config, method="mae"))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=f"stage 'pool': --method mae needs a ViT, but .* gives {expected.name}"):
        architectures([masked, read[1]], [3, 3], "cpu")


def test_the_network_and_its_size_go_from_stage_to_stage(tmp_path: Path) -> None:
    chain = [POOL + ", model: test_vit, image_size: 64}", CRIC + ", image_size: 32x48}"]
    found = architectures(read_chain(written(tmp_path, *chain)), [1, 3], "cpu")
    assert found == [Architecture("test_vit", 64, 64, 1, 16), Architecture("test_vit", 32, 48, 3, 16)]
    run = saved(tmp_path / "vit", Architecture("test_vit", 32, 32, 3, 8))
    (found_run,) = architectures(read_chain(written(tmp_path, POOL + f", init: '{run}'" + "}")), [3], "cpu")
    assert found_run == Architecture("test_vit", 32, 32, 3, 8)


def test_a_size_that_the_first_stage_s_patch_does_not_divide_is_refused_for_a_later_stage(tmp_path: Path) -> None:
    read = read_chain(written(tmp_path, POOL + ", preset: tiny}", CRIC + ", image_size: 100}"))
    with pytest.raises(UsageError, match="stage 'cric': --image-size 100x100: the patch of 12"):
        architectures(read, [3, 3], "cpu")


def test_where_the_device_is_not_known_yet_neither_is_the_automatic_preset(tmp_path: Path) -> None:
    read = read_chain(written(tmp_path, POOL + "}", CRIC + "}"))
    assert architectures(read, [3, 3], None) == [None, None]


@pytest.mark.parametrize(
    "network",
    [
        Architecture("vit_tiny_patch16_224", 96, 96, 3, 12),
        Architecture("vit_tiny_patch16_224", 96, 96, 3, 16),
        Architecture("test_vit", 32, 48, 1, 16),
        Architecture("efficientnet_lite0", 128, 128, 3),
        Architecture("parallel_resnet_tiny", 33, 47, 1),
    ],
)
def test_flags_for_random_weights_give_the_same_network(network: Architecture) -> None:
    from training.encoder import architecture_for

    flags = scratch_flags(network)
    assert flags is not None
    size = f"{network.height}x{network.width}"
    assert architecture_for(**flags, image_size=size, channels=network.channels) == network


def test_a_patch_that_no_flag_gives_has_no_scratch_to_compare_with() -> None:
    assert scratch_flags(Architecture("test_vit", 32, 32, 3, 8)) is None


# What a stage is known by


def keys(*configs: tuple[str, PretrainConfig | TransferConfig], dataset: str = "v1", origin: str = "none") -> list[str]:
    found = [origin]
    for verb, config in configs:
        found.append(key_of(verb, config, dataset, found[-1]))
    return found[1:]


FIRST, SECOND = PretrainConfig("a", out="-", epochs=5), TransferConfig("a", out="-", where=("source=cric",))


def test_a_key_is_the_same_wherever_images_and_results_lie_and_however_many_workers_there_are() -> None:
    elsewhere = replace(FIRST, data="b", out="x", workers="3", init="somewhere", keep=5)
    assert keys(("pretrain", FIRST)) == keys(("pretrain", elsewhere))
    assert len(keys(("pretrain", FIRST))[0]) == 16


@pytest.mark.parametrize("change", [{"epochs": 6}, {"seed": 1}, {"where": ("a=b",)}, {"lr": 5e-4}, {"flip": False}])
def test_whatever_changes_a_stage_changes_its_key_and_that_of_the_stage_after_it(change: dict[str, Any]) -> None:
    ours = keys(("pretrain", FIRST), ("transfer", SECOND))
    theirs = keys(("pretrain", replace(FIRST, **change)), ("transfer", SECOND))
    assert ours[0] != theirs[0] and ours[1] != theirs[1]
    later = keys(("pretrain", FIRST), ("transfer", replace(SECOND, **change)))
    assert ours[0] == later[0] and ours[1] != later[1]


def test_other_images_first_weights_or_networks_are_other_stages() -> None:
    ours = keys(("pretrain", FIRST))
    assert ours != keys(("pretrain", FIRST), dataset="v2")
    assert ours != keys(("pretrain", FIRST), origin="imagenet")
    assert ours[0] != key_of("pretrain", FIRST, "v1", "none", Architecture("test_vit", 32, 32, 3, 16))


def test_first_weights_are_known_by_their_content(tmp_path: Path) -> None:
    one = saved(tmp_path / "one", Architecture("test_vit", 32, 32, 3, 16))
    two = saved(tmp_path / "two", Architecture("test_vit", 32, 48, 3, 16))
    assert origin_key(one) != origin_key(two)
    (tmp_path / "one").rename(tmp_path / "moved")
    assert origin_key(str(tmp_path / "moved")) != origin_key(two)
    assert origin_key(str(tmp_path / "moved" / "model" / "model.safetensors")) == origin_key(str(tmp_path / "moved"))
    with pytest.raises(UsageError, match="not a RUN"):
        origin_key(str(tmp_path / "gone"))
