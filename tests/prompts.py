"""The recordings of the audio demo, which come from a package of Debian: not every machine can have them."""

from __future__ import annotations

import pytest

from stages.data.sources.from_demo import PROMPTS_FOLDERS

needs_prompts = pytest.mark.skipif(
    not any(folder.is_dir() for folder in PROMPTS_FOLDERS), reason="the recordings are not here: make prompts"
)
