"""What all configs share, and the YAML that sets them: `--config run.yaml`, and the stages of a chain."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar, TypeVar

import yaml

from cluster import storage
from cluster.errors import UsageError, nearest
from cluster.outdir import FORMAT, OutDir, config_text

Chosen = TypeVar("Chosen")

HEADER = ("verb", "format")
"""Keys of a `config.yaml` that are not fields: which verb wrote it, and in which format version."""


@dataclass(frozen=True)
class Config:
    """What every verb's config shares: checked on construction, comparable, written as plain YAML."""

    RUNTIME: ClassVar[frozenset[str]] = frozenset(
        {"out", "overwrite", "workers", "device", "images", "checkpoint_s", "keep"}
        | {"watchdog_s", "probe", "read_on", "train_on", "receipt"}
    )
    """Fields that do not change the result, so they are left out when two configs are compared."""
    RAISABLE: ClassVar[frozenset[str]] = frozenset()
    """Fields that may grow when an `--out` is taken up again."""

    def identity(self) -> dict[str, Any]:
        """The fields that decide the result, as plain values."""
        return {k: v for k, v in self.as_dict().items() if k not in self.RUNTIME}

    def as_dict(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: _plain(v) for k, v in values.items()}

    def open_out(self, verb: str, lazy: Collection[str] = ()) -> OutDir:
        """The `--out` of this config, claimed for it; `lazy` and errors as `OutDir.open`."""
        values = self.as_dict()
        raisable = {name: values[name] for name in self.RAISABLE}
        return OutDir.open(
            values["out"],
            verb=verb,
            config=values,
            identity=self.identity(),
            raisable=raisable,
            overwrite=values["overwrite"],
            defaults={f.name: _plain(f.default) for f in fields(self) if f.default is not MISSING},
            lazy=lazy,
        )

    def _require(self, field: str, ok: bool, rule: str) -> None:
        if not ok:
            flag = field.replace("_", "-")
            raise UsageError(f"--{flag} {getattr(self, field)}: {rule}")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def load_yaml(path: str, config_class: type, *, verb: str) -> dict[str, Any]:
    """The fields that a YAML file sets, scalars still as text: whoever converts flags converts these too.

    An empty or null value stands for the field's default and is left out. Keys may be written with `-` or `_`.

    Raises:
        UsageError: no such file, not a YAML mapping, an unknown key, or the config of another verb.
    """
    values = read_mapping(path)
    _check_header(path, values, verb)
    return fields_of(path, {k: v for k, v in values.items() if k not in HEADER}, config_class, verb=verb)


def fields_of(where: str, values: dict[str, Any], config_class: type, *, verb: str) -> dict[str, Any]:
    """`values` by the names of the fields that they set, as `load_yaml` gives them; `where` begins errors.

    Raises:
        UsageError: an unknown key.
    """
    names = [field.name for field in fields(config_class)]
    settings = {key.replace("-", "_"): value for key, value in values.items()}
    for name in settings:
        if name not in names:
            raise UsageError(f"{where}: unknown key {storage.printable(name)!r} for {verb}.{nearest(name, names)}")
    return {name: value for name, value in settings.items() if not _is_null(value)}


def configured(config_class: type[Chosen], values: dict[str, Any], where: str) -> Chosen:
    """The config whose fields `values` sets, converted and checked as the command line does; `where` begins errors.

    Raises:
        UsageError: a value cannot be converted or is not allowed, or a required field is missing.
    """
    from cyclopts import App, CycloptsError
    from cyclopts.config import Dict

    def keep(config: Any) -> Any:
        return config

    keep.__annotations__ = {"config": config_class}
    app = App(
        exit_on_error=False, print_error=False, result_action="return_value", config=(Dict(values, source=where),)
    )
    app.default(keep)
    try:
        config = app([])
    except CycloptsError as error:
        error.verbose = False
        raise UsageError(f"{where}: {' '.join(str(error).split())}") from error
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error
    if not isinstance(config, config_class):
        raise TypeError(f"{where}: gave {type(config).__name__}, not a {config_class.__name__}")
    return config


def dump_yaml(verb: str, config: dict[str, Any]) -> str:
    """The YAML of a config's `as_dict()`, with header, as `config.yaml` holds it and `--config` reads it."""
    return config_text(verb, config)


def read_mapping(path: str) -> dict[str, Any]:
    """The names and values of a YAML file, every scalar still as text.

    Raises:
        UsageError: no such file, or not a YAML mapping.
    """
    text = storage.read_bytes(path)
    try:
        # BaseLoader makes no objects and leaves every scalar a string; the safe loader would read `2:4` as 124
        values = yaml.load(text, Loader=yaml.BaseLoader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UsageError(f"{path}: must be a YAML mapping of names to values")
    return values


def _check_header(path: str, values: dict[str, Any], verb: str) -> None:
    other = values.get("verb", verb)
    if other != verb:
        raise UsageError(f"{path}: is a config of `rayograph {other}`, not of {verb}")
    version = str(values.get("format", FORMAT))
    if not version.isdigit() or int(version) > FORMAT:
        raise UsageError(f"{path}: format {version} is newer than this rayograph reads ({FORMAT})")


def _is_null(value: object) -> bool:
    return isinstance(value, str) and value.lower() in {"", "~", "null"}
