"""What tests of data sets and of problems on them share."""

import hashlib

import pytest

from kronscope.studies.data import published


@pytest.fixture
def publish(monkeypatch):
    """publish(data_set, file, content): what a made-up file holds is taken for the published."""

    def publish(data_set, file, content):
        monkeypatch.setitem(
            published.PUBLISHED[data_set], file, hashlib.sha256(content).hexdigest()
        )

    return publish
