"""Inspect's own checks of a sandbox, in one VM, as a user who is not root."""

import pytest
from inspect_ai.util._sandbox.self_check import *  # noqa: F403
from nexus_inspect import NexusSandboxEnvironment
from nexus_mcp import Vm


@pytest.fixture(scope="module")
async def environment():
    vm = await Vm.create("debian", memory="512MiB", tags={"harness": "inspect_ai"})
    try:
        made = await vm.run("useradd", "--create-home", "agent")
        assert made.status == 0, made
        yield await NexusSandboxEnvironment.of(vm, user="agent")
    finally:
        await vm.delete()


@pytest.fixture
async def sandbox_env(environment):
    return environment


async def test_connection(environment):
    there = await environment.connection()
    assert environment.vm.name in there.command and there.container == environment.vm.name
    assert there.ports == []
