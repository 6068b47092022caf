"""What all tests share. With `CI=true` a skip that nobody expects is a failure: a test never passes by not running."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from cluster.session import Resources  # before anything imports Ray: it sets what Ray reads at import

if TYPE_CHECKING:
    from tests.hosts import Hosts
    from tests.runs import Pretrained
    from tests.s3 import Store

ROOT = Path(__file__).parents[1]
EXPECTED_SKIPS = ("no GPU", "no real images", "not on this system")
"""How the reason of a skip must begin for it to count as expected."""


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images beside the checkout; without it the test is skipped, and says so."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real images: {folder} is absent")
    return folder


@pytest.fixture(scope="session")
def ray_session() -> Generator[Resources]:
    """The one Ray of the whole test run: every verb called in this process finds it and uses it."""
    from cluster.session import session

    with session(cpus=8) as found:
        yield found


@pytest.fixture(scope="session")
def namespaces() -> None:
    """The machine can have hosts of `tests.hosts`; else the test is skipped, which CI takes for a failure."""
    from tests.hosts import unavailable

    reason = unavailable()
    if reason:
        pytest.skip(reason)


@pytest.fixture(scope="module")
def hosts(namespaces: None) -> Generator[Hosts]:
    """Three hosts: a Ray head, a node of its cluster, both with this checkout's code, and one that runs nothing."""
    from tests.hosts import Hosts

    ours = {"PYTHONPATH": str(ROOT)}
    with Hosts(3) as three:
        three[0].ray_head(resources={"first": 1}, env=ours)
        three[1].ray_worker(three[0], resources={"second": 1}, env=ours)
        yield three


@pytest.fixture(scope="session")
def phantoms(ray_session: Resources, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DATASET of 200 phantoms of 32 px: four row groups, about half of them labelled."""
    from training.configs import IngestConfig
    from training.ingest import ingest

    out = tmp_path_factory.mktemp("phantoms") / "dataset"
    ingest(IngestConfig("phantom:200", out=str(out), image_size="32"))
    return out


@pytest.fixture(scope="session")
def pretrained(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Pretrained:
    """A finished, never interrupted RUN of two workers on `phantoms`, and what it printed."""
    from tests.runs import Pretrained, pretrain_config
    from training.pretrain import pretrain

    config, printed = pretrain_config(phantoms, tmp_path_factory.mktemp("pretrained") / "run"), io.StringIO()
    with contextlib.redirect_stderr(printed):
        summary = pretrain(config)
    return Pretrained(config, Path(config.out), summary, printed.getvalue())


@pytest.fixture(scope="session")
def store() -> Generator[Store]:
    """The one S3 server of the whole test run."""
    from tests.s3 import running

    with running() as found:
        yield found


@pytest.fixture
def s3(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A bucket of the test's own on a well-behaved server; the environment says how to reach it."""
    for name, value in store.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RAYOGRAPH_SCRATCH", str(tmp_path / "scratch"))
    store.bucket = store.make(f"bucket-{len(store.buckets)}")
    store.seen.clear()
    return store


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, Any, Any]:
    report = yield
    return _expected_only(report)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, Any, Any]:
    report = yield
    return _expected_only(report)


def _expected_only(report: Any) -> Any:
    """The report, failed if it is a skip for another reason than the expected ones; an expected failure is no skip."""
    if os.environ.get("CI") != "true" or not report.skipped or "wasxfail" in vars(report):
        return report
    reason = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
    if not reason.removeprefix("Skipped: ").startswith(EXPECTED_SKIPS):
        report.outcome = "failed"
        report.longrepr = f"with CI=true this skip is a failure: {reason}"
    return report
