"""vLLM loads a checkpoint by its own functions, through ours: the memory it takes, and files that change meanwhile."""

from __future__ import annotations

import pytest
from support.load_checks import LoadTests

pytestmark = pytest.mark.long


class TestLoads(LoadTests):
    pass
