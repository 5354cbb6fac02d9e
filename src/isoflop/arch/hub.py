"""One `config.json` from the public hub, fetched because the user asked for it.

Nothing else in `arch` reaches the network. The name is checked before it becomes part
of an address, the answer is bounded in size and time, and no redirect may leave the
hub's own host. No credentials are sent: a gated model's config must be downloaded by
hand.
"""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Any

from isoflop.arch.foreign import MAX_BYTES, check_size
from isoflop.errors import InputError, Problem

if TYPE_CHECKING:
    from http.client import HTTPResponse

HUB = "https://huggingface.co"
SECONDS_SOCKET = 10.0
SECONDS_WHOLE = 30.0

_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?"
_NAME = re.compile(rf"(?P<repository>{_PART}/{_PART})(?:@(?P<revision>[A-Za-z0-9._-]{{1,64}}))?")

_MEANING = {
    401: "is a public model: this one is gated or absent, download its config.json by hand",
    403: "is a public model: this one is gated, download its config.json by hand",
    404: "is a model on the hub with a config.json, at that revision",
    429: "is asked for less often: the hub limits requests",
}


def config_address(name: str, hub: str = HUB) -> str:
    """The address of a model's `config.json`; `name` is ORG/NAME or ORG/NAME@REVISION.

    >>> config_address("openai-community/gpt2")
    'https://huggingface.co/openai-community/gpt2/resolve/main/config.json'
    """
    match = _NAME.fullmatch(name)
    if match is None or ".." in name or "--" in name:  # what the hub itself forbids in a name
        rule = "is ORG/NAME or ORG/NAME@REVISION, of letters, digits and . _ -"
        raise InputError(f"hf:{name[:200]}", [Problem("name", name, rule)])
    return f"{hub}/{match['repository']}/resolve/{match['revision'] or 'main'}/config.json"


def fetch_config(name: str, hub: str = HUB) -> bytes:
    """The bytes of a hub model's `config.json`.

    Raises:
        InputError: not a legal name, no network, no such model, too large, or too slow.
    """
    import http.client
    import urllib.error
    import urllib.request

    class SameHost(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, *args: Any, **names: Any) -> urllib.request.Request | None:
            if not str(args[-1]).startswith(f"{hub}/"):  # the last is the new address
                raise urllib.error.URLError(f"redirected away from {hub}")
            return super().redirect_request(*args, **names)

    address = config_address(name, hub)
    where = f"hf:{name}"
    try:
        request = urllib.request.Request(address, headers={"User-Agent": "isoflop"})  # noqa: S310 - https or a test's loopback, never from the user
        with urllib.request.build_opener(SameHost).open(request, timeout=SECONDS_SOCKET) as answer:
            data = _read(answer, where)
    except urllib.error.HTTPError as error:
        error.close()
        rule = _MEANING.get(error.code, "is answered by the hub")
        raise InputError(where, [Problem("name", name, rule, f"HTTP {error.code}")]) from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        hint = "download config.json and give its path instead"
        rule = f"can be reached ({type(error).__name__}: {reason})"
        raise InputError(where, [Problem("network", hub, rule, hint)]) from None
    check_size(data, where)
    return data


def _read(answer: HTTPResponse, where: str) -> bytes:
    """At most one byte more than allowed, within `SECONDS_WHOLE`."""
    end = time.monotonic() + SECONDS_WHOLE
    data = b""
    while len(data) <= MAX_BYTES and (chunk := answer.read1(1 << 16)):
        data += chunk
        if time.monotonic() > end:
            rule = f"answers within {SECONDS_WHOLE:g} s"
            raise InputError(where, [Problem("network", "too slow", rule)])
    return data
