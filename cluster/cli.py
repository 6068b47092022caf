"""The command line: the outermost shell, the one module that may import everything, and that nothing imports.

Parses, converts, reports errors and exit codes; what a verb does is imported only when it runs.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

from cyclopts import App, CycloptsError, Parameter
from cyclopts.config import Dict

from cluster.demo import DemoConfig, Part
from cluster.doctor import DoctorConfig
from cluster.errors import RayographError, StoppedError, UsageError
from cluster.settings import load_yaml
from serving.configs import IndexBuildConfig, IndexCheckConfig, IndexSearchConfig, ServeConfig
from training.configs import (
    EvaluateConfig,
    ExportConfig,
    InferenceConfig,
    IngestConfig,
    PretrainConfig,
    SuggestConfig,
    TransferConfig,
)
from tuning.configs import TuneConfig

STOPPED, INTERRUPTED = StoppedError.exit_code, 130
_REPEAT_S = 2.0
"""A second Ctrl-C within this time is the same one: a terminal, `make` and `demo` may each pass it on."""


def ingest(config: IngestConfig) -> object:
    """Read, check, decode, deduplicate and shard images into a DATASET."""
    from training.ingest import ingest as run

    return run(config)


def pretrain(config: PretrainConfig) -> object:
    """Pretrain a network on images without labels."""
    from training.pretrain import pretrain as run

    return run(config)


def transfer(config: TransferConfig) -> object:
    """Fine-tune or probe on the labelled images, cross-validated by group, and leave one refitted model."""
    from training.transfer import transfer as run

    return run(config)


def evaluate(config: EvaluateConfig) -> object:
    """Judge a model on labelled images that it has not seen, or compare it with others."""
    from training.evaluate import evaluate as run

    return run(config)


def predict(config: InferenceConfig) -> object:
    """Write the class probabilities of every image to a Parquet file."""
    from training.inference import predict as run

    return run(config)


def embed(config: InferenceConfig) -> object:
    """Write the embedding of every image to a Parquet file."""
    from training.inference import embed as run

    return run(config)


def export(config: ExportConfig) -> object:
    """Write a model for others, as ONNX or for timm, checked against ours."""
    from training.export import export as run

    return run(config)


def tune(config: TuneConfig) -> object:
    """Search the settings of a verb; its best.yaml feeds that verb through --config."""
    from tuning.study import tune as run

    return run(config)


def index_build(config: IndexBuildConfig) -> object:
    """Build the index of a dataset's images under a model."""
    from serving.index import build
    from training.gallery import gallery

    return build(config, gallery=gallery)


def index_search(config: IndexSearchConfig) -> object:
    """Show the images of an index that are nearest to one image."""
    from serving.index import search

    return search(config)


def index_check(config: IndexCheckConfig) -> object:
    """Say whether an index is whole: hashes, counts, recall."""
    from serving.index import check

    return check(config)


def suggest(config: SuggestConfig) -> object:
    """Say which images to label next, and which labels look wrong."""
    from training.suggest import suggest as run

    return run(config)


def serve(config: ServeConfig) -> object:
    """Answer classification and search over HTTP, with a web page."""
    from serving.serve import serve as run

    return run(config)


def doctor(config: DoctorConfig = DoctorConfig()) -> int:  # noqa: B008 - frozen
    """Say what this machine has and lacks, and what to do about it."""
    from cluster.doctor import doctor as run

    return run(config)


def demo(config: DemoConfig = DemoConfig()) -> object:  # noqa: B008 - frozen
    """Run the whole chain, small: from images to endpoints that are asked, with and without pretraining."""
    from cluster.demo import Tools
    from cluster.demo import demo as run
    from training.examples import draw_answer, questions

    return run(config, Tools(_write_report, questions, draw_answer, _draw_curves))


@dataclass(frozen=True)
class Verb:
    """One sub-command: its function, its config, and whether stopping it loses nothing."""

    run: Callable[[Any], object]
    config: type
    resumable: bool = True


VERBS: dict[str, Verb] = {
    "ingest": Verb(ingest, IngestConfig),
    "pretrain": Verb(pretrain, PretrainConfig),
    "transfer": Verb(transfer, TransferConfig),
    "evaluate": Verb(evaluate, EvaluateConfig),
    "predict": Verb(predict, InferenceConfig),
    "embed": Verb(embed, InferenceConfig),
    "tune": Verb(tune, TuneConfig),
    "index build": Verb(index_build, IndexBuildConfig),
    "index search": Verb(index_search, IndexSearchConfig, resumable=False),
    "index check": Verb(index_check, IndexCheckConfig, resumable=False),
    "suggest": Verb(suggest, SuggestConfig),
    "serve": Verb(serve, ServeConfig, resumable=False),
    "export": Verb(export, ExportConfig, resumable=False),
    "doctor": Verb(doctor, DoctorConfig, resumable=False),
    "demo": Verb(demo, DemoConfig),
}


FAMILIES = {"index": "Build, search and check the index of a dataset's images under a model."}
"""What verbs of two words have in common."""


def build_app() -> App:
    """The command line as a cyclopts application; calling its `meta` parses, but reports no error and never exits."""
    app = App(
        name="rayograph",
        help="From unlabelled medical images and a few labelled ones to a trained, evaluated model, on Ray.",
        help_flags=["--help", "-h"],
        help_format="plaintext",
        version=_version,
        default_parameter=Parameter(negative_iterable=()),
        result_action="return_value",
        exit_on_error=False,
        print_error=False,
        suppress_keyboard_interrupt=False,
    )
    families: dict[str, App] = {}
    for order, (name, verb) in enumerate(VERBS.items()):
        first, _, second = name.partition(" ")
        if not second:
            app.command(verb.run, name=name, sort_key=order)
            continue
        if first not in families:
            families[first] = App(name=first, help=FAMILIES[first], sort_key=order)
            app.command(families[first])
        families[first].command(verb.run, name=second)

    app.meta.suppress_keyboard_interrupt = False  # `main` says what happened and what to do

    @app.meta.default
    def launch(
        *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
        config: str | None = None,
        debug: Annotated[bool, Parameter(negative=())] = False,
    ) -> object:
        """Hand over to the verb.

        Parameters
        ----------
        config
            YAML file with the verb's fields, such as the config.yaml of a result; flags override it.
        debug
            Print the traceback of an error.
        """
        if config is not None:
            app.config = (_settings(config, _verb_of(list(tokens))),)
        return app(tokens)

    return app


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns its exit code, having printed errors as one or two lines on stderr.

    Codes: 0 done, 1 failed, 2 wrong usage or config, 75 stopped but resumable, 130 Ctrl-C.
    """
    tokens = sys.argv[1:] if arguments is None else arguments
    _install_signals()
    try:
        return _run(tokens)
    except BaseException as error:
        if "--debug" in tokens and not isinstance(error, SystemExit | BrokenPipeError):
            traceback.print_exc()
        code = _report(error, tokens)
        _leave_on_signals(code)
        return code
    finally:
        _flush()


def _run(tokens: list[str]) -> int:
    result = build_app().meta(tokens or ["--help"])
    sys.stdout.flush()
    return result if isinstance(result, int) else 0


def _settings(path: str, name: str) -> Dict:
    if name not in VERBS:
        raise UsageError(f"--config {path}: name the verb first, as in `rayograph pretrain --config {path}`")
    values = load_yaml(path, VERBS[name].config, verb=name.replace(" ", "-"))
    for word in reversed(name.split()):  # flat, cyclopts would drop a field that is called like a verb
        values = {word: values}
    return Dict(values, source=path)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"rayograph {version('rayograph')}"
    except PackageNotFoundError:
        return "rayograph (not installed)"


def _install_signals() -> None:
    """Ctrl-C and SIGTERM arrive in the main thread as KeyboardInterrupt and StoppedError, once per press."""
    last = dict.fromkeys((signal.SIGINT, signal.SIGTERM), -_REPEAT_S)

    def stop(number: int, frame: FrameType | None) -> None:
        kind = signal.Signals(number)
        repeated = time.monotonic() - last[kind] < _REPEAT_S
        last[kind] = time.monotonic()
        if repeated:
            return
        raise KeyboardInterrupt if kind == signal.SIGINT else StoppedError("stopped by SIGTERM")

    for kind in last:
        signal.signal(kind, stop)


def _leave_on_signals(code: int) -> None:
    """Another signal, while atexit hooks still run, ends the process at once and without a traceback."""
    start = time.monotonic()

    def leave(number: int, frame: FrameType | None) -> None:
        if time.monotonic() - start >= _REPEAT_S:
            os._exit(code)

    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, leave)


def _report(error: BaseException, tokens: list[str]) -> int:
    """What went wrong is on stderr in one or two lines; returns the exit code."""
    error = _root(error)
    message, code = _explain(error, tokens)
    if message:
        _say(message)
    return code


def _explain(error: BaseException, tokens: list[str]) -> tuple[str, int]:
    """The message for stderr, which may be none, and the exit code."""
    match error:
        case SystemExit(code=signal.SIGTERM):  # Ray's own handler, which `ray.init` puts in place of ours
            said, code = f"stopped by SIGTERM{_again(tokens)}", STOPPED
        case SystemExit():
            said, code = "", error.code if isinstance(error.code, int) else int(error.code is not None)
        case KeyboardInterrupt():
            said, code = f"stopped{_again(tokens)}", INTERRUPTED
        case StoppedError():
            said, code = f"{error}{_again(tokens)}", error.exit_code
        case BrokenPipeError():
            said, code = "", 0
        case RayographError():
            said, code = f"error: {error}", error.exit_code
        case CycloptsError():
            error.verbose = False
            said, code = f"error: {_one_line(str(error))} (see rayograph {_help_of(tokens)})", UsageError.exit_code
        case MemoryError():
            said, code = "error: out of memory; use a smaller --batch-size or fewer --workers", 1
        case _:
            advice = "" if "--debug" in tokens else "\nrun again with --debug for the traceback"
            said, code = f"error: {type(error).__name__}: {_one_line(str(error))}{advice}", 1
    return said, code


def _root(error: BaseException) -> BaseException:
    """The error that a worker raised, where Ray wrapped it."""
    cause = getattr(error, "cause", None)
    return _root(cause) if isinstance(cause, Exception) and cause is not error else error


def _again(tokens: list[str]) -> str:
    verb = VERBS.get(_verb_of(tokens))
    return "; the same command again goes on" if verb and verb.resumable else ""


def _verb_of(tokens: list[str]) -> str:
    pairs = [f"{a} {b}" for a, b in pairwise(tokens)]
    return next((words for words in [*pairs, *tokens] if words in VERBS), "")


def _help_of(tokens: list[str]) -> str:
    return f"{_verb_of(tokens)} --help".strip()


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 500 else f"{line[:497]}..."


def _say(message: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        print(f"rayograph: {message}".encode("utf-8", "backslashreplace").decode(), file=sys.stderr, flush=True)


def _flush() -> None:
    """Output is written; a reader that went away causes no noise at exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _draw_curves(curves: dict[str, list[float]], path: Path) -> None:
    from training import figures

    figures.curves({name: (range(1, len(y) + 1), y) for name, y in curves.items()}, path, "step", "loss")


def _write_report(path: Path, title: str, parts: list[Part]) -> None:
    """`cluster.demo` may not know `training`, so the report's blocks are made here."""
    from training.report import Block, Figure, Section, Table, Text, write_report

    sections = []
    for part in parts:
        blocks: list[Block] = [Text(paragraph) for paragraph in part.paragraphs]
        if part.rows:
            blocks.append(Table(part.headers, part.rows, caption=part.heading))
        blocks += [Figure(file, alt=what, caption=what) for file, what in part.figures]
        if blocks:
            sections.append(Section(part.heading, blocks))
    write_report(path, title=title, sections=sections)


if __name__ == "__main__":
    sys.exit(main())
