"""Nexus as a sandbox of the OpenAI Agents SDK: each session has a VM, which a stop keeps."""

import io
import time
import uuid
from contextlib import suppress
from typing import Literal

from agents.sandbox import errors
from agents.sandbox.manifest import Manifest
from agents.sandbox.session import SandboxSessionState
from agents.sandbox.session import pty_types as pty
from agents.sandbox.session.base_sandbox_session import BaseSandboxSession
from agents.sandbox.session.runtime_helpers import RESOLVE_WORKSPACE_PATH_HELPER
from agents.sandbox.session.sandbox_client import BaseSandboxClient, BaseSandboxClientOptions
from agents.sandbox.snapshot import resolve_snapshot
from agents.sandbox.types import ExecResult, ExposedPortEndpoint, User
from agents.sandbox.util.tar_utils import UnsafeTarMemberError, validate_tar_bytes
from nexus_mcp import NexusError, Vm


class NexusSandboxClientOptions(BaseSandboxClientOptions):
    """What a session's VM is like; the fields are those of vm_create unless said otherwise."""

    type: Literal["nexus"] = "nexus"
    image: str = "debian"  # `from`: an image, template:NAME, oci:IMAGE, docker-archive:PATH, ...
    user: str = "root"  # who runs what does not name a user
    memory: str | None = None
    vcpus: int | None = None
    disk: str | None = None
    exposed_ports: tuple[int, ...] = ()


class NexusSandboxSessionState(SandboxSessionState):
    type: Literal["nexus"] = "nexus"
    options: NexusSandboxClientOptions
    vm: str | None = None


class NexusSandboxSession(BaseSandboxSession):
    def __init__(self, state):
        self.state, self.vm, self._ptys = state, None, {}

    async def _ensure_backend_started(self):
        if self.vm is None and self.state.vm:
            self.vm = await Vm.find(self.state.vm)  # None if it was deleted; then a new one is made
        self._set_start_state_preserved(self.vm is not None)
        if self.vm is not None:
            await self.vm.start()
            return
        options = self.state.options
        self.vm = await Vm.create(
            **{"from": options.image},
            memory=options.memory,
            vcpus=options.vcpus,
            disk=options.disk,
            tags={"harness": "openai-agents", "session": str(self.state.session_id)},
        )
        self.state.vm, self.state.workspace_root_ready = self.vm.id, False

    async def _prepare_backend_workspace(self):
        root = self.state.manifest.root
        await self.vm.guest("run_command", argv=["mkdir", "-p", "--", root], cwd="/")

    def _runtime_helpers(self):
        return (RESOLVE_WORKSPACE_PATH_HELPER,)

    async def _validate_path_access(self, path, *, for_write=False):
        return await self._validate_remote_path_access(path, for_write=for_write)

    async def running(self):
        with suppress(NexusError):
            return self.vm is not None and (await self.vm.inspect())["state"] == "ready"
        return False

    async def _shutdown_backend(self):
        if self.vm is not None:
            with suppress(NexusError):
                await self.vm.stop()

    async def exec(self, *command, timeout=None, shell=True, user=None):
        argv = self._prepare_exec_command(*command, shell=shell, user=None)
        return await self._exec_internal(*argv, timeout=timeout, user=user)

    async def _exec_internal(self, *command, timeout=None, user=None, input=None):
        try:
            order = await self._order(user)
            ran = await self.vm.run(*map(str, command), timeout=timeout, input=input, **order)
        except NexusError as error:
            if error.status is not None:
                return ExecResult(stdout=b"", stderr=str(error).encode(), exit_code=error.status)
            retry = error.retryable
            raise errors.ExecTransportError(
                command=command, cause=error, retryable=retry
            ) from error
        if ran.timed_out:
            raise errors.ExecTimeoutError(command=command, timeout_s=timeout)
        return ExecResult(stdout=ran.stdout, stderr=ran.stderr, exit_code=ran.status)

    async def _order(self, user):
        """How every command of the session runs."""
        env = await self.state.manifest.environment.resolve()
        return {"cwd": self.state.manifest.root, "env": env, "user": self._user(user)}

    def _user(self, user):
        return (user.name if isinstance(user, User) else user) or self.state.options.user

    async def _resolve_exposed_port(self, port):
        published = await self.vm.nexus.call("vm_publish", vm=self.vm.id, guest_port=port)
        at = published.structured_content["host_port"]
        return ExposedPortEndpoint(host="127.0.0.1", port=at, tls=False)

    async def read(self, path, *, user=None):
        return io.BytesIO(await self._read(path, user))

    async def _read_bounded(self, path, *, max_bytes):
        return await self._read(path, None, max_bytes)

    async def _read(self, path, user, most=None):
        path = await self._validate_path_access(path)
        try:
            return await self.vm.read(str(path), user=self._user(user), most=most)
        except NexusError as error:
            if error.errno == "ENOENT":
                raise errors.WorkspaceReadNotFoundError(path=path, cause=error) from error
            raise errors.WorkspaceArchiveReadError(path=path, cause=error) from error

    async def write(self, path, data, *, user=None):
        path, content = await self._validate_path_access(path, for_write=True), data.read()
        if isinstance(content, str):
            content = content.encode()
        if not isinstance(content, bytes | bytearray):
            raise errors.WorkspaceWriteTypeError(path=path, actual_type=type(content).__name__)
        try:
            await self.vm.write(str(path), content, user=self._user(user))
        except NexusError as error:
            raise errors.WorkspaceArchiveWriteError(path=path, cause=error) from error

    async def persist_workspace(self):
        left_out = [f"--exclude=./{path}" for path in self._persist_workspace_skip_relpaths()]
        root = self._workspace_root_path()
        command = ["tar", "-c", "--no-wildcards", "--anchored", *left_out, "."]
        packed = await self._exec_internal(*command, user="root")
        if not packed.ok():
            cause = errors.ExecNonZeroError(packed, command=command)
            raise errors.WorkspaceArchiveReadError(path=root, cause=cause)
        return io.BytesIO(packed.stdout)

    async def hydrate_workspace(self, data):
        archive, root = data.read(), self._workspace_root_path()
        try:
            validate_tar_bytes(archive, allow_external_symlink_targets=False)
        except UnsafeTarMemberError as error:
            raise errors.WorkspaceArchiveWriteError(path=root, cause=error) from error
        await self._prepare_backend_workspace()
        unpacked = await self._exec_internal("tar", "-x", input=archive, user="root")
        if not unpacked.ok():
            cause = errors.ExecNonZeroError(unpacked, command=["tar", "-x"])
            raise errors.WorkspaceArchiveWriteError(path=root, cause=cause)

    def supports_pty(self):
        return True

    async def pty_exec_start(self, *command, shell=True, user=None, tty=False, **limits):
        argv = self._prepare_exec_command(*command, shell=shell, user=None)
        order = await self._order(user) | {"timeout_s": limits.get("timeout") or 0}
        if len(self._ptys) >= pty.PTY_PROCESSES_MAX:
            meta = [(key, live["used"], False) for key, live in self._ptys.items()]
            await self._pty_end(pty.process_id_to_prune_from_meta(meta))
        try:
            facts, _ = await self.vm.guest(
                "command_start", argv=argv, tty=tty, merge=not tty, **order
            )
        except NexusError as error:
            raise errors.ExecTransportError(command=command, cause=error) from error
        session_id = pty.allocate_pty_process_id(set(self._ptys))
        self._ptys[session_id] = {"id": facts["command_id"], "tty": tty, "used": 0, "cursor": None}
        wait_s = limits.get("yield_time_s")
        wait_ms = pty.clamp_pty_yield_time_ms(10_000 if wait_s is None else int(wait_s * 1000))
        return await self._pty_news(session_id, wait_ms, limits.get("max_output_tokens"))

    async def pty_write_stdin(self, *, session_id, chars, yield_time_s=None, **limits):
        live = self._resolve_pty_session_entry(pty_processes=self._ptys, session_id=session_id)
        if chars and not live["tty"]:
            raise RuntimeError("stdin is not available for this process")
        if chars:
            with suppress(NexusError):  # it has already ended; its output is shown below
                await self.vm.guest("command_input", id=live["id"], input=chars)
        wait_ms = pty.resolve_pty_write_yield_time_ms(
            yield_time_ms=int((yield_time_s or 0) * 1000), input_empty=not chars
        )
        return await self._pty_news(session_id, wait_ms, limits.get("max_output_tokens"))

    async def _pty_news(self, session_id, wait_ms, tokens):
        """What a command wrote since the last call; waits for its end, at most so long."""
        live, text = self._ptys[session_id], ""
        cursor, deadline = live["cursor"], time.monotonic() + wait_ms / 1000
        while True:
            left = max(0, int((deadline - time.monotonic()) * 1000))
            facts, news = await self.vm.guest(
                "command_output", id=live["id"], cursor=cursor, wait_ms=left
            )
            cursor, text = facts["cursor"], text + news.get("stdout", b"").decode()
            is_live = facts["state"] == "running"
            if not facts.get("more") and (not is_live or not left):
                break
        live["cursor"], live["used"] = cursor, time.monotonic()
        if not is_live:
            del self._ptys[session_id]
        text, counted = pty.truncate_text_by_tokens(text, tokens)
        process, status = (session_id, None) if is_live else (None, facts.get("status"))
        return pty.PtyExecUpdate(process, text.encode(), status, counted)

    async def _pty_end(self, session_id):
        with suppress(NexusError):  # it has already ended
            command = self._ptys.pop(session_id)["id"]
            await self.vm.guest("command_signal", id=command, signal="KILL")

    async def pty_terminate_all(self):
        for session_id in list(self._ptys):
            await self._pty_end(session_id)


class NexusSandboxClient(BaseSandboxClient[NexusSandboxClientOptions]):
    backend_id = "nexus"
    supports_default_options = True

    async def create(self, *, snapshot=None, manifest=None, options=None):
        options, session_id = options or NexusSandboxClientOptions(), uuid.uuid4()
        state = NexusSandboxSessionState(
            session_id=session_id,
            manifest=self._validate_manifest_for_create(manifest or Manifest()),
            snapshot=resolve_snapshot(snapshot, str(session_id)),
            exposed_ports=options.exposed_ports,
            options=options,
        )
        return await self.resume(state)

    async def resume(self, state):
        state.assert_path_grants_rebound()
        return self._wrap_session(NexusSandboxSession(state))

    async def delete(self, session):
        if vm := session._inner.vm:
            await vm.delete()
        return session

    def deserialize_session_state(self, payload):
        return self._deserialize_session_state_payload(payload, NexusSandboxSessionState)
