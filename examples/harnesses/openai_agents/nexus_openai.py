"""Nexus as a sandbox of the OpenAI Agents SDK: each session has a VM, which a stop keeps."""

import io
import uuid
from typing import Literal

from agents.sandbox import ExecResult, ExposedPortEndpoint, Manifest, errors, resolve_snapshot
from agents.sandbox import session as sdk
from agents.sandbox.session import pty_types as pty
from agents.sandbox.session.workspace_payloads import coerce_write_payload
from agents.sandbox.util.tar_utils import UnsafeTarMemberError, validate_tar_bytes
from nexus_mcp import Commands, Vm


class NexusSandboxClientOptions(sdk.BaseSandboxClientOptions, extra="allow"):
    """What a session's VM is like; other fields, such as memory, are arguments of vm_create."""

    type: Literal["nexus"] = "nexus"
    image: str = "debian"  # `from`: an image, template:NAME, oci:IMAGE, docker-archive:PATH, ...
    user: str = "root"  # who runs what does not name a user
    exposed_ports: tuple[int, ...] = ()


class NexusSandboxSessionState(sdk.SandboxSessionState):
    type: Literal["nexus"] = "nexus"
    options: NexusSandboxClientOptions
    vm: str | None = None


def as_error(error, action, what):
    """The SDK's error for one of Nexus."""
    if action == "run":
        return errors.ExecTransportError(command=what, cause=error, retryable=error.retryable)
    if action == "write":
        return errors.WorkspaceArchiveWriteError(path=what, cause=error, retryable=error.retryable)
    if error.errno == "ENOENT":
        return errors.WorkspaceReadNotFoundError(path=what, cause=error)
    return errors.WorkspaceArchiveReadError(path=what, cause=error, retryable=error.retryable)


class NexusSandboxSession(sdk.BaseSandboxSession):
    _validate_path_access = sdk.BaseSandboxSession._validate_remote_path_access

    def __init__(self, state):
        self.state, self.vm, self._live = state, None, Commands(pty.PTY_PROCESSES_MAX)

    async def _ensure_backend_started(self):
        state, options = self.state, self.state.options
        tags = {"harness": "openai-agents", "session": str(state.session_id)}
        self.vm = await Vm.resume(state.vm, options.image, tags=tags, **options.model_extra)
        is_same = self.vm.id == state.vm
        self._set_start_state_preserved(is_same)
        state.vm, state.workspace_root_ready = self.vm.id, is_same and state.workspace_root_ready
        env = await state.manifest.environment.resolve()
        await self.vm.settle(as_error, cwd=state.manifest.root, env=env, user=options.user)

    async def running(self):
        return self.vm is not None and await self.vm.is_ready()

    async def _shutdown_backend(self):
        if self.vm is not None:
            await self.vm.stop()

    async def exec(self, *command, timeout=None, shell=True, user=None):
        argv = self._prepare_exec_command(*command, shell=shell, user=None)
        ran = await self.vm.run(*argv, timeout=timeout, user=getattr(user, "name", user))
        if ran.timed_out:
            raise errors.ExecTimeoutError(command=argv, timeout_s=timeout)
        return ExecResult(stdout=ran.stdout, stderr=ran.stderr, exit_code=ran.status)

    async def _exec_internal(self, *command, timeout=None):
        return await self.exec(*command, timeout=timeout, shell=False)

    async def _resolve_exposed_port(self, port):
        return ExposedPortEndpoint(host="127.0.0.1", port=await self.vm.publish(port), tls=False)

    async def read(self, path, *, user=None, most=None):
        path = await self._validate_path_access(path)
        return io.BytesIO(await self.vm.read(path, user=getattr(user, "name", user), most=most))

    async def _read_bounded(self, path, *, max_bytes):
        return (await self.read(path, most=max_bytes)).read()

    async def write(self, path, data, *, user=None):
        path = await self._validate_path_access(path, for_write=True)
        content = coerce_write_payload(path=path, data=data).stream.read()
        await self.vm.write(path, content, user=getattr(user, "name", user))

    async def persist_workspace(self):
        return io.BytesIO(await self.vm.pack(leave_out=self._persist_workspace_skip_relpaths()))

    async def hydrate_workspace(self, data):
        archive, root = data.read(), self._workspace_root_path()
        try:
            validate_tar_bytes(archive, allow_external_symlink_targets=False)
        except UnsafeTarMemberError as error:
            raise errors.WorkspaceArchiveWriteError(path=root, cause=error) from error
        await self.vm.unpack(archive, root)

    def supports_pty(self):
        return True

    async def pty_exec_start(self, *command, shell=True, user=None, tty=False, **limits):
        argv = self._prepare_exec_command(*command, shell=shell, user=None)
        order = {"tty": tty, "timeout": limits.get("timeout"), "user": getattr(user, "name", user)}
        wait_s = limits.get("yield_time_s")
        wait_ms = pty.clamp_pty_yield_time_ms(10_000 if wait_s is None else int(wait_s * 1000))
        return self._update(await self._live.begin(self.vm, wait_ms, *argv, **order), limits)

    async def pty_write_stdin(self, *, session_id, chars, yield_time_s=None, **limits):
        live = self._resolve_pty_session_entry(pty_processes=self._live, session_id=session_id)
        if chars and not live.tty:
            raise RuntimeError("stdin is not available for this process")
        asked_ms = int((yield_time_s or 0) * 1000)
        wait_ms = pty.resolve_pty_write_yield_time_ms(yield_time_ms=asked_ms, input_empty=not chars)
        return self._update(await self._live.write(session_id, chars, wait_ms), limits)

    def _update(self, news, limits):
        text, count = pty.truncate_text_by_tokens(news.text, limits.get("max_output_tokens"))
        return pty.PtyExecUpdate(news.number, text.encode(), news.status, count)

    async def pty_terminate_all(self):
        await self._live.kill_all()


class NexusSandboxClient(sdk.BaseSandboxClient[NexusSandboxClientOptions]):
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
        await Vm.discard(session.state.vm)
        return session

    def deserialize_session_state(self, payload):
        return self._deserialize_session_state_payload(payload, NexusSandboxSessionState)
