"""Published data sets for development, beside the checkout: no part of the project, and tests of them skip without."""

from __future__ import annotations

from pathlib import Path

import pytest

DATA = Path(__file__).parents[2].parent / "shared" / "data" / "dev"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"development data is not at {DATA}")
