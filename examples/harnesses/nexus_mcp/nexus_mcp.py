"""VMs, commands and files of Nexus for Python programs, over MCP.

One bridge (`nexusctl mcp`) serves a whole process. It lives in a thread with an event loop of its
own: an MCP client must be entered and left in one task, while harnesses call from many loops.
"""

import asyncio
import atexit
import base64
import itertools
import os
import threading
import uuid
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from mcp import Client, StdioServerParameters

# The limits of one call, in bytes: output of each of two streams, a file's content, input.
SHOWN, READ, WRITTEN = 256 << 10, 512 << 10, 2 << 20
# How much unread output of each stream the VM keeps; the command blocks while there is more.
KEPT = 16 << 20
LOST = {"code": "lost", "message": "the command, or a part of its output, is lost"}
NOT_STARTED = ("program_not_executable", "user_not_found", "cwd_not_found")


class NexusError(Exception):
    """A tool refused or failed: what is said, and the same as data."""

    def __init__(self, tool, error):
        super().__init__(f"{tool}: {error['message']}")
        self.code = error["code"]
        self.errno = error.get("errno")  # the name of the underlying Linux error, such as EACCES
        self.retryable = error.get("retryable", False)
        self.is_gone = error.get("class") == "unavailable" or self.code == "vm_not_found"
        # A shell's exit code for a command that did not start.
        self.status = 126 if self.code in NOT_STARTED else None
        self.status = 127 if self.code == "program_not_found" else self.status


class OutputLimit(Exception):
    """A command or a file has more than the caller takes; `ran` is what came so far."""

    def __init__(self, limit, ran=None):
        super().__init__(f"more than {limit} bytes")
        self.ran = ran


@dataclass
class Ran:
    """How a command ended."""

    status: int | None  # as in a shell: the exit code, or 128 plus the signal's number
    stdout: bytes
    stderr: bytes
    timed_out: bool = False
    refusal: NexusError | None = None  # why it did not start; `status` is then 126 or 127


class Nexus:
    """The daemon, as this process talks to it."""

    _shared = None

    @classmethod
    def shared(cls):
        """The one of this process, started on first use."""
        if cls._shared is None:
            cls._shared = cls()
        return cls._shared

    def __init__(self):
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="nexus", daemon=True)
        self._thread.start()
        self._ready = self._stopped = None
        atexit.register(self.close)

    def close(self):
        """Ends the bridge. VMs and the commands in them stay."""
        if self._ready is not None:
            self._loop.call_soon_threadsafe(self._stopped.set)
        else:
            self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)

    async def call(self, tool, **arguments):
        """Calls a tool and returns its result. To cancel this is to cancel the call."""
        given = {name: value for name, value in arguments.items() if value is not None}
        return await asyncio.wrap_future(self.later(tool, **given))

    def later(self, tool, **arguments):
        """Calls a tool without waiting for it."""
        return asyncio.run_coroutine_threadsafe(self._call(tool, arguments), self._loop)

    async def finish(self, tool, **arguments):
        """Calls a tool that starts long work, waits for its end, and returns what it made."""
        outcome = (await self.call(tool, **arguments, wait_s=0)).structured_content
        try:
            while not outcome["done"]:
                outcome = await self.call("op_get", op_id=outcome["op_id"], wait_s=30)
                outcome = outcome.structured_content
        except asyncio.CancelledError:
            self.later("op_cancel", op_id=outcome["op_id"])
            raise
        if "result" not in outcome:
            raise NexusError(tool, outcome["error"])
        return outcome["result"]

    async def _call(self, tool, arguments):
        if self._ready is None:
            self._ready, self._stopped = self._loop.create_future(), asyncio.Event()
            self._serving = self._loop.create_task(self._serve())
        result = await (await asyncio.shield(self._ready)).call_tool(tool, arguments)
        if result.is_error:
            text = {"code": "unknown", "message": result.content[0].text}
            raise NexusError(tool, (result.meta or {}).get("dev.nexus/error", text))
        return result

    async def _serve(self):
        # The SDK passes only a few variables on; these say where the daemon is.
        env = {name: value for name, value in os.environ.items() if name.startswith("NEXUS_")}
        bridge = StdioServerParameters(command="nexusctl", args=["mcp", "--tools", "all"], env=env)
        try:
            async with Client(bridge) as client:
                self._ready.set_result(client)
                await self._stopped.wait()
        except Exception as error:
            if self._ready.done():
                raise
            self._ready.set_exception(error)
            self._ready = None  # the next call tries again
        else:
            self._loop.stop()


class Vm:
    """One VM."""

    def __init__(self, details):
        self.nexus, self.id, self.name = Nexus.shared(), details["id"], details["name"]
        self._as_error, self._defaults = None, {}

    @classmethod
    async def create(cls, source, **arguments):
        """Makes a VM from an image, such as debian or oci:IMAGE, and starts it.

        The arguments are those of vm_create. It has no network unless they say otherwise.
        """
        arguments = {"network": "none", "from": source} | arguments
        vm = cls(await Nexus.shared().finish("vm_create", **arguments, start=False))
        try:
            await vm.start()
        except BaseException:
            vm.nexus.later("vm_delete", vm=vm.id, force=True)
            raise
        return vm

    @classmethod
    async def find(cls, name):
        """The VM with this name or id, or None; also None for None."""
        if name is None:
            return None
        try:
            return cls((await Nexus.shared().call("vm_inspect", vm=name)).structured_content)
        except NexusError as error:
            if error.code != "vm_not_found":
                raise

    @classmethod
    async def discard(cls, id):
        """Deletes the VM with this id, if there is one."""
        if vm := await cls.find(id):
            await vm.delete()

    @classmethod
    async def resume(cls, id, source, **arguments):
        """The VM with this id, started. If it is gone, or `id` is None, `create` makes one."""
        vm = await cls.find(id)
        if vm is None:
            return await cls.create(source, **arguments)
        await vm.start()
        return vm

    async def inspect(self):
        return (await self.nexus.call("vm_inspect", vm=self.id)).structured_content

    async def settle(self, as_error=None, cwd=None, **defaults):
        """Sets how commands run that do not say otherwise (cwd, env, user), and whose files are.

        A missing cwd is made, as root. `as_error` turns a NexusError of `run`, `begin`, `read`,
        `write`, `pack` and `unpack` into an error of the caller's. It gets that, what failed
        ("run", "read" or "write"), and the command or the path.
        """
        if cwd is not None:
            await self.guest("file_mkdir", path=cwd)
        self._as_error, self._defaults = as_error, {"cwd": cwd} | defaults

    @contextmanager
    def _told(self, action, what):
        try:
            yield
        except NexusError as error:
            told = error if self._as_error is None else self._as_error(error, action, what)
            if told is error:
                raise
            raise told from error

    async def is_ready(self):
        """Whether commands can run in it now."""
        with suppress(NexusError):  # it is gone, or the daemon does not answer
            return (await self.inspect())["state"] == "ready"
        return False

    async def publish(self, port):
        """Makes a TCP port of the guest reachable on 127.0.0.1. Returns the port there."""
        published = await self.nexus.call("vm_publish", vm=self.id, guest_port=port)
        return published.structured_content["host_port"]

    async def shell_line(self):
        """What a human pastes to get a shell in it."""
        connect = (await self.inspect()).get("connect", {})
        return connect.get("shell", f"nexusctl shell {self.name}")

    async def start(self):
        """Starts it; a boot that failed, as on a busy host, is tried again once."""
        try:
            await self.nexus.finish("vm_start", vm=self.id)
        except NexusError as error:
            if not error.retryable:
                raise
            await self.nexus.finish("vm_start", vm=self.id)

    async def stop(self):
        """Stops it and keeps its disk; one that is gone already is as good."""
        try:
            await self.nexus.finish("vm_stop", vm=self.id)
        except NexusError as error:
            if error.code != "vm_not_found":
                raise

    async def delete(self):
        """Deletes it with its disk; one that is gone already is as good."""
        try:
            await self.nexus.call("vm_delete", vm=self.id, force=True)
        except NexusError as error:
            if error.code != "vm_not_found":
                raise

    async def guest(self, tool, **arguments):
        """Calls a tool of the guest. Returns its facts, and the bytes of its streams."""
        result = await self.nexus.call(f"guest_{tool}", vm=self.id, **arguments)
        streams = {}
        for block in result.content:
            if stream := (block.meta or {}).get("dev.nexus/stream"):
                is_text = arguments.get("encoding") != "base64"
                streams[stream] = block.text.encode() if is_text else base64.b64decode(block.text)
        return (result.meta or {}).get("dev.nexus/result"), streams

    async def run(self, *argv, check=False, **how):
        """Runs a program to its end; `how` is more of run_command: command, cwd, env, user.

        `input` is what it reads. All of its output is taken, or up to `limit` bytes of a stream:
        then it is killed, as after `timeout` seconds, or when the await is cancelled. One that
        cannot start ends as in a shell, with 126 or 127. With `check`, a status that is not 0 is
        an error.
        """
        with self._told("run", argv):
            return await self._run(*argv, check=check, **how)

    async def _run(self, *argv, check=False, **how):
        try:
            ran = await self._follow(*argv, **how)
        except NexusError as error:
            if error.status is None:
                raise
            ran = Ran(error.status, b"", f"{error}\n".encode(), refusal=error)
        if check and ran.status != 0:
            raise self._failed(argv[0], ran)
        return ran

    def _failed(self, program, ran):
        said = f"exit code {ran.status}: {ran.stderr.decode(errors='replace').strip()}"
        return NexusError(f"{program} in {self.name}", {"code": "failed", "message": said})

    async def _follow(self, *argv, input=None, limit=None, timeout=None, **order):
        """Runs a program that can start, as `run` says."""
        rest = memoryview(input or b"")
        small = len(rest) <= WRITTEN
        facts, streams = await self.guest(
            "run_command",
            argv=list(argv) or None,
            stdin=base64.b64encode(rest).decode() if small and input is not None else None,
            stdin_encoding="base64",
            stdin_open=None if small else True,
            yield_after_s=5 if small else 0,
            timeout_s=timeout or 0,
            encoding="base64",
            max_output_bytes=SHOWN,
            keep_bytes=KEPT,
            lossless=True,
            **self._with_defaults(order),
        )
        whole = all(facts[name]["omitted_bytes"] == 0 for name in ("stdout", "stderr"))
        if facts["state"] == "running" or not whole:
            facts, streams = await self._exchange(
                facts["command_id"], b"" if small else rest, limit
            )
        ran = Ran(facts.get("status"), *(streams.get(name, b"") for name in ("stdout", "stderr")))
        ran.timed_out = facts["timed_out"]
        if limit is not None and max(len(ran.stdout), len(ran.stderr)) > limit:
            raise OutputLimit(limit, ran)
        return ran

    async def _exchange(self, command, rest, limit):
        """Writes a command's input and reads its output, from the start to the end of both."""
        streams = {"stdout": bytearray(), "stderr": bytearray()}
        where, facts = {"id": command, "encoding": "base64"}, {"state": "running"}
        try:
            while facts["state"] == "running" or facts.get("more"):
                if rest and not facts.get("more"):
                    piece = base64.b64encode(rest[:WRITTEN]).decode()
                    is_last = len(rest) <= WRITTEN
                    try:
                        facts, news = await self.guest(
                            "command_input", input=piece, eof=is_last, **where
                        )
                    except NexusError as error:
                        if error.code != "input_closed":
                            raise
                        rest = b""  # nobody reads it
                        continue
                    rest = rest[facts["written_bytes"] :]
                else:
                    facts, news = await self.guest(
                        "command_output", limit=SHOWN, wait_ms=30_000, **where
                    )
                    if not facts.get("more"):
                        await asyncio.sleep(0.02)  # lets a slow writer produce some output
                where["cursor"] = facts["cursor"]
                for name, stream in streams.items():
                    if facts[name].get("offset", 0) != len(stream):
                        raise NexusError("command_output", LOST)
                    stream += news.get(name, b"")
                if limit is not None and max(map(len, streams.values())) > limit:
                    raise OutputLimit(limit, Ran(None, *map(bytes, streams.values())))
        except BaseException:
            self.nexus.later("guest_command_signal", vm=self.id, id=command, signal="KILL")
            raise
        if facts["state"] == "lost":
            raise NexusError("command_output", LOST)
        return facts, {name: bytes(stream) for name, stream in streams.items()}

    async def begin(self, *argv, tty=False, timeout=None, **order):
        """Starts a program that goes on while it is read from; `order` is as in `run`.

        Both of its streams are read as one. With `tty` it has a terminal, and takes input.
        """
        with self._told("run", argv):
            facts, _ = await self.guest(
                "command_start",
                argv=list(argv),
                tty=tty,
                merge=not tty,
                timeout_s=timeout or 0,
                **self._with_defaults(order),
            )
        return Command(self, facts["command_id"], tty)

    def _with_defaults(self, order):
        return self._defaults | {name: value for name, value in order.items() if value is not None}

    async def read(self, path, limit=None, user=None, most=None):
        """The content of a file that has no more than `limit` bytes, or its first `most` bytes."""
        content, facts, most = bytearray(), {}, most or 1 << 60
        with self._told("read", path):
            while not facts.get("eof") and len(content) < most:
                facts, news = await self.guest(
                    "file_read",
                    path=str(path),
                    offset=len(content),
                    limit=min(READ, most - len(content)),
                    encoding="base64",
                    user=user or self._defaults.get("user"),
                )
                if limit is not None and facts["size_bytes"] > limit:
                    raise OutputLimit(limit)
                content += news.get("content", b"")
        return bytes(content)

    async def write(self, path, content, mode=None, user=None):
        """Makes or replaces a file in one step; its directories are made too."""
        pieces = [content[at : at + WRITTEN] for at in range(0, max(len(content), 1), WRITTEN)]
        upload = uuid.uuid4().hex
        with self._told("write", path):
            for number, piece in enumerate(pieces, 1):
                part = {"upload_id": upload, "commit": number == len(pieces)}
                await self.guest(
                    "file_write",
                    path=str(path),
                    content=base64.b64encode(piece).decode(),
                    encoding="base64",
                    mode=mode,
                    user=user or self._defaults.get("user"),
                    **(part if len(pieces) > 1 else {}),
                )

    async def pack(self, directory=None, leave_out=()):
        """A directory of the guest as a tar archive, without some paths in it; by default, cwd."""
        directory = str(directory or self._defaults["cwd"])
        options = ["--no-wildcards", "--anchored"] if leave_out else []  # not all tars have them
        options += [f"--exclude=./{path}" for path in leave_out]
        with self._told("read", directory):
            packed = await self._run("tar", "-c", *options, ".", cwd=directory, user="root")
            said = packed.stderr.decode(errors="replace").strip()
            # GNU tar ends so if files changed meanwhile; other tars, if something failed.
            changed = [line.endswith("file changed as we read it") for line in said.splitlines()]
            if packed.status != 0 and not (packed.status == 1 and changed and all(changed)):
                raise self._failed("tar", packed)
        return packed.stdout

    async def unpack(self, archive, directory):
        """Unpacks a tar archive as root into a directory of the guest, which is made if missing."""
        how = {"user": "root", "check": True}
        with self._told("write", directory):
            await self._run("mkdir", "-p", "--", str(directory), cwd="/", **how)
            await self._run("tar", "-x", cwd=str(directory), input=archive, **how)


class Command:
    """A program that goes on in a VM, as `Vm.begin` started it."""

    def __init__(self, vm, id, tty):
        self.vm, self.id, self.tty, self._cursor = vm, id, tty, None
        self.status, self.has_ended = None, False

    async def write(self, text):
        """Types into its terminal. Does nothing if it has ended, which `news` tells."""
        if not text:
            return
        try:
            await self.vm.guest("command_input", id=self.id, input=text)
        except NexusError as error:
            if error.code not in ("command_ended", "input_closed"):
                raise

    async def news(self, wait_ms):
        """What it wrote since the last call, when it ends or after `wait_ms`.

        After very much output there is more, and the next call goes on there. `has_ended` says that
        it ended and that all was read; `status` is then as in `Ran`.
        """
        text, facts = "", {"more": True}
        while facts.get("more") and len(text) < SHOWN:
            facts, news = await self.vm.guest(
                "command_output", id=self.id, cursor=self._cursor, wait_ms=wait_ms, until_end=True
            )
            self._cursor, wait_ms = facts["cursor"], 0
            text += news.get("stdout", b"").decode()
        self.has_ended = facts["state"] != "running" and not facts.get("more")
        self.status = facts.get("status") if self.has_ended else None
        return text

    async def kill(self):
        """Ends it and all that it started."""
        with suppress(NexusError):  # it has ended already, or its VM has
            await self.vm.guest("command_signal", id=self.id, signal="KILL")


@dataclass
class News:
    """What a command wrote since the last time."""

    text: str
    number: int | None  # of the command, for what comes next; None if it ended and all was read
    status: int | None  # as in `Ran`; None until then


class Commands(dict):
    """Commands that go on, by number; for one beyond `most`, the longest unused one is killed."""

    def __init__(self, most):
        self._most, self._numbers = most, itertools.count(1)

    async def begin(self, vm, wait_ms, *argv, **order):
        """Starts a program in a VM, as `Vm.begin` does, and says its first news."""
        if len(self) >= self._most:
            await self.pop(next(iter(self))).kill()
        number = next(self._numbers)
        self[number] = await vm.begin(*argv, **order)
        return await self._news(number, wait_ms)

    async def write(self, number, text, wait_ms):
        """Types into one, as `Command.write` does, and says its news."""
        await self[number].write(text)
        return await self._news(number, wait_ms)

    async def _news(self, number, wait_ms):
        command = self.pop(number)
        self[number] = command  # at the end, as the last that was used
        text = await command.news(wait_ms)
        if command.has_ended:
            self.pop(number, None)
        return News(text, None if command.has_ended else number, command.status)

    async def kill_all(self):
        while self:
            _, command = self.popitem()
            await command.kill()
