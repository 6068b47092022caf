"""README is tested: its commands parse, its Python imports what there is, its make targets exist."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest

from cluster.cli import VERBS, build_app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[str]:
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    return [line.partition("#")[0].strip() for line in lines if line.startswith("rayograph ")]


def verb_of(command: str) -> str:
    """The words that name the verb: one, or two as in `index build`."""
    words = shlex.split(command)[1:3]
    return " ".join(words) if " ".join(words) in VERBS else words[0]


@pytest.mark.parametrize("command", commands())
def test_every_command_of_the_readme_parses(command: str) -> None:
    app = build_app()
    function, bound, _ = app.parse_args(shlex.split(command)[1:], exit_on_error=False, print_error=False)
    assert function is VERBS[verb_of(command)].run
    assert bound is not None


def test_the_readme_shows_every_verb() -> None:
    shown = {verb_of(c) for c in commands()} | set(re.findall(r"make (\w+)", README))
    assert set(VERBS) <= shown


def test_the_readmes_python_imports_what_there_is() -> None:
    (source,) = blocks("python")
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    assert imports
    for node in imports:
        module = __import__(str(node.module), fromlist=[alias.name for alias in node.names])
        for alias in node.names:
            assert getattr(module, alias.name) is not None


def test_every_make_target_of_the_readme_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"`?make (\w+)`?", README)):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_no_figure_of_the_readme_is_left_blank() -> None:
    assert "@@" not in README
