import io

import pytest

from wanrt.errors import ScriptError
from wanrt.script import build_job, read_script


@pytest.fixture
def job_of():
    """A job from a prompt file's text."""

    def make(text, **flags):
        raw = text if isinstance(text, bytes) else text.encode()
        return build_job(read_script("-", io.BytesIO(raw)), flags)

    return make


@pytest.fixture
def findings_of(job_of):
    """The lines of the error that a prompt file's text gives."""

    def find(text, **flags):
        with pytest.raises(ScriptError) as caught:
            job_of(text, **flags)
        return str(caught.value).splitlines()

    return find
