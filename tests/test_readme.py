"""What the README shows is what the code says."""

import re
from pathlib import Path

import pytest

from megatron_cp.cli.backends import markdown

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_table_of_backends_is_the_registrys():
    block = re.search(r"<!-- backends -->\n(.*?)\n<!-- end -->", README, re.DOTALL)
    assert block is not None
    assert block[1] == markdown(), "write the output of `megatron-cp backends --markdown` into the README"


@pytest.mark.parametrize("path", sorted(set(re.findall(r"(?:scripts|configs|megatron_cp|docs)/[\w./-]+\w", README))))
def test_files_that_the_readme_names_exist(path):
    assert (ROOT / path).exists()
