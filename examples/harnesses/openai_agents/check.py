"""A session's life: what the SDK may ask of a sandbox, step by step, in a real VM.

    python check.py

Prints each step and, last, how many passed.
"""

import asyncio
import io
import json
import sys
import tarfile
import tempfile
import time
import traceback
from pathlib import Path

from agents import ModelResponse, RunConfig, Runner, Usage, set_tracing_disabled
from agents.editor import ApplyPatchOperation
from agents.models.interface import Model
from agents.run_config import SandboxRunConfig
from agents.sandbox import errors
from agents.sandbox.entries import File
from agents.sandbox.manifest import Environment, Manifest
from agents.sandbox.sandbox_agent import SandboxAgent
from agents.sandbox.snapshot import LocalSnapshot
from agents.sandbox.types import User
from nexus_mcp import Commands, Nexus, NexusError
from nexus_openai import NexusSandboxClient, NexusSandboxClientOptions
from openai.types.responses import (
    ResponseFunctionToolCall,
    ResponseOutputMessage,
    ResponseOutputText,
)

STEPS = []


def step(function):
    STEPS.append(function)
    return function


async def refused(kind, awaitable):
    """The error, which must be of this kind."""
    try:
        await awaitable
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}")


async def shell(s, line, **more):
    """The output of a shell line that must end well."""
    ran = await s.exec(line, **more)
    assert ran.ok(), (line, ran)
    return ran.stdout.decode()


def has(text, *parts):
    for part in parts:
        assert part in text, (part, text)


async def talk(s, news, is_enough, chars=""):
    """Types into a live command and reads until that is enough. Returns what came, and the end."""
    session, output = news.process_id, news.output.decode()
    for _ in range(60):
        if is_enough(output, news):
            return output, news
        news = await s.pty_write_stdin(session_id=session, chars=chars, yield_time_s=1)
        output, chars = output + news.output.decode(), ""
    raise AssertionError((output, news))


def has_ended(output, news):
    return news.exit_code is not None


async def nothing_is_called(s, name):
    """Waits until no process has this name."""
    for _ in range(600):
        if not (await s.exec("pgrep", "-x", name, shell=False)).ok():
            return
        await asyncio.sleep(0.1)
    raise AssertionError(f"{name} still runs")


@step
async def the_manifest_is_in_the_workspace(s):
    assert await shell(s, "pwd; cat notes/hello.txt") == "/workspace\nhello\n"


@step
async def the_manifests_environment_is_in_commands(s):
    assert await shell(s, "echo $GREETING") == "good day\n"


@step
async def a_program_runs_without_a_shell(s):
    ran = await s.exec("printf", "%s|", "a b", "$HOME", shell=False)
    assert (ran.stdout, ran.stderr, ran.exit_code) == (b"a b|$HOME|", b"", 0)


@step
async def streams_and_exit_code_are_apart(s):
    ran = await s.exec("printf '\\303\\050'; echo no >&2; exit 7")
    assert (ran.stdout, ran.stderr, ran.exit_code) == (b"\xc3\x28", b"no\n", 7)


@step
async def a_signal_is_told_as_shells_do(s):
    assert (await s.exec("kill -TERM $$")).exit_code == 143


@step
async def a_missing_program_is_127(s):
    ran = await s.exec("no-such-program", shell=False)
    assert ran.exit_code == 127 and b"no-such-program" in ran.stderr, ran


@step
async def a_timeout_of_a_fraction_kills_the_tree(s):
    await refused(errors.ExecTimeoutError, s.exec("sleep 1234 & sleep 1235", timeout=0.3))
    await nothing_is_called(s, "sleep")


@step
async def a_cancelled_command_is_killed(s):
    for wait in (0.5, 7):  # during the first call, and after it
        sleep = s.exec("sleep", "2345", shell=False)
        await refused(asyncio.TimeoutError, asyncio.wait_for(sleep, wait))
        await nothing_is_called(s, "sleep")


@step
async def large_output_is_whole(s):
    for size in (3_000_000, 20_000_000):
        ran = await s.exec(f"head -c {size} /dev/zero; echo end >&2")
        assert (len(ran.stdout), ran.stderr) == (size, b"end\n"), (size, len(ran.stdout))


@step
async def commands_run_at_once(s):
    # Each waits for all the others.
    meet = "mkdir -p all; touch all/{}; while [ $(ls all | wc -l) -lt 8 ]; do sleep 0.1; done"
    await asyncio.gather(*(shell(s, meet.format(at), timeout=300) for at in range(8)))


@step
async def a_command_runs_as_a_user(s):
    await shell(s, "useradd --create-home agent && chown agent /workspace")
    assert await shell(s, "id -un", user=User(name="agent")) == "agent\n"


@step
async def an_unknown_user_is_a_failure(s):
    ran = await s.exec("id", user="no-such-user")
    assert not ran.ok() and b"no-such-user" in ran.stderr, ran


@step
async def a_file_is_written_with_its_directories(s):
    await s.write(Path("deep/er/a.txt"), io.BytesIO("grün\r\n".encode()))
    assert (await s.read(Path("deep/er/a.txt"))).read() == "grün\r\n".encode()


@step
async def a_large_file_comes_back(s):
    content = bytes(range(256)) * 20_000
    await s.write(Path("large.bin"), io.BytesIO(content))
    assert (await s.read(Path("/workspace/large.bin"))).read() == content


@step
async def the_start_of_a_file_is_read(s):
    assert (
        await s.read_bounded(Path("large.bin"), max_bytes=600_000)
        == (bytes(range(256)) * 20_000)[:600_000]
    )


@step
async def a_missing_file_is_told_from_others(s):
    await refused(errors.WorkspaceReadNotFoundError, s.read(Path("no-such-file")))
    await refused(errors.WorkspaceArchiveReadError, s.read(Path("deep")))
    await refused(errors.WorkspaceArchiveWriteError, s.write(Path("deep"), io.BytesIO(b"x")))


@step
async def files_are_their_users(s):
    await s.write(Path("mine/a.txt"), io.BytesIO(b"a"), user="agent")
    assert await shell(s, "stat -c %U mine mine/a.txt") == "agent\nagent\n"
    await shell(s, "echo secret > root.txt; chmod 600 root.txt")
    await refused(errors.WorkspaceArchiveReadError, s.read(Path("root.txt"), user="agent"))
    await refused(
        errors.WorkspaceArchiveWriteError, s.write(Path("root.txt"), io.BytesIO(b"x"), user="agent")
    )


@step
async def nothing_leads_out_of_the_workspace(s):
    await shell(s, "ln -s /etc out")
    for path in ("../etc/passwd", "/etc/passwd", "out/passwd"):
        await refused(errors.InvalidManifestPathError, s.read(Path(path)))
    await shell(s, "rm out")


@step
async def files_are_listed_moved_and_removed(s):
    await s.mkdir(Path("box/inner"), parents=True)
    await s.write(Path("box/a"), io.BytesIO(b"a"))
    await s.mv(Path("box/a"), Path("box/b"))
    assert sorted(Path(entry.path).name for entry in await s.ls(Path("box"))) == ["b", "inner"]
    await s.rm(Path("box"), recursive=True)
    assert not (await s.exec("test -e box")).ok()


@step
async def an_archive_is_extracted(s):
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        entry = tarfile.TarInfo("packed/run.sh")
        entry.mode, entry.size = 0o755, 8
        tar.addfile(entry, io.BytesIO(b"echo hi\n"))
    archive.seek(0)
    await s.extract(Path("packed.tar"), archive)
    assert await shell(s, "sh packed/run.sh") == "hi\n"


@step
async def a_patch_is_applied(s):
    await s.apply_patch(
        ApplyPatchOperation(type="update_file", path="notes/hello.txt", diff="-hello\n+good bye\n")
    )
    assert await shell(s, "cat notes/hello.txt") == "good bye\n"


@step
async def a_terminal_talks(s):
    news = await s.pty_exec_start("sh", shell=False, tty=True, yield_time_s=0.5)
    assert news.process_id is not None and news.exit_code is None, news
    typed = "tty; echo $((6 * 7))\n"
    await talk(s, news, lambda output, _: "/dev/pts/" in output and "42" in output, typed)
    _, end = await talk(s, news, has_ended, "exit 5\n")
    assert (end.process_id, end.exit_code) == (None, 5), end
    gone = s.pty_write_stdin(session_id=news.process_id, chars="", yield_time_s=1)
    await refused(errors.PtySessionNotFoundError, gone)


@step
async def a_long_command_is_followed(s):
    news = await s.pty_exec_start("echo one; sleep 3; echo two >&2; exit 9", yield_time_s=0.5)
    assert news.exit_code is None, news
    output, end = await talk(s, news, has_ended)
    assert (output, end.exit_code) == ("one\ntwo\n", 9), (output, end)


@step
async def a_terminal_is_interrupted(s):
    news = await s.pty_exec_start("sleep 3456", tty=True, yield_time_s=0.5)
    _, end = await talk(s, news, has_ended, "\x03")
    assert end.exit_code == 130, end


@step
async def all_terminals_end(s):
    for _ in range(3):
        await s.pty_exec_start("sleep 4567", tty=True, yield_time_s=0.3)
    await s.pty_terminate_all()
    await nothing_is_called(s, "sleep")


@step
async def endless_output_comes_in_parts(s):
    news = await s.pty_exec_start("yes", shell=False, yield_time_s=0.5)
    assert news.process_id is not None and news.output.startswith(b"y\ny\n"), news
    await s.pty_terminate_all()
    await nothing_is_called(s, "yes")


@step
async def the_longest_unused_command_makes_room(s):
    commands = Commands(most=2)
    first, second = [await commands.begin(s._inner.vm, 0, "cat", tty=True) for _ in range(2)]
    await commands.write(first.number, "", 0)
    await commands.begin(s._inner.vm, 0, "sleep", "5678")
    assert first.number in commands and second.number not in commands, list(commands)
    await commands.kill_all()
    await nothing_is_called(s, "cat")
    await nothing_is_called(s, "sleep")


@step
async def a_port_is_reached(s):
    code = "import http.server as h; h.test(h.SimpleHTTPRequestHandler, port=8000)"
    news = await s.pty_exec_start("python3", "-c", code, shell=False, yield_time_s=0.5)
    at = await s.resolve_exposed_port(8000)
    for _ in range(100):
        try:
            reader, writer = await asyncio.open_connection(at.host, at.port)
            writer.write(b"GET /notes/hello.txt HTTP/1.0\r\n\r\n")
            answer = await reader.read()
            writer.close()
            if answer:
                break
        except OSError:
            await asyncio.sleep(0.1)
    has(answer.decode(), "200 OK", "good bye")
    assert news.process_id is not None
    await s.pty_terminate_all()


@step
async def the_workspace_is_packed_and_unpacked(s):
    await shell(s, "ln -s notes link; mkdir -p empty; chmod 750 packed/run.sh")
    before = await shell(s, "find . -printf '%p %M %u %l\\n' | sort")
    archive = await s.persist_workspace()
    await shell(s, "find . -mindepth 1 -delete")
    await s.hydrate_workspace(archive)
    assert await shell(s, "find . -printf '%p %M %u %l\\n' | sort") == before


@step
async def a_dangerous_archive_is_refused(s):
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("../../evil"))
    archive.seek(0)
    await refused(errors.WorkspaceArchiveWriteError, s.hydrate_workspace(archive))


async def lives_again(client, session):
    """The session from its state as JSON, as another process would have it."""
    state = json.loads(json.dumps(client.serialize_session_state(session.state)))
    again = await client.resume(client.deserialize_session_state(state))
    await again.start()
    return again


async def is_resumed(client, session):
    """A running VM, a stopped one, and another in place of a deleted one."""
    vm = session._inner.vm
    await shell(session, "echo kept > kept.txt; echo outside > /root/outside; echo gone > /tmp/t")
    again = await lives_again(client, session)
    assert again._inner.vm.id == vm.id and await shell(again, "cat /tmp/t") == "gone\n"
    assert await again.running()
    await again.aclose()
    assert not await again.running()
    again = await lives_again(client, again)
    assert again._inner.vm.id == vm.id
    assert await shell(again, "cat kept.txt /root/outside") == "kept\noutside\n"
    await again.aclose()
    await client.delete(again)
    error = await refused(NexusError, Nexus.shared().call("vm_inspect", vm=vm.id))
    assert error.code == "vm_not_found"
    again = await lives_again(client, again)
    assert again._inner.vm.id != vm.id and await shell(again, "cat kept.txt") == "kept\n"
    await again.aclose()
    await client.delete(again)


class Scripted(Model):
    """A model that says what it is told to; it sees what the tools answered."""

    def __init__(self, calls):
        self.calls, self.seen = list(calls), []

    async def get_response(self, system_instructions, input, *others, **more):
        self.seen = [item["output"] for item in input if item.get("type") == "function_call_output"]
        if len(self.seen) < len(self.calls):
            name, arguments = self.calls[len(self.seen)]
            arguments = arguments(self.seen) if callable(arguments) else arguments
            item = ResponseFunctionToolCall(
                type="function_call",
                name=name,
                call_id=f"call-{len(self.seen)}",
                arguments=json.dumps(arguments),
            )
        else:
            text = ResponseOutputText(type="output_text", text="done", annotations=[])
            item = ResponseOutputMessage(
                id="1", type="message", role="assistant", status="completed", content=[text]
            )
        return ModelResponse(output=[item], usage=Usage(), response_id=None)

    def stream_response(self, *others, **more):
        raise NotImplementedError


async def an_agent_works(client, options):
    """A run with a model of ours and the SDK's own tools, from the VM's start to its deletion."""

    def number(seen):
        return int(seen[-1].split("session ID ")[1].split()[0])

    model = Scripted(
        [
            ("exec_command", {"cmd": "echo $((40 + 2)) > answer; cat answer"}),
            ("exec_command", {"cmd": "cat", "tty": True, "yield_time_ms": 500}),
            ("write_stdin", lambda seen: {"session_id": number(seen), "chars": "typed\n\x04"}),
        ]
    )
    agent = SandboxAgent(name="agent", instructions="work", model=model)
    sandbox = SandboxRunConfig(client=client, options=options)
    result = await Runner.run(agent, "work", run_config=RunConfig(sandbox=sandbox))
    assert result.final_output == "done"
    has(model.seen[0], "42")
    has(model.seen[2], "typed")


async def main():
    set_tracing_disabled(True)
    client = NexusSandboxClient()
    options = NexusSandboxClientOptions(memory="512MiB", exposed_ports=(8000,))
    passed = 0

    async def took(name, awaitable):
        nonlocal passed
        began = time.monotonic()
        try:
            await awaitable
        except Exception:
            traceback.print_exc()
            print(f"FAILED {name}", flush=True)
            return
        passed += 1
        print(f"ok {name} ({time.monotonic() - began:.1f} s)", flush=True)

    with tempfile.TemporaryDirectory() as home:
        manifest = Manifest(
            entries={"notes/hello.txt": File(content=b"hello\n")},
            environment=Environment(value={"GREETING": "good day"}),
        )
        snapshot = LocalSnapshot(id="life", base_path=Path(home))
        session = await client.create(manifest=manifest, options=options, snapshot=snapshot)
        try:
            await session.start()
            for function in STEPS:
                await took(function.__name__, function(session))
            await took("is_resumed", is_resumed(client, session))
        finally:
            await client.delete(session)
        await took("an_agent_works", an_agent_works(client, options))
    count = len(STEPS) + 2
    print(f"{passed} of {count} steps passed")
    return passed != count


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
