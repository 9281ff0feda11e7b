"""A program whose operations have two threads; it prints at its end whether a watch decides how they wait.

Usage: two_threads.py WORDS...
WORDS: as after `python`.
"""

import atexit
import os
import runpy
import sys
from pathlib import Path

import torch

torch.set_num_threads(2)


def say() -> None:
    from pi0.model import cpu_waiting

    sys.stdout.flush()
    # At once: ranks write to one stream.
    os.write(1, b"cores are watched\n" if cpu_waiting.watched() else b"cores are not watched\n")


atexit.register(say)
words = sys.argv[1:]
if words[0] == "-m":
    sys.argv, sys.path[0] = words[1:], os.getcwd()
    runpy.run_module(words[1], run_name="__main__", alter_sys=True)
else:
    sys.argv, sys.path[0] = words, str(Path(words[0]).resolve().parent)
    runpy.run_path(words[0], run_name="__main__")
