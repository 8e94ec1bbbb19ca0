"""The API's reference can be built, and says something of every public name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from actserve.core import errors
from tests import api
from tests.documents import ROOT


def test_the_reference_has_a_page_for_each_module_and_every_name(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-m", "tests.api", str(tmp_path)]
    built = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, cwd=ROOT)
    assert built.returncode == 0, built.stderr
    for module in api.MODULES:
        page = (tmp_path / module.replace(".", "/")).with_suffix(".html").read_text()
        for name, _ in api.documented(module):
            anchor = name.removeprefix(f"{module}.")
            assert f'id="{anchor}"' in page, name
        assert str(ROOT) not in page


@pytest.mark.parametrize("module", api.MODULES)
def test_every_public_name_says_what_it_is(module: str) -> None:
    names = dict(api.documented(module))
    assert names
    silent = {name for name, text in names.items() if not text and not _in_the_tree(name)}
    assert silent == set()


def _in_the_tree(name: str) -> bool:
    """Errors have their lines in the module's own docstring."""
    return name.startswith("actserve.core.errors.") and name.rpartition(".")[2] in (errors.__doc__ or "").split()
