"""`--config` files: what is read, what is refused, and that `config.yaml` can be read back."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from cluster.cli import VERBS, build_app
from cluster.errors import UsageError
from cluster.settings import Config, dump_yaml, load_yaml
from training.configs import PretrainConfig

REQUIRED = {
    "source": "some images",
    "image": "cell.png",
    "to": "onnx",
    "index": "index",
    "data": "some images",
    "model": "run",
    "out": "out",
}


def load(tmp_path: Path, text: str) -> dict[str, Any]:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    return load_yaml(str(file), PretrainConfig, verb="pretrain")


def test_scalars_stay_text_for_the_converter_of_the_flags(tmp_path: Path) -> None:
    text = "workers: 2:4\nepochs: 10\nflip: false\nlr: 1e-3\nwhere: [a=b]\n"
    expected = {"workers": "2:4", "epochs": "10", "flip": "false", "lr": "1e-3", "where": ["a=b"]}
    assert load(tmp_path, text) == expected


def test_the_header_of_a_config_file_is_accepted_and_dashes_mean_underscores(tmp_path: Path) -> None:
    assert load(tmp_path, "verb: pretrain\nformat: 1\nbatch-size: 8\n") == {"batch_size": "8"}


def test_null_stands_for_the_default(tmp_path: Path) -> None:
    assert load(tmp_path, "model: null\ndecoder_width:\ninit: none\n") == {"init": "none"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bach_size: 3", "unknown key 'bach_size' for pretrain. Did you mean 'batch_size'"),
        ("verb: transfer", "is a config of `rayograph transfer`, not of pretrain"),
        ("format: 99", "format 99 is newer"),
        ("- a\n- b", "must be a YAML mapping"),
        ("", "must be a YAML mapping"),
        ("a: [1", "not valid YAML"),
        ("a: !!python/object/apply:os.system [x]", "unknown key 'a'"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        load(tmp_path, text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        load_yaml(str(tmp_path / "gone.yaml"), PretrainConfig, verb="pretrain")


@pytest.mark.parametrize("verb", [name for name, verb in VERBS.items() if issubclass(verb.config, Config)])
def test_the_config_of_every_verb_comes_back_from_its_own_yaml(
    tmp_path: Path, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config_class = VERBS[verb].config
    names = {field.name for field in fields(config_class)}
    extra = {"where": ("modality=oct", "eye=left"), "image_size": "64x144", "window": "0:50", "workers": "1:2"}
    config = config_class(**{name: value for name, value in (REQUIRED | extra).items() if name in names})
    (tmp_path / "run.yaml").write_text(dump_yaml(verb.replace(" ", "-"), config.as_dict()))
    seen: list[object] = []
    monkeypatch.setitem(VERBS, verb, type(VERBS[verb])(_recorder(config_class, seen), config_class))
    build_app().meta([*verb.split(), "--config", str(tmp_path / "run.yaml")])
    assert seen == [config]


def test_flags_override_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run.yaml").write_text("data: images\nout: o\nepochs: 3\nbatch_size: 8\nwhere: [a=b]\n")
    seen: list[PretrainConfig] = []
    monkeypatch.setitem(VERBS, "pretrain", type(VERBS["pretrain"])(_recorder(PretrainConfig, seen), PretrainConfig))
    build_app().meta(["pretrain", "--config", str(tmp_path / "run.yaml"), "--epochs", "7", "--where", "c=d"])
    assert (seen[0].epochs, seen[0].batch_size, seen[0].where) == (7, 8, ("c=d",))


def _recorder(config_class: type, seen: list[Any]) -> Any:
    def record(config: Any) -> None:
        seen.append(config)

    record.__annotations__["config"] = config_class
    return record
