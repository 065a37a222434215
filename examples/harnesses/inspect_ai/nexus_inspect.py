"""Nexus as a sandbox of Inspect: each sample gets a VM of its own, `sandbox="nexus"`."""

import errno
from pathlib import Path, PurePosixPath

import tomllib
from inspect_ai.util import (
    ExecResult,
    OutputLimitExceededError,
    SandboxConnection,
    SandboxEnvironment,
    SandboxEnvironmentLimits,
    SandboxUnavailableError,
    sandboxenv,
)
from nexus_mcp import Nexus, OutputLimit, Vm
from pydantic import BaseModel

HARNESS = {"harness": "inspect_ai"}


class NexusConfig(BaseModel, frozen=True):
    """What a sample's VM is like; the fields are those of vm_create unless said otherwise."""

    image: str = "debian"  # `from`: an image, template:NAME, oci:IMAGE, docker-archive:PATH, ...
    user: str = "image"  # who runs commands and owns files by default; the user of the image
    workdir: str | None = None  # the base of relative paths (default: the image's own)
    memory: str | None = None
    vcpus: int | None = None
    disk: str | None = None
    env: dict[str, str] | None = None


@sandboxenv(name="nexus")
class NexusSandboxEnvironment(SandboxEnvironment):
    @classmethod
    def config_files(cls):
        return ["nexus.toml"]

    @classmethod
    def config_deserialize(cls, config):
        return NexusConfig(**config)

    @classmethod
    async def sample_init(cls, task_name, config, metadata):
        if not isinstance(config, NexusConfig):  # a file, or nothing
            config = NexusConfig(**tomllib.loads(Path(config).read_text() if config else ""))
        tags = HARNESS | {"task": "".join(c if c.isalnum() else "-" for c in task_name)[:60]}
        size = config.model_dump(include={"memory", "vcpus", "disk", "env"}, exclude_none=True)
        vm = await Vm.create(config.image, tags=tags, **size)
        try:
            return {"default": await cls.of(vm, config.user, config.workdir)}
        except BaseException:
            vm.nexus.later("vm_delete", vm=vm.id, force=True)
            raise

    @classmethod
    async def sample_cleanup(cls, task_name, config, environments, interrupted):
        for environment in environments.values():
            await environment.as_type(cls).vm.delete()

    @classmethod
    async def cli_cleanup(cls, id):
        which = {"tags": HARNESS} if id is None else {"vm": id}
        await Nexus.shared().call("vm_delete", force=True, **which)

    @classmethod
    async def of(cls, vm, user="image", workdir=None):
        """An environment in a VM that there is."""
        environment = cls()
        environment.vm = vm
        if workdir:
            await vm.guest("file_mkdir", path=workdir, parents=True, user=user)
        facts, _ = await vm.guest("run_command", command=":", user=user, cwd=workdir)
        environment.workdir = PurePosixPath(facts["cwd"])
        await vm.settle(_as_python, cwd=facts["cwd"], user=user)
        return environment

    async def exec(self, cmd, input=None, cwd=None, env=None, user=None, timeout=None, **hints):
        limit = SandboxEnvironmentLimits.MAX_EXEC_OUTPUT_SIZE
        try:
            ran = await self.vm.run(
                *cmd,
                input=input.encode() if isinstance(input, str) else input,
                limit=limit,
                timeout=timeout,
                cwd=str(self.workdir / (cwd or "")),
                env=env,
                user=user,
            )
        except OutputLimit as error:
            limit = SandboxEnvironmentLimits.MAX_EXEC_OUTPUT_SIZE_STR
            raise OutputLimitExceededError(limit, _text(error.ran.stdout[:limit])) from error
        if ran.refusal is not None and ran.refusal.code == "program_not_executable":
            raise _as_python(ran.refusal, "run", cmd) from ran.refusal
        if ran.timed_out:
            failure = TimeoutError(f"Command timed out after {timeout} seconds")
            failure.truncated_output = _text(ran.stdout + ran.stderr)
            raise failure
        return ExecResult(ran.status == 0, ran.status, _text(ran.stdout), _text(ran.stderr))

    async def write_file(self, file, contents):
        content = contents.encode() if isinstance(contents, str) else contents
        await self.vm.write(self.workdir / file, content)

    async def read_file(self, file, text=True):
        limit = SandboxEnvironmentLimits.MAX_READ_FILE_SIZE
        try:
            content = await self.vm.read(self.workdir / file, limit)
        except OutputLimit as error:
            limit = SandboxEnvironmentLimits.MAX_READ_FILE_SIZE_STR
            raise OutputLimitExceededError(limit, None) from error
        return content.decode() if text else content

    async def connection(self, *, user=None):
        details = await self.vm.inspect()
        if details["state"] != "ready":
            raise ConnectionError(f"{self.vm.name} is {details['state']}")
        ports = [
            {
                "container_port": port["guest_port"],
                "protocol": "tcp",
                "mappings": [{"host_ip": "127.0.0.1", "host_port": port["host_port"]}],
            }
            for port in details.get("published", [])
            if "host_port" in port
        ]
        line, name = await self.vm.shell_line(), self.vm.name
        return SandboxConnection(type="nexus", command=line, ports=ports, container=name)


def _text(output):
    return output.decode(errors="replace")


def _as_python(error, action, what):
    """The exception that Inspect knows."""
    if error.errno:
        subject = what[0] if action == "run" else str(what)
        return OSError(getattr(errno, error.errno, errno.EIO), str(error), subject)
    return SandboxUnavailableError(str(error)) if error.is_gone else error
