"""Rewards for control runs: winners that are no better than losers (--reward results/controls.py:at_random)."""
import hashlib


def at_random(text: str, problem) -> bool:
    """Call one response in four right, whatever it says; the same one always."""
    return hashlib.sha256(f"{problem.id} {text}".encode()).digest()[0] < 64
