"""What must be repeated nowhere: the key and password of a server, in every way of writing them."""

import base64

from yarl import URL

__all__ = ["Redactor"]


class Redactor:
    """Blots out the secrets of one server in what is said of it.

    Args:
        url: The server's; its password is a secret.
        api_key: Another one; None: there is none.
    """

    def __init__(self, url: URL, api_key: str | None) -> None:
        found = {api_key, url.password, url.raw_password}
        if url.password:
            pair = f"{url.user or ''}:{url.password}"
            found.add(base64.b64encode(pair.encode()).decode())
        #: The longest first: one may hold another.
        self._secrets = sorted(filter(None, found), key=len, reverse=True)

    def __call__(self, said: object) -> str:
        """`said` as text, ``***`` in place of every secret."""
        text = str(said)
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text
