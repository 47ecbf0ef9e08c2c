"""Whether a model or data hub can be reached, asked once and briefly before anybody waits for it.

The libraries that load from a hub try six times over half a minute before they say that nobody is there. So the hub is
asked first whether it answers at all; if not, this process and those that it starts go on with what the local cache
holds. Not judged: what the hub answers, and how slowly it then sends.
"""

import errno
import functools
import http.client
import logging
import os
import socket
import urllib.error
import urllib.request

from huggingface_hub import constants

log = logging.getLogger(__name__)
NOBODY = (ConnectionRefusedError, TimeoutError, socket.gaierror)
NO_WAY = (errno.ENETUNREACH, errno.EHOSTUNREACH)


def ask_hub() -> None:
    """Go offline, with a warning, if nobody answers at the hub's address (``HF_ENDPOINT``, proxies respected).

    Waits ``HF_HUB_ETAG_TIMEOUT`` seconds (10 by default) to connect and as long for an answer, which is as long as
    the libraries wait each time.
    """
    if constants.HF_HUB_OFFLINE:
        return
    if reason := _silence(constants.ENDPOINT, float(constants.HF_HUB_ETAG_TIMEOUT)):
        log.warning("the hub %s does not answer (%s): only what is cached here is used", constants.ENDPOINT, reason)
        constants.HF_HUB_OFFLINE = True  # of this process, whose libraries have read the variable before
        os.environ["HF_HUB_OFFLINE"] = "1"  # of those that it starts


@functools.cache
def _silence(endpoint: str, timeout_s: float) -> str:
    """Why nobody is there; empty if anybody answers, with whatever, or if it is not for us to say (certificates)."""
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=timeout_s).close()
    except urllib.error.HTTPError:
        return ""
    except OSError as error:
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(cause, NOBODY) or (isinstance(cause, OSError) and cause.errno in NO_WAY):
            return str(cause)
    except (ValueError, http.client.HTTPException):
        return ""  # no address; the libraries will say so
    return ""
