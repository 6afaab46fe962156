"""The documentation site of ``make docs``."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mae_fast
from mae_fast.ops import registry

pytest.importorskip("material")
pytest.importorskip("mkdocstrings")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Built with --strict: broken links, pages outside of the navigation and unknown names are errors."""
    folder = tmp_path_factory.mktemp("site")
    command = (sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder))
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert result.returncode == 0, result.stdout
    return folder


def test_pages_load_no_external_files(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        loads = re.findall(r'<(?:script|img|iframe|link)\b[^>]*?(?:src|href)="?(?:https?:)?//[^>]*>', page.read_text())
        assert [tag for tag in loads if 'rel="canonical"' not in tag] == [], page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(?:@import|url\()[\s\"']*(?:https?:)?//", sheet.read_text()), sheet


def test_api_pages_list_every_op_and_flag(site):
    ops = (site / "api" / "ops" / "index.html").read_text()
    for op in registry.ops():
        assert f'id="mae_fast.ops.{op.name}.op.' in ops, op.name
    pages = "".join(page.read_text() for page in (site / "api").rglob("*.html"))
    for name in mae_fast._COMMANDS:
        assert f'id="mae_fast.{name}"' in pages, name
    tasks = (site / "api" / "index.html").read_text()
    for flag in ("predict_ratio", "multi_label", "freeze_encoder", "kl_weight", "val_data"):
        assert f">{flag}<" in tasks, flag
