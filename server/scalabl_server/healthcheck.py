"""The HEALTHCHECK of the container image: is the server of this container ready? Standard library only, to start quickly.

`python -m scalabl_server.healthcheck` finds host and port in the SCALABL_* environment variables. It does not know the
flags of `scalabl serve`.
"""

from __future__ import annotations

import os
import ssl
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping

TIMEOUT_SECONDS = 4.0


def address(environment: Mapping[str, str]) -> str:
    """The URL of /health/ready, on the admin port if there is one, because that port never uses TLS."""
    admin = environment.get("SCALABL_ADMIN_PORT")
    host = environment.get("SCALABL_ADMIN_HOST", "127.0.0.1") if admin else environment.get("SCALABL_HOST", "127.0.0.1")
    port = admin or environment.get("SCALABL_PORT", "8000")
    scheme = "https" if environment.get("SCALABL_SSL_CERTFILE") and not admin else "http"
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}/health/ready"


def main() -> int:
    """Return 0 when the server is ready; 1, with one line on standard error, when it is not."""
    url = address(os.environ)
    # The certificate is issued for the public name, not for 127.0.0.1. No secret is sent, so it need not be verified.
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
    try:
        with opener.open(url, timeout=TIMEOUT_SECONDS):
            return 0
    except (OSError, urllib.error.URLError) as error:
        print(f"{url}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
