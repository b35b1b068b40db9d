import base64

import pytest
from yarl import URL

from rollfleet_common.redact import Redactor

SERVER = URL("http://trainer:p%40ss@h:8000")
BASIC = base64.b64encode(b"trainer:p@ss").decode()


@pytest.mark.parametrize("secret", ["p@ss", "p%40ss", "sesame", BASIC])
def test_a_secret_is_blotted_out_however_it_is_written(secret: str) -> None:
    assert Redactor(SERVER, "sesame")(f"403: <{secret}> is wrong") == "403: <***> is wrong"


def test_what_is_no_secret_stays() -> None:
    said = f"trainer at h:8000: {base64.b64encode(b':').decode()}"
    assert Redactor(SERVER, None)(said) == said
    assert Redactor(URL("http://h:8000"), None)(ValueError(said)) == said
