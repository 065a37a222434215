"""Harbor's oracle agent on tasks in VMs, from a docker-archive and from an OCI layout.

    python check.py

The image is made here, of the busybox of a VM. Prints the rewards and, last, how many trials ended
as they should.
"""

import asyncio
import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from nexus_mcp import Nexus, Vm

APPLETS = "sh cat chmod chown cp env find id ls mkdir mv printf pwd rm sleep stat tar test"
CONFIG = {
    "architecture": "amd64",
    "os": "linux",
    "config": {
        "Env": ["PATH=/bin", "FROM_IMAGE=yes"],
        "WorkingDir": "/app",
        "User": "agent",
    },
}
TASK = """
version = "1.0"
[metadata]
[agent]
timeout_sec = 300.0
[verifier]
timeout_sec = 300.0
user = "root"
[environment]
docker_image = "{image}"
network_mode = "{network}"
memory_mb = 256
storage_mb = 512
cpus = 1
[environment.env]
FROM_TASK = "yes"
"""
SOLVE = """#!/bin/sh
set -e
[ "$(id -un):$(pwd):$FROM_IMAGE:$FROM_TASK" = agent:/app:yes:yes ]
[ "$(cat seed/file)" = seeded ]
echo done > answer
"""
TEST = """#!/bin/sh
if [ "$(cat /app/answer)" = done ] && [ "$(stat -c %U /app/answer)" = agent ]; then
  echo 1 > /logs/verifier/reward.txt
else
  echo 0 > /logs/verifier/reward.txt
fi
"""


async def busybox():
    """The static busybox of the image of that name."""
    vm = await Vm.create("busybox", memory="128MiB")
    try:
        return await vm.read("/bin/busybox")
    finally:
        await vm.delete()


def layer(program):
    """A root filesystem of busybox and a user."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:

        def add(name, content=None, kind=tarfile.REGTYPE, mode=0o755, owner=0, link=""):
            entry = tarfile.TarInfo(name)
            entry.type, entry.mode, entry.uid, entry.gid = kind, mode, owner, owner
            entry.size, entry.linkname = len(content or b""), link
            tar.addfile(entry, io.BytesIO(content or b""))

        for name in ("bin", "etc", "app", "home", "home/agent", "root", "tmp"):
            owner = 1000 if name in ("app", "home/agent") else 0
            mode = 0o1777 if name == "tmp" else 0o755
            add(name, kind=tarfile.DIRTYPE, mode=mode, owner=owner)
        add("bin/busybox", program)
        for applet in APPLETS.split():
            add(f"bin/{applet}", kind=tarfile.SYMTYPE, link="busybox")
        users = "root:x:0:0::/root:/bin/sh\nagent:x:1000:1000::/home/agent:/bin/sh\n"
        add("etc/passwd", users.encode(), mode=0o644)
        add("etc/group", b"root:x:0:\nagent:x:1000:\n", mode=0o644)
    return packed.getvalue()


def digest(content):
    return "sha256:" + hashlib.sha256(content).hexdigest()


def docker_archive(path, rootfs):
    """What `docker save` would write."""
    config = json.dumps({**CONFIG, "rootfs": {"type": "layers", "diff_ids": [digest(rootfs)]}})
    manifest = [{"Config": "config.json", "RepoTags": ["tiny:1"], "Layers": ["layer.tar"]}]
    with tarfile.open(path, mode="w") as tar:
        for name, content in (
            ("config.json", config.encode()),
            ("layer.tar", rootfs),
            ("manifest.json", json.dumps(manifest).encode()),
        ):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return f"docker-archive:{path}"


def oci_layout(path, rootfs):
    """The same image as a directory of the OCI."""
    blobs = path / "blobs/sha256"
    blobs.mkdir(parents=True)

    def blob(kind, content):
        (blobs / digest(content).removeprefix("sha256:")).write_bytes(content)
        mediatype = f"application/vnd.oci.image.{kind}"
        return {"mediaType": mediatype, "digest": digest(content), "size": len(content)}

    config = {**CONFIG, "rootfs": {"type": "layers", "diff_ids": [digest(rootfs)]}}
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": blob("config.v1+json", json.dumps(config).encode()),
        "layers": [blob("layer.v1.tar+gzip", gzip.compress(rootfs))],
    }
    index = {"schemaVersion": 2}
    index["manifests"] = [blob("manifest.v1+json", json.dumps(manifest).encode())]
    (path / "index.json").write_text(json.dumps(index))
    (path / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return f"oci-layout:{path}"


def task(path, image, network="no-network"):
    for name, content in (
        ("task.toml", TASK.format(image=image, network=network)),
        ("instruction.md", "Write `done` to /app/answer.\n"),
        ("environment/seed/file", "seeded\n"),
        ("solution/solve.sh", SOLVE),
        ("tests/test.sh", TEST),
    ):
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
        file.chmod(0o755 if name.endswith(".sh") else 0o644)


def main():
    program = asyncio.run(busybox())
    with tempfile.TemporaryDirectory() as home:
        home = Path(home)
        rootfs = layer(program)
        archive = docker_archive(home / "tiny.tar", rootfs)
        layout = oci_layout(home / "tiny", rootfs)
        task(home / "tasks/from-docker-archive", archive)
        task(home / "tasks/from-oci-layout", layout)
        # A task that needs something a VM does not have is refused with a reason.
        task(home / "tasks/with-network", layout, "public")
        jobs = home / "jobs"
        command = [Path(sys.executable).with_name("harbor"), "run", "-p", home / "tasks"]
        command += ["-a", "oracle", "--env", "nexus_harbor:NexusEnvironment", "-o", jobs]
        # Otherwise it looks up model prices on the network.
        env = {**os.environ, "HOME": str(home), "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
        subprocess.run([*command, "-n", "1", "-y", "--quiet"], env=env, cwd=home, check=True)
        rewards, refusals = {}, {}
        for result in jobs.glob("*/*/result.json"):
            trial = json.loads(result.read_text())
            name = trial["task_name"].rpartition("/")[2]
            if failure := trial.get("exception_info"):
                refusals[name] = failure["exception_message"]
            if verified := trial.get("verifier_result"):
                rewards[name] = verified["rewards"]["reward"]
    left = asyncio.run(Nexus.shared().call("vm_list", tags={"harness": "harbor"}))
    for name in sorted(rewards | refusals):
        print(name, rewards.get(name), refusals.get(name, ""))
    assert left.structured_content["vms"] == [], left.structured_content
    passed = sum(rewards.get(name) == 1.0 for name in ("from-docker-archive", "from-oci-layout"))
    passed += "no-network" in refusals.get("with-network", "")
    print(f"{passed} of 3 trials ended as they should")
    return passed != 3


if __name__ == "__main__":
    sys.exit(main())
