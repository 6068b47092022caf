"""Who may import whom, for every module there is: a new file is covered by itself."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("cluster", "serving", "training", "tuning")

RAY_MODULES = {"cluster.nodes", "cluster.session", "tuning.search", "serving.deployments", "serving.serve"} | {
    f"training.{name}"
    for name in ("ingest", "feed", "launch", "worker", "line", "loop", "probing", "inference", "folds", "gallery")
}
"""The thin Ray layer: the only modules that may import Ray."""
OUTER_MODULES = {"training.device"} | {
    f"training.{name}"
    for name in ("ingest", "pretrain", "transfer", "fitting", "chain", "evaluate", "evidence", "inference", "suggest")
}
"""The verbs, with the tasks of one of them, and what asks the session for its resources: they may reach Ray through
others. The rest is science."""


@cache
def graph() -> grimp.ImportGraph:
    return grimp.build_graph(*PACKAGES, include_external_packages=True, exclude_type_checking_imports=True)


def modules_of(package: str) -> set[str]:
    return graph().find_descendants(package) | {package}


def importers(graph: grimp.ImportGraph, name: str) -> set[str]:
    return graph.find_modules_that_directly_import(name) if name in graph.modules else set()


def science() -> set[str]:
    return modules_of("training") - RAY_MODULES - OUTER_MODULES


def reaching_ray(graph: grimp.ImportGraph, modules: set[str]) -> dict[str, tuple[str, ...]]:
    """The modules from which a chain of imports leads to Ray, each with its chain."""
    if "ray" not in graph.modules:
        return {}
    chains = {name: graph.find_shortest_chain(name, "ray") for name in sorted(modules)}
    return {name: chain for name, chain in chains.items() if chain}


def test_only_the_ray_layer_imports_ray() -> None:
    assert importers(graph(), "ray") - RAY_MODULES == set()


def test_science_reaches_ray_by_no_chain_of_imports() -> None:
    assert reaching_ray(graph(), science()) == {}


def test_a_science_module_that_imported_ray_would_be_caught() -> None:
    broken = grimp.build_graph(*PACKAGES, include_external_packages=True, exclude_type_checking_imports=True)
    broken.add_import(importer="training.metrics", imported="training.ingest")
    broken.add_import(importer="training.ingest", imported="ray")
    assert reaching_ray(broken, {"training.metrics"}) == {
        "training.metrics": ("training.metrics", "training.ingest", "ray")
    }


def test_cluster_knows_no_image_and_no_tensor() -> None:
    banned = ("torch", "torchvision", "numpy", "PIL", "timm", "sklearn", "faiss")
    found = {name: importers(graph(), name) & modules_of("cluster") for name in banned}
    assert {name: modules for name, modules in found.items() if modules} == {}


def test_nothing_imports_the_command_line() -> None:
    assert importers(graph(), "cluster.cli") == set()


def test_serving_reaches_training_only_through_what_a_model_is() -> None:
    allowed = {"training.artifact", "training.images", "training.device", "training.domain"}
    used = {name for module in modules_of("serving") for name in graph().find_modules_directly_imported_by(module)}
    assert {name for name in used if name.split(".")[0] == "training"} <= allowed


def test_the_contracts_of_pyproject_hold() -> None:
    command = [Path(sys.executable).with_name("lint-imports")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("reason", "ci", "code"), [("no GPU here", "true", 0), ("tired", "true", 1), ("tired", "", 0)])
def test_an_unexpected_skip_fails_only_with_ci(tmp_path: Path, reason: str, ci: str, code: int) -> None:
    (tmp_path / "conftest.py").write_text((ROOT / "tests/conftest.py").read_text())
    (tmp_path / "test_it.py").write_text(f"import pytest\n\n\ndef test_it():\n    pytest.skip({reason!r})\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"CI": ci}, capture_output=True, check=False)
    assert done.returncode == code


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [("training.worker", ["torch", "timm", "training.loop"]), ("training.artifact", ["sklearn", "scipy.optimize"])],
)
def test_what_a_start_waits_for_loads_only_what_it_needs(module: str, unwanted: list[str]) -> None:
    script = f"import sys, {module}; print([name for name in {unwanted} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
