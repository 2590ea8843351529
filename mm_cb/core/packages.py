"""The hub's libraries without network."""

import functools
import http.client
import ssl
import sys
import urllib.error
import urllib.request

_PATIENCE = 10.0
"""Seconds that the hub may take for a first answer."""
_PROXYS_OWN = (407, 502, 503, 504)


@functools.cache
def stay_offline_without_network() -> None:
    """Keep the hub's libraries offline where nobody answers at the hub's address: cached files at once, or one error.

    Otherwise every file that is asked for costs half a minute of retries, and a dry run minutes: without network, and
    behind a proxy that does not let the hub through.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or _answers(constants.ENDPOINT):
        return
    constants.HF_HUB_OFFLINE = True  # read by huggingface_hub and transformers at every request, by datasets once
    if "datasets" in sys.modules:
        sys.modules["datasets"].config.HF_HUB_OFFLINE = True


def _answers(address: str) -> bool:
    """Whether anybody but a proxy answers at an address; one whose certificate only others can check counts."""
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=_PATIENCE).close()
    except urllib.error.HTTPError as error:
        return error.code not in _PROXYS_OWN
    except (OSError, ValueError, http.client.HTTPException) as error:
        return isinstance(getattr(error, "reason", None), ssl.SSLError)
    return True
