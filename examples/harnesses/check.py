#!/usr/bin/env python3
"""Runs the harnesses' own checks against VMs of a daemon of their own, without a network.

    python3 check.py PROGRAMS PLACE [HARNESS...]

PROGRAMS is the directory of nexusd and nexusctl. PLACE is where `.ci/setup harnesses` made a
virtual environment for each harness; a kernel and images are kept there for the next run. Prints
what the checks say and, last, a line for each harness. Fails if a check fails or leaves a VM
behind. A harness that this machine has no Python for is skipped, and its line says so.
"""

import argparse
import ctypes
import fcntl
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
CHECKS = {
    "inspect_ai": ["-m", "pytest", "-q"],
    "openai_agents": ["check.py"],
    "harbor": ["check.py"],
}
IMAGES = ("debian", "busybox")
# Timeouts for software emulation on a busy machine; the first run also makes kernel and images.
START_S, CHECK_S, SEED_S = 60, 1800, 1800


class Daemon:
    """A nexusd with its own directories. On leaving it, `left` has the VMs that were there."""

    def __init__(self, programs, home):
        self.programs, self.home = programs, home
        self.env = {name: value for name, value in os.environ.items() if name != "NEXUS_SOCKET"}
        self.env |= {"NEXUS_STATE_DIR": str(home / "state"), "NEXUS_RUNTIME_DIR": str(home / "run")}
        self.env["PATH"] = f"{programs}:{os.environ['PATH']}"

    def ctl(self, *words, timeout=120):
        command = [self.programs / "nexusctl", *words]
        done = subprocess.run(
            command, env=self.env, timeout=timeout, check=True, stdout=subprocess.PIPE
        )
        return done.stdout

    def __enter__(self):
        with open(self.home / "nexusd.log", "ab") as log:
            self.process = subprocess.Popen([self.programs / "nexusd"], env=self.env, stderr=log)
        end = time.monotonic() + START_S
        while not (self.home / "run/nexus.sock").exists():
            if self.process.poll() is not None or time.monotonic() > end:
                self.process.kill()
                raise RuntimeError(f"nexusd does not serve:\n{self.said()}")
            time.sleep(0.1)
        return self

    def __exit__(self, *failure):
        try:
            self.left = json.loads(self.ctl("--json", "vm", "list"))["vms"]
            for vm in self.left:
                self.ctl("vm", "delete", "--force", vm["id"])
        finally:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(START_S)

    def said(self):
        return (self.home / "nexusd.log").read_text(errors="replace")[-4000:]


def seed(programs, place):
    """A state directory with kernel and images, made once."""
    whole, half = place / "seed", place / "half"
    if not whole.exists():
        print("making the kernel and the images, once", flush=True)
        shutil.rmtree(half, ignore_errors=True)
        half.mkdir(parents=True)
        with Daemon(programs, half) as daemon:
            for image in IMAGES:
                words = ["vm", "create", "--quiet", "--no-start", "--from", image]
                vm = daemon.ctl(*words, timeout=SEED_S).decode().strip()
                daemon.ctl("vm", "delete", vm)
        half.rename(whole)
    return whole / "state"


def leave_the_network():
    """From here on this process and its children have a loopback and nothing else; takes root."""
    new_network = 0x40000000  # CLONE_NEWNET of linux/sched.h
    if os.geteuid() != 0 or ctypes.CDLL(None, use_errno=True).unshare(new_network) != 0:
        print("the network stays: to leave it takes root", flush=True)
        return
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        set_flags, up = 0x8914, 0x1  # SIOCSIFFLAGS of linux/sockios.h, IFF_UP of linux/if.h
        fcntl.ioctl(any_socket, set_flags, struct.pack("16sH14x", b"lo", up))


def check(daemon, place, harness):
    """Runs one harness's checks. Returns its line for the end, and whether it failed."""
    python = place / harness / "bin/python"
    if not python.exists():
        why = place / f"{harness}.skipped"
        said = why.read_text().strip() if why.exists() else ".ci/setup harnesses did not install it"
        return f"SKIPPED {harness}: {said}", not why.exists()
    print(f"== {harness}", flush=True)
    began = time.monotonic()
    command = [python, *CHECKS[harness]]
    env = daemon.env | {"PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.Popen(
        command,
        cwd=HERE / harness,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    limit = threading.Timer(CHECK_S, process.kill)
    limit.start()
    last = "it said nothing"
    for line in process.stdout:
        print(line, end="", flush=True)
        last = line.strip() or last
    is_failed = process.wait() != 0
    limit.cancel()
    took = time.monotonic() - began
    return f"{'FAILED' if is_failed else 'ok'} {harness}: {last} ({took:.0f} s)", is_failed


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", 1)[0])
    parser.add_argument("programs", type=Path)
    parser.add_argument("place", type=Path)
    parser.add_argument("harness", nargs="*", choices=[*CHECKS, []])
    arguments = parser.parse_args()
    programs, place = arguments.programs.resolve(), arguments.place.resolve()
    source = seed(programs, place)
    with tempfile.TemporaryDirectory(prefix="nexus-harnesses-") as home:
        copy = ["cp", "-a", "--sparse=always", "--reflink=auto", source, f"{home}/state"]
        subprocess.run(copy, check=True)
        leave_the_network()
        with Daemon(programs, Path(home)) as daemon:
            names = arguments.harness or list(CHECKS)
            results = [check(daemon, place, harness) for harness in names]
            if any(is_failed for _, is_failed in results):
                print(f"nexusd said:\n{daemon.said()}")
    for line, _ in results:
        print(line)
    for vm in daemon.left:
        print(f"FAILED: the VM {vm['name']} {vm['tags']} was left behind")
    return any(is_failed for _, is_failed in results) or bool(daemon.left)


if __name__ == "__main__":
    sys.exit(main())
