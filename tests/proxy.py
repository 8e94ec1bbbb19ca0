"""nginx with a configuration from the documents, for the length of a `with`."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import urllib3

from actserve.cli.tools import local_service as local
from tests.waiting import until

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
DOCUMENTS = Path(__file__).parent.parent / "docs"

# In CI a missing nginx is a failure.
needs_nginx = pytest.mark.skipif(
    NGINX is None and not os.environ.get("CI"), reason="the tests behind a proxy need nginx: apt-get install nginx"
)


@contextmanager
def nginx(
    folder: Path, document: str, addresses: Mapping[str, str], prefix: str = ""
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """nginx with the one configuration in docs/`document` -> its URL with `prefix`, and its process.

    `addresses` are those to use instead of the documented ones.
    """
    (documented,) = re.findall(r"```nginx\n(.*?)```", (DOCUMENTS / document).read_text(), re.DOTALL)
    port = local.free_port()
    http = documented
    for shown, used in {**addresses, "listen 80;": f"listen 127.0.0.1:{port};"}.items():
        assert shown in http, f"{document} does not show {shown}"
        http = http.replace(shown, used)
    temporary = "\n".join(
        f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    configuration = folder / "nginx.conf"
    configuration.write_text(
        f"{'user root;' if os.getuid() == 0 else ''}"  # its workers write to the folder of this user
        f"daemon off; worker_processes 1; pid {folder}/pid; error_log {folder}/error.log;\n"
        f"events {{}}\nhttp {{\naccess_log off;\n{temporary}\n{http}}}\n"
    )
    assert NGINX is not None, "apt-get install nginx"
    with subprocess.Popen([NGINX, "-p", str(folder), "-c", str(configuration)], stderr=subprocess.DEVNULL) as process:
        url = f"http://127.0.0.1:{port}{prefix}"
        try:
            until(lambda: _is_ready(url) or process.poll() is not None)
            assert process.poll() is None, (folder / "error.log").read_text()
            yield url, process
        finally:
            process.terminate()


def _is_ready(url: str) -> bool:
    try:
        return urllib3.request("GET", url + "/readyz", timeout=5, retries=False).status == 200
    except urllib3.exceptions.HTTPError:
        return False
