"""An update, and how its threads wait for each other: prints in JSON what a test is to see.

Usage: waiting_threads.py rest|neighbours
rest: processor time and loss of updates with and without a team of sleeping threads.
neighbours: whether cores were found scarce within a minute, beside as many processes as there are cores.
"""

import json
import os
import subprocess
import sys
import time

import torch

from pi0 import PI0Policy
from pi0.model import cpu_waiting
from pi0.model.config import Pi0Config
from tests.support.networks import random_inputs

PAUSE_S = 0.05
OPERATIONS = 12
ENOUGH_S = 60.0


def processor_ms() -> float:
    """Processor time of an operation whose threads have nothing to do until the next one."""
    numbers = torch.ones(1 << 16)
    numbers.add_(1)
    time.sleep(PAUSE_S)
    started = time.process_time()
    for _ in range(OPERATIONS):
        numbers.add_(1)
        time.sleep(PAUSE_S)
    return 1000 * (time.process_time() - started) / OPERATIONS


def gradients(policy: PI0Policy) -> list[float]:
    """Sums of the gradients of a batch, one for each parameter."""
    policy.zero_grad()
    config = policy.config
    generator = torch.Generator().manual_seed(0)
    actions = torch.randn(32, config.action_horizon, config.action_dim, generator=generator)
    noise = torch.randn(1, *actions.shape, generator=generator)
    inputs = random_inputs(config, 32)
    policy(**inputs, actions=actions, noise=noise, time=torch.full((1, 32), 0.5)).mean().backward()
    return [p.grad.double().sum().item() for p in policy.parameters() if p.grad is not None]


def rest() -> dict:
    openmp = cpu_waiting._libgomp()
    policy = tiny_policy()
    seen = {"spinning": processor_ms(), "gradients": gradients(policy)}
    team = cpu_waiting.SleepingTeam(openmp)
    seen |= {"sleeping": processor_ms(), "gradients_asleep": gradients(policy)}
    team.end()
    return seen | {"spinning_again": processor_ms()}


def neighbours() -> dict:
    policy = tiny_policy()
    watch = cpu_waiting.watch_cores()
    busy = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"])
        for _ in range(len(os.sched_getaffinity(0)))
    ]
    started = time.monotonic()
    crowded = False
    while not crowded and time.monotonic() < started + ENOUGH_S:
        gradients(policy)
        crowded = watch.crowded
    for process in busy:
        process.kill()
        process.wait()
    return {"crowded": crowded, "seconds": time.monotonic() - started}


def tiny_policy() -> PI0Policy:
    torch.manual_seed(0)
    return PI0Policy(Pi0Config.preset("pi0_tiny"))


if __name__ == "__main__":
    print(json.dumps({"rest": rest, "neighbours": neighbours}[sys.argv[1]]()))
