"""VMs, commands and files of Nexus for Python programs, over MCP.

One bridge (`nexusctl mcp`) serves a whole process. It lives in a thread with an event loop of its
own: an MCP client must be entered and left in one task, while harnesses call from many loops.
"""

import asyncio
import atexit
import base64
import os
import threading
import uuid
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

    @classmethod
    async def create(cls, **arguments):
        """Makes a VM and starts it; the arguments are those of vm_create. It has no network unless they say otherwise."""
        arguments = {"network": "none"} | arguments
        vm = cls(await Nexus.shared().finish("vm_create", **arguments, start=False))
        try:
            await vm.start()
        except BaseException:
            vm.nexus.later("vm_delete", vm=vm.id, force=True)
            raise
        return vm

    @classmethod
    async def find(cls, name):
        """The VM with this name or id, or None."""
        try:
            return cls((await Nexus.shared().call("vm_inspect", vm=name)).structured_content)
        except NexusError as error:
            if error.code != "vm_not_found":
                raise

    async def inspect(self):
        return (await self.nexus.call("vm_inspect", vm=self.id)).structured_content

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
        await self.nexus.finish("vm_stop", vm=self.id)

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

    async def run(self, *argv, input=None, limit=None, timeout=None, **order):
        """Runs a program to its end; `order` is more of run_command: command, cwd, env, user.

        All of its output is taken, or up to `limit` bytes of a stream: then it is killed, as when
        the await is cancelled.
        """
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
            **order,
        )
        whole = all(facts[name]["omitted_bytes"] == 0 for name in ("stdout", "stderr"))
        if facts["state"] == "running" or not whole:
            facts, streams = await self._follow(facts["command_id"], b"" if small else rest, limit)
        ran = Ran(facts.get("status"), *(streams.get(name, b"") for name in ("stdout", "stderr")))
        ran.timed_out = facts["timed_out"]
        if limit is not None and max(len(ran.stdout), len(ran.stderr)) > limit:
            raise OutputLimit(limit, ran)
        return ran

    async def _follow(self, command, rest, limit):
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

    async def read(self, path, limit=None, user=None, most=None):
        """The content of a file that has no more than `limit` bytes, or its first `most` bytes."""
        content, facts, most = bytearray(), {}, most or 1 << 60
        while not facts.get("eof") and len(content) < most:
            facts, news = await self.guest(
                "file_read",
                path=path,
                offset=len(content),
                limit=min(READ, most - len(content)),
                encoding="base64",
                user=user,
            )
            if limit is not None and facts["size_bytes"] > limit:
                raise OutputLimit(limit)
            content += news.get("content", b"")
        return bytes(content)

    async def write(self, path, content, mode=None, user=None):
        """Makes or replaces a file in one step; its directories are made too."""
        pieces = [content[at : at + WRITTEN] for at in range(0, max(len(content), 1), WRITTEN)]
        upload = uuid.uuid4().hex
        for number, piece in enumerate(pieces, 1):
            part = {"upload_id": upload, "commit": number == len(pieces)}
            await self.guest(
                "file_write",
                path=path,
                content=base64.b64encode(piece).decode(),
                encoding="base64",
                mode=mode,
                user=user,
                **(part if len(pieces) > 1 else {}),
            )
