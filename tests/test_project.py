"""The version, the changelog, and the workflows, which call targets of the Makefile."""

import re
from pathlib import Path

import pytest

import mae_fast

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def test_version_is_defined_once():
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in project["project"]
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "mae_fast.__version__"}
    assert "version:" not in (ROOT / "CITATION.cff").read_text().replace("cff-version:", "")


def test_changelog_has_the_version():
    text = (ROOT / "CHANGELOG.md").read_text()
    versions = re.findall(r"^## \[([\d.]+)\] - \d{4}-\d\d-\d\d$", text, re.MULTILINE)
    assert versions[0] == mae_fast.__version__
    links = re.findall(r"^\[(\S+)\]: ", text, re.MULTILINE)
    assert links == ["Unreleased", *versions]


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_makefile_has_the_targets_of_the_workflows(file):
    yaml = pytest.importorskip("yaml")
    makefile = (ROOT / "Makefile").read_text()
    for job in yaml.safe_load(file.read_text())["jobs"].values():
        lines = [step["run"] for step in job["steps"] if "run" in step]
        targets = [line.split()[1] for line in lines if line.startswith("make ") and "${{ matrix" not in line]
        targets += [row["target"] for row in job.get("strategy", {}).get("matrix", {}).get("include", [])]
        for target in targets:
            assert re.search(rf"^{target}:.*##", makefile, re.MULTILINE), target
