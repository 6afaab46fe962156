"""What the runs of a test file share: small data sets, the weights of one pre-training, results to compare."""

from collections.abc import Callable
from pathlib import Path

import pytest
import run_matrix
from run_matrix import SAME_BYTES, Images, Row


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Images:
    return Images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="session")
def weights(images: Images, tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Path:
    """A finished pre-training."""
    row, run = Row("pretrain", "jpeg", "pil", 0, "straight"), tmp_path_factory.mktemp("weights") / "run"
    line = run_matrix.words(row, images.of("classify", "jpeg"), None, run)
    run_matrix.check_training(row, line, run, pytestconfig.getoption("run_limit"))
    return run


@pytest.fixture(scope="session")
def check(images: Images, weights: Path, pytestconfig: pytest.Config) -> Callable[[Row, Path], None]:
    """Checks a row's run, whose figures must be those of earlier ones on the same pixels by the same decoder: neither
    workers nor where the bytes lie nor a resumption changes them."""
    seen: dict[tuple, object] = {}

    def checked(row: Row, folder: Path) -> None:
        found = run_matrix.check(row, images, weights, folder, pytestconfig.getoption("run_limit"))
        pixels = "jpeg" if row.data in SAME_BYTES else row.data
        assert found == seen.setdefault((row.verb, pixels, row.decoder, row.flags), found)

    return checked
