"""Settings for the texts of tests, and a store for them."""

from pathlib import Path

import pytest

from data_pipeline import stores
from data_pipeline.build import remote_inputs
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


@pytest.fixture
def bucket(monkeypatch) -> str:
    """The URL of an object store in the memory of this process."""
    obstore = pytest.importorskip("obstore", reason="obstore is absent: pip install charlstm[remote]")
    from obstore.store import MemoryStore

    held = MemoryStore()
    monkeypatch.setattr(stores, "_connect", lambda url: (obstore, held))
    remote_inputs._store.cache_clear()
    return "s3://bucket"
