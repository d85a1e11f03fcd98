"""Settings for the texts of tests."""

from pathlib import Path

import pytest

from data_pipeline.settings import CorpusSettings


@pytest.fixture
def setting(tmp_path):
    """Makes the settings of a corpus; texts may be given as they are."""

    def make(text: str | bytes | Path | None = None, **values) -> CorpusSettings:
        if isinstance(text, str | bytes):
            path = tmp_path / "text.txt"
            path.write_bytes(text.encode() if isinstance(text, str) else text)
            text = path
        return CorpusSettings(corpus=str(text or ""), cache_dir=str(tmp_path / "cache"), **values)

    return make
