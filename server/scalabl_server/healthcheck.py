"""Whether the server of this container is ready: the image's HEALTHCHECK. Standard library only, so that it starts at once.

`python -m scalabl_server.healthcheck` asks where the environment says that the server listens: flags are not seen here.
"""

from __future__ import annotations

import os
import ssl
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping

SECONDS = 4.0


def address(environment: Mapping[str, str]) -> str:
    """The URL of /health/ready; the admin port's if there is one, since that never speaks TLS."""
    admin = environment.get("SCALABL_ADMIN_PORT")
    host = environment.get("SCALABL_ADMIN_HOST", "127.0.0.1") if admin else environment.get("SCALABL_HOST", "127.0.0.1")
    port = admin or environment.get("SCALABL_PORT", "8000")
    scheme = "https" if environment.get("SCALABL_SSL_CERTFILE") and not admin else "http"
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}/health/ready"


def main() -> int:
    """Status 0 when it is ready; 1 and one line on standard error when it is not."""
    url = address(os.environ)
    # A certificate's name says nothing about 127.0.0.1, and nothing secret is sent.
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
    try:
        with opener.open(url, timeout=SECONDS):
            return 0
    except (OSError, urllib.error.URLError) as error:
        print(f"{url}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
