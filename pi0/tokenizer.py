"""Rebuild the vocabulary of the tiny policies: `python -m pi0.tokenizer`."""

from pi0.base.errors import run_command
from pi0.policy.tokenizer import main

if __name__ == "__main__":
    run_command(main)
