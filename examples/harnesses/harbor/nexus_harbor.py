"""Nexus as an environment of Harbor: each trial gets a VM of its own."""

import io
import os
import shlex
import shutil
import tarfile
from pathlib import Path

from harbor.environments.base import BaseEnvironment, ExecResult, transfer_tar_filter
from harbor.environments.capabilities import (
    EnvironmentCapabilities,
    EnvironmentResourceCapabilities,
)
from nexus_mcp import Vm

# Values that `from` of vm_create accepts unchanged; any other name is an image in a registry.
SOURCES = (
    "docker-archive:",
    "oci-layout:",
    "oci-archive:",
    "oci:",
    "file:",
    "image:",
    "rootfs:",
    "template:",
)


class NexusEnvironment(BaseEnvironment):
    _vm = None

    @property
    def vm(self):
        if self._vm is None:
            raise RuntimeError("the VM was not created")
        return self._vm

    @staticmethod
    def type():
        return "nexus"

    @classmethod
    def preflight(cls, kwargs=None):
        super().preflight(kwargs)
        if not shutil.which("nexusctl"):
            raise SystemExit("nexusctl is not in PATH: install Nexus, or add its directory to PATH")

    @classmethod
    def resource_capabilities(cls):
        return EnvironmentResourceCapabilities(cpu_limit=True, memory_limit=True)

    @property
    def capabilities(self):
        return EnvironmentCapabilities(disable_internet=True)

    def _validate_definition(self):
        """What a VM cannot be is refused by `start`, where it fails one trial and not the job."""

    async def start(self, force_build):
        image = self.task_env_config.docker_image
        if not image:
            raise RuntimeError("Nexus builds no Dockerfile: name an image by docker_image")
        if not self._network_disabled:
            mode = self.network_policy.network_mode.value
            raise RuntimeError(
                f"VMs of this adapter have no network, and the task wants {mode!r}: "
                "set network_mode='no-network'"
            )
        memory, disk = self._effective_memory_mb, self._effective_storage_mb
        self._vm = await Vm.create(
            image if image.startswith(SOURCES) else f"oci:{image}",
            vcpus=self._effective_cpus and int(self._effective_cpus),
            memory=memory and f"{memory}MiB",
            disk=disk and f"{disk}MiB",
            tags={"harness": "harbor", "session": self.session_id[:60]},
        )
        await self.ensure_dirs(self._mount_targets(writable_only=True))
        await self._upload_environment_dir_after_start()

    async def stop(self, delete):
        if self._vm is not None:
            await (self.vm.delete() if delete else self.vm.stop())

    async def exec(self, command, cwd=None, env=None, timeout_sec=None, user=None):
        user = self._resolve_user(user)
        ran = await self.vm.run(
            command=command,
            cwd=cwd or self.task_env_config.workdir,
            env=self._merge_env(env),
            timeout=timeout_sec,
            user="image" if user is None else str(user),
        )
        if ran.timed_out:
            raise RuntimeError(f"Command timed out after {timeout_sec} seconds")
        stdout, stderr = (
            text.decode(errors="replace") or None for text in (ran.stdout, ran.stderr)
        )
        return ExecResult(stdout=stdout, stderr=stderr, return_code=ran.status)

    async def upload_file(self, source_path, target_path):
        source = Path(source_path)
        mode = f"{source.stat().st_mode & 0o777:04o}"
        await self.vm.write(target_path, source.read_bytes(), mode)

    async def download_file(self, source_path, target_path):
        target = Path(target_path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(await self.vm.read(source_path))

    async def upload_dir(self, source_dir, target_dir):
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as tar:
            for child in sorted(Path(source_dir).iterdir()):
                tar.add(child, arcname=child.name, filter=_roots)
        await self.vm.unpack(packed.getvalue(), target_dir)

    async def download_dir(self, source_dir, target_dir):
        packed = await self.vm.pack(source_dir)
        Path(target_dir).mkdir(parents=True, exist_ok=True)
        with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
            tar.extractall(target_dir, filter=transfer_tar_filter)

    async def attach(self):
        command = shlex.split(await self.vm.shell_line())
        os.execvp(command[0], command)


def _roots(member):
    """Files that are uploaded are root's, whoever owns them here."""
    member.uid = member.gid = 0
    member.uname = member.gname = "root"
    return member
