"""One Chromium and one `lora-edu lab` for all browser tests of a process.

Without a Chromium the tests are skipped and say what to install; nothing here starts one of its own.
"""

from collections.abc import Iterator

import jupyterlab_driver as driver
import pytest
import replay
from playwright.sync_api import Browser


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    path = driver.chromium_path()
    if path is None:
        pytest.skip(
            "no Chromium or Chrome on this machine: install one (Debian: apt-get install chromium) "
            "or name it in LORA_EDU_CHROMIUM"
        )
    with driver.chromium(path) as running:
        yield running


@pytest.fixture(scope="session")
def server(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[driver.Server]:
    kernels = replay.folder() / "jupyterlab"  # guarded, and with two threads, as nbval's own kernel is
    with driver.lab(tmp_path_factory.mktemp("browser") / "home", kernels) as running:
        yield running


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    report = yield
    item.stash[driver.FAILED] = item.stash.get(driver.FAILED, False) or report.failed
    return report
